"""Keys and values that one layer makes and others read (cross-layer KV sharing; Brandon et al. 2024, arXiv
2405.12981; Gemma 4), for every attention that keeps keys and values per head.

A layer with `kv_source` makes no keys and values: it reads those that its source made in this step. What people get
wrong: it must see the keys of the whole step, not what the source's sliding window still holds afterwards; and it
writes none to the cache.
"""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, model_validator
from torch import Tensor

from kvell.cache import StreamSpec
from kvell.cache_operation import CacheOperation, InPlace
from kvell.kernels.attention import attention, compile_in_cpp
from kvell.kernels.cpp.decode import ELEMENTS, decode_operator
from kvell.layers.contract import AttentionDescription, AttentionPart, RotaryPart
from kvell.layers.cost import Technique, Work
from kvell.layers.part import Part, Reads, Site
from kvell.layers.rotary import check_turns

if TYPE_CHECKING:
    from kvell.step import Step

KEY_VALUES = "key_values"
# The index of the earlier layer whose keys and values a layer reads; None where it makes its own.
KeyValueSource = Annotated[NonNegativeInt | None, Reads(KEY_VALUES)]


class KeyValuePart(AttentionPart):
    """The common part of attentions that keep keys and values per KV head, one row of each per token, for all tokens
    or a window of them. Such layers can read each other's keys and values, whatever else they do."""

    if TYPE_CHECKING:  # each technique declares these fields itself, in its own order
        num_heads: int
        num_kv_heads: int
        head_dim: int
        sliding_window: int | None
        rotary: RotaryPart | None
        kv_source: int | None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rotary is not None and (problem := check_turns(self.rotary, self.head_dim)):
            raise ValueError(problem)
        return self

    def streams(self) -> tuple[StreamSpec, ...]:
        """Keys and values: nothing where the layer reads another's."""
        if self.kv_source is not None:
            return ()
        width = self.num_kv_heads * self.head_dim
        past = None if self.sliding_window is None else self.sliding_window - 1
        return StreamSpec("key", width, past), StreamSpec("value", width, past)

    def works(self, site: Site, source: Part | None) -> tuple[Work, ...]:
        """For each row seen a product of every query with its key and with its value."""
        holder = site.index if self.kv_source is None else self.kv_source
        reads = ((holder, "key"), (holder, "value"))
        return (Work("attention", 2 * self.num_heads * self.head_dim, most=self.sliding_window, reads=reads),)

    def full_attention_width(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim

    def heads_of_rows(self) -> int:
        return self.num_kv_heads

    def windowed_streams(self) -> tuple[str, ...]:
        return () if self.sliding_window is None else ("key", "value")

    def without(self, technique: Technique, site: Site) -> AttentionPart:
        absent: dict[Technique, dict[str, Any]] = {
            "sharing": {"kv_source": None},
            "windows": {"sliding_window": None},
            "grouping": {"num_kv_heads": self.num_heads},
        }
        return self.model_copy(update=absent.get(technique))

    def check_source(self, source: Part) -> str | None:
        if not isinstance(source, KeyValuePart):
            return "which keeps no keys and values per head"
        return unlike(self, source, ("num_kv_heads", "head_dim", "rotary"))

    def describe(self) -> AttentionDescription:
        return AttentionDescription(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sliding_window=self.sliding_window,
            kv_source=self.kv_source,
            rotary=None if self.rotary is None else self.rotary.describe(),
        )


class KeyValues(NamedTuple):
    """The keys and values each sequence may see, past and present: a list of (S, K, D), one per sequence."""

    keys: list[Tensor]
    values: list[Tensor]


class KeyValueAttention(CacheOperation):
    """Attention over a layer's keys and values of this step, joined to those that its sequences remember, or over
    those that its source made. Inputs: queries, and the layer's own new keys and values, if it makes any."""

    def __init__(self, part: KeyValuePart, layer: int, *, scale: float) -> None:
        self.layer, self.source, self.scale, self.window = layer, part.kv_source, scale, part.sliding_window
        self.group, self.width = part.num_heads // part.num_kv_heads, part.head_dim
        holder = layer if self.source is None else self.source
        self.rows = (holder, "key"), (holder, "value")
        self.streams = self.rows if self.source is None else ()
        self.reads = None if self.source is None else (self.source, KEY_VALUES)

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

    def in_place(self, dtype: torch.dtype, *inputs: Tensor | None) -> InPlace | None:
        """Where all inputs are of the streams' dtype: the kernel writes rows as they are."""
        if dtype not in ELEMENTS or any(x is not None and x.dtype is not dtype for x in inputs):
            return None
        return InPlace(self.rows, self.source is None, self.window, self._by_table)

    def _by_table(
        self,
        table: Int[Tensor, "B fields"],
        query: Float[Tensor, "B H D"],
        key: Float[Tensor, "B K D"] | None,
        value: Float[Tensor, "B K D"] | None,
    ) -> Float[Tensor, "B H D"]:
        run = decode_operator(query.dtype, self.width, self.group)
        own = (None if x is None else x.contiguous() for x in (query, key, value))
        attended: Tensor = run(*own, table, self.scale)
        return attended

    def compile_kernels(self, dtype: torch.dtype) -> None:
        """Those in C++: else they are compiled when they are first called."""
        compile_in_cpp(dtype, self.width, self.group)

    def _seen(
        self, step: "Step", key: Float[Tensor, "T K D"] | None, value: Float[Tensor, "T K D"] | None
    ) -> KeyValues:
        if self.source is not None:
            seen: KeyValues = step.made[self.source, KEY_VALUES]
            return seen
        assert key is not None
        assert value is not None
        heads = key.shape[1:]
        rows = (
            step.append(*stream, made.flatten(1)) for stream, made in zip(self.streams, (key, value), strict=True)
        )
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
