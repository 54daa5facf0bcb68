"""What a layer does with the cache in a step, declared as a value of its own.

    plain step       step.perform(operation, *inputs) calls it
    compiled step    it is left out of the machine code, which calls it back, or runs its `in_place` form
    recorded step    it is called between two CUDA graphs

Everything else in a layer has shapes that follow from the number of tokens alone; only an operation depends on how
much each sequence holds. So a layer looks at no lengths outside of its operations.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvell.cache.cache import StreamKey
    from kvell.step import Made, Step


class InPlace(NamedTuple):
    """The form of an operation, for one token per sequence, that asks the cache for nothing but room: one row in each
    of two streams, whatever the numbers are. A compiled step reserves it before it begins, and tells the machine code
    by a table (decoding/row_table.py) where the rows lie.

    streams  the streams of keys and of values that it reads, its own or another layer's
    appends  whether it writes their newest rows itself
    window   how many of the last rows it reads; None for all
    run      (table, *inputs) -> the result; known to torch's compiler
    """

    streams: tuple["StreamKey", "StreamKey"]
    appends: bool
    window: int | None
    run: Callable[..., Tensor]


class CacheOperation(ABC):
    """One thing that a layer does with the cache.

    streams  the streams that it appends this step's rows to
    reads    what it takes of an earlier layer of the same step, None for nothing
    """

    streams: tuple["StreamKey", ...] = ()
    reads: "Made | None" = None

    @abstractmethod
    def __call__(self, step: "Step", wanted: "Step", *inputs: Any, **named: Any) -> Tensor:
        """The result: a tensor of its own in the first input's dtype, no view of one that was given or is kept, whose
        memory may serve for something else by then. `wanted` is the step narrowed to the tokens whose result is
        asked for, or the step itself."""

    def result_shape(self, step: "Step", *inputs: Tensor | None) -> Sequence[int]:
        """The shape of the result, from the inputs and the number of sequences; the first input's if not said."""
        first = inputs[0]
        assert first is not None
        return first.shape

    def in_place(self, dtype: torch.dtype, *inputs: Tensor | None) -> InPlace | None:
        """Its form for a step of one token per sequence whose rows are of `dtype`, if it has one for these inputs."""
        return None
