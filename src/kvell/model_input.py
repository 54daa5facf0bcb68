"""What a model is given, looked at before anything is computed."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvell.cache import Cache, StreamSpecs
from kvell.config import ModelConfig
from kvell.errors import CacheError, InputError, warn

if TYPE_CHECKING:
    from kvell.model import Decoder


def lengths_of(tokens: Tensor, counts: Sequence[int] | None, device: torch.device, config: ModelConfig) -> list[int]:
    """How many of the tokens (B, n) each sequence has. InputError for tokens and counts that cannot be."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens must be a tensor, not {type(tokens).__name__}")
    if tokens.device != device:
        raise InputError(f"the tokens are on {tokens.device}, the model is on {device}")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise InputError(f"tokens must be (batch, tokens), at least one of each, not {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(f"tokens must be int64 or int32, not {tokens.dtype}")
    try:
        lengths = [tokens.shape[1]] * tokens.shape[0] if counts is None else list(map(operator.index, counts))
    except TypeError:
        raise InputError(f"counts must be whole numbers, one for each sequence, not {counts!r}") from None
    if counts is not None and (tokens.shape[0] != 1 or sum(lengths) != tokens.shape[1] or min(lengths) < 1):
        raise InputError(f"counts {lengths} do not lay out tokens of the shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu":  # on an accelerator looking would make it wait
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= config.num_known_tokens:
            wrong, known = low if low < 0 else high, config.num_known_tokens
            if 0 <= wrong < config.vocab_size:
                raise InputError(f"token id {wrong} has no per-layer embedding: there are {known} of them")
            raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
    return lengths


def check_cache(cache: Cache | None, lengths: list[int], streams: StreamSpecs, model: "Decoder") -> None:
    """CacheError for a cache that another model made, for other streams, another dtype or device, or that is
    full."""
    if cache is None:
        return
    if cache.specs is not streams and cache.specs != streams:
        raise CacheError("the cache was made for another model: its streams are not this model's")
    if (cache.dtype, cache.device) != (model.dtype, model.device):
        mine, its = f"{model.dtype} on {model.device}", f"{cache.dtype} on {cache.device}"
        raise CacheError(f"the cache holds {its}, the model is {mine}: make a cache after moving the model")
    cache.check_model(model)
    cache.check_step(lengths)


def warn_of_length(lengths: list[int], cache: Cache | None, limit: int) -> None:
    """At the step in which a sequence outgrows the model's positions, unless it is known of the cache."""
    longest = max(lengths) if cache is None else max(map(sum, zip(cache.lengths, lengths, strict=True)))
    if longest <= limit or (cache is not None and cache.warned_of_length):
        return
    if cache is not None:
        cache.warned_of_length = True
    warn(f"{longest} tokens, and the model has {limit} positions: it extrapolates")
