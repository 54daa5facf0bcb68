"""Decoding by recorded graphs. Where there is no GPU, graphs are stood in for by a list of torch's operations, which
are run again on the same tensors: that shows what a graph reads and writes, and in which order."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from decoding_checks import check_all_ways
from small_models import MIXED, model_like
from strategies import VOCAB, random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kvell.decoding import recorded
from kvell.kernels import experts as experts_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ASKS = {"aten._local_scalar_dense.default", "aten.nonzero.default"}


class ListedOperations(TorchDispatchMode):
    """What a CUDAGraph does, for operations of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[tuple[Any, Any, Any, list[Any]]] = []

    def capture_begin(self, pool: Any = None) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        for function, arguments, settings, results in self.listed:
            again = tree_flatten(function(*arguments, **settings))[0]
            for result, value in zip(results, again, strict=True):
                if isinstance(result, Tensor) and result.data_ptr() != value.data_ptr():
                    result.copy_(value)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert str(function) not in ASKS, f"{function}: the host would wait for the device"
        results = function(*args, **(kwargs or {}))
        self.listed.append((function, args, kwargs or {}, tree_flatten(results)[0]))
        return results


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", ListedOperations)
        monkeypatch.setattr(recorded, "_side_stream", lambda _: nullcontext())
        monkeypatch.setattr(experts_module, "is_recorded", lambda _: True)
    return


@pytest.mark.parametrize("kind", ["deepseek_v4", "zaya", "gemma4", "mixed"])
def test_recorded_graphs_give_the_models_logits(kind: str) -> None:
    model = random_model(MIXED if kind == "mixed" else model_like(kind)).to(DEVICE)
    graphs = copy.deepcopy(model)
    for sequences in (1, 2):
        graphs._compiled[sequences] = recorded.RecordedStep(graphs, sequences)
    check_all_ways(model, graphs)


def test_weights_changed_in_place_are_seen() -> None:
    model = random_model(MIXED).to(DEVICE)
    model._compiled[1] = recorded.RecordedStep(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        token = torch.randint(0, VOCAB, (1, 1), device=DEVICE)
        torch.testing.assert_close(model(token, cache=model.make_cache()), model(token), atol=1e-4, rtol=1e-4)


def test_logits_of_a_step_stay_when_the_next_one_runs() -> None:
    model = random_model(MIXED).to(DEVICE)
    model._compiled[1] = recorded.RecordedStep(model, 1)
    cache = model.make_cache()
    first = model(torch.tensor([[3]], device=DEVICE), cache=cache)
    kept = first.clone()
    model(torch.tensor([[5]], device=DEVICE), cache=cache)
    assert torch.equal(first, kept)
