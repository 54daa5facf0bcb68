"""Keys and values that one layer makes and others read (cross-layer KV sharing; Brandon et al. 2024, arXiv
2405.12981; Gemma 4), for every attention that keeps keys and values per head.

A layer with `kv_source` makes no keys and values: it reads those that its source made in this step. What people get
wrong: it must see the keys of the whole step, not what the source's sliding window still holds afterwards; and it
writes none to the cache.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kvell.kernels.attention import attention, compile_in_cpp
from kvell.layers.part import Part

if TYPE_CHECKING:
    from kvell.step import Step

KEY_VALUES = "key_values"


class KeyValues(NamedTuple):
    """The keys and values each sequence may see, past and present: a list of (S, K, D), one per sequence."""

    keys: list[Tensor]
    values: list[Tensor]


class KeyValueAttention:
    """What of such a layer asks the cache: attention over its keys and values of this step, joined to those that its
    sequences remember, or over those that its `source` left."""

    def __init__(self, layer: int, source: int | None, kv_heads: int, *, scale: float, window: int | None) -> None:
        self.layer, self.source, self.kv_heads, self.scale, self.window = layer, source, kv_heads, scale, window

    def __call__(
        self,
        step: "Step",
        wanted: "Step",
        query: Float[Tensor, "W H D"],
        key: Float[Tensor, "T K D"] | None,
        value: Float[Tensor, "T K D"] | None,
    ) -> Float[Tensor, "W H D"]:
        """`wanted` are the tokens whose queries these are; key and value where the layer makes its own."""
        seen = self._seen(step, key, value)
        return attention(query, seen.keys, seen.values, wanted.counts, scale=self.scale, window=self.window)

    def compile_kernels(self, dtype: torch.dtype, heads: int, width: int) -> None:
        """Those in C++: else they are compiled when they are first called."""
        compile_in_cpp(dtype, width, heads // self.kv_heads)

    def _seen(
        self, step: "Step", key: Float[Tensor, "T K D"] | None, value: Float[Tensor, "T K D"] | None
    ) -> KeyValues:
        if self.source is not None:
            seen: KeyValues = step.made[self.source, KEY_VALUES]
            return seen
        assert key is not None
        assert value is not None
        heads = key.shape[1:]
        rows = (step.append(self.layer, name, made.flatten(1)) for name, made in (("key", key), ("value", value)))
        seen = KeyValues(*([own.unflatten(1, heads) for own in every] for every in rows))
        step.leave(self.layer, KEY_VALUES, seen)
        return seen


def unlike(mine: Part, source: Part, fields: tuple[str, ...]) -> str | None:
    """Why a layer cannot read what `source` makes: another layer's rows, a field that differs, a window too short.
    None where it can."""
    source_of_source: int | None = getattr(source, "kv_source", None)
    if source_of_source is not None:
        return f"which has no keys of its own (it reads layer {source_of_source})"
    for field in fields:
        ours, theirs = getattr(mine, field), getattr(source, field)
        if ours != theirs:
            return f"whose {field} differs: {theirs}, not {ours}"
    window, reach = getattr(mine, "sliding_window", None), getattr(source, "sliding_window", None)
    if reach is not None and (window is None or window > reach):
        return f"whose window of {reach} is shorter than this layer's {window}"
    return None
