"""What both ways of decoding have in common: a step that is looked at but computes nothing, and where weights lie."""

from abc import ABC, abstractmethod
from operator import getitem, is_not
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kvell.cache_operation import CacheOperation
from kvell.step import Step

if TYPE_CHECKING:
    from kvell.model import Decoder


class OneTokenStep(Step, ABC):
    """One token for each of B sequences, of which nothing is known but that. It has no starts: a layer that looked at
    them would have them compiled or recorded."""

    def __init__(self, model: "Decoder", tokens: Tensor, positions: Tensor) -> None:
        super().__init__(tokens, [1] * len(tokens), [], positions, sources=model.config.reads())

    def perform(self, operation: CacheOperation, *inputs: Tensor | None, wanted: Step | None = None) -> Tensor:
        assert wanted is None
        return self.leave_out(operation, inputs)

    @abstractmethod
    def leave_out(self, operation: CacheOperation, inputs: tuple[Tensor | None, ...]) -> Tensor:
        """What stands for the operation's result, of its shape and like the first input."""


class Weights:
    """All of a model's weights, and whether they still lie where they lay."""

    def __init__(self, model: nn.Module) -> None:
        places = [
            (slots, name, tensor)
            for module in model.modules()
            for slots in (module._parameters, module._buffers)
            for name, tensor in slots.items()
            if tensor is not None
        ]
        self._slots, self._names, self._tensors = zip(*places, strict=True)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def have_moved(self) -> bool:
        """Whether any was replaced, or its memory was. They are held: what was theirs is nobody else's."""
        # Before every token, so without a step of Python for each.
        if any(map(is_not, map(getitem, self._slots, self._names), self._tensors)):
            return True
        return list(map(Tensor.data_ptr, self._tensors)) != self._addresses
