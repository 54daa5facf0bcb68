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
    """The form of an operation for steps of one token per sequence, if all that it needs of the cache is room for one
    row in each of two streams, whatever the values are. A compiled step reserves the rows before it begins, and a
    table (decoding/row_table.py) tells the machine code where they are.

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
    reads    what it takes from an earlier layer of the same step, None for nothing
    """

    streams: tuple["StreamKey", ...] = ()
    reads: "Made | None" = None

    @abstractmethod
    def __call__(self, step: "Step", wanted: "Step", *inputs: Any, **named: Any) -> Tensor:
        """The result, in the first input's dtype. It is a new tensor, never a view of an input or of cached rows:
        their memory may be reused before the result is read. `wanted` is the step narrowed to the tokens whose
        results are needed, or the step itself."""

    def result_shape(self, step: "Step", *inputs: Tensor | None) -> Sequence[int]:
        """The shape of the result, from the inputs and the number of sequences; the first input's if not said."""
        first = inputs[0]
        assert first is not None
        return first.shape

    def in_place(self, dtype: torch.dtype, *inputs: Tensor | None) -> InPlace | None:
        """Its form for a step of one token per sequence whose rows are of `dtype`, if it has one for these inputs."""
        return None
