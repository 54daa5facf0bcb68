"""Tokenizers as others make them, small: like Gemma's, like GPT-2's, of bytes without special tokens, and one whose
ids have gaps."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END_OF_TEXT = 257  # of the one like GPT-2's
LETTERS = "abcdefghijklmnopqrstuvwxyz,.\n"


def like_gemma() -> tokenizers.Tokenizer:
    """Spaces become a character of their own, what has no token falls back to bytes, and a template puts <bos>."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "▁t", "he", "▁the"])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<eos>", "<bos>", "<unk>")])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return made


def like_gpt2() -> tokenizers.Tokenizer:
    """Bytes and merges, and <|endoftext|>, which nothing puts anywhere, as the last id."""
    vocabulary = {piece: index for index, piece in enumerate([*BYTES, "he"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return made


def of_bytes() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(BYTES)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def with_gaps() -> tokenizers.Tokenizer:
    """Every third id, and no token for anything but a few letters, which it drops."""
    vocabulary = {piece: 3 * index + 4 for index, piece in enumerate(["[end]", *LETTERS, " "])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken("[end]", special=True)])
    return made


KINDS: Mapping[str, Callable[[], tokenizers.Tokenizer]] = {
    "like Gemma's": like_gemma,
    "like GPT-2's": like_gpt2,
    "of bytes": of_bytes,
    "with gaps": with_gaps,
}


def write(tokenizer: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Puts a tokenizer.json, and perhaps a tokenizer_config.json, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
