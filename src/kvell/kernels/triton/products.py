"""The matrix product of all kernels: exact products of the operands' numbers, added up in fp32.

fp32 operands go through tensor cores in three passes of tf32, which together lose no more than fp32 does. The
interpreter multiplies bf16 numbers as if they were integers: there they are widened first.
"""

import triton
import triton.language as tl

from kvell.kernels.triton import INTERPRETED

WIDENED = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b):
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def product_added(a, b, total):
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")
