"""Sinkhorn's iterations in one call, in C++: for a decoded token, whose matrix has a few numbers, they are otherwise
dozens of operators; compiled with the step around them, dozens of loops."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, float32

from kvell.kernels.cpp import known, operator
from kvell.kernels.cpp.decode import unreadable


def refuses(logits: Tensor, iterations: int, eps: float) -> str | None:
    """Why the kernel cannot read these."""
    return unreadable(logits) if logits.dtype is float32 else "not in fp32"


def sinkhorn(logits: Float[Tensor, "T N N"], iterations: int, eps: float) -> Float[Tensor, "T N N"]:
    """As kernels/hyper_connections.py has it."""
    mix: Tensor = sinkhorn_operator(logits.shape[1])(logits.contiguous(), iterations, eps)
    return mix


def sinkhorn_operator(streams: int) -> Any:
    """sinkhorn(logits (T, N, N) in fp32, contiguous, iterations, eps): (T, N, N)."""
    return known(operator("sinkhorn", STREAMS=streams))
