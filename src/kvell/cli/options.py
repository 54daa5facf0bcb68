"""Options that several commands have."""

import typer

LENIENT = typer.Option(
    "--lenient",
    help="Leave out keys of the model's config.json that are unknown here, with a warning: the model may be another"
    " than its makers meant.",
)
