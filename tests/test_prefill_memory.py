"""Prefill needs memory in proportion to the prompt: no tensor of T x T is ever made."""

import subprocess
import sys

import pytest
import torch
from strategies import random_model
from test_cache import small_config
from torch.utils._python_dispatch import TorchDispatchMode

import kvell
from kvell.cache.stream import Stream


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operator returned in memory of its own."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.itemsize)
        return result


@pytest.mark.parametrize("chunk", [512, 100000])
@pytest.mark.parametrize("windows", [(100,), (None,), (100, None)])
def test_the_largest_tensor_grows_no_faster_than_the_prompt(windows: tuple[int | None, ...], chunk: int) -> None:
    model = random_model(small_config(*windows))
    largest = []
    for length in (2048, 4096):
        cache = model.make_cache()
        tokens = torch.zeros(1, length, dtype=torch.long)
        with LargestTensor() as seen:
            for piece in tokens.split(chunk, dim=1):
                model(piece, cache=cache, last_only=True)
        largest.append(seen.elements)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 4096 * 4096 / 8


PREFILL = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from strategies import random_model
from test_cache import small_config
torch.set_num_threads(1)
model = random_model(small_config(100, None))
def peak(length):
    model(torch.zeros(1, length, dtype=torch.long), cache=model.make_cache(), last_only=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base = peak(256)
print(peak(8192) - base, peak(16384) - base)
"""


def test_the_process_grows_in_proportion_to_the_prompt() -> None:
    """A T x T mask of 16,384 tokens alone would be 256 MiB, scores 1 GiB."""
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", PREFILL, folder], capture_output=True, text=True, check=True)
    half, whole = (int(number) for number in done.stdout.split())
    assert whole < 2.5 * half + (8 << 20)
    assert whole < 200 << 20


V4_PREFILL = """
import resource, torch, kvell
from kvell.families import parse_config
torch.set_num_threads(1)
model = kvell.Decoder(parse_config({
    "model_type": "deepseek_v4", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6,
    "num_attention_heads": 8, "head_dim": 64, "qk_rope_head_dim": 16, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 64, "index_n_heads": 8, "index_head_dim": 32, "index_topk": 64, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256, "compress_ratios": [0, 0, 4, 128, 4, 128],
    "num_hash_layers": 2, "num_nextn_predict_layers": 0,
})).eval()
tokens = torch.randint(0, 4096, (1, 32768))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.no_grad():
    model(tokens[:, :256], last_only=True)
    base = peak()
    model(tokens, cache=model.make_cache(), last_only=True)
print(model.num_parameters(), peak() - base)
"""


def test_compressed_attention_takes_a_long_prompt_in_one_call_and_little_memory() -> None:
    """Scores of 32,768 tokens against 8,192 entries would be 8 GiB for 8 heads."""
    done = subprocess.run([sys.executable, "-c", V4_PREFILL], capture_output=True, text=True, check=True)
    parameters, grown = (int(number) for number in done.stdout.split())
    assert 14e6 < parameters < 16e6
    assert grown < 512 << 20


@pytest.mark.parametrize("last_only", [False, True])
def test_a_prompt_in_several_steps_gives_what_it_gives_in_one(
    last_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of different lengths, with and without a cache, some of it held already."""
    model = random_model(small_config(100, None))
    counts = [50, 3, 120]
    tokens = torch.randint(0, 31, (1, sum(counts)))
    with torch.no_grad():
        held = torch.randint(0, 31, (3, 40))
        whole, streams = model(tokens, counts=counts, last_only=last_only, return_streams=True)
        one = model.make_cache(3, max_rewind=5)
        model(held, cache=one)
        after = model(tokens, cache=one, counts=counts, last_only=last_only)
        monkeypatch.setattr("kvell.long_prompts.MAX_STEP", 32)
        several = model.make_cache(3, max_rewind=5)
        model(held, cache=several)
        close = {"atol": 1e-4, "rtol": 1e-4}
        again, streams_again = model(tokens, counts=counts, last_only=last_only, return_streams=True)
        torch.testing.assert_close(again, whole, **close)
        torch.testing.assert_close(streams_again, streams, **close)
        torch.testing.assert_close(model(tokens, cache=several, counts=counts, last_only=last_only), after, **close)
        assert several.lengths == one.lengths
        assert several.rewindable == one.rewindable
        assert several.nbytes == one.nbytes


def test_a_prompt_interrupted_between_its_steps_makes_the_cache_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small_config(100, None))
    monkeypatch.setattr("kvell.long_prompts.MAX_STEP", 32)
    calls = []

    def interrupted(x: torch.Tensor, *_: object) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr(model.layers[1].feed_forward, "forward", interrupted)
    cache = model.make_cache()
    with pytest.raises(KeyboardInterrupt):
        model(torch.zeros(1, 100, dtype=torch.long), cache=cache)
    with pytest.raises(kvell.CacheError, match="interrupted"):
        cache.fork()


def test_a_growing_cache_grows_once_for_a_prompt_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small_config(100, None))
    monkeypatch.setattr("kvell.long_prompts.MAX_STEP", 32)
    moved = []
    move = Stream._move
    monkeypatch.setattr(Stream, "_move", lambda stream, *rest: moved.append(id(stream)) or move(stream, *rest))
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.zeros(1, 700, dtype=torch.long), cache=cache)
    growing = [id(s) for key, s in cache.sequences[0].streams.items() if cache.specs[key].past is None]
    assert growing
    assert all(moved.count(stream) == 1 for stream in growing)
