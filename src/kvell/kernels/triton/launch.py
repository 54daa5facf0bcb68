"""What launching a kernel takes besides its arguments."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`: sides of a block are powers of two."""
    return max(1 << max(number - 1, 0).bit_length(), least)


def blocks(number: int, block: int) -> int:
    return -(-number // block)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting for what it still has to do: from pinned memory the copy is
    queued behind that, and torch keeps the memory until it is done."""
    if device.type != "cuda":
        return numbers.to(device)
    # A graph would read this memory again whenever it is replayed.
    assert not torch.cuda.is_current_stream_capturing()
    return numbers.pin_memory().to(device, non_blocking=True)


class Recomputed(torch.autograd.Function):
    """Forward in Triton; backward runs the torch version of the same arguments again and differentiates it."""

    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Any], plain: Callable[..., Any], *tensors: Tensor | None) -> Any:
        ctx.plain = plain
        ctx.save_for_backward(*tensors)
        return fast(*tensors)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            tensors = [
                saved if saved is None else saved.detach().requires_grad_(need)
                for saved, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.plain(*tensors)
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))
