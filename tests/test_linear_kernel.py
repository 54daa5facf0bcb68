"""The projections of the CPU against the same product in double precision."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvell import kernels
from kvell.kernels import linear as kernel
from kvell.kernels.table import noted_choices

IN, OUT = 96, 2 * kernel.TILE + 40


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (7,), (8,), (3, 50)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_rows_is_the_product(
    dtype: torch.dtype, shape: tuple[int, ...], multiplies: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "multiplies_bf16", lambda: multiplies)
    x, weight = torch.randn(*shape, IN).to(dtype), torch.randn(OUT, IN).to(dtype)
    bias = torch.randn(OUT).to(dtype) if biased else None
    with torch.no_grad():
        y = kernel.linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.shape == exact.shape
    # bf16 has 8 bits: a product that is rounded, and another time with its bias added, is off by two halves of them.
    rtol, atol = (2**-7, 2**-5) if dtype is torch.bfloat16 else (1e-6, 1e-4)
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("large", [0, 1 << 40])
def test_one_row_can_be_exported(large: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called or compiled."""
    monkeypatch.setitem(kernel.LARGE, dtype, large)
    layer = nn.Linear(12, 20).to(dtype)

    class Projection(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernel.linear(x, layer.weight, layer.bias)

    x = torch.randn(1, 12).to(dtype)
    with torch.no_grad():
        program = torch.export.export(Projection(), (x,), strict=False)
        torch.testing.assert_close(program.module()(x), layer(x))
    called = any("kvell.times_row" in str(node.target) for node in program.graph.nodes)
    assert called == (large == 0)


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and many, the latter in bf16, and neither for gradients, under autocast, or where the reference is
    asked for."""
    monkeypatch.setattr(kernel, "multiplies_bf16", lambda: False)
    weight = torch.randn(4, 8).bfloat16()
    one, many = torch.randn(1, 8).bfloat16(), torch.randn(kernel.WIDENED_FROM, 8).bfloat16()
    with torch.no_grad(), noted_choices() as made:
        kernel.linear(one, weight)
        kernel.linear(many, weight)
        kernel.linear(one.float(), weight.float())
        assert [choice.taken for choice in made] == ["one row", "widened", "one row"]
    with torch.no_grad(), noted_choices() as made:
        kernel.linear(many.float(), weight.float())
        kernel.linear(many[:3], weight)
        with kernels.use("reference"):
            kernel.linear(one, weight)
            kernel.linear(many, weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert kernel.linear(one, weight.float()).dtype == torch.bfloat16
            assert kernel.linear(one.float(), weight.float(), torch.zeros(4)).dtype == torch.bfloat16
    with noted_choices() as with_gradients:
        kernel.linear(one, weight)
        kernel.linear(many, weight)
    assert [choice.taken for choice in [*made, *with_gradients]] == ["reference"] * 8
