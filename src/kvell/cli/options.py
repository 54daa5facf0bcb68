"""Options that several commands have."""

import typer

LENIENT = typer.Option(
    "--lenient",
    help="Leave out unknown keys of the model's config.json, with a warning: the model may then differ from what its"
    " makers meant.",
)
