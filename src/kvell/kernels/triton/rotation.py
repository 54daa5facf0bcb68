"""Turning pairs of channels in Triton: what kernels/rotation.py says, both of its functions in one kernel.

A program has a block of heads, of any tokens: their numbers once as they stand, and once each number's partner in its
pair. Backwards a gradient is turned back. No gradient flows to cos and sin; where one is wanted torch turns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.rotation import rotate_last_reference, rotate_reference
from kvell.kernels.triton.launch import blocks, on_device_of, power_of_two

NUMBERS = 2048  # of a program's block


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if _learned(cos, sin):
        return rotate_reference(x, cos, sin)
    return _Turned.apply(x, cos, sin, torch.promote_types(x.dtype, cos.dtype), False, False)  # type: ignore[no-untyped-call]


def rotate_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if _learned(cos, sin):
        return rotate_last_reference(x, cos, sin)
    return _Turned.apply(x, cos, sin, x.dtype, True, False)  # type: ignore[no-untyped-call]


def _learned(cos: Tensor, sin: Tensor) -> bool:
    return torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)


class _Turned(torch.autograd.Function):
    """`last`: the last channels, pairs side by side, or the first, in halves; `back`: by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, last: bool, back: bool) -> Tensor:
        x, cos, sin = (tensor.contiguous() for tensor in (x, cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.settings = x.dtype, last, back
        turned = torch.empty_like(x, dtype=dtype)
        tokens, heads, width = x.shape
        filled = power_of_two(width)
        rows = max(NUMBERS // filled, 1)
        if x.numel():
            with on_device_of(x):
                _turn[(blocks(tokens * heads, rows),)](
                    *(x, cos, sin, turned, tokens * heads, heads, width, cos.shape[1], last, back, rows, filled)
                )
        return turned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dtype, last, back = ctx.settings
        return _Turned.apply(gradient, *ctx.saved_tensors, dtype, last, not back), None, None, None, None, None  # type: ignore[no-untyped-call]


@triton.jit
def _turn(
    x,
    cos,
    sin,
    turned,
    count,
    heads,
    width,
    pairs,
    LAST: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real = (row < count)[:, None] & (channel < width)[None, :]
    if LAST:
        place = channel - (width - 2 * pairs)
        turning = (place >= 0) & (channel < width)
        pair, second = place // 2, place % 2 == 1
        partner = tl.where(second, channel - 1, channel + 1)
    else:
        turning = channel < 2 * pairs
        pair, second = channel % pairs, channel >= pairs
        partner = tl.where(second, channel - pairs, channel + pairs)
    both = (row < count)[:, None] & turning[None, :]
    own = tl.load(x + row[:, None] * width + channel[None, :], real, 0.0).to(tl.float32)
    other = tl.load(x + row[:, None] * width + partner[None, :], both, 0.0).to(tl.float32)
    angle = (row // heads)[:, None] * pairs + pair[None, :]
    c = tl.load(cos + angle, both, 1.0).to(tl.float32)
    s = tl.load(sin + angle, both, 0.0).to(tl.float32)
    # The first of a pair loses, the second gains.
    gains = second != BACK
    tl.store(
        turned + row[:, None] * width + channel[None, :], own * c + tl.where(gains[None, :], s, -s) * other, real
    )
