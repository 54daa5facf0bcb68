"""The command line: `kvell COMMAND ...`, one file per command.

Commands import torch and the library when they run, not before, so that help comes at once.
"""

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from kvell import __version__
from kvell.cli import console
from kvell.cli.bench import bench
from kvell.cli.generate import generate
from kvell.cli.inspect import inspect
from kvell.cli.plan import EPILOG, plan
from kvell.cli.train import train
from kvell.errors import KvellError

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
application.command()(generate)
application.command()(inspect)
application.command(epilog=EPILOG)(plan)
application.command()(train)
application.command()(bench)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(f"kvell {__version__}")
        raise typer.Exit


@application.callback()
def kvell(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_print_version, is_eager=True, help="Print Kvell's version.")
    ] = None,
) -> None:
    """The LLM architectures that made long contexts cheap: exact, small, and free to combine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 1 for wrong input, 2 for wrong usage, 130 on Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" in its place
    with warnings.catch_warnings():
        warnings.showwarning = console.show_warning
        try:
            code = application(given or ["--help"], standalone_mode=False, prog_name="kvell")
            sys.stdout.flush()
        except KvellError as error:
            return console.fail(str(error), code=1)
        except typer.TyperException as error:
            return console.fail(error.format_message(), code=error.exit_code)
        except BrokenPipeError:
            console.drop_stdout()
            return 1
        except OSError as error:
            if error.filename is not None:  # a file's or a folder's, where no command had words for it
                return console.fail(f"{error.filename}: {error.strerror}", code=1)
            console.drop_stdout()  # which has no name
            return console.fail(f"the output cannot be written: {error}", code=1)
        except KeyboardInterrupt:
            return 130
    return code or 0
