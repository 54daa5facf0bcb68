"""What a cache is compared with."""

import torch

from kvell.config import ModelConfig


def full_attention_nbytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes the same model would hold if every layer kept all keys and values of its own."""
    per_token = sum(layer.attention.full_attention_width() for layer in config.layers)
    return tokens * per_token * dtype.itemsize
