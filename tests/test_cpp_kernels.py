"""Kernels in C++ against their references, on every way of laying out rows, and whole models that run on them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import VOCAB, configs, random_model
from torch import Tensor

from kvell import ModelConfig, kernels
from kvell.kernels import attention as in_torch
from kvell.kernels.attention import attention, attention_reference
from kvell.kernels.compressed import (
    compressed_attention,
    compressed_attention_reference,
    pick,
)
from kvell.kernels.cpp import attention as in_cpp
from kvell.kernels.cpp import decode
from kvell.kernels.cpp import pick as pick_in_cpp
from kvell.kernels.cpp import sinkhorn as sinkhorn_in_cpp
from kvell.kernels.hyper_connections import fast_sinkhorn, sinkhorn
from kvell.kernels.table import noted_choices

FLOAT, BFLOAT = torch.float32, torch.bfloat16
# Heads of this width, so many KV heads, and query heads for each: vectors of every length, more heads than registers.
SHAPES = [(64, 2, 2), (2, 1, 1), (6, 2, 3), (5, 1, 2), (80, 2, 5), (128, 1, 8), (16, 3, 40)]


@pytest.fixture(autouse=True)
def _in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything runs in C++ here, and what is compiled is kept for the next test."""
    with kernels.use("cpp", tmp_path_factory.getbasetemp() / "cpp"):
        yield


def rows(count: int, heads: int, width: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(count, heads, width).to(dtype)


def expected(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], **how: Any
) -> Tensor:
    own = zip(query.split(list(counts)), keys, values, strict=True)
    return torch.cat([attention_reference(*each, **how) for each in own])


def assert_near(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype
    tolerance = 2e-2 if actual.dtype is BFLOAT else 2e-5
    torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("width", "kv_heads", "group"), SHAPES)
def test_one_query_each(width: int, kv_heads: int, group: int, dtype: torch.dtype) -> None:
    for lengths in ([1], [63], [64], [65], [3000], [3, 700, 2]):
        query = rows(len(lengths), kv_heads * group, width, dtype)
        keys, values = ([rows(length, kv_heads, width, dtype) for length in lengths] for _ in range(2))
        counts = [1] * len(lengths)
        for window in (None, 1, 5, 128):
            assert not decode.refuses(query, keys, values, counts)
            y = attention(query, keys, values, counts, scale=0.3, window=window)
            assert_near(y, expected(query, keys, values, counts, scale=0.3, window=window))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_query_each_by_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        query, lengths = rows(3, 4, 64), [40_000, 1, 5000]
        keys, values = ([rows(length, 2, 64) for length in lengths] for _ in range(2))
        y = attention(query, keys, values, [1, 1, 1], scale=0.3)
    finally:
        torch.set_num_threads(before)
    assert_near(y, expected(query, keys, values, [1, 1, 1], scale=0.3))


def place(own: Tensor) -> decode.Place:
    return own.data_ptr(), own.stride(0), len(own)


def test_the_newest_rows_are_written_where_they_belong() -> None:
    """To the places left for them, to those where they are kept besides, and nowhere else."""
    query, key, value = rows(2, 4, 8), rows(2, 2, 8), rows(2, 2, 8)
    held = [[torch.full((length + 1, 16), 7.0) for length in (5, 2)] for _ in range(2)]
    for every in held:
        for own in every:
            own[:-1] = torch.randn(len(own) - 1, 16)
    before = [[own[:-1].clone() for own in every] for every in held]
    kept = torch.full((3, 16), 7.0)
    keys, values = held
    entries = [
        decode.entry(place(keys[0]), place(values[0]), 4, None, kept_key=kept[:1].data_ptr()),
        decode.entry(place(keys[1]), place(values[1]), 4, 2, kept_value=kept[1:2].data_ptr()),
    ]
    y = decode.decode_operator(FLOAT, 8, 2)(query, key, value, torch.tensor(entries), 0.3)
    for new, every, old in zip((key, value), held, before, strict=True):
        for index, own in enumerate(every):
            torch.testing.assert_close(own, torch.cat([old[index], new[index].flatten()[None]]), atol=0, rtol=0)
    torch.testing.assert_close(kept, torch.stack([key[0].flatten(), value[1].flatten(), kept[2]]), atol=0, rtol=0)
    for index, window in enumerate((None, 2)):
        seen = [own.unflatten(1, (2, 8)) for own in (keys[index], values[index])]
        wanted = attention_reference(query[index : index + 1], *seen, scale=0.3, window=window)
        assert_near(y[index : index + 1], wanted)


