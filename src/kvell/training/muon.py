"""Muon for the experts of a mixture, whose weights are a stack of matrices (Jordan 2024,
kellerjordan.github.io/posts/muon). torch.optim.Muon takes single matrices.

    B = momentum B + (1 - momentum) G,   U = (1 - momentum) G + momentum B         Nesterov's
    O = the orthogonal matrix nearest U, roughly: X = U / |U|, then five times
        X = a X + (b A + c A A) X,  A = X X^T                                      in bf16
    W = (1 - rate decay) W - rate sqrt(max(1, rows / columns)) O
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

# As torch.optim.Muon has them.
COEFFICIENTS, ITERATIONS, EPS, MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 1e-7, 0.95


class StackedMuon(Optimizer):
    """Muon of stacks of matrices (E, rows, columns): each matrix moves as torch.optim.Muon would move it alone."""

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 1e-3, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every stack that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                weight, gradient, buffer = map(own, (parameter, parameter.grad, state["momentum_buffer"]))
                buffer.lerp_(gradient, 1 - momentum)
                update = orthogonal(gradient.lerp(buffer, momentum))
                rows, columns = weight.shape[1:]
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)


def orthogonal(stack: Float[Tensor, "E rows columns"]) -> Float[Tensor, "E rows columns"]:
    """About the nearest orthogonal matrix of each, in bf16: its singular values lie around 1."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = stack.bfloat16()
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def own(stack: Tensor) -> Float[Tensor, "E rows columns"]:
    """The matrices that lie in this process: FSDP divides the first dimension, so each is whole in one."""
    if not isinstance(stack, DTensor):
        return stack
    assert stack.placements == (Shard(0),), stack.placements
    return stack.to_local()
