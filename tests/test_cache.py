"""What a cache holds, what it reserves, and what it refuses."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import random_model
from torch import Tensor

import kvell
from kvell import Cache, CacheError, CheckpointError, Decoder, ModelConfig
from kvell.cache import StreamSpec
from kvell.cache.stream import BLOCK_ROWS, Stream
from kvell.config import DraftConfig, LayerConfig
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.rotary import DefaultRotary

ROW_BYTES = 2 * 1 * 8 * 4  # a key and a value, one KV head of 8 channels in fp32


def small_config(*windows: int | None, shared: bool = True) -> ModelConfig:
    """One layer per window and, where shared, one more that reads the last of them."""
    rotary = DefaultRotary(theta=100.0)
    attentions = [
        GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8, rotary=rotary, sliding_window=window)
        for window in windows
    ]
    if shared:
        attentions.append(attentions[-1].model_copy(update={"kv_source": len(windows) - 1}))
    layers = tuple(LayerConfig(attention=a, feed_forward=GatedMLP(intermediate_size=8)) for a in attentions)
    return ModelConfig(vocab_size=31, hidden_size=16, max_positions=4096, layers=layers)


@pytest.fixture
def model() -> Decoder:
    return random_model(small_config(7, None))


def feed(model: Decoder, cache: Cache, count: int) -> Tensor:
    return model(torch.randint(0, 31, (cache.batch_size, count)), cache=cache, last_only=True)


@settings(max_examples=50, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    past=st.one_of(st.none(), st.integers(0, 150)),
    max_rewind=st.integers(0, 40),
)
def test_a_stream_holds_the_newest_rows_within_its_bound(
    chunks: list[int], past: int | None, max_rewind: int
) -> None:
    spec = StreamSpec("rows", 2, past)
    cache = Cache({(0, "rows"): spec}, max_rewind=max_rewind)
    total = 0
    for count in chunks:
        held = cache.sequences[0].streams[0, "rows"].count
        rows = torch.arange(total, total + count)[:, None].expand(-1, 2).float()
        cache.check_step([count])
        visible = cache.append(0, (0, "rows"), rows, count)
        cache.end_step([count])
        total += count
        assert visible[:, 0].tolist() == list(range(total - count - held, total))
        kept = total if past is None else min(total, past + min(max_rewind, total))
        stream = cache.sequences[0].streams[0, "rows"]
        assert stream.held[:, 0].tolist() == list(range(total - kept, total))
        assert cache.nbytes == kept * 2 * 4
        assert cache.nbytes <= cache.allocated_nbytes <= cache.nbytes + cache.nbytes // 8 + BLOCK_ROWS * 2 * 4


def test_the_bytes_are_the_sum_of_the_streams(model: Decoder) -> None:
    cache = model.make_cache(batch_size=2, max_rewind=3)
    for total in (5, 6, 9, 40):
        feed(model, cache, total - cache.lengths[0])
        windowed = min(total, 6 + 3)
        assert cache.nbytes == 2 * ROW_BYTES * (windowed + total)


def test_a_shared_layer_holds_nothing(model: Decoder) -> None:
    assert {layer for layer, _ in model.make_cache().specs} == {0, 1}


def test_a_reserved_cache_allocates_exactly_and_refuses_more(model: Decoder) -> None:
    cache = model.make_cache(max_length=50, max_rewind=2)
    reserved = ROW_BYTES * (50 + 6 + 2)
    assert cache.allocated_nbytes == reserved
    for _ in range(10):
        feed(model, cache, 5)
        assert cache.allocated_nbytes == reserved
    assert cache.nbytes == reserved
    with pytest.raises(CacheError, match="max_length=50 tokens, not 51"):
        feed(model, cache, 1)
    assert cache.lengths == [50]
    assert cache.fork().allocated_nbytes == reserved


def test_no_step_copies_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = 0
    move = Stream._move

    def counting_move(stream: Stream, rows: Tensor, capacity: int) -> None:
        nonlocal moved
        moved += len(rows)
        move(stream, rows, capacity)

    monkeypatch.setattr(Stream, "_move", counting_move)
    for past in (None, 511):
        moved = 0
        cache = Cache({(0, "rows"): StreamSpec("rows", 1, past)})
        for _ in range(5000):
            cache.check_step([1])
            cache.append(0, (0, "rows"), torch.zeros(1, 1), 1)
            cache.end_step([1])
        assert moved < 10 * 5000  # copying the past at every step would move millions


def test_memory_is_given_back_by_a_long_rewind(model: Decoder) -> None:
    cache = model.make_cache(max_rewind=2000)
    feed(model, cache, 2000)
    cache.rewind(1990)
    assert cache.allocated_nbytes <= cache.nbytes * 9 / 8 + BLOCK_ROWS * 2 * ROW_BYTES


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (5, "cannot rewind sequence 0 by 5: 4 tokens can be taken back now"),
        (21, "cannot rewind sequence 0 by 21: it holds 20 tokens"),
        (-1, "negative number of tokens: -1"),
        ([1, 1], "2 amounts for 1 sequences"),
    ],
)
def test_a_rewind_too_far_is_refused_and_changes_nothing(model: Decoder, amount: int, message: str) -> None:
    cache = model.make_cache(max_rewind=4)
    feed(model, cache, 20)
    before = cache.nbytes
    with pytest.raises(CacheError, match=message):
        cache.rewind(amount)
    assert (cache.lengths, cache.nbytes) == ([20], before)


def test_what_was_taken_back_cannot_be_taken_back_again(model: Decoder) -> None:
    cache = model.make_cache(max_rewind=4)
    feed(model, cache, 20)
    cache.rewind(3)
    assert cache.rewindable == [1]
    with pytest.raises(CacheError, match="1 tokens can be taken back"):
        cache.rewind(2)
    feed(model, cache, 2)
    assert cache.rewindable == [3]


def test_a_saved_cache_of_another_model_is_refused(model: Decoder, tmp_path: Path) -> None:
    cache = model.make_cache()
    feed(model, cache, 5)
    cache.save(tmp_path / "state")
    other_weights = random_model(model.config, seed=1)
    with pytest.raises(CacheError, match="saved by another model"):
        Cache.load(tmp_path / "state", other_weights)
    with pytest.raises(CacheError, match="saved by another model"):
        Cache.load(tmp_path / "state", random_model(small_config(8, None)))
    assert Cache.load(tmp_path / "state", model).lengths == [5]


@torch.no_grad()
def test_a_saved_cache_of_a_model_of_which_one_row_differs_is_refused(tmp_path: Path) -> None:
    model = random_model(small_config(None).model_copy(update={"vocab_size": 900}))
    model.make_cache().save(tmp_path / "state")
    for name, row in (("embedding.weight", 0), ("embedding.weight", 451), ("layers.0.attention.o_proj.weight", 3)):
        values = model.get_parameter(name)[row]
        kept = values.clone()
        values += 1e-4
        with pytest.raises(CacheError, match="saved by another model"):
            Cache.load(tmp_path / "state", model)
        values.copy_(kept)
    assert Cache.load(tmp_path / "state", model).lengths == [0]


def test_a_damaged_missing_or_impossible_cache_file_is_named(model: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match=r"could not save .* no file can have this name"):
        model.make_cache().save(tmp_path / "a\0b")
    with pytest.raises(CacheError, match=f"no such file: {path}"):
        Cache.load(path, model)
    cache = model.make_cache()
    feed(model, cache, 5)
    cache.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CacheError, match=f"{path} is not a readable cache file"):
        Cache.load(path, model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": 1.0}, "batch_size must be a whole number, not 1.0"),
        ({"max_rewind": -1}, "max_rewind must be at least 0, not -1"),
        ({"max_rewind": 1.5}, "max_rewind must be a whole number, not 1.5"),
        ({"max_length": 8.0}, "max_length must be a whole number, not 8.0"),
        ({"max_length": 2**50}, f"max_length={2**50} for 1 sequences: cpu has no memory for "),
        ({"max_length": 2**70}, "max_length must be at most "),
    ],
)
def test_a_cache_that_cannot_be_made_is_refused(model: Decoder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=f"^{message}"):
        model.make_cache(**settings)


def test_caches_that_do_not_fit_together_do_not_merge(model: Decoder) -> None:
    with pytest.raises(CacheError, match="max_rewind differs"):
        Cache.merge([model.make_cache(), model.make_cache(max_rewind=1)])
    with pytest.raises(CacheError, match="model differs"):
        Cache.merge([model.make_cache(), random_model(model.config, seed=1).make_cache()])
    with pytest.raises(CacheError, match="at least one"):
        Cache.merge([])


def test_a_batch_of_the_wrong_size_is_refused(model: Decoder) -> None:
    cache = model.make_cache(batch_size=2)
    with pytest.raises(CacheError, match="the step has 3 sequences, the cache 2"):
        model(torch.zeros(3, 1, dtype=torch.long), cache=cache)
    assert feed(model, cache, 3).shape == (2, 1, 31)


def test_a_step_interrupted_in_its_middle_makes_the_cache_unusable(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = model.make_cache(max_rewind=2)
    feed(model, cache, 4)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.layers[1].feed_forward, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, 1)
    monkeypatch.undo()
    for use in (lambda: feed(model, cache, 1), cache.fork, lambda: cache.rewind(1)):
        with pytest.raises(CacheError, match="interrupted"):
            use()


FILL = """
import ctypes, sys, psutil, torch, kvell
torch.set_num_threads(1)
name, reserve = sys.argv[1], sys.argv[2] == "reserve"
def private():
    # Without what the allocator keeps of freed memory, and the pages of libraries first touched on the way.
    ctypes.CDLL(None).malloc_trim(0)
    return sum(int(m.private_dirty) for m in psutil.Process().memory_maps(grouped=True))
