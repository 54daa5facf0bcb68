"""Hyper-connections in Triton: what kernels/hyper_connections.py says, T tokens, N streams of C channels, M numbers.

Reading is two kernels: `_project` multiplies blocks of tokens with the weights, in slices of the flattened streams
where there are few tokens, and adds up their squares in the same pass (the norm is a factor, applied afterwards).
Streams in bf16 meet the weights as three bf16 numbers each, which hold all of their bits: where there are many tokens
`_split` takes the weights apart beforehand, and `_project_parts` multiplies. `_read` joins the slices,
makes the coefficients with Sinkhorn in registers, and collapses the streams. The backward keeps the M numbers and the
root of every token (100 bytes for 4 streams) and makes everything else again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvell.kernels.triton.hyper_connections_backward import read_backward
from kvell.kernels.triton.launch import blocks, on_device_of, power_of_two
from kvell.kernels.triton.products import product_added

# Tokens per product, the least that a matrix unit takes, and channels per block. Where there are many tokens more of
# them meet a block of weights, which is then read less often: so many in fp32, and of bf16 as an H200 was fastest.
TOKENS, TOKENS_OF_MANY, CHANNELS = 16, 64, 128
TOKENS_OF_PARTS, CHANNELS_OF_PARTS = 128, 64
MANY = 512  # tokens from which such blocks, in slices, are programs enough
# Products of bf16 numbers that a matrix unit adds up in one go. It cuts off the sum's last bits at each step: on an
# H200 the numbers, of size 1, were off by 5e-5 after 4,096, by 2e-4 after 16,384 (fp32 products: 2e-6). Either is far
# below what rounding the streams to bf16 costs, 4e-3 of each.
LONGEST_SUM = 4096
WIDE = 1024  # channels per block where one token is worked on
PROGRAMS = 256  # enough to keep a large GPU busy


def hyper_read(
    h: Tensor, weight: Tensor, base: Tensor, scale: Tensor, *, iterations: int | None, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _Read.apply(h, weight, base, scale, iterations, eps, norm_eps)  # type: ignore[no-untyped-call]


def hyper_write(h: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    return _Write.apply(h, y, post, mix)  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        base: Tensor,
        scale: Tensor,
        iterations: int | None,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, weight, base, scale = (x.contiguous() for x in (h, weight, base, scale))
        tokens, streams, channels = h.shape
        width, count = streams * channels, len(weight)
        split = h.dtype == torch.bfloat16
        parts = split and tokens >= MANY
        block = TOKENS if tokens < MANY else TOKENS_OF_PARTS if parts else TOKENS_OF_MANY
        least = blocks(width, LONGEST_SUM) if split else 1
        slices = max(least, min(PROGRAMS // max(blocks(tokens, block), 1), blocks(width, 4 * CHANNELS)))
        partial, squares = weight.new_empty(slices, tokens, count), weight.new_empty(slices, tokens)
        x = h.new_empty(tokens, channels)
        post, mix = weight.new_empty(tokens, streams), weight.new_empty(tokens, streams, streams)
        numbers, roots = weight.new_empty(tokens, count), weight.new_empty(tokens)
        steps = 0 if iterations is None else iterations
        if tokens:
            with on_device_of(h):
                grid, filled = (blocks(tokens, block), slices), power_of_two(count, 16)
                if parts:
                    taken_apart = h.new_empty(3, filled, width)
                    _split[(blocks(width, CHANNELS),)](weight, taken_apart, width, count, CHANNELS, filled)
                    _project_parts[grid](
                        *(h, taken_apart, partial, squares, tokens, width, count),
                        *(tokens % block == 0 and width % CHANNELS_OF_PARTS == 0, block, CHANNELS_OF_PARTS, filled),
                        num_stages=4,
                    )
                else:
                    _project[grid](h, weight, partial, squares, tokens, width, count, split, block, CHANNELS, filled)
                _read[(tokens,)](
                    *(h, partial, squares, base, scale, x, post, mix, numbers, roots),
                    *(tokens, channels, slices, steps, eps, norm_eps),
                    *(streams, power_of_two(streams), power_of_two(min(channels, WIDE))),
                )
        ctx.save_for_backward(h, weight, base, scale, numbers, roots)
        ctx.settings = steps, eps
        return x, post, mix

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_x: Tensor, grad_post: Tensor, grad_mix: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        steps, eps = ctx.settings
        gradients = read_backward(ctx.saved_tensors, (grad_x, grad_post, grad_mix), wanted, iterations=steps, eps=eps)
        return (*gradients, None, None, None)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        h, y, post, mix = (x.contiguous() for x in (h, y, post, mix))
        tokens, streams, channels = h.shape
        written, block = torch.empty_like(h), power_of_two(min(channels, WIDE))
        if tokens:
            with on_device_of(h):
                _write[(tokens, blocks(channels, block))](
                    h, y, post, mix, written, channels, streams, power_of_two(streams), block
                )
        ctx.save_for_backward(h, y, post, mix)
        return written

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        h, y, post, mix = ctx.saved_tensors
        tokens, streams, channels = h.shape
        found = tuple(torch.empty_like(x) for x in (h, y, post, mix))
        if tokens:
            with on_device_of(h):
                _write_backward[(tokens,)](
                    *(h, y, post, mix, gradient.contiguous(), *found),
                    *(channels, streams, power_of_two(streams), power_of_two(min(channels, WIDE))),
                )
        return found


@triton.jit
def _taken_apart(numbers):
    """8 bits of a number in each of three. Whoever adds up products with them begins with the smallest."""
    high = numbers.to(tl.bfloat16)
    left = numbers - high.to(tl.float32)
    middle = left.to(tl.bfloat16)
    return high, middle, (left - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split(weight, parts, width, count, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr):
    """The weights' three parts (3, NUMBERS, width), zeros behind the last number."""
    number = tl.arange(0, NUMBERS)[:, None]
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = channel < width
    at = number * width + channel
    high, middle, low = _taken_apart(tl.load(weight + at, (number < count) & inside, 0.0))
    tl.store(parts + at, high, inside)
    tl.store(parts + NUMBERS * width + at, middle, inside)
    tl.store(parts + 2 * NUMBERS * width + at, low, inside)


