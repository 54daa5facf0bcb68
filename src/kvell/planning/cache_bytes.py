"""Bytes of a cache, from the same stream specifications that the cache allocates."""

import torch

from kvell.cache import streams_nbytes
from kvell.config import ModelConfig


def cache_nbytes(config: ModelConfig, tokens: int, dtype: torch.dtype, max_rewind: int = 0) -> int:
    """Bytes one sequence of `tokens` tokens holds."""
    return streams_nbytes(config.streams(), tokens, min(max_rewind, tokens), dtype)


def full_attention_nbytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes the same model would hold if every layer kept all keys and values of its own."""
    per_token = sum(layer.attention.full_attention_width() for layer in config.layers)
    return tokens * per_token * dtype.itemsize
