"""The simulated rounding, against the number formats' definitions in exact fractions."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from number_formats import E2M1_VALUES, E4M3_VALUES, nearest
from torch import Tensor

import kvell
from kvell.kernels.rounding import hadamard, round_fp4, round_fp8

Round = Callable[[Tensor, int], Tensor]
FORMATS: dict[str, tuple[Round, list[Fraction | None], Fraction]] = {
    "fp8": (round_fp8, E4M3_VALUES, Fraction(1e-4)),
    "fp4": (round_fp4, E2M1_VALUES, 6 * Fraction(2) ** -126),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def scale_of(block: list[float], name: str) -> Fraction:
    """The smallest power of two by which the block's largest number fits the format."""
    _, values, least = FORMATS[name]
    amax = max(least, *(Fraction(abs(number)) for number in block))
    largest = max(value for value in values if value is not None)
    scale = Fraction(2) ** (amax.numerator.bit_length() - amax.denominator.bit_length() - 12)  # surely too small
    while largest * scale < amax:
        scale *= 2
    return scale


def expected(x: Tensor, block: int, name: str) -> Tensor:
    """(R, D): every number the nearest that the format has in its block's scale, by exact comparison."""
    rows = []
    for row in x.double().tolist():
        rounded: list[float] = []
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = scale_of(part, name)
            rounded += [float(nearest(Fraction(number) / scale, FORMATS[name][1]) * scale) for number in part]
        rows.append(rounded)
    return torch.tensor(rows, dtype=torch.float64).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e-3, 1.0, 300.0, 1e20])
@every_format
def test_numbers_become_the_nearest_of_the_format(name: str, magnitude: float, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 64) * magnitude * torch.rand(4, 64) ** 4).to(dtype)
    for block in (16, 32, 64):
        rounded = FORMATS[name][0](x, block)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, expected(x, block, name))


@every_format
def test_every_number_of_the_format_stays_and_halfway_goes_to_the_even_code(name: str) -> None:
    """All numbers of the format, the middles between neighbours, and both neighbours of each middle."""
    kernel, values, _ = FORMATS[name]
    numbers = sorted({value for value in values if value is not None})
    middles = [(low + high) / 2 for low, high in pairwise(numbers)]
    exact = torch.tensor([float(number) for number in [*numbers, *middles]])
    up = exact.nextafter(torch.tensor(math.inf))
    down = exact.nextafter(torch.tensor(-math.inf))
    largest = float(numbers[-1])
    x = torch.cat([exact, up, down]).clamp(-largest, largest)
    x = torch.cat([x, torch.tensor([largest])])[None]
    for scale in (1.0, 2.0**-7, 2.0**9):
        assert torch.equal(kernel(x * scale, x.shape[1]), expected(x * scale, x.shape[1], name))
    assert torch.equal(kernel(x, x.shape[1])[0, : len(numbers)], x[0, : len(numbers)])


@pytest.mark.parametrize("exponent", [-9, -1, 0, 1, 30])
@every_format
def test_the_scale_is_exact_at_powers_of_two(name: str, exponent: int) -> None:
    """The largest number of a block exactly at the largest of the format, and one step to either side of it."""
    kernel, values, _ = FORMATS[name]
    top = torch.tensor(float(max(value for value in values if value is not None)) * 2.0**exponent)
    others = torch.rand(31) * top
    for amax in (top, top.nextafter(torch.tensor(math.inf)), top.nextafter(torch.tensor(0.0))):
        for sign in (1.0, -1.0):
            x = torch.cat([others.clamp(max=float(top) * 0.99), amax[None] * sign])[None]
            assert torch.equal(kernel(x, 32), expected(x, 32, name))


def test_every_bfloat16_number_alone_keeps_its_leading_bits() -> None:
    """All exponents: a block of one number is scaled by its own exponent."""
    codes = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(torch.bfloat16)
    numbers = numbers[(numbers < 2.0**127) & (numbers > 2.0**-110)][::7]
    x = numbers[None]
    assert torch.equal(round_fp8(x, 1), expected(x, 1, "fp8"))
    assert torch.equal(round_fp4(x, 1), expected(x, 1, "fp4"))


@every_format
def test_tiny_and_zero_blocks_have_the_least_scale(name: str) -> None:
    kernel = FORMATS[name][0]
    assert torch.equal(kernel(torch.zeros(2, 32), 32), torch.zeros(2, 32))
    tiny = torch.tensor([[2.0**-149, 2.0**-127, 2.0**-128, -3 * 2.0**-127, 2.0**-126, 0.0, 2.0**-125, 1e-45]])
    assert torch.equal(kernel(tiny, 8), expected(tiny, 8, name))
    below = torch.tensor([[1e-5, 3e-8, -9.9e-5, 2.0**-33]])
    assert torch.equal(kernel(below, 4), expected(below, 4, name))
    halves = torch.tensor([[1e-5, 3e-7, -9.9e-5, 2.0**-24]]).half()
    assert torch.equal(kernel(halves, 4), expected(halves, 4, name))
    assert torch.equal(kernel(torch.zeros(2, 32).half(), 32), torch.zeros(2, 32).half())


@every_format
def test_a_block_knows_nothing_of_the_others(name: str) -> None:
    kernel = FORMATS[name][0]
    x = torch.randn(3, 5, 128)
    x[..., 32:64] *= 1e6
    assert torch.equal(kernel(x, 32), torch.cat([kernel(part, 32) for part in x.split(32, dim=-1)], dim=-1))
    assert torch.equal(kernel(x, 32)[1, 2], kernel(x[1, 2], 32))


def test_fp4_blocks_are_of_32() -> None:
    x = torch.randn(2, 64) * torch.tensor([1.0, 100.0]).repeat_interleave(32)
    assert torch.equal(round_fp4(x), round_fp4(x, 32))
    assert not torch.equal(round_fp4(x), round_fp4(x, 64))


@every_format
def test_gradients_pass_through(name: str) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    weights = torch.randn(2, 64)
    (FORMATS[name][0](x, 32) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


def sylvester(width: int) -> Tensor:
    signs = [[(-1.0) ** (row & column).bit_count() for column in range(width)] for row in range(width)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(width)


@pytest.mark.parametrize("width", [1, 2, 8, 64, 128])
def test_the_hadamard_transform_is_sylvesters_matrix(width: int) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    wanted = x @ sylvester(width).T
    torch.testing.assert_close(hadamard(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard(x.float()), wanted.float(), rtol=1e-5, atol=1e-5)


def test_the_hadamard_transform_of_bfloat16_is_rounded_once() -> None:
    x = torch.randn(64, 128).bfloat16()
    transformed = hadamard(x)
    assert transformed.dtype == torch.bfloat16
    assert torch.equal(transformed, hadamard(x.float()).bfloat16())


def test_the_hadamard_transform_has_a_gradient() -> None:
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 8, dtype=torch.float64)
    (hadamard(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ sylvester(8))


@pytest.mark.parametrize("width", [3, 12, 96, 0])
def test_a_width_that_is_no_power_of_two_is_refused(width: int) -> None:
    with pytest.raises(kvell.InputError, match=f"power of two, not {width}"):
        hadamard(torch.randn(2, width))


@pytest.mark.parametrize("block", [48, 128, 0])
@every_format
def test_blocks_that_do_not_fill_the_width_are_refused(name: str, block: int) -> None:
    with pytest.raises(kvell.InputError, match=f"blocks of {block} do not fill a width of 64"):
        FORMATS[name][0](torch.randn(2, 64), block)