bf16, streams = torch.bfloat16, kvell.ModelConfig.from_pretrained(name).streams()
chunk = {key: torch.ones(4096 // spec.stride, spec.width, dtype=bf16) for key, spec in streams.items()}
cache = kvell.Cache(streams, dtype=bf16, max_length=131072 if reserve else None)
before = private()
for _ in range(131072 // 4096):
    cache.check_step([4096])
    for key, rows in chunk.items():
        cache.append(0, key, rows, 4096)
    cache.end_step([4096])
print(cache.nbytes, cache.allocated_nbytes, private() - before)
"""


@pytest.mark.parametrize(
    ("name", "gigabytes", "how"),
    [
        ("gemma-4-e2b", "0.812", "reserve"),
        ("gemma-4-e2b", "0.812", "grow"),
        ("gemma-4-e4b", "2.168", "reserve"),
        ("laguna-xs.2", "5.43", "reserve"),
        ("zaya1-8b", "5.37", "reserve"),
        ("deepseek-v4-flash", "0.913", "reserve"),
        ("deepseek-v4-pro", "1.308", "reserve"),
    ],
)
def test_a_released_model_at_128k_holds_the_published_bytes(name: str, gigabytes: str, how: str) -> None:
    """Rows of all streams really appended; the process grows by what the cache says it holds.

    Gigabytes: derived by hand from the released shapes, bf16, window - 1 past rows.
    """
    done = subprocess.run([sys.executable, "-c", FILL, name, how], capture_output=True, text=True, check=True)
    held, allocated, grown = (int(number) for number in done.stdout.split())
    decimals = len(gigabytes.split(".")[1])
    assert f"{held / 1e9:.{decimals}f}" == gigabytes
    if how == "reserve":
        assert allocated == held
    else:
        assert held <= allocated <= held * 9 / 8 + BLOCK_ROWS * 15 * 2 * 512 * 2
    assert abs(grown - held) <= 0.03 * held


def test_a_cache_stepped_in_inference_mode_continues_outside_it(model: Decoder) -> None:
    tokens = torch.randint(0, 31, (1, 40))
    with torch.no_grad():
        whole = model(tokens)
    for reserve in (None, 40):
        cache = model.make_cache(max_length=reserve)
        with torch.inference_mode():
            model(tokens[:, :20], cache=cache)
        torch.testing.assert_close(model(tokens[:, 20:], cache=cache), whole[:, 20:], atol=1e-4, rtol=1e-4)


def copies(cache: Cache) -> dict[str, Cache]:
    """Every way to have a cache once more."""
    return {
        "itself": cache,
        "fork": cache.fork(),
        "select": cache.select([0]),
        "merge": Cache.merge([cache]),
        "shallow": copy.copy(cache.fork()),
        "deep": copy.deepcopy(cache),
        "pickled": pickle.loads(pickle.dumps(cache)),
    }


def test_a_live_cache_of_a_model_with_other_weights_is_refused(model: Decoder) -> None:
    other = random_model(model.config, seed=1)
    tokens = torch.tensor([[3, 1, 4]])
    cache = other.make_cache()
    other(tokens, cache=cache)
    wanted = other(tokens, cache=cache.fork())
    for name, one in copies(cache).items():
        with pytest.raises(CacheError, match="made by another model: its rows mean nothing to this one"):
            model(tokens, cache=one)
        assert torch.equal(other(tokens, cache=one), wanted), name


@torch.no_grad()
def test_a_live_cache_goes_on_with_its_model_reloaded_copied_or_changed_in_place(
    model: Decoder, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[3, 1, 4]])
    cache = model.make_cache()
    model(tokens, cache=cache)
    wanted = model(tokens, cache=cache.fork())
    for same in (kvell.from_pretrained(tmp_path), copy.deepcopy(model)):
        for name, one in copies(cache.fork()).items():
            assert torch.equal(same(tokens, cache=one), wanted), name
    later = cache.fork()
    model.norm.weight.add_(1)
    assert not torch.equal(model(tokens, cache=later), wanted)


def test_a_draft_blocks_cache_knows_its_model_too(model: Decoder) -> None:
    config = model.config.model_copy(update={"draft": DraftConfig(layer=model.config.layers[0])})
    mine, others = random_model(config), random_model(config, seed=1)
    tokens = torch.tensor([[3, 1, 4]])
    _, streams = mine(tokens, return_streams=True)
    with pytest.raises(CacheError, match="made by another model"):
        mine.draft(streams, tokens, cache=others.make_draft_cache())
    cache = mine.make_draft_cache()
    mine.draft(streams, tokens, cache=cache)
    assert cache.lengths == [3]


def test_weights_are_sampled_only_where_a_cache_is_saved_or_meets_another_model(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Decoder] = []
    fingerprint = Decoder.fingerprint

    def counting(model: Decoder) -> str:
        asked.append(model)
        return fingerprint(model)

    monkeypatch.setattr(Decoder, "fingerprint", counting)
    cache = model.make_cache(max_rewind=2)
    feed(model, cache, 5)
    cache.rewind(1)
    feed(model, Cache.merge([cache, cache.fork(), model.make_cache(max_rewind=2)]), 1)
    assert asked == []
    cache.save(tmp_path / "state")
    assert asked == [model]
    again = copy.deepcopy(model)
    feed(again, cache, 1)
    assert asked == [model, model, again]
    feed(again, cache, 1)
    assert len(asked) == 3, "once is enough"


def test_another_models_cache_is_refused_and_stays_usable(model: Decoder) -> None:
    deeper = random_model(small_config(7, None, None))
    cache = deeper.make_cache()
    with pytest.raises(CacheError, match="made for another model"):
        feed(model, cache, 1)
    assert feed(deeper, cache, 1).shape == (1, 1, 31)
    stale = model.make_cache()
    with pytest.raises(CacheError, match="make a cache after moving the model"):
        feed(random_model(model.config).to(torch.bfloat16), stale, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rewindable", []), ("rewindable", [99]), ("lengths", None), ("dtype", 3), ("max_length", 2), ("format", "x")],
)
def test_a_saved_cache_with_an_impossible_header_is_refused(
    model: Decoder, tmp_path: Path, field: str, value: object
) -> None:
    cache = model.make_cache()
    feed(model, cache, 5)
    cache.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        header = json.loads(file.metadata()["kvell"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "state", {"kvell": json.dumps(header | {field: value})})
    with pytest.raises(CacheError, match="is not a readable cache file"):
        Cache.load(tmp_path / "state", model)


@pytest.mark.parametrize("wrong", [1.5, "3", [1.0]])
def test_a_rewind_by_no_whole_number_is_refused(model: Decoder, wrong: Any) -> None:
    cache = model.make_cache(max_rewind=4)
    feed(model, cache, 5)
    with pytest.raises(CacheError, match="whole number"):
        cache.rewind(wrong)
    with pytest.raises(CacheError, match="no sequence 1 in a cache of 1"):
        cache.select([1])
