"""Turning pairs of channels is a product of complex numbers, however it is computed."""

import pytest
import torch
from torch import Tensor

from kvell.kernels.rotation import rotate, rotate_last

T, HEADS = 5, 3


def turned(first: Tensor, second: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.complex(first.double(), second.double()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return pairs.real, pairs.imag


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("dtype", "of_table"), [
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)
])  # fmt: skip
@pytest.mark.parametrize("width", [6, 7, 8, 13])
@pytest.mark.parametrize("rows", [1, T])
def test_pairs_turn_and_the_rest_passes_through(
    rows: int, width: int, dtype: torch.dtype, of_table: torch.dtype, recorded: bool
) -> None:
    x = torch.randn(rows, HEADS, width, dtype=dtype)
    kept, angles = x.clone(), torch.randn(rows, 3, dtype=torch.float64)
    cos, sin = angles.cos().to(of_table), angles.sin().to(of_table)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-6
    with torch.set_grad_enabled(recorded):
        halves, last = rotate(x, cos.to(dtype), sin.to(dtype)), rotate_last(x, cos, sin)
    assert torch.equal(x, kept)
    wanted = kept.double().clone()
    wanted[..., 0:3], wanted[..., 3:6] = turned(x[..., 0:3], x[..., 3:6], angles)
    torch.testing.assert_close(halves.double(), wanted, atol=2 * tolerance, rtol=tolerance)
    wanted = kept.double().clone()
    pairs = wanted[..., -6:].unflatten(-1, (3, 2))
    pairs[..., 0], pairs[..., 1] = turned(x[..., -6::2], x[..., -5::2], angles)
    torch.testing.assert_close(last.double(), wanted, atol=tolerance, rtol=tolerance)
    assert halves.dtype == last.dtype == dtype
