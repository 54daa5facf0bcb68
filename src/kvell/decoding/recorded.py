"""The step of one token per sequence on a CUDA device, recorded as CUDA graphs.

A graph launches again the kernels that were launched while it was recorded, on the same memory, without Python or
torch between them: a decoded token of a small model is hundreds of kernels that take less time than their launches.
An operation on the cache launches other kernels for every length, so it is no part of a graph:

    graph 0 -> operation 0 -> graph 1 -> operation 1 -> ... -> graph n

An operation reads the tensors that the graph before it has written, and its result is copied to where the next graph
reads.
The kernels are those that run without graphs, so the logits are the same. (Only experts of large batches that torch's
grouped product does not take, as in fp32, run in another way.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvell.cache_operation import CacheOperation
from kvell.decoding.one_token import OneTokenStep, Weights
from kvell.step import Step

if TYPE_CHECKING:
    from kvell.model import Decoder


class _LeftOut(NamedTuple):
    """An operation, its inputs, and where its result belongs."""

    operation: CacheOperation
    inputs: tuple[Tensor | None, ...]
    result: Tensor


class _Recorder(OneTokenStep):
    """A step whose operations on the cache do not run: at each of them one graph ends and the next begins."""

    def __init__(
        self, model: "Decoder", tokens: Tensor, positions: Tensor, between: Callable[[_LeftOut], None]
    ) -> None:
        super().__init__(model, tokens, positions)
        self.between = between

    def leave_out(self, operation: CacheOperation, inputs: tuple[Tensor | None, ...]) -> Tensor:
        first = inputs[0]
        assert first is not None
        result = first.new_empty(operation.result_shape(self, *inputs))
        self.between(_LeftOut(operation, inputs, result))
        return result


class RecordedStep:
    """A model's step of one token for each of `batch_size` sequences. One step runs at a time: threads take turns."""

    def __init__(self, model: "Decoder", batch_size: int) -> None:
        self.weights = Weights(model)
        self.folder: Path | None = None
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.left_out: list[_LeftOut] = []
        self.lock = Lock()
        with torch.inference_mode(False), torch.no_grad(), _side_stream(model.device):
            self.tokens, self.positions = torch.zeros(2, batch_size, dtype=torch.long, device=model.device)
            # Kernels are compiled and libraries find their workspaces before anything is recorded.
            for _ in range(2):
                model.logits_of(_Recorder(model, self.tokens, self.positions, lambda _: None))
            self._begin()
            try:
                self.logits = model.logits_of(_Recorder(model, self.tokens, self.positions, self._between))
            except BaseException:
                with suppress(RuntimeError):  # nothing else can run on the device while a graph is open
                    self.graphs[-1].capture_end()
                raise
            self.graphs[-1].capture_end()

    def __call__(self, step: Step) -> Tensor:
        """Logits (B, V)."""
        with self.lock:
            self.tokens.copy_(step.tokens)
            self.positions.copy_(step.positions)
            for graph, (operation, inputs, result) in zip(self.graphs, self.left_out, strict=False):
                graph.replay()
                result.copy_(operation(step, step, *inputs))
            self.graphs[-1].replay()
            return self.logits.clone()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Tensors of one graph are read by later ones: all draw on the first one's memory.
        graph.capture_begin(pool=self.graphs[0].pool() if self.graphs else None)
        self.graphs.append(graph)

    def _between(self, left_out: _LeftOut) -> None:
        self.graphs[-1].capture_end()
        self.left_out.append(left_out)
        self._begin()


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Nothing can be recorded on the default stream."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
