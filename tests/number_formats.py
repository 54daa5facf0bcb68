"""Small floats from the definitions of their formats, in exact fractions: sign, exponent, mantissa, bias.

An exponent field of zero means a subnormal: no leading one, and the exponent of one. e4m3 (arXiv 2209.05433, table 1)
has no infinities, and all ones but the sign is NaN; e2m1 (OCP Microscaling Formats (MX) Specification v1.0) has
neither.
"""

import math
from bisect import bisect_left
from fractions import Fraction

import torch


def number(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> Fraction:
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = Fraction(code & (1 << mantissa_bits) - 1, 1 << mantissa_bits)
    if exponent == 0:
        return sign * mantissa * Fraction(2) ** (1 - bias)
    return sign * (1 + mantissa) * Fraction(2) ** (exponent - bias)


# By code; None is NaN.
E4M3_VALUES = [None if code & 0x7F == 0x7F else number(code, 4, 3, 7) for code in range(256)]
E2M1_VALUES: list[Fraction | None] = [number(code, 2, 1, 1) for code in range(16)]


def nearest(wanted: Fraction, values: list[Fraction | None]) -> Fraction:
    """The nearest number of a format, of two the one with the even code; the largest beyond the end."""
    positive = [value for value in values[: len(values) // 2] if value is not None]  # ascending, by code
    size = abs(wanted)
    above = bisect_left(positive, size)
    candidates = range(max(above - 1, 0), min(above + 1, len(positive)))
    best = min(candidates, key=lambda code: (abs(positive[code] - size), code & 1))
    return positive[best] if wanted >= 0 else -positive[best]


# Bits of the significand with the leading one, the least and the largest exponent.
PRECISIONS = {
    torch.float64: (53, -1022, 1023),
    torch.float32: (24, -126, 127),
    torch.bfloat16: (8, -126, 127),
    torch.float16: (11, -14, 15),
}


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of a dtype, of two the even one, as a Python float; infinity where it is too large."""
    if value == 0:
        return 0.0
    bits, least, largest = PRECISIONS[dtype]
    # By lengths in binary, to within one; then exactly.
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, least) - bits + 1)
    result = round(size / unit) * unit  # to even
    if result >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(result), value)
