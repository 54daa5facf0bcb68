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

from kvell.kernels.rotation import rotate
from kvell.kernels.table import TRITON, Kernel, KernelVersion


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
    heads: tuple[Tensor, Tensor] = CONVOLVED_HEADS(
        laid, depthwise, depthwise_bias, grouped, grouped_bias, temperature, cos, sin, counts
    )
    return heads


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
    """The same in plain torch."""
    convolved = convolve_reference(laid, depthwise, depthwise_bias, grouped, grouped_bias)
    return _heads_of(laid, convolved, grouped.shape[1], temperature, cos, sin, counts)


def convolved_heads_by_products(
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
    """The same with plain products in place of convolutions."""
    convolved = convolve_as_products(laid, depthwise, depthwise_bias, grouped, grouped_bias)
    return _heads_of(laid, convolved, grouped.shape[1], temperature, cos, sin, counts)


def convolve_reference(
    laid: Float[Tensor, "L channels"],
    depthwise: Float[Tensor, "channels 1 kernel"],
    depthwise_bias: Float[Tensor, " channels"],
    grouped: Float[Tensor, "channels D kernel2"],
    grouped_bias: Float[Tensor, " channels"],
) -> Float[Tensor, "V channels"]:
    """Both convolutions, of all sequences at once: V = L - reach outputs, from the first row with all it reaches."""
    channels, width = grouped.shape[:2]
    # cuDNN rounds the operands of fp32 convolutions to tf32 unless a global setting forbids it, also backwards, when
    # a setting made here would be over. It does not in fp64.
    dtype = torch.float64 if laid.is_cuda and laid.dtype == torch.float32 else laid.dtype
    x, depthwise, depthwise_bias, grouped, grouped_bias = (
        tensor.to(dtype) for tensor in (laid, depthwise, depthwise_bias, grouped, grouped_bias)
    )
    y = F.conv1d(x.T[None], depthwise, depthwise_bias, groups=channels)
    return F.conv1d(y, grouped, grouped_bias, groups=channels // width)[0].T.to(laid.dtype)


def convolve_as_products(
    laid: Float[Tensor, "L channels"],
    depthwise: Float[Tensor, "channels 1 kernel"],
    depthwise_bias: Float[Tensor, " channels"],
    grouped: Float[Tensor, "channels D kernel2"],
    grouped_bias: Float[Tensor, " channels"],
) -> Float[Tensor, "V channels"]:
    """The first as a multiply-add for each place of its kernel, the second as one product for each head."""
    width, taps = grouped.shape[1:]
    length = laid.shape[0] - depthwise.shape[2] + 1
    y = depthwise_bias
    for place, weight in enumerate(depthwise[:, 0].unbind(1)):
        y = torch.addcmul(y, laid[place : place + length], weight)
    # (V, heads, D * kernel2), a channel's places side by side as in the weights.
    reached = y.unfold(0, taps, 1).unflatten(1, (-1, width)).flatten(2)
    weights = grouped.unflatten(0, (-1, width)).flatten(2)
    heads = torch.baddbmm(grouped_bias.view(-1, 1, width), reached.transpose(0, 1), weights.mT)
    return heads.transpose(0, 1).flatten(1)


def _heads_of(
    laid: Float[Tensor, "L channels"],
    convolved: Float[Tensor, "V channels"],
    width: int,
    temperature: Float[Tensor, " K"] | None,
    cos: Float[Tensor, "T pairs"] | None,
    sin: Float[Tensor, "T pairs"] | None,
    counts: Sequence[int],
) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "T K D"]]:
    """Everything behind the convolutions. Outputs that would look across a sequence's beginning are those of its
    first `reach` rows, which nobody asks for."""
    reach, channels = laid.shape[0] - convolved.shape[0], laid.shape[1]
    rows = laid[reach:]
    if len(counts) > 1:
        # Output i is about row i + reach: between two sequences stand `reach` outputs about neither.
        own = [count + reach for count in counts[:-1]] + [counts[-1]]
        rows, convolved = (
            torch.cat([part[:count] for part, count in zip(x.split(own), counts, strict=True)])
            for x in (rows, convolved)
        )
    rows, convolved = (x.unflatten(1, (-1, width)) for x in (rows, convolved))
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


def normalised(x: Float[Tensor, "T heads D"]) -> Float[Tensor, "T heads D"]:
    """Every head at the L2 norm sqrt(D)."""
    return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps))


CONVOLVED_HEADS = Kernel(
    "convolved_heads",
    KernelVersion("triton", "triton", f"{TRITON}.convolution:convolved_heads"),
    KernelVersion("products", "torch", convolved_heads_by_products),
    KernelVersion("reference", "reference", convolved_heads_reference),
)
