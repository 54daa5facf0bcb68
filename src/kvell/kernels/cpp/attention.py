"""Causal attention of one sequence's newest tokens, in C++: full or within a window, without a mask in memory.

torch's attention on the CPU takes a mask for a window, and multiplies blocks by a library made for large matrices.
Here products, exponentials and what is visible are one loop, over what a query may see and no more.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, dtype, float32

from kvell.kernels.cpp import operator
from kvell.kernels.cpp.decode import ELEMENTS, side_by_side, unreadable
from kvell.kernels.linear import multiplies_bf16

UNLIMITED = 1 << 62


def refuses(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> str | None:
    """Why the kernel cannot read these, or is not worth it."""
    if (problem := unreadable(query, key, value)) is None and not worth(query.dtype):
        return "torch multiplies bf16 faster on this processor"
    return problem


def refuses_all(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], **_: Any
) -> str | None:
    """The same for the sequences of a step, whose rows are alike."""
    return refuses(query, keys[0], values[0])


def worth(element: dtype) -> bool:
    """Whether it is the faster way: torch multiplies bf16 faster where the processor does so by itself."""
    return element is float32 or not multiplies_bf16()


def causal_attention(
    query: Float[Tensor, "n H D"],
    key: Float[Tensor, "S K D"],
    value: Float[Tensor, "S K D"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "n H D"]:
    """The queries are the last n of the sequence's S tokens."""
    group, width = query.shape[1] // key.shape[1], query.shape[2]
    run = attention_operator(query.dtype, width, group)
    limit = UNLIMITED if window is None else window
    y: Tensor = run(query.contiguous(), side_by_side(key), side_by_side(value), scale, limit)
    return y


def attention_operator(element: dtype, width: int, group: int) -> Any:
    """attention(query (n, H, D), keys and values (S, K, D), scale, window): (n, H, D)."""
    return operator("attention", WIDTH=width, GROUP=group, ELEMENT=ELEMENTS[element])