CUTS = [(1, 1), (5, 5), (7, 100), (130, 130), (130, 300), (70, 71)]


@pytest.mark.parametrize(("width", "kv_heads", "group"), SHAPES)
def test_many_queries(width: int, kv_heads: int, group: int) -> None:
    for count, held in CUTS:
        query, key, value = (
            rows(count, kv_heads * group, width),
            rows(held, kv_heads, width),
            rows(held, kv_heads, width),
        )
        for window in (None, 1, 20, 128):
            y = in_cpp.causal_attention(query, key, value, scale=0.3, window=window)
            assert_near(y, attention_reference(query, key, value, scale=0.3, window=window))


@pytest.mark.parametrize("window", [1000, 1023, 1024, 1500, None])
def test_several_blocks_of_queries_with_long_windows(window: int | None) -> None:
    """Of which each has tiles that are seen in part at both ends."""
    query, key, value = rows(600, 2, 16), rows(2600, 1, 16), rows(2600, 1, 16)
    y = in_cpp.causal_attention(query, key, value, scale=0.3, window=window)
    assert_near(y, attention_reference(query, key, value, scale=0.3, window=window))


def test_many_queries_in_bf16() -> None:
    query, key, value = rows(70, 6, 16, BFLOAT), rows(100, 2, 16, BFLOAT), rows(100, 2, 16, BFLOAT)
    y = in_cpp.causal_attention(query, key, value, scale=0.3, window=None)
    assert_near(y, attention_reference(query, key, value, scale=0.3))


def test_sequences_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("torch's attention ran")

    monkeypatch.setattr(in_torch, "_several", never)
    for counts, lengths in (([40, 40], [40, 40]), ([3, 1, 9], [50, 1, 9])):
        query = rows(sum(counts), 4, 8)
        keys, values = ([rows(length, 2, 8) for length in lengths] for _ in range(2))
        y = attention(query, keys, values, counts, scale=0.3, window=6)
        assert_near(y, expected(query, keys, values, counts, scale=0.3, window=6))


