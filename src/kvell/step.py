"""What the layers of one forward step share.

T tokens of the step: those of all its sequences, laid end to end, with nothing between them. A batch of equal
prompts, a ragged batch and packed documents are all the same thing here: a list of counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from kvell.cache import Cache
from kvell.cache_operation import CacheOperation
from kvell.layers.contract import RotaryPart
from kvell.layers.rotary import RotaryTable, rotary_table

Made = tuple[int, str]  # what a layer makes for later ones: its index, and what it is


class Observed:
    """What training wants to know of a step besides its logits; layers write into it where there is one.

    By the layer's index: each indexer's loss (layers/compressed.py), and of each mixture's router how many tokens
    chose each of its classes (E), and the auxiliary loss that evens them out (layers/routers.py). As it is keyed,
    nothing counts twice where activation checkpointing runs a layer again.
    """

    # Neither this nor Step is a dataclass: FSDP copies those where they pass a sharded module, and what the module
    # leaves in its copy would be lost.
    def __init__(self) -> None:
        self.index_losses: dict[int, Tensor] = {}
        self.expert_loads: dict[int, Tensor] = {}
        self.balance_losses: dict[int, Tensor] = {}


class Step:
    """One step: `counts[b]` new tokens of sequence b, which holds `starts[b]` already; at their `positions`.

    `made` is what earlier layers of this step leave for later ones, by the index of the layer that made it: the keys
    and values that sharing layers read, a router's state. It holds this step's tensors themselves, so sharing works
    without a cache, and gradients flow through it. `sources` are those that any layer reads; nothing else is kept
    alive. `observed` collects what training asks for.
    """

    def __init__(
        self,
        tokens: Int[Tensor, " T"],
        counts: list[int],
        starts: list[int],
        positions: Int[Tensor, " T"],
        cache: Cache | None = None,
        sources: frozenset[Made] = frozenset(),
        observed: Observed | None = None,
        made: dict[Made, Any] | None = None,
        rows: Int[Tensor, " W"] | None = None,
    ) -> None:
        """`rows` are those of a whole step that a narrowed one is about."""
        self.tokens, self.counts, self.starts, self.positions = tokens, counts, starts, positions
        self.cache, self.sources, self.observed = cache, sources, observed
        self.made: dict[Made, Any] = {} if made is None else made
        self._rows = rows
        self._tables: dict[Any, RotaryTable] = {}
        self._complete: dict[int | None, Tensor] = {}

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, " T"],
        counts: list[int],
        cache: Cache | None,
        sources: frozenset[Made] = frozenset(),
        observed: Observed | None = None,
    ) -> "Step":
        """A step that continues each sequence where its cache stands, or at 0 without one."""
        starts = [0] * len(counts) if cache is None else cache.lengths
        own = [torch.arange(start, start + n, device=tokens.device) for start, n in zip(starts, counts, strict=True)]
        positions = own[0] if len(own) == 1 else torch.cat(own)
        return cls(tokens, counts, starts, positions, cache, sources, observed)

    def append(self, layer: int, name: str, rows: Shaped[Tensor, "T width"]) -> list[Shaped[Tensor, "_ width"]]:
        """Gives each sequence its new rows of a layer's stream, one per token, and returns all the rows each may see.

        Without a cache the present passes through.
        """
        return self.append_each(layer, name, self.by_sequence(rows))

    def append_each(
        self, layer: int, name: str, pieces: Sequence[Shaped[Tensor, "_ width"]]
    ) -> list[Shaped[Tensor, "_ width"]]:
        """The same for streams that have not one row per token: `pieces` are each sequence's new rows."""
        if self.cache is None:
            return list(pieces)
        return [
            self.cache.append(index, (layer, name), piece, count)
            for index, (piece, count) in enumerate(zip(pieces, self.counts, strict=True))
        ]

    def perform(
        self, operation: CacheOperation, *inputs: Shaped[Tensor, "..."] | None, wanted: "Step | None" = None
    ) -> Shaped[Tensor, "..."]:
        """What an operation on the cache gives for these inputs. Steps that are compiled or recorded (decoding/)
        leave it out of what they compile or record."""
        return operation(self, wanted or self, *inputs)

    def by_sequence(self, rows: Shaped[Tensor, "T *rest"]) -> Sequence[Shaped[Tensor, "_ *rest"]]:
        """Each sequence's rows."""
        return [rows] if len(self.counts) == 1 else rows.split(self.counts)

    def leave(self, layer: int, name: str, made: Any) -> None:
        """Leaves what a layer made, if a later layer reads it."""
        if (layer, name) in self.sources:
            self.made[layer, name] = made

    def rows_left_by(self, layer: int, name: str) -> Shaped[Tensor, "T *rest"]:
        """What a layer left for each token, for this step's tokens: it may have seen those of the whole step."""
        rows = self.made[layer, name]
        return rows if len(rows) == len(self.tokens) else self.select(rows)

    def rotary(self, rotary: RotaryPart, head_dim: int, dtype: torch.dtype) -> RotaryTable:
        """cos and sin for this step's tokens, computed once for all layers that turn alike."""
        key = (rotary, head_dim, dtype)
        if key not in self._tables:
            self._tables[key] = rotary_table(rotary, head_dim, self.positions, dtype)
        return self._tables[key]

    def windows_complete(self, ratio: int | None) -> Int[Tensor, " T"]:
        """How many windows of `ratio` tokens each token completes or has behind it; none without a ratio."""
        if ratio not in self._complete:
            after = self.positions + 1
            self._complete[ratio] = torch.zeros_like(after) if ratio is None else after // ratio
        return self._complete[ratio]

    def last(self) -> "Step":
        """The same step narrowed to the last token of each sequence; it shares what was made, and appends nothing."""
        ends = torch.tensor(self.counts, device=self.tokens.device).cumsum(0) - 1
        return Step(
            self.tokens[ends],
            [1] * len(self.counts),
            [start + count - 1 for start, count in zip(self.starts, self.counts, strict=True)],
            self.positions[ends],
            self.cache,
            self.sources,
            self.observed,
            self.made,
            ends,
        )

    def select(self, x: Shaped[Tensor, "T *rest"]) -> Shaped[Tensor, "W *rest"]:
        """The rows of the whole step's x that a narrowed step is about."""
        return x if self._rows is None else x[self._rows]
