"""Rounding to the numbers of eight- and four-bit floats, without storing them so.

DeepSeek V4 was trained to live with it: its released inference code rounds KV rows to FP8, and the indexer's queries
and keys, after a Hadamard transform, to FP4 (arXiv 2606.19348).

    scale = 2^ceil(log2(max |x| of the block / largest number)),  x -> nearest(x / scale) * scale

e4m3 (arXiv 2209.05433): numbers up to 448. e2m1 (OCP Microscaling Formats (MX) Specification v1.0): 0, .5, 1, 1.5, 2,
3, 4, 6. Ties go to the even code. What people get wrong: a logarithm in floating point is a little off at powers of
two, where the ceiling makes the scale twice or half as large. Gradients pass through as if nothing were rounded.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvell.errors import InputError

E4M3_LARGEST, E2M1_LARGEST = 448.0, 6.0


def round_fp8(x: Float[Tensor, "*shape D"], block: int) -> Float[Tensor, "*shape D"]:
    """x with each `block` of its last dimension rounded to e4m3 numbers times a power of two; a block whose largest
    number is less than 1e-4 has the scale of that. InputError where the blocks do not fill the dimension."""
    return _Rounded.apply(x, block, E4M3_LARGEST, 1e-4)  # type: ignore[no-untyped-call]


def round_fp4(x: Float[Tensor, "*shape D"], block: int = 32) -> Float[Tensor, "*shape D"]:
    """x with each `block` of its last dimension rounded to e2m1 numbers times a power of two from 2^-126 on.
    InputError where the blocks do not fill the dimension."""
    return _Rounded.apply(x, block, E2M1_LARGEST, E2M1_LARGEST * 2.0**-126)  # type: ignore[no-untyped-call]


def hadamard(x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
    """The orthonormal Walsh-Hadamard transform of the last dimension, which is its own inverse: H x / sqrt(D).

    H[i, j] is -1 if i and j have an odd number of set bits in common, else 1 (Sylvester's order). InputError where D
    is not a power of two.
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise InputError(f"a Hadamard transform needs a width that is a power of two, not {width}")
    h = x.to(_wide(x))
    for step in (2**bit for bit in range(width.bit_length() - 1)):
        left, right = h.unflatten(-1, (-1, 2, step)).unbind(-2)
        h = torch.stack([left + right, left - right], dim=-2).flatten(-3)
    return (h * width**-0.5).to(x.dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, largest: float, least: float) -> Tensor:
        if block < 1 or x.shape[-1] % block:
            raise InputError(f"blocks of {block} do not fill a width of {x.shape[-1]}")
        blocks = x.to(_wide(x)).unflatten(-1, (-1, block))
        scale = _power_of_two_above(blocks.abs().amax(-1, keepdim=True).clamp(min=least), largest)
        # Exact, and never beyond the largest number: nothing has to be cut off.
        codes = blocks / scale
        nearest = _nearest_e4m3(codes) if largest == E4M3_LARGEST else _nearest_e2m1(codes)
        return (nearest * scale).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


def _power_of_two_above(amax: Tensor, largest: float) -> Tensor:
    """2^ceil(log2(amax / largest)), exactly: dividing by the mantissa leaves a power of two."""
    mantissa, _ = amax.frexp()
    _, exponent = math.frexp(largest)
    scale = amax / (2 * mantissa) * 2.0 ** (1 - exponent)
    return torch.where(scale * largest < amax, 2 * scale, scale)


def _nearest_e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _nearest_e2m1(x: Tensor) -> Tensor:
    """The numbers lie 0.5 apart up to 2, 1 up to 4 and 2 up to 6; the even codes are the even multiples of that."""
    size = x.abs()
    apart = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / apart).round() * apart


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in: fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
