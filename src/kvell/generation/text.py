"""Token ids to text while they arrive.

A token may end inside a character, and a text may end inside a stop string. So text is released as soon as no
further token can change it, and not before. The work per token does not grow with the text.
"""

import codecs
import re
from collections.abc import Callable, Sequence

from kvell.generation.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text piece by piece; the pieces together are `tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._joiner = _ByteJoiner() if tokenizer.is_byte_level else _WindowJoiner(tokenizer.join)

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        token = self._tokenizer.visible_token(token_id)
        return "" if token is None else self._joiner.push(token)

    def flush(self) -> str:
        """The rest at the end of the text, unfinished characters as U+FFFD."""
        return self._joiner.flush()


class _ByteJoiner:
    """Joins byte-level tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        return self._decoder.decode(_token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowJoiner:
    """Joins tokens of every other kind, whose text depends on the tokens around them (leading spaces, say).

    A token's text is what it adds to the text of the tokens released just before it. A run of byte tokens is
    held back as a whole, since one wrong byte anywhere in it makes every byte of the run a U+FFFD.
    """

    _BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

    def __init__(self, join: Callable[[list[str]], str]) -> None:
        self._join = join
        self._context: list[str] = []
        self._held: list[str] = []

    def push(self, token: str) -> str:
        self._held.append(token)
        return "" if self._BYTE_TOKEN.fullmatch(token) else self._release()

    def flush(self) -> str:
        return self._release()

    def _release(self) -> str:
        text = self._join(self._context + self._held)[len(self._join(self._context)) :]
        if text:
            self._context, self._held = self._held, []
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary; most printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. A token added to the vocabulary as plain text stands for itself."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


class StopStrings:
    """Lets text through up to the first stop string, holding back only what may be the beginning of one.

    Of several, the first to be complete counts, and of those complete at the same character the longest: what
    is shown does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now that `text` has arrived: nothing once a stop string has."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [text.find(stop) + len(stop) for stop in self._stop if stop in text]
        if ends:
            self.stopped, self._held = True, ""
            first = min(ends)
            return text[: first - max(len(stop) for stop in self._stop if text[:first].endswith(stop))]
        shown = len(text) - self._beginning_at_end(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text

    def _beginning_at_end(self, text: str) -> int:
        """How many last characters of `text` are the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class Transcript:
    """What a reader sees of a generation: complete characters, nothing from a stop string on.

    A stop string that is a special token, which has no text, stops at that token.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._strings = StopStrings(stop)
        self._stop_ids = {tokenizer.special_token_id(text) for text in stop} - {None}
        self._ended = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._ended or self._strings.stopped

    def push(self, token_id: int) -> str:
        """The text released with this token."""
        if token_id in self._stop_ids:
            self._ended = True
            return self.flush()
        return self._strings.push(self._stream.push(token_id))

    def flush(self) -> str:
        """The rest, at the end of the generation."""
        return self._strings.push(self._stream.flush()) + self._strings.flush()
