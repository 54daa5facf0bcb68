"""A model's tokenizer as its folder describes it: tokenizer.json, and the tokens that tokenizer_config.json adds.

tokenizer.json may hold the truncation and the padding of whoever used it last. Both are taken off, as transformers
does: a text has all its tokens and no others.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from kvell.errors import CheckpointError
from kvell.files import read_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ADDED = "added_tokens_decoder"
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def read_backend(folder: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder. Text that spells a special token is text to it (`encode_special_tokens`).

    CheckpointError where there is none or its files are damaged or contradict each other.
    """
    file = Path(folder) / TOKENIZER
    if not file.is_file():
        raise CheckpointError(f"there is no {TOKENIZER} in {folder}, so its model cannot read text")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = read_settings(folder)
    _add_tokens(backend, settings, Path(folder) / SETTINGS)
    _mark_special(backend, settings)
    backend.encode_special_tokens = True
    return backend


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing where there is none. CheckpointError for a damaged one."""
    file = Path(folder) / SETTINGS
    return read_json(file) if file.exists() else {}


def named_token(settings: Mapping[str, Any], name: str) -> str | None:
    """How the token that the settings call `name` ("bos_token", ...) is written, None where they name none."""
    value = settings.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _add_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], file: Path) -> None:
    """Adds what `added_tokens_decoder` has and tokenizer.json lacks or describes otherwise, in the order of the ids.
    CheckpointError where a token does not get the id that it is listed under."""
    listed = dict(sorted(_listed(settings.get(ADDED), file)))
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in listed.values() if repr(token) not in known])
    for number, token in listed.items():
        if (found := backend.token_to_id(token.content)) != number:
            raise CheckpointError(
                f"{file}: {ADDED} lists {token.content!r} under {number}, but with {TOKENIZER} it is {found}"
            )


def _listed(value: Any, file: Path) -> Iterator[tuple[int, AddedToken]]:
    if not isinstance(value, dict | None):
        raise CheckpointError(f"{file}: {ADDED} is {value!r:.80}, wanted is an object of tokens by their ids")
    for number, token in (value or {}).items():
        if not (number.isascii() and number.isdigit()):
            raise CheckpointError(f"{file}: {ADDED} has {number!r:.80} where a token's id is wanted")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(f"{file}: {ADDED} lists {token!r:.80} under {number}, wanted is a token's content")
        flags = {name: token[name] for name in FLAGS if name in token}
        if wrong := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
            raise CheckpointError(f"{file}: {ADDED}: {wrong[0]} of {number} is {flags[wrong[0]]!r:.80}, not a flag")
        yield int(number), AddedToken(token["content"], **flags)


def _mark_special(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """A token of the vocabulary that the settings name as the model's ("eos_token", "image_token", ...) is special,
    whether or not tokenizer.json lists it as such."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name in settings:
        content = named_token(settings, name) if name.endswith("_token") else None
        if content is None or backend.token_to_id(content) is None:
            continue
        token = added.get(content, AddedToken(content, special=True, normalized=False))
        if content not in added or not token.special:
            token.special = True
            backend.add_tokens([token])
