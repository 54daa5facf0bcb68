"""What moves the weights, and how fast: Muon on the matrices and AdamW on the rest, schedules, load balancing."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim import Optimizer as TorchOptimizer

from kvell.layers.routers import MLPRouting, ScoreRouting
from kvell.model import Decoder
from kvell.training.settings import Optimizer, Schedule


def optimizers(model: Decoder, settings: Optimizer) -> list[TorchOptimizer]:
    """One optimizer, or Muon and AdamW, over every parameter that learns; each group knows its full rate."""
    matrices = [] if settings.kind == "adamw" else hidden_matrices(model)
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    made: list[TorchOptimizer] = [
        AdamW(others, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    ]
    if matrices:
        made.append(Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=settings.matrix_weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return made


def hidden_matrices(model: Decoder) -> list[nn.Parameter]:
    """The weights of linear layers inside the model: neither the tables that tokens look up nor the head, which is
    one for every token."""
    head = getattr(model, "head", None)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    weights = [module.weight for module in linears]
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def set_rates(made: list[TorchOptimizer], share: float) -> None:
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * share


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The share of the full learning rate at a step, counted from 0.

    wsd: Hu et al. 2024, arXiv 2404.06395, section 4; cosine: Loshchilov and Hutter 2017, arXiv 1608.03983.
    """
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        progress = (step - schedule.warmup) / max(steps - schedule.warmup, 1)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * progress)) / 2
    left = (steps - step) / max(schedule.decay * steps, 1)
    return schedule.floor + (1 - schedule.floor) * min(left, 1.0)


@torch.no_grad()
def rebalance(model: Decoder, loads: Mapping[int, Tensor], bias_rate: float) -> None:
    """Moves the selection biases of routers that have them against the last step's loads, by layer index."""
    for module in model.modules():
        if isinstance(module, ScoreRouting | MLPRouting) and module.index in loads:
            module.rebalance(loads[module.index], bias_rate)
