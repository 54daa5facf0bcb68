"""Prefill needs memory in proportion to the prompt: no tensor of T x T is ever made."""

import subprocess
import sys

import pytest
import torch
from strategies import random_model
from test_cache import small_config
from torch.utils._python_dispatch import TorchDispatchMode


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
