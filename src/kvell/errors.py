"""What Kvell raises when a user's input is wrong, and how it warns. The command line prints the message and exits
with 1."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index

LONGEST_MESSAGE = 2000


class KvellError(Exception):
    """The base of every error meant for a user: one line that says what is wrong, where, and what would be right.

    It stays one line, and no endless one, whatever a file's names and values hold: lines are joined by a space, what
    else cannot be printed stands as in a Python string, and of a very long message there are the beginning and the
    end.
    """

    def __init__(self, message: str) -> None:
        message = " ".join(map(str.strip, message.splitlines()))
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
        super().__init__("".join(one if one.isprintable() else repr(one)[1:-1] for one in message))


class ConfigError(KvellError):
    """A model's description that cannot be built."""


class CheckpointError(KvellError):
    """A file that is missing or damaged, does not fit the model, or could not be written."""


class CacheError(KvellError):
    """A cache asked for what it does not hold."""


class InputError(KvellError):
    """Tokens, text or settings that a model cannot take."""


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Puts the path of the file or folder that a KvellError is about before its message, unless it stands there."""
    try:
        yield
    except KvellError as error:
        if str(error).startswith(str(source)):
            raise
        raise type(error)(f"{source}: {error}") from None


def whole_number(
    name: str, value: object, least: int = 1, most: int | None = None, error: type[KvellError] = InputError
) -> int:
    """The value as an int. An error that names it if it is no whole number, or one outside the bounds."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise error(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise error(f"{name} must be at least {least}, not {number}")
    if most is not None and number > most:
        raise error(f"{name} must be at most {most}, not {number}")
    return number


def warn(message: str) -> None:
    """Warns of the line in the user's program that led here: the first one behind Kvell's own and torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("kvell", "torch", "jaxtyping"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
