"""Text to token ids and back, as a model's own tokenizer.json says."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from kvell.errors import CheckpointError, InputError
from kvell.generation.tokenizer_files import SETTINGS, named_token, read_backend, read_settings

PARSING = threading.Lock()  # whether special tokens are parsed is a state of the library's tokenizer


class Tokenizer:
    """A tokenizer.json, and whether its model expects a first token that the file itself does not add.

    Special tokens (beginnings, ends, roles) are never part of decoded text, and text never becomes one unless that
    is asked for: a document that spells "<eos>" does not end there.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_token_id: int | None = None) -> None:
        self._backend = backend
        self._bos_token_id = bos_token_id
        self._decoder = backend.decoder
        self._is_byte_level = _is_byte_level(backend.decoder)
        added = backend.get_added_tokens_decoder()
        self._special_tokens = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self._special_tokens.values())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a model's directory. Raises CheckpointError where it is missing or damaged."""
        backend = read_backend(directory)
        return cls(backend, _bos_token_id(directory, backend))

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special_tokens: bool = False) -> list[int]:
        """The ids of `text`, with the special tokens a model expects around it unless told otherwise.

        A special token that the text itself spells is text like any other; with `parse_special_tokens` it becomes
        that token, for prompts that are written by hand or by a template. InputError where the text is not valid
        Unicode.
        """
        try:
            with PARSING:
                self._backend.encode_special_tokens = not parse_special_tokens
                ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            if not isinstance(text, str):
                raise InputError(f"the text must be a string, not {type(text).__name__}") from None
            raise InputError("the text holds a lone surrogate, which is no character") from error
        if add_special_tokens and self._bos_token_id is not None and ids[:1] != [self._bos_token_id]:
            ids.insert(0, self._bos_token_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token written `text`, None where there is none."""
        return self._special_tokens.get(text)

    def visible_token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it, None where it has no part in the text."""
        return None if token_id in self._special_ids else self._backend.id_to_token(token_id)

    def join(self, tokens: list[str]) -> str:
        """The text of tokens as the vocabulary writes them."""
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are bytes, each written as one character, and may end inside a character."""
        return self._is_byte_level


def _is_byte_level(decoder: decoders.Decoder | None) -> bool:
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    kinds = [part["type"] for part in state.get("decoders", [state])]
    if "ByteLevel" in kinds and len(kinds) > 1:
        raise CheckpointError(f"the tokenizer decodes by {' then '.join(kinds)}: ByteLevel must be alone")
    return kinds == ["ByteLevel"]


def _bos_token_id(directory: str | Path, backend: tokenizers.Tokenizer) -> int | None:
    """The token a tokenizer_config.json puts before every text, None where it asks for none."""
    settings = read_settings(directory)
    if not settings.get("add_bos_token"):
        return None
    content = named_token(settings, "bos_token")
    token_id = None if content is None else backend.token_to_id(content)
    file = Path(directory) / SETTINGS
    if content is None:
        named = settings.get("bos_token")
        raise CheckpointError(f"{file}: add_bos_token is set, and bos_token is {named!r:.80}, wanted is a text")
    if token_id is None:
        raise CheckpointError(f"{file} asks for a bos_token, but {content!r} is not in the vocabulary")
    return token_id
