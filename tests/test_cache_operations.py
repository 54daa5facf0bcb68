"""What layers declare of their operations on the cache is what the operations do."""

from typing import Any

import pairwise
import pytest
import torch
from strategies import VOCAB, random_model
from torch import Tensor

from kvell import ModelConfig
from kvell import model as model_module
from kvell.cache import StreamKey
from kvell.cache_operation import CacheOperation
from kvell.step import Made, Step

CONFIGS = pairwise.configs()


class Watched(dict[Made, Any]):
    """What layers make for each other, and which of it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[Made] = set()

    def __getitem__(self, key: Made) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


class WatchedStep(Step):
    """A step that compares every operation with its declaration."""

    performed: set[StreamKey]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.made = self.watched = Watched()
        self.appended: set[StreamKey] = set()

    def append_each(self, layer: int, name: str, pieces: Any) -> Any:
        self.appended.add((layer, name))
        return super().append_each(layer, name, pieces)

    def perform(self, operation: CacheOperation, *inputs: Tensor | None, wanted: Step | None = None) -> Tensor:
        self.appended, self.watched.read = set(), set()
        result = super().perform(operation, *inputs, wanted=wanted)
        assert self.appended == set(operation.streams), type(operation)
        assert self.watched.read == ({operation.reads} - {None}), type(operation)
        assert tuple(result.shape) == tuple(operation.result_shape(self, *inputs)), type(operation)
        assert inputs[0] is not None
        assert result.dtype == inputs[0].dtype
        WatchedStep.performed |= self.appended
        return result


@pytest.mark.parametrize("config", CONFIGS.values(), ids=range(len(CONFIGS)))
def test_operations_append_read_and_give_what_they_declare(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prompt, in single tokens and in a ragged step; together they append to every stream."""
    monkeypatch.setattr(model_module, "Step", WatchedStep)
    WatchedStep.performed = set()
    model = random_model(config)
    cache = model.make_cache(2)
    tokens = torch.randint(0, VOCAB, (2, 9))
    model(tokens, cache=cache)
    model(tokens[:, :1], cache=cache)
    model(tokens[:1, :5], cache=cache, counts=[4, 1])
    assert WatchedStep.performed == set(config.streams())
