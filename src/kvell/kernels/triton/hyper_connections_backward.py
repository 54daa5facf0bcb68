"""The backward pass of reading hyper-connected streams.

With n = W x, x = root * h, s = scale * n + base and the gradients g of what was read:

    g_pre_j = sum_c g_c h_jc,  through sigmoid and Sinkhorn to g_s,   g_n = scale * g_s
    g_h     = pre_j g_c + root * (W^T g_n - x (g_n . n) / (N C)),     g_W = sum over tokens of g_n x^T

Sinkhorn goes backwards through its steps: every step divided by sums, so with those at hand a step's input is its
output times them. The sums of all steps, N numbers each, stand in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.triton.launch import blocks, on_device_of, power_of_two
from kvell.kernels.triton.products import product, product_added

TOKENS, CHANNELS, WIDE = 16, 128, 1024
TOKEN_SLICE = 1024  # tokens whose share of the weights' gradient is one program's


def read_backward(
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor, Tensor],
    wanted: tuple[bool, bool],
    *,
    iterations: int,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of h and weight, as far as `wanted`, of base and of scale, from those of x, post and mix."""
    h, weight, base, scale, numbers, roots = saved
    tokens, streams, channels = h.shape
    count, width, filled = len(weight), streams * channels, power_of_two(len(weight), 16)
    grad_x, grad_post, grad_mix = (gradient.contiguous() for gradient in gradients)
    to_scaled, to_numbers = torch.empty_like(numbers), torch.empty_like(numbers)
    pre = numbers.new_empty(tokens, streams)
    grad_h = torch.empty_like(h) if wanted[0] else None
    grad_weight = torch.zeros_like(weight) if wanted[1] else None
    with on_device_of(h):
        if tokens:
            _coefficients[(tokens,)](
                *(h, grad_x, grad_post, grad_mix, numbers, base, scale, to_scaled, to_numbers, pre),
                *(channels, iterations, eps, streams, power_of_two(streams)),
                *(power_of_two(max(2 * iterations, 1)), power_of_two(min(channels, WIDE))),
            )
        if tokens and grad_h is not None:
            overlap = (to_numbers * numbers).sum(1) / width
            _streams[(blocks(tokens, TOKENS), streams * blocks(channels, CHANNELS))](
                *(h, weight, grad_x, pre, to_numbers, overlap, roots, grad_h),
                *(tokens, channels, count, streams, TOKENS, CHANNELS, filled),
            )
        if tokens and grad_weight is not None:
            slices = blocks(tokens, TOKEN_SLICE)
            shares = weight.new_empty(slices, count, width)
            _weights[(blocks(width, CHANNELS), slices)](
                h, to_numbers, roots, shares, tokens, width, count, TOKEN_SLICE, TOKENS, CHANNELS, filled
            )
            grad_weight = shares.sum(0)
    parts = [streams, streams, streams**2]
    grad_scale = torch.stack([part.sum() for part in (to_scaled * numbers).split(parts, dim=1)])
    return grad_h, grad_weight, to_scaled.sum(0), grad_scale


