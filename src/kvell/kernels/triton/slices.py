"""Softmax over keys that several programs share out among them: each leaves its slice's output and the logarithm of
its sum, and these are joined here.

    o = sum_i exp(l_i) o_i / sum_i exp(l_i),   l = log sum_i exp(l_i)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.triton.launch import on_device_of, power_of_two


def joined(outputs: Tensor, logarithms: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of outputs (slices, rows, D) and logarithms (slices, rows), both fp32: (rows, D) in `dtype` and (rows)."""
    slices, rows, width = outputs.shape
    output, logarithm = outputs.new_empty(rows, width, dtype=dtype), logarithms.new_empty(rows)
    with on_device_of(outputs):
        _join[(rows,)](outputs, logarithms, output, logarithm, slices, rows, width, power_of_two(width))
    return output, logarithm


@triton.jit
def _join(outputs, logarithms, output, logarithm, slices, rows, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    largest = tl.load(logarithms + row)
    for piece in range(1, slices):
        largest = tl.maximum(largest, tl.load(logarithms + piece * rows + row))
    total = tl.exp(tl.load(logarithms + row) - largest)
    joint = tl.load(outputs + row * width + channel, inside, 0.0) * total
    for piece in range(1, slices):
        at = piece * rows + row
        share = tl.exp(tl.load(logarithms + at) - largest)
        total += share
        joint += tl.load(outputs + at * width + channel, inside, 0.0) * share
    tl.store(output + row * width + channel, joint / total, inside)
    tl.store(logarithm + row, largest + tl.log(total))
