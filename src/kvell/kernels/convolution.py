"""Compressed convolutional attention's queries and keys, in one pass (layers/convolutional.py has the formulas).

    c      = conv_grouped(conv_depthwise([q; k]))      causal; the second mixes within a head
    query  = rotate(normalised(c_q + m_q)),             m_q = (q + k of its group) / 2, or q where there are no keys
    key    = rotate(normalised(c_k + m_k) * temperature),   m_k = mean of its group's m_q

Sequences lie end to end, each behind the rows that its convolutions reach back to: zeros before its beginning.

T tokens, H query heads, K KV heads of width D: H * D + K * D channels; L = T + reach * sequences rows.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.choice import triton_wanted
from kvell.kernels.rotation import rotate


def convolved_heads(
    laid: Float[Tensor, "L channels"],
    depthwise: Float[Tensor, "channels 1 kernel"],
    depthwise_bias: Float[Tensor, " channels"],
    grouped: Float[Tensor, "channels D kernel2"],
    grouped_bias: Float[Tensor, " channels"],
    temperature: Float[Tensor, " K"] | None,
    cos: Float[Tensor, "T pairs"] | None,
    sin: Float[Tensor, "T pairs"] | None,
    counts: Sequence[int],
) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "T K D"]]:
    """Queries and keys of every sequence's `counts[b]` tokens. Without `temperature` there are no keys, K = 0;
    without cos and sin nothing turns."""
    if triton_wanted(laid):
        from kvell.kernels.triton.convolution import convolved_heads as run
    else:
        run = convolved_heads_reference
    return run(laid, depthwise, depthwise_bias, grouped, grouped_bias, temperature, cos, sin, counts)


def convolved_heads_reference(
    laid: Float[Tensor, "L channels"],
    depthwise: Float[Tensor, "channels 1 kernel"],
    depthwise_bias: Float[Tensor, " channels"],
    grouped: Float[Tensor, "channels D kernel2"],
    grouped_bias: Float[Tensor, " channels"],
    temperature: Float[Tensor, " K"] | None,
    cos: Float[Tensor, "T pairs"] | None,
    sin: Float[Tensor, "T pairs"] | None,
    counts: Sequence[int],
) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "T K D"]]:
    """The same in plain torch.

    All are convolved at once. Outputs that would look across a sequence's beginning are those of its first `reach`
    rows, which nobody asks for.
    """
    channels, width = grouped.shape[:2]
    reach = depthwise.shape[2] + grouped.shape[2] - 2
    y = F.conv1d(laid.T[None], depthwise, depthwise_bias, groups=channels)
    y = F.conv1d(y, grouped, grouped_bias, groups=channels // width)
    convolved = _own_rows(F.pad(y, (reach, 0))[0].T, counts, reach).unflatten(1, (-1, width))
    rows = _own_rows(laid, counts, reach).unflatten(1, (-1, width))
    if temperature is None:
        query, key = normalised(convolved + rows), rows[:, :0]
    else:
        heads = channels // width - len(temperature)
        group = heads // len(temperature)
        query_mean = (rows[:, :heads] + rows[:, heads:].repeat_interleave(group, dim=1)) / 2
        key_mean = query_mean.unflatten(1, (-1, group)).mean(2)
        query = normalised(convolved[:, :heads] + query_mean)
        key = normalised(convolved[:, heads:] + key_mean) * temperature[:, None]
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, key


def _own_rows(laid: Float[Tensor, "L channels"], counts: Sequence[int], reach: int) -> Float[Tensor, "T channels"]:
    """Every sequence's rows without those it reaches back to."""
    return torch.cat([sequence[reach:] for sequence in laid.split([count + reach for count in counts])])


def normalised(x: Float[Tensor, "T heads D"]) -> Float[Tensor, "T heads D"]:
    """Every head at the L2 norm sqrt(D)."""
    return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps))
