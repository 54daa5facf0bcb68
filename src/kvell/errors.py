"""What Kvell raises when a user's input is wrong. The command line prints the message and exits with 1."""

from collections.abc import Iterator
from contextlib import contextmanager


class KvellError(Exception):
    """The base of every error meant for a user: one line that says what is wrong, where, and what would be right."""


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