@triton.jit
def _project_parts(
    h,
    parts,
    partial,
    squares,
    tokens,
    width,
    count,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """What `_project` computes, by weights taken apart; EVEN where blocks leave no rest."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    number = tl.arange(0, NUMBERS)
    share = tl.cdiv(tl.cdiv(width, CHANNELS), tl.num_programs(1)) * CHANNELS
    first = tl.program_id(1) * share
    products = tl.zeros([TOKENS, NUMBERS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for start in range(first, tl.minimum(first + share, width), CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        own = h + token[:, None] * width + channel[None, :]
        at = number[None, :] * width + channel[:, None]
        if EVEN:
            rows = tl.load(own)
            high = tl.load(parts + at)
            middle = tl.load(parts + NUMBERS * width + at)
            low = tl.load(parts + 2 * NUMBERS * width + at)
        else:
            inside = channel < width
            rows = tl.load(own, (token < tokens)[:, None] & inside[None, :], 0.0)
            high = tl.load(parts + at, inside[:, None], 0.0)
            middle = tl.load(parts + NUMBERS * width + at, inside[:, None], 0.0)
            low = tl.load(parts + 2 * NUMBERS * width + at, inside[:, None], 0.0)
        products = product_added(rows, low, products)
        products = product_added(rows, middle, products)
        products = product_added(rows, high, products)
        wide = rows.to(tl.float32)
        square += tl.sum(wide * wide, 1)
    at = tl.program_id(1).to(tl.int64) * tokens + token
    tl.store(squares + at, square, token < tokens)
    tl.store(
        partial + at[:, None] * count + number[None, :],
        products,
        (token < tokens)[:, None] & (number < count)[None, :],
    )


@triton.jit
def _project(
    h,
    weight,
    partial,
    squares,
    tokens,
    width,
    count,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """One slice's share of W h and of h . h for a block of tokens."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    number = tl.arange(0, NUMBERS)
    share = tl.cdiv(tl.cdiv(width, CHANNELS), tl.num_programs(1)) * CHANNELS
    first = tl.program_id(1) * share
    products = tl.zeros([TOKENS, NUMBERS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for start in range(first, tl.minimum(first + share, width), CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < width
        rows = tl.load(
            h + token[:, None] * width + channel[None, :], (token < tokens)[:, None] & inside[None, :], 0.0
        )
        wide = rows.to(tl.float32)
        columns = tl.load(
            weight + number[None, :] * width + channel[:, None], (number < count)[None, :] & inside[:, None], 0.0
        )
        if SPLIT:
            high, middle, low = _taken_apart(columns)
            products = product_added(rows, low, products)
            products = product_added(rows, middle, products)
            products = product_added(rows, high, products)
        else:
            products = product_added(wide, columns, products)
        square += tl.sum(wide * wide, 1)
    at = tl.program_id(1).to(tl.int64) * tokens + token
    tl.store(squares + at, square, token < tokens)
    tl.store(
        partial + at[:, None] * count + number[None, :],
        products,
        (token < tokens)[:, None] & (number < count)[None, :],
    )


@triton.jit
def _read(
    h,
    partial,
    squares,
    base,
    scale,
    x,
    post_out,
    mix_out,
    numbers,
    roots,
    tokens,
    channels,
    slices,
    iterations,
    eps,
    norm_eps,
    N: tl.constexpr,
    STREAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token: its coefficients, and its streams collapsed. STREAMS is N filled up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, STREAMS)
    real = stream < N
    cell = 2 * N + stream[:, None] * N + stream[None, :]
    square_real = real[:, None] & real[None, :]
    pre = tl.zeros([STREAMS], tl.float32)
    post = tl.zeros([STREAMS], tl.float32)
    mix = tl.zeros([STREAMS, STREAMS], tl.float32)
    square = tl.sum(tl.zeros([STREAMS], tl.float32), 0)
    for piece in range(slices):
        at = piece * tokens + token
        own = partial + at * (N * (N + 2))
        square += tl.load(squares + at)
        pre += tl.load(own + stream, real, 0.0)
        post += tl.load(own + N + stream, real, 0.0)
        mix += tl.load(own + cell, square_real, 0.0)
    root = 1.0 / tl.sqrt(square / (N * channels) + norm_eps)
    pre, post, mix = pre * root, post * root, mix * root
    kept = numbers + token * (N * (N + 2))
    tl.store(kept + stream, pre, real)
    tl.store(kept + N + stream, post, real)
    tl.store(kept + cell, mix, square_real)
    tl.store(roots + token, root)
    pre = tl.sigmoid(pre * tl.load(scale) + tl.load(base + stream, real, 0.0)) + eps
    post = 2 * tl.sigmoid(post * tl.load(scale + 1) + tl.load(base + N + stream, real, 0.0))
    mix = mix * tl.load(scale + 2) + tl.load(base + cell, square_real, 0.0)
    if iterations > 0:
        mix = tl.where(real[:, None], tl.where(real[None, :], mix, float("-inf")), 0.0)
        mix = tl.exp(mix - tl.max(mix, 1)[:, None])
        mix = tl.where(square_real, mix / tl.sum(mix, 1)[:, None] + eps, 0.0)
        mix = mix / (tl.sum(mix, 0) + eps)[None, :]
        for _ in range(iterations - 1):
            mix = mix / (tl.sum(mix, 1) + eps)[:, None]
            mix = mix / (tl.sum(mix, 0) + eps)[None, :]
    tl.store(post_out + token * N + stream, post, real)
    tl.store(mix_out + token * (N * N) + stream[:, None] * N + stream[None, :], mix, square_real)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < channels
        streams = tl.load(
            h + (token * N + stream)[:, None] * channels + channel[None, :], real[:, None] & inside[None, :], 0.0
        ).to(tl.float32)
        tl.store(x + token * channels + channel, tl.sum(streams * pre[:, None], 0), inside)


@triton.jit
def _write(h, y, post, mix, written, channels, N: tl.constexpr, STREAMS: tl.constexpr, CHANNELS: tl.constexpr):
    """One token, one block of channels."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    stream = tl.arange(0, STREAMS)
    real = stream < N
    placed = tl.load(y + token * channels + channel, inside, 0.0).to(tl.float32)
    streams = tl.load(post + token * N + stream, real, 0.0)[:, None] * placed[None, :]
    for source in tl.static_range(N):
        old = tl.load(h + (token * N + source) * channels + channel, inside, 0.0).to(tl.float32)
        streams += tl.load(mix + (token * N + source) * N + stream, real, 0.0)[:, None] * old[None, :]
    tl.store(
        written + (token * N + stream)[:, None] * channels + channel[None, :],
        streams,
        real[:, None] & inside[None, :],
    )


@triton.jit
def _write_backward(
    h,
    y,
    post,
    mix,
    gradient,
    grad_h,
    grad_y,
    grad_post,
    grad_mix,
    channels,
    N: tl.constexpr,
    STREAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token: what flows to the old streams and the block's output, and, over all channels, to post and mix."""
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, STREAMS)
    real = stream < N
    weights = tl.load(post + token * N + stream, real, 0.0)
    to_post = tl.zeros([STREAMS], tl.float32)
    to_mix = tl.zeros([STREAMS, STREAMS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < channels
        flow = tl.load(
            gradient + (token * N + stream)[:, None] * channels + channel[None, :],
            real[:, None] & inside[None, :],
            0.0,
        ).to(tl.float32)
        placed = tl.load(y + token * channels + channel, inside, 0.0).to(tl.float32)
        to_post += tl.sum(flow * placed[None, :], 1)
        tl.store(grad_y + token * channels + channel, tl.sum(flow * weights[:, None], 0), inside)
        for source in tl.static_range(N):
            own = (token * N + source) * channels + channel
            old = tl.load(h + own, inside, 0.0).to(tl.float32)
            row = tl.load(mix + (token * N + source) * N + stream, real, 0.0)
            tl.store(grad_h + own, tl.sum(flow * row[:, None], 0), inside)
            to_mix += tl.where((stream == source)[:, None], tl.sum(flow * old[None, :], 1)[None, :], 0.0)
    tl.store(grad_post + token * N + stream, to_post, real)
    tl.store(
        grad_mix + token * (N * N) + stream[:, None] * N + stream[None, :], to_mix, real[:, None] & real[None, :]
    )
