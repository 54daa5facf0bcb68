"""All ways of applying chosen experts to their tokens."""

from typing import Any

import pytest
import torch

from kvell.kernels.experts import (
    experts_gathered,
    experts_grouped,
    experts_indexed,
    experts_of_groups,
    experts_reference,
)
from kvell.layers.feed_forward import GatedUnit

WAYS = [experts_gathered, experts_grouped, experts_indexed, experts_of_groups]


@pytest.mark.parametrize("run", WAYS)
def test_experts_run_in_every_way_alike(run: Any) -> None:
    """Four experts, one that nobody chose, and choices of none."""
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    chosen = torch.tensor([[0, 1], [1, 4], [3, 0], [4, 4], [0, 3]])
    gate_up, down, unit = torch.randn(4, 8, 8), torch.randn(4, 8, 4), GatedUnit("silu", 0.7)
    expected = experts_reference(x, weights, chosen, gate_up, down, unit)
    torch.testing.assert_close(run(x, weights, chosen, gate_up, down, unit), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", WAYS)
def test_a_choice_of_none_adds_nothing_whatever_an_expert_would_give(run: Any) -> None:
    x, chosen = torch.full((2, 8), 60000.0), torch.tensor([[2, 2], [2, 2]])
    gate_up, down = torch.full((2, 8, 8), 1e30), torch.full((2, 8, 4), 1e30)
    y = run(x, torch.rand(2, 2), chosen, gate_up, down, GatedUnit("silu"))
    assert torch.equal(y, torch.zeros_like(x))
