"""Attention's fast version gives what its reference gives, in every way that it takes."""

import pytest
import torch
from torch import Tensor

from kvell.kernels.attention import QUERY_BLOCK, attention, attention_reference

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def rows(count: int, heads: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, heads, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(queries: int, held: int, window: int | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The fast version's and the reference's outputs for a sequence's last `queries` of `held` rows."""
    query, key, value = rows(queries, HEADS, 0, dtype), rows(held, KV_HEADS, 1, dtype), rows(held, KV_HEADS, 2, dtype)
    with torch.no_grad():
        fast = attention(query, [key], [value], [queries], scale=0.3, window=window)
        return fast, attention_reference(query, key, value, scale=0.3, window=window)


@pytest.mark.parametrize("window", [None, 1, 5, 70, 300])
@pytest.mark.parametrize(
    ("queries", "held"),
    [
        (1, 1),
        (1, 700),
        (1, 2049),
        (2, 2),
        (3, 40),
        (130, 130),
        (130, 133),
        (QUERY_BLOCK + 1, QUERY_BLOCK + 1),
        (2 * QUERY_BLOCK, 2 * QUERY_BLOCK + 4),
        (3 * QUERY_BLOCK + 7, 4 * QUERY_BLOCK),
    ],
)
def test_the_fast_version_agrees_with_the_reference(queries: int, held: int, window: int | None) -> None:
    fast, reference = both(queries, held, window)
    torch.testing.assert_close(fast, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float64, 1e-6)])
def test_so_it_does_in_other_dtypes(window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    fast, reference = both(300, 500, window, dtype)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize(("queries", "held"), [(200, 200), (150, 260)])
def test_gradients_agree(queries: int, held: int, window: int | None) -> None:
    def gradients(version: str) -> list[Tensor]:
        query, key, value = rows(queries, HEADS, 0), rows(held, KV_HEADS, 1), rows(held, KV_HEADS, 2)
        wanted = [x.requires_grad_() for x in (query, key, value)]
        if version == "fast":
            y = attention(query, [key], [value], [queries], scale=0.3, window=window)
        else:
            y = attention_reference(query, key, value, scale=0.3, window=window)
        return list(torch.autograd.grad((y * rows(queries, HEADS, 3)).sum(), wanted))

    for ours, theirs in zip(gradients("fast"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sequences_of_one_length_are_taken_together() -> None:
    counts = [150, 150, 150]
    query, key, value = (rows(450, heads, seed) for heads, seed in ((HEADS, 0), (KV_HEADS, 1), (KV_HEADS, 2)))
    keys, values = list(key.split(counts)), list(value.split(counts))
    together = attention(query, keys, values, counts, scale=0.3, window=20)
    alone = [
        attention_reference(*own, scale=0.3, window=20) for own in zip(query.split(counts), keys, values, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
