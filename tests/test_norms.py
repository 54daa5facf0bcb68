"""Norms in bf16 are those of fp32, rounded once: on the CPU and, where there is one, on a GPU."""

import pytest
import torch

from kvell.layers.norms import RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("of_weight", [None, torch.bfloat16, torch.float32])
def test_only_the_result_is_rounded_to_bf16(of_weight: torch.dtype | None) -> None:
    norm = RMSNorm(200, 1e-6, weighted=of_weight is not None)
    x = torch.randn(300, 200).bfloat16()
    if norm.weight is not None and of_weight is not None:
        norm = norm.to(of_weight)
        torch.nn.init.normal_(norm.weight)
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    if norm.weight is not None:
        exact *= norm.weight.double()
    found = norm.to(DEVICE)(x.to(DEVICE))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu().double(), exact, atol=0, rtol=2**-8 + 1e-6)
