"""`kvell train`: from a config file to a model's folder."""

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvell.cli import console

if TYPE_CHECKING:
    from kvell.training.loop import Outcome
    from kvell.training.settings import TrainingConfig

INTERRUPTED = 130  # what shells give for a process that Ctrl-C ended


def train(
    config: Annotated[
        str,
        typer.Argument(help="A run's file, YAML or JSON: docs/training.md says what stands in it.", metavar="CONFIG"),
    ],
    out: Annotated[str | None, typer.Option(help="The run's folder, in place of the config's.")] = None,
    device: Annotated[str | None, typer.Option(help="The device, in place of the config's.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads to compute with.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files that are no UTF-8 text or cannot be read.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew: discard what the run's folder holds.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print how the run ended as JSON, and not the config.")
    ] = False,
) -> None:
    """Train a model, or go on with a run that was stopped.

    The same command goes on where the run's last checkpoint stands. SIGTERM and Ctrl-C let the step finish, save, and
    end with exit code 0 and 130; a second Ctrl-C ends at once. Under torchrun the run is divided over its processes;
    torchrun itself then ends with exit code 1 and a traceback of its own, though all is saved.
    """
    from kvell.errors import KvellError
    from kvell.training.loop import train as run
    from kvell.training.parallel import is_first_to_say
    from kvell.training.settings import TrainingConfig

    given = {"out": out, "device": device, "threads": threads}
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        settings = TrainingConfig.read(config, {name: value for name, value in given.items() if value is not None})
        if is_first and not as_json:
            _show(settings, config)
        with console.training_progress(settings.steps, shown=is_first) as on_step:
            outcome = run(settings, skip_bad=skip_bad, fresh=fresh, on_step=on_step)
    except KvellError as error:
        if is_first_to_say(str(error)):
            raise
        raise typer.Exit(1) from None
    if is_first:
        _report(outcome, settings.steps, as_json)
    if outcome.reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _show(settings: "TrainingConfig", config: str) -> None:
    """The run's config, resolved: the model's layers, and everything else as YAML, a line a key."""
    import yaml

    from kvell.cli.inspect import describe, print_layers

    output = console.stdout()
    print_layers(output, config, describe(settings.model))
    for name, value in settings.model_dump(mode="json", exclude={"model"}).items():
        line = yaml.safe_dump({name: value}, default_flow_style=True, sort_keys=False, width=float("inf"))
        print(line.strip().removeprefix("{").removesuffix("}"))
    sys.stdout.flush()


def _report(outcome: "Outcome", steps: int, as_json: bool) -> None:
    if as_json:
        described = {"reason": outcome.reason, "step": outcome.step, "folder": str(outcome.folder)}
        print(json.dumps({**described, "evaluation": outcome.evaluation}, indent=2))
        return
    print(f"{outcome.reason} after step {outcome.step} of {steps}: {outcome.folder}", file=sys.stderr)
    held_out = outcome.evaluation.get("held_out", {})
    if held_out.get("bits_per_byte") is not None:
        cut = (
            f", in pieces of {held_out['in_pieces_of']} tokens, the model's positions"
            if "in_pieces_of" in held_out
            else ""
        )
        print(f"held-out text: {held_out['bits_per_byte']:.4f} bits per byte{cut}", file=sys.stderr)
    for name, figures in outcome.evaluation.get("tasks", {}).items():
        print(f"{name}: {figures['solved']} of {figures['cases']} solved", file=sys.stderr)
