"""Where a command's prompt comes from."""

import sys
from pathlib import Path

from kvell.errors import InputError


def read_prompt(text: str | None, file: str | None, from_stdin: bool) -> str:
    """The text of the one prompt given. `file` may be "-", which is stdin.

    Raises InputError where there is none or more than one, or where it is empty or not UTF-8.
    """
    prompt = _read(text, file, from_stdin)
    if not prompt:
        raise InputError("the prompt is empty: a model continues at least one character")
    return prompt


def _read(text: str | None, file: str | None, from_stdin: bool) -> str:
    sources = (text is not None) + (file is not None) + from_stdin
    if sources != 1:
        given = "no prompt is given" if sources == 0 else "more than one prompt is given"
        raise InputError(f"{given}: use one of --prompt TEXT, --prompt-file FILE, or - for stdin")
    if text is not None:
        return text
    if file is None or file == "-":
        return _decode(sys.stdin.buffer.read(), "stdin")
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"the prompt file {file} cannot be read: {error.strerror}") from error
    return _decode(content, file)


def _decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise InputError(f"{source} is not UTF-8: {byte} ({error.reason})") from error