@pytest.mark.parametrize("count", [1, 40])
def test_rows_may_lie_apart_and_what_lies_between_is_not_read(count: int) -> None:
    def apart(held: int) -> Tensor:
        """Views whose rows, and whose heads, have others' between them, and others' before and behind."""
        around = torch.full((held + 90, 2, 2, 8), float("nan"))
        around[60 : 60 + held, :, 0] = torch.randn(held, 2, 8)
        return around[60 : 60 + held, :, 0]

    query, key, value = rows(count, 4, 8), apart(50), apart(50)
    for layout in (lambda x: x, lambda x: x.contiguous(), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        y = attention(query, [layout(key)], [layout(value)], [count], scale=0.3)
        assert_near(y, attention_reference(query, key, value, scale=0.3))
    # Rows that no query sees: older than any window, or behind the last one.
    held = torch.full((200, 2, 8), float("nan"))
    held[100 - count + 1 - 6 : 100] = torch.randn(count + 5, 2, 8)
    y = attention(query, [held[:100]], [held[:100]], [count], scale=0.3, window=6)
    assert_near(y, attention_reference(query, held[:100], held[:100], scale=0.3, window=6))


@pytest.mark.parametrize("count", [1, 40])
def test_what_is_not_a_number_shows(count: int) -> None:
    query, key, value = rows(count, 4, 16), rows(90, 2, 16), rows(90, 2, 16)
    for broken in (key, value):
        for bits in (0x7FC00000, 0x7FC00001, -1):
            broken[30, 1, 3] = torch.tensor(bits, dtype=torch.int32).view(FLOAT)
            y = attention(query, [key], [value], [count], scale=0.3)
            assert torch.equal(y.isnan().any(-1), torch.tensor([False, False, True, True]).expand(count, 4))
        broken[30, 1, 3] = 0.0


@pytest.mark.parametrize("count", [1, 40])
def test_scores_of_any_size(count: int) -> None:
    query, key, value = rows(count, 4, 16), rows(90, 2, 16), rows(90, 2, 16)
    for size in (0.0, 1e-20, 300.0, -1e4):
        y = attention(query * size, [key], [value], [count], scale=1.0)
        assert_near(y, attention_reference(query * size, key, value, scale=1.0))


@pytest.mark.parametrize("recorded", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_where_gradients_are_recorded_torch_computes(recorded: int, count: int) -> None:
    inputs = [rows(count, 2, 8), rows(9, 1, 8), rows(9, 1, 8)]
    inputs[recorded].requires_grad_()
    query, key, value = inputs
    attention(query, [key], [value], [count], scale=0.3).sum().backward()
    gradient = inputs[recorded].grad
    assert gradient is not None
    (wanted,) = torch.autograd.grad(attention_reference(query, key, value, scale=0.3).sum(), inputs[recorded])
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_not_of_one_dtype_torch_computes() -> None:
    """As under autocast."""
    query, key = rows(3, 2, 8), rows(9, 1, 8)
    assert not decode.refuses(query[:1], [key], [key], [1])
    assert not in_cpp.refuses(query, key, key)
    for other in (key.double(), key.half(), key.bfloat16()):
        for inputs in ((query, other, key), (query, key, other), (query.to(other), other, key)):
            assert decode.refuses(inputs[0][:1], [inputs[1]], [inputs[2]], [1])
            assert in_cpp.refuses(*inputs)
    assert decode.refuses(query.double()[:1], [key.double()], [key.double()], [1])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("heads", "width"), [(8, 64), (3, 5), (64, 64)])
def test_one_query_over_a_window_and_entries(heads: int, width: int, dtype: torch.dtype) -> None:
    sink = 3 * torch.randn(heads)
    for held, entries, seen, picked in ((1, 0, 0, None), (5, 9, 7, None), (400, 300, 300, 20), (30, 50, 3, 8)):
        query, window = torch.randn(1, heads, width).to(dtype), torch.randn(held, width).to(dtype)
        far, visible, picks = torch.randn(entries, width).to(dtype), torch.tensor([seen]), None
        if picked is not None:
            best = torch.randperm(seen)[:picked].sort().values
            picks = torch.cat([best, best.new_full((picked - len(best),), -1)])[None]
        inputs = (query, window, far, visible, picks, sink)
        with noted_choices() as made:
            y = compressed_attention(*inputs, scale=0.3, window=128)
        assert [choice.taken for choice in made] == ["c++, one query"]
        assert_near(y, compressed_attention_reference(*inputs, scale=0.3, window=128))
    with torch.enable_grad():
        assert decode.refuses_shared(*inputs[:5], sink.requires_grad_())
    assert decode.refuses_shared(torch.zeros(1, 65, 64, dtype=dtype), *inputs[1:5], torch.zeros(65))


def chosen(scores: Tensor, visible: Sequence[int], k: int) -> list[list[int]]:
    """The picks of as many queries of which all give the entries these very scores: relu(s) - relu(-s) is s."""
    count = len(visible)
    query, weights = torch.tensor([[1.0], [-1.0]]).expand(count, 2, 1), torch.tensor([1.0, -1.0]).expand(count, 2)
    picks: list[list[int]] = pick(query, weights, scores[:, None], torch.tensor(visible), k).tolist()
    return picks


@pytest.mark.parametrize("count", [1, 2])
def test_zeros_are_chosen_where_small_numbers_count_as_zero(count: int) -> None:
    scores = torch.zeros(3000)
    scores[5::100] = -1.0
    torch.set_flush_denormal(True)
    try:
        picks = chosen(scores, [3000] * count, 9)
    finally:
        torch.set_flush_denormal(False)
    assert picks == [[0, 1, 2, 3, 4, 6, 7, 8, 9]] * count


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "ascending", "descending", "infinite"])
@pytest.mark.parametrize(("length", "k"), [(1, 1), (100, 9), (5000, 64), (3000, 32), (70, 69)])
def test_the_largest_scores_are_chosen_and_of_equal_ones_the_first(length: int, k: int, kind: str) -> None:
    for visible in ([length], [length // 2], [0], [length, 0, length // 3, length - 1] + [length] * 40):
        scores = torch.randn(length)
        if kind == "ties":
            scores = (2 * scores).round()
        elif kind == "equal":
            scores = torch.zeros_like(scores)
        elif kind == "infinite":
            scores[scores < 0] = float("-inf")
            scores[scores > 1] = float("inf")
        elif kind != "normal":
            scores = scores.sort(descending=kind == "descending").values
        for among, own in zip(visible, chosen(scores, visible, k), strict=True):
            best = scores[:among].sort(descending=True, stable=True).indices[:k].sort().values
            assert own == best.tolist() + [-1] * (k - len(best))


def test_what_is_not_a_number_is_the_largest_as_in_torch() -> None:
    scores = torch.tensor([2.0, float("nan"), -5.0, float("nan"), float("-inf")])
    for count in (1, 3):
        for version in ("cpp", "reference", "fast"):
            with kernels.use(version):
                assert chosen(scores, [5] * count, 2) == [[1, 3]] * count


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(
    ("heads", "width", "count", "length"),
    [
        *((4, 8, count, length) for count, length in ((1, 60), (1, 1025), (50, 60), (2, 1025), (700, 9000))),
        *((3, 10, count, 1500) for count in (1, 33)),
        *((64, 16, count, 5000) for count in (1, 40)),
        *((17, 2, count, 100) for count in (1, 5)),
        *((1, 5, count, 70) for count in (1, 5)),
    ],
)
def test_picks(
    count: int, length: int, heads: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the reference, but where two scores are so near that either may be the larger one. More queries, and
    entries, than are worked on at once."""
    asked, ask = [], pick_in_cpp.pick_operator
    monkeypatch.setattr(pick_in_cpp, "pick_operator", lambda *shape: asked.append(shape) or ask(*shape))
    query, keys = torch.randn(count, heads, width).to(dtype), torch.randn(length, width).to(dtype)
    weights, visible = torch.randn(count, heads), torch.randint(1, length + 1, (count,))
    visible[0], keys[-1] = length, 9 * keys[-1]  # whose last entry is often among the best
    picks = pick(query.requires_grad_(), weights, keys, visible, 7)
    assert picks.shape == (count, 7)
    assert asked == [(dtype, heads, width)]
    scores = (weights.double()[:, None] @ (query.detach().double() @ keys.double().T).relu_()).squeeze(1)
    scores[torch.arange(length) >= visible[:, None]] = float("-inf")
    best = scores.topk(7).values
    for own, row, nearest, among in zip(picks, scores, best, visible.tolist(), strict=True):
        there = own[own >= 0]
        assert len(there) == min(among, 7)
        assert there.tolist() == sorted(set(there.tolist()))
        found = row[there].sort(descending=True).values
        torch.testing.assert_close(found, nearest[: len(there)], atol=1e-4, rtol=1e-4)


def test_keys_that_the_kernel_cannot_read_are_torchs() -> None:
    query, keys = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(60, 8, dtype=torch.float64)
    weights, visible = torch.randn(3, 4), torch.tensor([60, 9, 2])
    picks = pick(query, weights, keys, visible, 7)
    with kernels.use("reference"):
        assert torch.equal(picks, pick(query, weights, keys, visible, 7))


@pytest.mark.parametrize(("count", "length"), [(1, 20_000), (700, 9000), (40, 20_000)])
def test_picks_by_any_number_of_threads(count: int, length: int) -> None:
    """More queries than have room for their scores at once, or fewer, whose entries threads share."""
    query, weights, keys = torch.randn(count, 4, 8), torch.rand(count, 4), torch.randn(length, 8)
    visible = torch.randint(0, length + 1, (count,))
    visible[0] = length
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(pick(query, weights, keys, visible, 64))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("iterations", "eps"), [(1, 1e-6), (2, 1e-2), (20, 1e-6)])
def test_sinkhorn(streams: int, iterations: int, eps: float) -> None:
    """Of one token, of as many as fill vectors and of a few more or less, shared by threads or not."""
    for tokens in (0, 1, 2, 4, 5, 15, 16, 33, 600):
        logits = 9 * torch.randn(tokens, streams, streams)
        assert not sinkhorn_in_cpp.refuses(logits, iterations, eps)
        assert_near(fast_sinkhorn(logits, iterations, eps), sinkhorn(logits, iterations, eps))
    apart = torch.randn(20, 2 * streams, streams)[:, ::2]
    assert_near(fast_sinkhorn(apart, iterations, eps), sinkhorn(apart, iterations, eps))


@pytest.mark.parametrize("tokens", [3, 40])
def test_sinkhorn_of_what_is_not_a_number(tokens: int) -> None:
    """Its token alone sees it."""
    logits = torch.randn(tokens, 4, 4)
    for broken in (torch.nan, torch.inf):
        logits[2, 1, 3] = broken
        expected = sinkhorn(logits, 20, 1e-6)
        assert expected.isnan().any(dim=(1, 2)).tolist() == [token == 2 for token in range(tokens)]
        found = fast_sinkhorn(logits, 20, 1e-6)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5, equal_nan=True)
    logits[2, 1, 3] = -torch.inf
    assert_near(fast_sinkhorn(logits, 20, 1e-6), sinkhorn(logits, 20, 1e-6))


def test_sinkhorn_that_the_kernel_cannot_compute_is_torchs() -> None:
    doubles, recorded = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, requires_grad=True)
    torch.testing.assert_close(fast_sinkhorn(doubles, 9, 1e-6), sinkhorn(doubles, 9, 1e-6), atol=1e-12, rtol=1e-12)
    found, wanted = (
        torch.autograd.grad(run(recorded, 9, 1e-6).square().sum(), recorded) for run in (fast_sinkhorn, sinkhorn)
    )
    torch.testing.assert_close(found, wanted)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(config=configs(), seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 9), max_size=4))
def test_models_agree_with_themselves(config: ModelConfig, seed: int, sizes: list[int]) -> None:
    """In chunks and token by token, in a batch of two."""
    model = random_model(config, seed)
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        with kernels.use("reference"):
            whole = model(tokens)
        cache, at = model.make_cache(2), 0
        for size in [*sizes, *[1] * 20]:
            logits = model(tokens[:, at : at + size], cache=cache)
            torch.testing.assert_close(logits, whole[:, at : at + size], atol=1e-4, rtol=1e-4)
            at += size
            if at >= 20:
                break


def test_code_is_kept_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every folder that is named, however it is; and what is damaged there is named."""
    monkeypatch.chdir(tmp_path)
    query = rows(1, 1, 4)
    for folder in ("relative", tmp_path / "with spaces"):
        with kernels.use("cpp", folder):
            attention(query, [query], [query], [1], scale=1.0)
    assert [file.suffix for file in sorted(tmp_path.rglob("*")) if file.is_file()] == [".so", ".so"]
    (file,) = (tmp_path / "relative").iterdir()
    file.unlink()  # this process has it mapped: it must not be cut short
    file.write_bytes(b"")
    code = (
        "import torch; from kvell import kernels; from kvell.kernels.attention import attention\n"
        "x = torch.zeros(1, 1, 4)\n"
        "with kernels.use('cpp', 'relative'): attention(x, [x], [x], [1], scale=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = f"InputError: compiled code in {file} cannot be read: delete it, and it is made anew"
    assert done.stderr.splitlines()[-1].endswith(said)


def test_without_a_compiler_it_is_said_what_else_to_do(tmp_path: Path) -> None:
    code = (
        "import torch; from pathlib import Path; from kvell import kernels\n"
        "from kvell.kernels.attention import attention\n"
        "x = torch.zeros(1, 1, 2)\n"
        f"with kernels.use('cpp', Path({str(tmp_path)!r})): attention(x, [x], [x], [1], scale=1)"
    )
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(
        "InputError: compile: no C++ compiler works here: install g++, name another in the environment's CXX, or do "
        "without kernels in C++"
    )
    assert not any(tmp_path.iterdir())
