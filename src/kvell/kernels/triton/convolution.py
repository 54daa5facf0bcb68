"""Compressed convolutional attention's queries and keys in Triton: what kernels/convolution.py says.

A program makes one head of a block of tokens: the depthwise convolution of the rows it reaches, the grouped one as a
product per place of its kernel, the mean, the norm, the temperature and the turn. A head's channels are worked on as
three parts: the two halves of those that turn, whose pairs then stand at the same place, and the rest.

Gradients are those of the version by plain products, which runs again for them: convolutions on a GPU are not exact
in fp32.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.convolution import convolved_heads_by_products
from kvell.kernels.triton.launch import Recomputed, blocks, on_device_of, power_of_two, sent
from kvell.kernels.triton.products import product_added

INTO = 32  # a head's channels that one product adds up over: larger blocks do not fit into registers


def convolved_heads(
    laid: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    temperature: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    counts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    tensors = laid, depthwise, depthwise_bias, grouped, grouped_bias, temperature, cos, sin
    fast, plain = (partial(run, counts=counts) for run in (_forward, convolved_heads_by_products))
    return Recomputed.apply(fast, plain, *tensors)  # type: ignore[no-untyped-call]


def _forward(
    laid: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    temperature: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    counts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    channels, width, later = grouped.shape
    earlier, tokens, heads = depthwise.shape[2], sum(counts), channels // width
    kv_heads = 0 if temperature is None else len(temperature)
    # A place of the grouped kernel, then channels in, then channels out: a product reads whole rows.
    laid, depthwise, depthwise_bias, grouped, grouped_bias = (
        x.contiguous() for x in (laid, depthwise, depthwise_bias, grouped.permute(2, 1, 0), grouped_bias)
    )
    query = laid.new_empty(tokens, heads - kv_heads, width)
    key = laid.new_empty(tokens, kv_heads, width)
    places = _places(counts, earlier + later - 2, laid.device)
    pairs = 0 if cos is None else cos.shape[1]
    block = 16 if tokens <= 16 else 32
    if tokens:
        with on_device_of(laid):
            _convolve[blocks(tokens, block), heads](
                *(laid, places, depthwise, depthwise_bias, grouped, grouped_bias),
                laid if temperature is None else temperature.contiguous(),
                laid if cos is None else cos.contiguous(),
                laid if sin is None else sin.contiguous(),
                *(query, key, tokens, channels, width, pairs, torch.finfo(laid.dtype).eps, width**0.5),
                *(heads - kv_heads, kv_heads, earlier, later, block, min(power_of_two(width, 16), INTO)),
                *(power_of_two(pairs, 16) if pairs else 0, power_of_two(width - 2 * pairs, 16)),
                width > 2 * pairs,
            )
    return query, key


def _places(counts: Sequence[int], reach: int, device: torch.device) -> Tensor:
    """Where every token's row lies: each sequence stands behind the rows that it reaches back to."""
    if len(counts) == sum(counts):  # one token each: nothing that the device does not know
        return torch.arange(len(counts), device=device) * (reach + 1) + reach
    sequence = torch.arange(len(counts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
    return sent(torch.arange(sum(counts), device="cpu") + reach * (1 + sequence), device)


@triton.jit
def _weights(weights, number, channels, width, into, out):
    """The grouped kernel's weights at one place, from a block of a head's channels to `number` of them."""
    return tl.load(
        weights + into[:, None] * channels + out[None, :],
        (out < number)[None, :] & (into < width)[:, None],
        0.0,
    )


@triton.jit
def _mean(laid, at, known, head, first, number, channels, width, out, HEADS: tl.constexpr, KV_HEADS: tl.constexpr):
    """m_q of a query head, m_k of a key head, of `number` channels from `first` on."""
    mask = known[:, None] & (out < number)[None, :]
    rows = laid + at[:, None] * channels + first + out[None, :]
    own = tl.load(rows + head * width, mask, 0.0).to(tl.float32)
    if KV_HEADS > 0:
        group = HEADS // KV_HEADS
        if head < HEADS:
            own += tl.load(rows + (HEADS + head // group) * width, mask, 0.0).to(tl.float32)
        else:
            for member in range(group):
                query = tl.load(rows + ((head - HEADS) * group + member) * width, mask, 0.0).to(tl.float32)
                own += query / group
        own = own / 2
    return own


@triton.jit
def _bias(grouped_bias, head, first, number, width, out, TOKENS: tl.constexpr):
    bias = tl.load(grouped_bias + head * width + first + out, out < number, 0.0).to(tl.float32)
    return tl.zeros([TOKENS, 1], tl.float32) + bias[None, :]


@triton.jit
def _convolve(
    laid,
    places,
    depthwise,
    depthwise_bias,
    grouped,
    grouped_bias,
    temperature,
    cos,
    sin,
    query,
    key,
    tokens,
    channels,
    width,
    pairs,
    least,
    root_width,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    EARLIER: tl.constexpr,
    LATER: tl.constexpr,
    TOKENS: tl.constexpr,
    INTO: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = tl.program_id(1)
    known = token < tokens
    at = tl.load(places + token, known, 0)
    rest = width - 2 * pairs
    if PAIRS > 0:
        pair = tl.arange(0, PAIRS)
        a = _bias(grouped_bias, head, 0, pairs, width, pair, TOKENS)
        b = _bias(grouped_bias, head, pairs, pairs, width, pair, TOKENS)
    if HAS_REST:
        other = tl.arange(0, REST)
        c = _bias(grouped_bias, head, 2 * pairs, rest, width, other, TOKENS)
    for place in tl.static_range(LATER):
        for start in range(0, width, INTO):
            into = start + tl.arange(0, INTO)
            inside = into < width
            bias = tl.load(depthwise_bias + head * width + into, inside, 0.0).to(tl.float32)
            inner = tl.zeros([TOKENS, 1], tl.float32) + bias[None, :]
            for before in tl.static_range(EARLIER):
                row = at - (LATER - 1) + place - (EARLIER - 1) + before
                rows = laid + row[:, None] * channels + head * width + into[None, :]
                values = tl.load(rows, known[:, None] & inside[None, :], 0.0).to(tl.float32)
                factor = tl.load(depthwise + (head * width + into) * EARLIER + before, inside, 0.0).to(tl.float32)
                inner += values * factor[None, :]
            inner = inner.to(grouped.dtype.element_ty)
            weights = grouped + place * width * channels + head * width
            if PAIRS > 0:
                a = product_added(inner, _weights(weights, pairs, channels, width, into, pair), a)
                b = product_added(inner, _weights(weights + pairs, pairs, channels, width, into, pair), b)
            if HAS_REST:
                c = product_added(inner, _weights(weights + 2 * pairs, rest, channels, width, into, other), c)
    square = tl.zeros([TOKENS], tl.float32)
    if PAIRS > 0:
        a += _mean(laid, at, known, head, 0, pairs, channels, width, pair, HEADS, KV_HEADS)
        b += _mean(laid, at, known, head, pairs, pairs, channels, width, pair, HEADS, KV_HEADS)
        square += tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if HAS_REST:
        c += _mean(laid, at, known, head, 2 * pairs, rest, channels, width, other, HEADS, KV_HEADS)
        square += tl.sum(c * c, 1)
    factor = root_width / tl.maximum(tl.sqrt(square), least)
    if head < HEADS:
        made = query + (token * HEADS + head) * width
    else:
        factor *= tl.load(temperature + head - HEADS).to(tl.float32)
        made = key + (token * KV_HEADS + head - HEADS) * width
    if PAIRS > 0:
        mask = known[:, None] & (pair < pairs)[None, :]
        angle = token[:, None] * pairs + pair[None, :]
        x = tl.load(cos + angle, mask, 0.0).to(tl.float32) * factor[:, None]
        y = tl.load(sin + angle, mask, 0.0).to(tl.float32) * factor[:, None]
        tl.store(made[:, None] + pair[None, :], a * x - b * y, mask)
        tl.store(made[:, None] + pairs + pair[None, :], b * x + a * y, mask)
    if HAS_REST:
        mask = known[:, None] & (other < rest)[None, :]
        tl.store(made[:, None] + 2 * pairs + other[None, :], c * factor[:, None], mask)
