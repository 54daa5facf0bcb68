"""Compressed attention's kernels by themselves: what is picked, and what is attended to."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kvell import Cache
from kvell.cache import StreamSpec
from kvell.kernels import compressed as compressed_kernels
from kvell.kernels import top_k
from kvell.kernels.compressed import (
    MAX_BLOCK,
    WINDOW_BLOCK,
    compressed_attention_blocked,
    compressed_attention_joined,
    compressed_attention_reference,
    pick_blocked,
    pick_for_one,
    pick_reference,
)
from kvell.kernels.top_k import ranked, top_k_ascending, top_k_lowest_first, top_k_of_ranked


def tied(count: int, entries: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, weights and keys of small integers, exact in fp32, with many equal scores and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-1, 2, (count, 2, 4), generator=generator).float()
    weights = torch.randint(-1, 3, (count, 2), generator=generator).float()
    return query, weights, torch.randint(-1, 2, (entries, 4), generator=generator).float()


def pick_one_by_one(query, weights, keys, visible, top_k: int) -> torch.Tensor:
    """Each query alone, of whom not all see all entries."""
    alone = zip(query.split(1), weights.split(1), visible.split(1), strict=True)
    return torch.cat([pick_for_one(q, w, keys, v, top_k) for q, w, v in alone])


@pytest.mark.parametrize("run", [pick_blocked, pick_reference, pick_one_by_one])
@pytest.mark.parametrize(("count", "start"), [(1, 39), (40, 0), (MAX_BLOCK + 9, 3)])
@pytest.mark.parametrize("top_k", [1, 3, 8, 200])
def test_of_equal_scores_the_first_entries_are_picked(run, count: int, start: int, top_k: int) -> None:
    """transformers 5.23 takes those that torch.topk happens to return. Fewer visible entries than top_k, none at the
    beginning, leave picks of -1 behind the others."""
    visible = (torch.arange(start, start + count) + 1) // 4
    entries = int(visible[-1])
    query, weights, keys = tied(count, entries, seed=top_k)
    picks = run(query, weights, keys, visible, top_k)
    assert picks.shape == (count, min(top_k, entries))
    ties = 0
    for t in range(count):
        scores = [
            sum(
                int(w) * max(sum(int(a) * int(b) for a, b in zip(q, key, strict=True)), 0)
                for q, w in zip(*of, strict=True)
            )
            for key in keys[: visible[t]].tolist()
            for of in [(query[t].tolist(), weights[t].tolist())]
        ]
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        best = sorted(order[:top_k])
        assert picks[t].tolist() == best + [-1] * (picks.shape[1] - len(best))
        ties += len(order) > top_k and scores[order[top_k - 1]] == scores[order[top_k]]
    assert ties > 0 or count == 1 or top_k == 200, "nothing was tied"


@pytest.mark.parametrize("width", [1, 2, 7, 40])
@pytest.mark.parametrize("values", [1, 2, 3, 100])
def test_top_k_is_that_of_a_stable_sort(width: int, values: int) -> None:
    """Over rows of few different numbers, negative ones, zeros of both signs and unseen entries among them."""
    scores = torch.randint(0, values, (60, width)) - values / 2
    scores[torch.rand(60, width) < 0.3] = 0.0
    scores[torch.rand(60, width) < 0.1] *= -1.0
    scores[torch.rand(60, width) < 0.2] = float("-inf")
    for k in range(1, width + 1):
        wanted = [sorted(range(width), key=lambda j, row=row: (-row[j], j))[:k] for row in scores.tolist()]
        assert top_k_lowest_first(scores, k).tolist() == wanted
        for chosen in (top_k_ascending(scores, k), top_k_of_ranked(ranked(scores), k)):
            assert chosen.tolist() == [sorted(row) for row in wanted]


@pytest.mark.parametrize(("width", "k"), [(1, 1), (2, 1), (7, 3), (40, 40)])
@pytest.mark.parametrize("few", [True, False])
def test_top_k_without_sorting_is_that_of_a_stable_sort(
    few: bool, width: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step of one token is exported with where scores are few, ties and numbers that are none among them."""
    monkeypatch.setattr(top_k, "COMPARED", 60 * width**2 - (not few))

    class Choice(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return top_k_lowest_first(scores, k)

    scores = torch.randint(-2, 2, (60, width)).float()
    scores[:20][torch.rand(20, width) < 0.2] = torch.nan
    for infinite in (torch.inf, -torch.inf):
        scores[10:][torch.rand(50, width) < 0.2] = infinite
    program = torch.export.export(Choice(), (scores,), strict=False)
    assert any("sort" in str(node.target) for node in program.graph.nodes) == (not few)
    assert torch.equal(program.module()(scores), top_k_lowest_first(scores, k))


@pytest.mark.parametrize("values", [2, 9000, 2**24])
@pytest.mark.parametrize("width", [4096, 4099, 9001])
def test_top_k_of_long_rows_is_that_of_a_stable_sort(width: int, values: int) -> None:
    """Rows that are chosen from by groups: a score too many in one of them, and those beyond the last, are found."""
    scores = torch.randint(0, values, (30, width)).float()
    scores[:10, -7:] += values
    scores[10:20, 8::512] += values
    scores[torch.rand(30, width) < 0.2] = float("-inf")
    for k in (1, 8, 60, 84, 150):
        wanted = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(top_k_ascending(scores, k), wanted)


def test_top_k_without_asking_keeps_every_bit_of_the_order() -> None:
    """Of numbers next to each other, the smallest and the largest there are."""
    ordered = [-torch.inf, -3.4e38, -1.0000001, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38, torch.inf]
    order = torch.randperm(len(ordered))
    scores = torch.tensor(ordered)[order][None]
    for k in range(1, len(ordered) + 1):
        expected = (order >= len(ordered) - k).nonzero().T
        assert torch.equal(top_k_of_ranked(ranked(scores), k), expected)
        assert torch.equal(top_k_ascending(scores, k), expected)


@pytest.mark.parametrize("entries", [3, 12, 90])
@pytest.mark.parametrize(
    "run", [compressed_attention_blocked, compressed_attention_joined, compressed_attention_reference]
)
def test_a_pick_of_minus_one_is_no_entry(run, entries: int) -> None:
    """It must not be looked up from the end, and must have no weight; where all are -1 only the window is seen. Many
    entries are gathered by each query, few are masked: the same for both."""
    count, width, scale = 30, 8, 8**-0.5
    query, rows, sink = torch.randn(count, 2, width), torch.randn(count, width), torch.randn(2)
    far = torch.randn(entries, width)
    visible = torch.full((count,), entries)
    picks = torch.full((count, 3), -1)
    for t in range(count):
        some = torch.randperm(entries)[: t % 4].sort().values
        picks[t, : len(some)] = some
    ours = run(query, rows, far, visible, picks, sink, scale=scale, window=4)
    for t in range(count):
        seen = torch.cat([rows[max(t - 3, 0) : t + 1], far[picks[t][: t % 4]]])
        scores = (query[t] @ seen.T * scale).exp()
        wanted = scores @ seen / (sink.exp()[:, None] + scores.sum(1, keepdim=True))
        torch.testing.assert_close(ours[t], wanted, rtol=0, atol=1e-5)


@pytest.fixture
def _lazy_memory() -> Iterator[None]:
    """Memory that is only taken when it is written to, whatever other tests have asked for."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("entries", [0, 3, 12, 90])
@pytest.mark.parametrize("before", [0, 1, 5, 6, 9])
@pytest.mark.parametrize("count", [2, WINDOW_BLOCK, WINDOW_BLOCK + 1, 3 * WINDOW_BLOCK - 5])
def test_windows_and_entries_joined_are_one_softmax(
    count: int, before: int, entries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that begin before the sequence, end behind it, or see no entry yet, as the first queries do not."""
    monkeypatch.setattr(compressed_kernels, "BLOCK_NUMBERS", 1000)
    query, rows, far = (
        torch.randn(*shape, dtype=dtype) for shape in ((count, 3, 8), (before + count, 8), (entries, 8))
    )
    visible = (torch.arange(count) * (entries + 1) // count).clamp(max=entries)
    picks = torch.full((count, 4), -1)
    for t in range(count):
        some = torch.randperm(int(visible[t]))[:4].sort().values
        picks[t, : len(some)] = some
    for chosen in (None, picks):
        arguments = (query, rows, far, visible, chosen, 3 * torch.randn(3))
        ours = compressed_attention_joined(*arguments, scale=0.5, window=7)
        wanted = compressed_attention_reference(*arguments, scale=0.5, window=7)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, wanted, atol=3e-2 if dtype is torch.bfloat16 else 1e-5, rtol=0)


def test_keys_are_read_where_they_lie() -> None:
    """torch's streaming attention takes it on trust that a row's numbers lie side by side."""
    query, rows, far = (torch.randn(shape).mT.contiguous().mT for shape in ((70, 3, 8), (75, 8), (90, 8)))
    sink, visible = torch.randn(3), torch.full((70,), 90)
    for picks in (None, torch.arange(4).expand(70, -1)):
        ours, wanted = (
            run(query, rows, far, visible, picks, sink, scale=0.5, window=7)
            for run in (compressed_attention_joined, compressed_attention_reference)
        )
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_lazy_memory")
def test_rows_beyond_two_to_the_31_numbers_are_found() -> None:
    """Places computed in int32 overflow there. The stream's memory is reserved and never touched but at its ends."""
    width, last = 512, 2**31 // 512 + 100
    spec = StreamSpec("entry", width, stride=4)
    cache = Cache({(0, "entry"): spec}, dtype=torch.bfloat16, max_length=4 * (last + 1))
    stream = cache.sequences[0].streams[0, "entry"]
    ends = torch.randn(2, width).bfloat16()
    stream.buffer[0], stream.count = ends[0], last
    cache.sequences[0].length = 4 * last
    entries = cache.append(0, (0, "entry"), ends[1:], 4)
    assert entries.numel() > 2**31
    assert torch.equal(entries[-1], ends[1])
    query, rows, sink = torch.randn(1, 2, width).bfloat16(), torch.randn(1, width).bfloat16(), torch.zeros(2)
    arguments = {"scale": width**-0.5, "window": 1}
    visible = torch.tensor([last + 1])
    far = compressed_attention_blocked(
        query, rows, entries, visible, torch.tensor([[0, last, -1]]), sink, **arguments
    )
    near = compressed_attention_blocked(query, rows, ends, torch.tensor([2]), None, sink, **arguments)
    torch.testing.assert_close(far, near)
