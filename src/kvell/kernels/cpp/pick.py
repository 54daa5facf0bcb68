"""The indexer's scores and its choice among them in one call, in C++: no product of a head is kept in memory, and
scores only until their query has chosen. It is a choice of places: no gradient flows through it.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvell.kernels.cpp import operator
from kvell.kernels.cpp.decode import ELEMENTS


def refuses(query: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, top_k: int) -> str | None:
    """Why the kernel cannot read these."""
    return None if keys.dtype in ELEMENTS else "keys neither in fp32 nor in bf16"


def pick(
    query: Float[Tensor, "n H D"],
    weights: Float[Tensor, "n H"],
    keys: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    top_k: int,
) -> Int[Tensor, "n P"]:
    """As kernels/compressed.py has it."""
    run = pick_operator(keys.dtype, *query.shape[1:])
    asked, share = (given.detach().float().contiguous() for given in (query, weights))
    seen, most = visible.long().contiguous(), min(top_k, keys.shape[0])
    picks: Tensor = run(asked, share, keys.detach().contiguous(), seen, most)
    return picks


def pick_operator(dtype: torch.dtype, heads: int, width: int) -> Any:
    """pick(query (n, H, D) and weights (n, H) in fp32, keys (E, D) of the dtype, visible (n), k): picks (n, k).
    Everything is contiguous."""
    return operator("pick", HEADS=heads, WIDTH=width, ELEMENT=ELEMENTS[dtype])
