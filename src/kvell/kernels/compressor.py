"""Entries from the raw rows of their windows, in one pass (layers/compressor.py has the formula).

    entry_j = rotate(norm(sum_s softmax_s(gate_s + bias_s) * value_s))         s over the slots of window j

J windows of `ratio` tokens; a raw row has a token's values, then its gates. With overlap there are two sets of
channels, and a window's slots are the tokens of the window before through the first and its own through the second.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.rotation import rotate_last
from kvell.kernels.table import TRITON, Kernel, KernelVersion


def pooled_entries(
    rows: Float[Tensor, "S raw"],
    bias: Float[Tensor, "ratio channels"],
    weight: Float[Tensor, " D"],
    cos: Float[Tensor, "J pairs"],
    sin: Float[Tensor, "J pairs"],
    *,
    behind: int,
    eps: float,
) -> Float[Tensor, "J D"]:
    """The entries of J windows. `rows` are their tokens' and, with `behind` 1, those of the window before the first,
    which without it has none before it. There is overlap where channels are twice D."""
    entries: Tensor = POOLED_ENTRIES(rows, bias, weight, cos, sin, behind=behind, eps=eps)
    return entries


def pooled_entries_reference(
    rows: Float[Tensor, "S raw"],
    bias: Float[Tensor, "ratio channels"],
    weight: Float[Tensor, " D"],
    cos: Float[Tensor, "J pairs"],
    sin: Float[Tensor, "J pairs"],
    *,
    behind: int,
    eps: float,
) -> Float[Tensor, "J D"]:
    """The same in plain torch."""
    width = len(weight)
    values, gates = rows.unflatten(0, (-1, len(bias))).chunk(2, dim=-1)
    gates = gates.float() + bias
    if bias.shape[1] > width:
        values, gates = _overlapping(values, width, behind, 0.0), _overlapping(gates, width, behind, float("-inf"))
    entries = (gates.softmax(1) * values).sum(1).to(rows.dtype)
    entries = F.rms_norm(entries.float(), (width,), weight.float(), eps).to(rows.dtype)
    return rotate_last(entries[:, None], cos, sin)[:, 0]


def _overlapping(
    windows: Float[Tensor, "I ratio channels"], width: int, behind: int, nothing: float
) -> Float[Tensor, "J slots D"]:
    """The window before through the first set of channels, the window itself through the second."""
    before, own = windows.split(width, dim=-1)
    if not behind:
        before = torch.cat([torch.full_like(before[:1], nothing), before])
    return torch.cat([before[: len(own) - behind], own[behind:]], dim=1)


POOLED_ENTRIES = Kernel(
    "pooled_entries",
    KernelVersion("triton", "triton", f"{TRITON}.compressor:pooled_entries"),
    KernelVersion("reference", "reference", pooled_entries_reference),
)
