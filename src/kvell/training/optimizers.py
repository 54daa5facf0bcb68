"""What moves the weights, and how fast: Muon on the matrices and AdamW on the rest, schedules, load balancing."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim import Optimizer as TorchOptimizer

from kvell.layers.routers import MLPRouting, ScoreRouting
from kvell.model import Decoder
from kvell.training.muon import StackedMuon
from kvell.training.parameters import Role, group_of, roles
from kvell.training.settings import Optimizer, Schedule


def optimizers(model: Decoder, settings: Optimizer) -> list[TorchOptimizer]:
    """AdamW, and Muon where it is wanted, over every parameter that learns. What learns at one rate with one decay is
    one group, which knows its full rate."""
    groups: dict[type[TorchOptimizer], dict[tuple[float, float], list[nn.Parameter]]] = {}
    known = roles(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by = algorithm(known[name], parameter, settings)
            how = learning(name, known[name], by, settings)
            groups.setdefault(by, {}).setdefault(how, []).append(parameter)
    made: list[TorchOptimizer] = []
    for by in (AdamW, Muon, StackedMuon):
        if by in groups:
            options = [
                {"params": parameters, "lr": rate, "weight_decay": decay, "full_lr": rate}
                for (rate, decay), parameters in groups[by].items()
            ]
            made.append(AdamW(options, betas=settings.betas) if by is AdamW else by(options))
    return made


def algorithm(role: Role, parameter: nn.Parameter, settings: Optimizer) -> type[TorchOptimizer]:
    if settings.kind == "adamw" or role != "hidden matrix":
        return AdamW
    return Muon if parameter.dim() == 2 else StackedMuon


def learning(name: str, role: Role, by: type[TorchOptimizer], settings: Optimizer) -> tuple[float, float]:
    """A parameter's full learning rate and its weight decay."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if by is not AdamW:
        rate, decay = settings.matrix_learning_rate, settings.matrix_weight_decay
    if role not in ("matrix", "hidden matrix"):
        decay = 0.0
    group = group_of(name, settings.parameter_groups)
    if group is None:
        return rate, decay
    if group.learning_rate is not None:
        rate = group.learning_rate
    if group.learning_rate_scale is not None:
        rate *= group.learning_rate_scale
    return rate, decay if group.weight_decay is None else group.weight_decay


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
    """Moves the selection biases of routers that have them against the last step's loads, by layer index. A router
    that does not learn keeps its own."""
    for module in model.modules():
        if not isinstance(module, ScoreRouting | MLPRouting) or module.index not in loads:
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            module.rebalance(loads[module.index], bias_rate)
