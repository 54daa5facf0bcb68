"""The bf16 projections of the CPU against the same product in fp32."""

import pytest
import torch
from torch.nn import functional as F

from kvell import kernels
from kvell.kernels import linear as kernel

IN, OUT = 96, 2 * kernel.TILE + 40


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (7,), (8,), (3, 50)])
@pytest.mark.parametrize("biased", [True, False])
def test_any_number_of_rows_is_the_product_in_fp32(
    shape: tuple[int, ...], multiplies: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "multiplies_bf16", lambda: multiplies)
    x, weight = torch.randn(*shape, IN).bfloat16(), torch.randn(OUT, IN).bfloat16()
    bias = torch.randn(OUT).bfloat16() if biased else None
    with torch.no_grad():
        y = kernel.linear(x, weight, bias)
        exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    # bf16 has 8 bits: a product that is rounded, and another time with its bias added, is off by two halves of them.
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=2**-5)


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and many, and neither for gradients, in fp32, or where the reference is asked for."""
    ran: list[str] = []
    monkeypatch.setattr(kernel, "multiplies_bf16", lambda: False)
    for name, run in (("_of_one_row", kernel._of_one_row), ("_widened", kernel._widened)):
        monkeypatch.setattr(kernel, name, lambda *arguments, name=name, run=run: ran.append(name) or run(*arguments))
    weight = torch.randn(4, 8).bfloat16()
    one, many = torch.randn(1, 8).bfloat16(), torch.randn(kernel.WIDENED_FROM, 8).bfloat16()
    with torch.no_grad():
        kernel.linear(one, weight)
        kernel.linear(many, weight)
        assert ran == ["_of_one_row", "_widened"]
        kernel.linear(one.float(), weight.float())
        kernel.linear(many[:3], weight)
        with kernels.use("reference"):
            kernel.linear(one, weight)
            kernel.linear(many, weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert kernel.linear(one, weight.float()).dtype == torch.bfloat16
    kernel.linear(one, weight)
    kernel.linear(many, weight)
    assert len(ran) == 2
