"""Linear projections on the CPU, where torch's own product is far from what the machine allows.

One row, a decoded token, should cost the reading of its weights: torch's matrix-vector product comes close to the
memory's bandwidth, its matrix product to half of it or less in bf16, and with small matrices in fp32 too.
Many rows should cost their multiplications: without instructions for bf16 they are a fourth to a seventh as fast as
in fp32, so the weights are widened, in tiles that stay in the cache. docs/log.md has the figures.
"""

import platform
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.table import Kernel, KernelVersion
from kvell.kernels.tracing import kept

# Widening weights takes as long as multiplying so many rows as they are.
WIDENED_FROM = 8
# Rows of a weight matrix that are widened at once.
TILE = 1024
# Numbers of a matrix from which its product with one row is called rather than compiled.
LARGE = {torch.bfloat16: 1 << 18, torch.float32: 1 << 21}


def linear(
    x: Float[Tensor, "*shape in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*shape out"]:
    """x @ weight.T + bias."""
    y: Tensor = LINEAR(x, weight, bias)
    return y


def _left_to_torch(x: Tensor, weight: Tensor) -> str | None:
    """Why the product is torch's own, whatever the number of rows."""
    if x.device.type != "cpu":
        return "not on the CPU"
    if x.dtype not in LARGE or weight.dtype is not x.dtype:
        return "not all in fp32, or all in bf16"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    return "under autocast" if torch.is_autocast_enabled("cpu") else None


def _several_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return "several rows" if x.numel() != x.shape[-1] else _left_to_torch(x, weight)


def _not_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype is not torch.bfloat16 or x.numel() < WIDENED_FROM * x.shape[-1]:
        return f"not in bf16, or fewer than {WIDENED_FROM} rows"
    return "the processor multiplies bf16" if multiplies_bf16() else _left_to_torch(x, weight)


@cache
def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 as it is, as far as torch makes use of it."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _of_one_row(
    x: Float[Tensor, "*ones in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*ones out"]:
    row = x.reshape(-1)
    if not torch.compiler.is_compiling():
        y = _times_row(weight, row, bias)
    elif weight.numel() < LARGE[x.dtype]:
        y = _times_row(weight, kept(row), bias)
    else:
        y = torch.ops.kvell.times_row(weight, row, bias)
    return y.view(*x.shape[:-1], -1)


def _times_row(
    weight: Float[Tensor, "out in"], row: Float[Tensor, " in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, " out"]:
    return torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)


# torch's compiler takes the product apart into a loop, which for a large matrix is slower.
_library = torch.library.Library("kvell", "FRAGMENT")
_library.define("times_row(Tensor weight, Tensor row, Tensor? bias) -> Tensor")
_library.impl("times_row", _times_row, "CPU")
torch.library.register_fake("kvell::times_row", lambda weight, row, bias: row.new_empty(len(weight)), lib=_library)


def _widened(
    x: Float[Tensor, "*shape in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*shape out"]:
    wide = x.float()
    y = torch.cat([F.linear(wide, tile.float()).to(x.dtype) for tile in weight.split(TILE)], dim=-1)
    return y if bias is None else y + bias


LINEAR = Kernel(
    "linear",
    KernelVersion("one row", "torch", _of_one_row, _several_rows),
    KernelVersion("widened", "torch", _widened, _not_widened),
    KernelVersion("reference", "reference", F.linear),
)
