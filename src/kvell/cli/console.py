"""What every command shows besides its result: errors, warnings, progress. All of it goes to stderr."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from kvell.training.loop import StepReport


def stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout() -> "Console":
    """For tables that are the result: as wide as the terminal, or as they need to be in a file or a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def fail(message: str, code: int) -> int:
    """Says in one line what was wrong, and returns the exit code."""
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return code


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Takes the place of `warnings.showwarning`: who runs a command has no use for a line of its source."""
    print(f"warning: {_one_line(str(message))}", file=file or sys.stderr)


def drop_stdout() -> None:
    """Gives up on stdout, whose reader has gone (`kvell ... | head`) or whose disk is full."""
    # The interpreter flushes stdout once more on its way out, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def waiting(description: str) -> AbstractContextManager[Any]:
    """Says on stderr, where that is a terminal, what takes its time while nothing else can be said of it."""
    return stderr().status(description) if sys.stderr.isatty() else nullcontext()


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal, and the function that says how far the work has come."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda completed: bar.update(task, completed=completed)


@contextmanager
def training_progress(steps: int, shown: bool) -> "Iterator[Callable[[StepReport], None]]":
    """A training run's bar with loss, speed and time left; where stderr is no terminal, a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    on_terminal = shown and sys.stderr.isatty()
    with Progress(*columns, console=stderr(), disable=not on_terminal) as bar:
        task = bar.add_task("reading texts", total=steps)
        last_line = monotonic()

        def on_step(report: "StepReport") -> None:
            nonlocal last_line
            said = f"loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=report.step, description=said)
            if shown and not on_terminal and (monotonic() - last_line > 30 or report.step == report.steps):
                last_line = monotonic()
                print(f"step {report.step} of {report.steps}  {said}", file=sys.stderr, flush=True)

        yield on_step


def _one_line(message: str) -> str:
    return " ".join(message.split())