@triton.jit
def _coefficients(
    h,
    grad_x,
    grad_post,
    grad_mix,
    numbers,
    base,
    scale,
    to_scaled,
    to_numbers,
    pre_out,
    channels,
    iterations,
    eps,
    N: tl.constexpr,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token: from the gradients of its coefficients to those of its numbers."""
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, STREAMS)
    real = stream < N
    square = stream[:, None] * N + stream[None, :]
    square_real = real[:, None] & real[None, :]
    flow = tl.zeros([STREAMS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < channels
        streams = tl.load(
            h + (token * N + stream)[:, None] * channels + channel[None, :], real[:, None] & inside[None, :], 0.0
        ).to(tl.float32)
        flow += tl.sum(streams * tl.load(grad_x + token * channels + channel, inside, 0.0).to(tl.float32)[None, :], 1)
    own = token * (N * (N + 2))

    factor = tl.load(scale)
    pre = tl.sigmoid(tl.load(numbers + own + stream, real, 0.0) * factor + tl.load(base + stream, real, 0.0))
    tl.store(pre_out + token * N + stream, pre + eps, real)
    flow = flow * pre * (1 - pre)
    tl.store(to_scaled + own + stream, flow, real)
    tl.store(to_numbers + own + stream, flow * factor, real)

    factor = tl.load(scale + 1)
    post = tl.sigmoid(tl.load(numbers + own + N + stream, real, 0.0) * factor + tl.load(base + N + stream, real, 0.0))
    flow = tl.load(grad_post + token * N + stream, real, 0.0) * 2 * post * (1 - post)
    tl.store(to_scaled + own + N + stream, flow, real)
    tl.store(to_numbers + own + N + stream, flow * factor, real)

    factor = tl.load(scale + 2)
    toward = tl.load(grad_mix + token * (N * N) + square, square_real, 0.0)
    if iterations > 0:
        mix = tl.load(numbers + own + 2 * N + square, square_real, 0.0) * factor
        mix += tl.load(base + 2 * N + square, square_real, 0.0)
        mix = tl.where(real[:, None], tl.where(real[None, :], mix, float("-inf")), 0.0)
        mix = tl.exp(mix - tl.max(mix, 1)[:, None])
        mix = tl.where(square_real, mix / tl.sum(mix, 1)[:, None] + eps, 0.0)
        # The sums that were divided by: even steps columns, odd steps rows.
        step = tl.arange(0, STEPS)
        column = tl.sum(mix, 0) + eps
        mix = mix / column[None, :]
        sums = tl.where((step == 0)[:, None], column[None, :], 1.0)
        for i in range(1, iterations):
            row = tl.sum(mix, 1) + eps
            mix = mix / row[:, None]
            sums = tl.where((step == 2 * i - 1)[:, None], row[None, :], sums)
            column = tl.sum(mix, 0) + eps
            mix = mix / column[None, :]
            sums = tl.where((step == 2 * i)[:, None], column[None, :], sums)
        for back in range(1, iterations):
            i = iterations - back
            column = tl.sum(tl.where((step == 2 * i)[:, None], sums, 0.0), 0)
            toward = (toward - tl.sum(toward * mix, 0)[None, :]) / column[None, :]
            mix = mix * column[None, :]
            row = tl.sum(tl.where((step == 2 * i - 1)[:, None], sums, 0.0), 0)
            toward = (toward - tl.sum(toward * mix, 1)[:, None]) / row[:, None]
            mix = mix * row[:, None]
        column = tl.sum(tl.where((step == 0)[:, None], sums, 0.0), 0)
        toward = (toward - tl.sum(toward * mix, 0)[None, :]) / column[None, :]
        softmax = tl.where(square_real, mix * column[None, :] - eps, 0.0)
        toward = softmax * (toward - tl.sum(toward * softmax, 1)[:, None])
    tl.store(to_scaled + own + 2 * N + square, toward, square_real)
    tl.store(to_numbers + own + 2 * N + square, toward * factor, square_real)


@triton.jit
def _streams(
    h,
    weight,
    grad_x,
    pre,
    to_numbers,
    overlap,
    roots,
    grad_h,
    tokens,
    channels,
    count,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """A block of tokens, a block of one stream's channels."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    known = token < tokens
    per_stream = tl.cdiv(channels, CHANNELS)
    stream = tl.program_id(1) // per_stream
    channel = (tl.program_id(1) % per_stream) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    both = known[:, None] & inside[None, :]
    number = tl.arange(0, NUMBERS)
    flow = tl.load(
        to_numbers + token[:, None] * count + number[None, :], known[:, None] & (number < count)[None, :], 0.0
    )
    columns = tl.load(
        weight + (number[:, None] * N + stream) * channels + channel[None, :],
        (number < count)[:, None] & inside[None, :],
        0.0,
    )
    through = product(flow, columns)
    root = tl.load(roots + token, known, 0.0)[:, None]
    at = (token * N + stream)[:, None] * channels + channel[None, :]
    own = tl.load(h + at, both, 0.0).to(tl.float32)
    read = tl.load(grad_x + token[:, None] * channels + channel[None, :], both, 0.0).to(tl.float32)
    weights = tl.load(pre + token * N + stream, known, 0.0)[:, None]
    through = root * (through - own * root * tl.load(overlap + token, known, 0.0)[:, None])
    tl.store(grad_h + at, weights * read + through, both)


@triton.jit
def _weights(
    h,
    to_numbers,
    roots,
    shares,
    tokens,
    width,
    count,
    TOKEN_SLICE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """A slice of tokens' share of the weights' gradient, for a block of the flattened channels."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    number = tl.arange(0, NUMBERS)
    total = tl.zeros([NUMBERS, CHANNELS], tl.float32)
    first = tl.program_id(1) * TOKEN_SLICE
    for start in range(first, tl.minimum(first + TOKEN_SLICE, tokens), TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        known = token < tokens
        flow = tl.load(
            to_numbers + token[None, :] * count + number[:, None], known[None, :] & (number < count)[:, None], 0.0
        )
        rows = tl.load(h + token[:, None] * width + channel[None, :], known[:, None] & inside[None, :], 0.0)
        rows = rows.to(tl.float32) * tl.load(roots + token, known, 0.0)[:, None]
        total = product_added(flow, rows, total)
    at = (tl.program_id(1).to(tl.int64) * count + number[:, None]) * width + channel[None, :]
    tl.store(shares + at, total, (number < count)[:, None] & inside[None, :])
