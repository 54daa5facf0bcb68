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

from kvell.kernels.choice import reference_wanted
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
    known = x.device.type == "cpu" and x.dtype in LARGE and weight.dtype is x.dtype
    if known and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or reference_wanted()):
        rows = x.numel() // x.shape[-1]
        if rows == 1:
            return _of_one_row(x, weight, bias)
        if rows >= WIDENED_FROM and x.dtype is torch.bfloat16 and not multiplies_bf16():
            return _widened(x, weight, bias)
    return F.linear(x, weight, bias)


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
