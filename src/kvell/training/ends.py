"""Which tokens begin and end a document: the model's, else the tokenizer's own, else those that Kvell's tokenizers
have."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from kvell.config import ModelConfig
from kvell.errors import ConfigError
from kvell.generation.tokenizer_files import named_token, read_settings

BOS, EOS = "<|bos|>", "<|eos|>"


@dataclass(frozen=True)
class Ends:
    """The ids of the tokens that begin and end a document; None where there is none."""

    bos: int | None
    eos: int | None

    @classmethod
    def of_new(cls, tokenizer: tokenizers.Tokenizer) -> "Ends":
        """Those of a tokenizer that was trained for the run, whatever the model's config says."""
        return cls(tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS))

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, folder: Path, model: ModelConfig) -> "Ends":
        """Those of a tokenizer that was read from a folder.

        What the tokenizer puts before every text begins a document. Otherwise the model's config counts
        (`bos_token_id`, the first of `eos_token_ids`), then tokenizer_config.json (`bos_token`, `eos_token`), then
        Kvell's own names. Where tokenizer_config.json says `add_bos_token: false` nothing begins a document that the
        tokenizer does not begin itself. ConfigError for an id that the model does not have.
        """
        named = read_settings(folder)
        for field, given in (("bos_token_id", [model.bos_token_id]), ("eos_token_ids", model.eos_token_ids)):
            for index in given:
                if index is not None and index >= model.vocab_size:
                    raise ConfigError(f"model.{field}: {index} is no id of a vocabulary of {model.vocab_size}")
        eos = model.eos_token_ids[0] if model.eos_token_ids else _named(tokenizer, named, "eos_token", EOS)
        front, _ = around_text(tokenizer)
        if front:
            return cls(front[0], eos)
        if named.get("add_bos_token") is False:
            return cls(None, eos)
        bos = _named(tokenizer, named, "bos_token", BOS) if model.bos_token_id is None else model.bos_token_id
        return cls(bos, eos)


def put_first(tokenizer: tokenizers.Tokenizer, bos: int | None) -> None:
    """Has the tokenizer put a token before every text, unless it puts one there already: documents, prompts and the
    tokenizer that a run leaves behind then all begin alike."""
    front, back = around_text(tokenizer)
    if bos is None or front:
        return
    added = [_special(tokenizer, index) for index in dict.fromkeys([bos, *back])]
    single = [str(bos), "$A", *map(str, back)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)


def around_text(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind every text."""
    encoding = tokenizer.encode("a")
    text = [place for place, added in enumerate(encoding.special_tokens_mask) if not added]
    if not text:  # it has no token for an a, and all there is was added
        return encoding.ids, []
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]


def _special(tokenizer: tokenizers.Tokenizer, index: int) -> dict[str, Any]:
    return {"id": str(index), "ids": [index], "tokens": [tokenizer.id_to_token(index) or f"<{index}>"]}


def _named(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], field: str, name: str) -> int | None:
    """The id of the token that a tokenizer_config.json names, else of the one with Kvell's name for it."""
    content = named_token(config, field)
    if content is not None and (index := tokenizer.token_to_id(content)) is not None:
        return index
    return tokenizer.token_to_id(name)
