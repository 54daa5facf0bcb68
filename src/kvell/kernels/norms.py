"""Root-mean-square normalisation over the last dimension (layers/norms.py has the formula)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.table import Kernel, KernelVersion


def rms_norm(
    x: Float[Tensor, "*shape width"], weight: Float[Tensor, " width"] | None, eps: float
) -> Float[Tensor, "*shape width"]:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, in x's dtype."""
    y: Tensor = RMS_NORM(x, weight, eps)
    return y


def rms_norm_widened(
    x: Float[Tensor, "*shape width"], weight: Float[Tensor, " width"] | None, eps: float
) -> Float[Tensor, "*shape width"]:
    """torch's own, on fp32 copies."""
    wide = None if weight is None else weight.float()
    return F.rms_norm(x.float(), x.shape[-1:], wide, eps).to(x.dtype)


def rms_norm_as_it_is(
    x: Float[Tensor, "*shape width"], weight: Float[Tensor, " width"] | None, eps: float
) -> Float[Tensor, "*shape width"]:
    """torch's own in x's dtype. On CUDA it has one kernel for bf16, which computes in fp32 and rounds the result."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm_of_many_rows(
    x: Float[Tensor, "*shape width"], weight: Float[Tensor, " width"] | None, eps: float
) -> Float[Tensor, "*shape width"]:
    """For many rows on the CPU. torch's own is faster for a single row, but stores the squares of many in memory."""
    wide = x.float()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    y = wide * mean_square.add_(eps).rsqrt_()
    return (y if weight is None else y.mul_(weight)).to(x.dtype)


def _few_rows(x: Tensor, *_: Any) -> str | None:
    if x.device.type != "cpu" or len(x) == 1:
        return "a single row, or not on the CPU"
    return (
        "gradients are recorded, or it is traced"
        if torch.is_grad_enabled() or torch.compiler.is_compiling()
        else None
    )


def _rounds(x: Tensor, weight: Tensor | None, eps: float) -> str | None:
    if weight is not None and weight.dtype != x.dtype:
        return "several dtypes"
    exact = x.dtype == torch.float32 or (x.is_cuda and x.dtype == torch.bfloat16)
    return None if exact else "torch rounds between its steps"


RMS_NORM = Kernel(
    "rms_norm",
    KernelVersion("many rows", "torch", rms_norm_of_many_rows, _few_rows),
    KernelVersion("as it is", "torch", rms_norm_as_it_is, _rounds),
    KernelVersion("widened", "torch", rms_norm_widened),
)
