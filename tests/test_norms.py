"""Norms in bf16 are those of fp32, rounded once: on the CPU and, where there is one, on a GPU."""

import pytest
import torch

from kvell.layers.norms import RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("of_weight", [None, torch.bfloat16, torch.float32])
def test_only_the_result_is_rounded_to_bf16(of_weight: torch.dtype | None, rows: int, recorded: bool) -> None:
    norm = RMSNorm(200, 1e-6, weighted=of_weight is not None)
    x = torch.randn(rows, 200).bfloat16()
    if norm.weight is not None and of_weight is not None:
        norm = norm.to(of_weight)
        torch.nn.init.normal_(norm.weight)
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    if norm.weight is not None:
        exact *= norm.weight.double()
    with torch.set_grad_enabled(recorded):
        found = norm.to(DEVICE)(x.to(DEVICE))
    assert found.dtype == torch.bfloat16
    assert found.requires_grad == (recorded and norm.weight is not None)
    torch.testing.assert_close(found.cpu().double(), exact, atol=0, rtol=2**-8 + 1e-6)


@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (5, 3, 16)])
def test_norms_are_the_same_whether_gradients_are_recorded(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(16, 1e-2)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *(1 for _ in shape[1:]))
    x[0] = 0
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt())
    torch.testing.assert_close(norm(x.requires_grad_()), norm(kept))
    assert torch.equal(x, kept)
