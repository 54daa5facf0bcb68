"""Text to token ids and back, as a model's own tokenizer.json says."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from kvell.errors import CheckpointError, InputError
from kvell.files import read_json


class Tokenizer:
    """A tokenizer.json, and whether its model expects a first token that the file itself does not add.

    Special tokens (beginnings, ends, roles) are never part of decoded text.
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
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"there is no tokenizer.json in {directory}, so its model cannot read text")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls(backend, _bos_token_id(path.with_name("tokenizer_config.json"), backend))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with the special tokens a model expects around it unless told otherwise.

        Raises InputError where the text is not valid Unicode.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
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


def _bos_token_id(path: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The token a tokenizer_config.json puts before every text, None where it asks for none."""
    if not path.is_file():
        return None
    config = read_json(path)
    if not config.get("add_bos_token"):
        return None
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(content) if isinstance(content, str) else None
    if token_id is None:
        raise CheckpointError(f"{path} asks for a bos_token, but {content!r} is not in the vocabulary")
    return token_id
