"""Applying the chosen experts to their tokens.

y_t = sum_j weights[t, j] * down[e] unit(gate_e x_t, up_e x_t),  e = chosen[t, j]

A choice of E, one past the last expert, stands for none: it adds nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.linear import linear
from kvell.kernels.table import Kernel, KernelVersion
from kvell.kernels.tracing import kept

# On a GPU so few (token, expert) pairs read a copy of their experts' weights: for being told who is chosen the host
# would have to wait.
GATHERED = 16


def experts(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T k"],
    chosen: Int[Tensor, "T k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "T C"]:
    """The weighted sum of each token's chosen experts; `gate_up` stacks gate rows over up rows."""
    y: Tensor = EXPERTS(x, weights, chosen, gate_up, down, unit)
    return y


def experts_reference(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T k"],
    chosen: Int[Tensor, "T k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "T C"]:
    """Every expert runs on every token; a token's weight is zero for those it did not choose."""
    dense = torch.zeros(x.shape[0], gate_up.shape[0] + 1, dtype=weights.dtype, device=x.device)
    dense = dense.scatter_add(1, chosen, weights)[:, :-1]
    gate, up = torch.einsum("tc,eic->tei", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,eci,te->tc", unit(gate, up), down, dense)


def experts_of_one_token(
    x: Float[Tensor, "1 C"],
    weights: Float[Tensor, "1 k"],
    chosen: Int[Tensor, "1 k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "1 C"]:
    """Nothing to sort."""
    outputs = []
    for expert in chosen[0].tolist():
        if expert == len(gate_up):
            outputs.append(torch.zeros_like(x))
        else:
            gate, up = linear(x, gate_up[expert]).chunk(2, dim=-1)
            outputs.append(linear(unit(gate, up), down[expert]))
    return weights @ torch.cat(outputs)


def experts_indexed(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T k"],
    chosen: Int[Tensor, "T k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "T C"]:
    """Nothing but the weights read depends on the choice. To be compiled: run as it stands it would copy them."""
    there = chosen < len(gate_up)
    expert = torch.where(there, chosen, 0)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = (gate_up[expert].to(wide) * kept(x)[:, None, None].to(wide)).sum(-1).chunk(2, dim=-1)
    inner = kept(unit(gate.to(x.dtype), up.to(x.dtype)))
    outputs = (down[expert].to(wide) * inner[:, :, None].to(wide)).sum(-1)
    return _summed(outputs, weights, there).to(x.dtype)


def experts_gathered(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T k"],
    chosen: Int[Tensor, "T k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "T C"]:
    """Every pair by itself, with a copy of its expert's weights; the host need not know the choice."""
    there = chosen < len(gate_up)
    expert = torch.where(there, chosen, 0).flatten()
    rows = x[:, None].expand(-1, chosen.shape[1], -1).flatten(0, 1)
    gate, up = (gate_up[expert] @ rows[:, :, None]).squeeze(2).chunk(2, dim=-1)
    outputs = (down[expert] @ unit(gate, up)[:, :, None]).squeeze(2).unflatten(0, chosen.shape)
    return _summed(outputs, weights, there)


def experts_of_groups(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T k"],
    chosen: Int[Tensor, "T k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "T C"]:
    """Sorted as in `experts_grouped`, and one product for all groups, whose bounds the host need not know."""
    order = chosen.flatten().argsort(stable=True)
    expert = chosen.flatten()[order]
    ends = torch.searchsorted(expert, torch.arange(len(gate_up), device=x.device), right=True).int()
    gate, up = F.grouped_mm(x[order // chosen.shape[1]], gate_up.mT, offs=ends).chunk(2, dim=-1)
    outputs = F.grouped_mm(unit(gate, up), down.mT, offs=ends)
    # Rows behind the last group, choices of none, are whatever lay there.
    return _summed(outputs[order.argsort()].unflatten(0, chosen.shape), weights, chosen < len(gate_up))


def fits_grouped(*weights: Float[Tensor, "E out in"]) -> bool:
    """Whether torch's grouped product takes them: rows of whole 16 bytes."""
    return all(size * weight.dtype.itemsize % 16 == 0 for weight in weights for size in weight.shape[1:])


def experts_grouped(
    x: Float[Tensor, "T C"],
    weights: Float[Tensor, "T k"],
    chosen: Int[Tensor, "T k"],
    gate_up: Float[Tensor, "E I2 C"],
    down: Float[Tensor, "E C I"],
    unit: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "T C"]:
    """Sorts the (token, expert) pairs by expert once, then runs each used expert on its own tokens."""
    order = chosen.flatten().argsort(stable=True)
    token = order // chosen.shape[1]
    num_experts = gate_up.shape[0]
    counts = torch.bincount(chosen.flatten(), minlength=num_experts + 1).tolist()
    outputs = []
    for expert, rows in enumerate(F.embedding(token, x).split(counts)):
        if expert == num_experts:
            outputs.append(torch.zeros_like(rows))
        elif len(rows):
            gate, up = linear(rows, gate_up[expert]).chunk(2, dim=-1)
            outputs.append(linear(unit(gate, up), down[expert]))
    # Back in the tokens' order and summed there: adding up in place would depend on the device's timing.
    by_token = F.embedding(order.argsort(), torch.cat(outputs)).unflatten(0, chosen.shape)
    return (by_token * weights[:, :, None]).sum(1)


def _summed(
    outputs: Float[Tensor, "T k C"], weights: Float[Tensor, "T k"], there: Bool[Tensor, "T k"]
) -> Float[Tensor, "T C"]:
    """Choices of none add nothing, whatever stands in their rows."""
    return torch.where(there[:, :, None], outputs * weights[:, :, None], 0).sum(1)


def _not_traced(*_: Any) -> str | None:
    return None if torch.compiler.is_compiling() else "not traced"


def _too_many_choices(x: Tensor, weights: Tensor, chosen: Tensor, *_: Any) -> str | None:
    if not x.is_cuda:
        return "not on a CUDA device"
    return None if chosen.numel() <= GATHERED else f"more than {GATHERED} choices"


def _not_grouped(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, unit: Any) -> str | None:
    """Why torch's grouped product does not take these."""
    if not x.is_cuda or x.dtype is not torch.bfloat16:
        return "not in bf16 on a CUDA device"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    return None if fits_grouped(gate_up, down) else "rows that are not whole 16 bytes"


def is_recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded of what is done with x."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _not_recorded(x: Tensor, *_: Any) -> str | None:
    return None if is_recorded(x) else "no CUDA graph is recorded"


def _several_tokens(x: Tensor, *_: Any) -> str | None:
    return None if len(x) == 1 else "several tokens"


EXPERTS = Kernel(
    "experts",
    KernelVersion("indexed", "torch", experts_indexed, _not_traced),
    KernelVersion("gathered", "torch", experts_gathered, _too_many_choices),
    KernelVersion("grouped product", "torch", experts_of_groups, _not_grouped),
    KernelVersion("gathered, recorded", "torch", experts_gathered, _not_recorded),
    KernelVersion("one token", "torch", experts_of_one_token, _several_tokens),
    KernelVersion("sorted", "torch", experts_grouped),
    KernelVersion("reference", "reference", experts_reference),
)
