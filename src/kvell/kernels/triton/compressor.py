"""The compressor's pooling in Triton: what kernels/compressor.py says, one program an entry.

Gradients are those of the torch version, which runs again for them.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.compressor import pooled_entries_reference
from kvell.kernels.triton.launch import Recomputed, on_device_of, power_of_two

# Numbers of a block of slots: values and gates of two such blocks stand in registers.
NUMBERS = 4096


def pooled_entries(
    rows: Tensor, bias: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, behind: int, eps: float
) -> Tensor:
    fast, plain = (partial(run, behind=behind, eps=eps) for run in (_forward, pooled_entries_reference))
    return Recomputed.apply(fast, plain, rows, bias, weight, cos, sin)  # type: ignore[no-untyped-call]


def _forward(
    rows: Tensor, bias: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, behind: int, eps: float
) -> Tensor:
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    bias, weight, cos, sin = (x.contiguous() for x in (bias, weight, cos, sin))
    width, (ratio, channels) = len(weight), bias.shape
    entries = rows.new_empty(len(cos), width)
    # The channels that turn begin at an even place of a program's block.
    before = width % 2
    filled = power_of_two(width + before, 2)
    slots = ratio * (channels // width)
    with on_device_of(rows):
        _pool[(len(cos),)](
            *(rows, bias, weight, cos, sin, entries, rows.stride(0), eps, slots, ratio, channels, width),
            *(cos.shape[1], behind, before, filled, max(min(NUMBERS // filled, power_of_two(slots)), 1)),
        )
    return entries


@triton.jit
def _pool(
    rows,
    bias,
    weight,
    cos,
    sin,
    entries,
    stride,
    eps,
    slots,
    ratio,
    channels,
    width,
    pairs,
    behind,
    BEFORE: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One window: a softmax over its slots for every channel, corrected as larger gates appear; norm; turn."""
    entry = tl.program_id(0)
    channel = tl.arange(0, WIDTH) - BEFORE
    inside = (channel >= 0) & (channel < width)
    largest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    pooled = tl.zeros([WIDTH], tl.float32)
    # Backwards: a window's own tokens come first, so that there is a largest gate from the first block on.
    for done in range(0, slots, SLOTS):
        slot = slots - 1 - done - tl.arange(0, SLOTS)
        earlier = slot < slots - ratio
        window = entry + behind - tl.where(earlier, 1, 0)
        exists = (slot >= 0) & (window >= 0)
        place = slot % ratio
        column = tl.where(earlier, 0, channels - width)[:, None] + channel[None, :]
        both = exists[:, None] & inside[None, :]
        at = (window * ratio + place).to(tl.int64)[:, None] * stride + column
        gate = tl.load(rows + at + channels, both, 0.0).to(tl.float32)
        gate += tl.load(bias + place[:, None] * channels + column, both, 0.0)
        gate = tl.where(exists[:, None], gate, float("-inf"))
        value = tl.load(rows + at, both, 0.0).to(tl.float32)
        larger = tl.maximum(largest, tl.max(gate, 0))
        weights = tl.exp(gate - larger[None, :])
        fade = tl.exp(largest - larger)
        total = total * fade + tl.sum(weights, 0)
        pooled = pooled * fade + tl.sum(weights * value, 0)
        largest = larger
    dtype = entries.dtype.element_ty
    pooled = tl.where(inside, pooled / total, 0.0).to(dtype).to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(pooled * pooled, 0) / width + eps)
    normed = pooled * root * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(normed.to(dtype).to(tl.float32), [WIDTH // 2, 2]))
    pair = tl.arange(0, WIDTH // 2) - (width + BEFORE - 2 * pairs) // 2
    turning = (pair >= 0) & (pair < pairs)
    c = tl.load(cos + entry.to(tl.int64) * pairs + pair, turning, 1.0)
    s = tl.load(sin + entry.to(tl.int64) * pairs + pair, turning, 0.0)
    turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [WIDTH])
    tl.store(entries + entry.to(tl.int64) * width + channel, turned, inside)
