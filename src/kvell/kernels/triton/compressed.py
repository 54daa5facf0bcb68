"""Attention over a window and compressed entries in Triton: what kernels/compressed.py says.

A program has a block of queries and heads as its rows: one query where each has picks of its own, several where all
see the same entries. It goes through the window's rows and then the entries in blocks, gathering picked ones as it
comes to them, with a softmax that is corrected as larger scores appear; the sink is where it begins. Where there are
few queries, programs share the keys of one out among them.

The backward makes the weights again from the logarithm of their sum. What flows to rows and entries is added up with
atomic additions, whose order varies: under `torch.use_deterministic_algorithms` the torch version runs backward.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvell.kernels.compressed import compressed_attention_blocked
from kvell.kernels.triton.compressed_backward import attention_backward
from kvell.kernels.triton.compressed_blocks import far_keys, gathered, in_order, near, own_rows, sides
from kvell.kernels.triton.launch import Recomputed, blocks, on_device_of
from kvell.kernels.triton.products import product, product_added
from kvell.kernels.triton.slices import joined

PROGRAMS = 256  # enough to keep a large GPU busy
WIDEST_FP32 = 128  # blocks of wider fp32 heads do not fit into registers and shared memory: torch does these
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: a difference of two is a number


def compressed_attention(
    query: Tensor,
    rows: Tensor,
    entries: Tensor,
    visible: Tensor,
    picks: Tensor | None,
    sink: Tensor,
    *,
    scale: float,
    window: int,
) -> Tensor:
    if query.dtype == torch.float32 and query.shape[2] > WIDEST_FP32:
        return compressed_attention_blocked(query, rows, entries, visible, picks, sink, scale=scale, window=window)
    if torch.are_deterministic_algorithms_enabled():
        plain = partial(compressed_attention_blocked, scale=scale, window=window)
        fast = partial(_without_gradients, scale=scale, window=window)
        return Recomputed.apply(fast, plain, query, rows, entries, visible, picks, sink)  # type: ignore[no-untyped-call]
    return _Attention.apply(query, rows, entries, visible, picks, sink, scale, window)  # type: ignore[no-untyped-call]


def _without_gradients(*tensors: Tensor, scale: float, window: int) -> Tensor:
    return _forward(*in_order(*tensors), scale, window)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        rows: Tensor,
        entries: Tensor,
        visible: Tensor,
        picks: Tensor | None,
        sink: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        tensors = in_order(query, rows, entries, visible, picks, sink)
        output, logarithm = _forward(*tensors, scale, window)
        ctx.save_for_backward(*tensors, output, logarithm)
        ctx.settings = scale, window
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, window = ctx.settings
        return (*attention_backward(ctx.saved_tensors, gradient.contiguous(), scale, window), None, None)


def _forward(
    query: Tensor,
    rows: Tensor,
    entries: Tensor,
    visible: Tensor,
    picks: Tensor | None,
    sink: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of the sum of every query's and head's weights."""
    count, heads, width = query.shape
    shape = sides(query, picks is not None)
    grid = blocks(count, shape["QUERIES"]), blocks(heads, shape["HEADS"])
    far = len(entries) if picks is None else picks.shape[1]
    steps = blocks(min(window, len(rows)) + shape["QUERIES"], shape["KEYS"]) + blocks(far, shape["KEYS"])
    slices = max(min(PROGRAMS // max(grid[0] * grid[1], 1), blocks(steps, 2)), 1)
    outputs = query.new_empty(slices, count * heads, width, dtype=query.dtype if slices == 1 else torch.float32)
    logarithms = query.new_empty(slices, count * heads, dtype=torch.float32)
    if count:
        with on_device_of(query):
            _attend[(*grid, slices)](
                *(query, rows, entries, visible, visible if picks is None else picks, sink, outputs, logarithms),
                *(count, heads, width, len(rows), far, rows.stride(0), entries.stride(0), scale, window),
                picks is not None,
                **shape,
            )
    if slices == 1:
        return outputs.view_as(query), logarithms[0]
    output, logarithm = joined(outputs, logarithms, query.dtype)
    return output.view_as(query), logarithm


@triton.jit
def _one_block(q, attended, seen, scale, largest, total, joint):
    """The softmax so far, with a block of keys more."""
    scores = product(q, tl.trans(attended)) * scale
    scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp(scores - larger[:, None])
    fade = tl.exp(largest - larger)
    joint = product_added(weights.to(attended.dtype), attended, joint * fade[:, None])
    return larger, total * fade + tl.sum(weights, 1), joint


@triton.jit
def _attend(
    query_in,
    rows,
    entries,
    visible,
    picks,
    sink,
    outputs,
    logarithms,
    queries,
    heads,
    width,
    held,
    far,
    row_stride,
    entry_stride,
    scale,
    window,
    PICKED: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    query, head, real = own_rows(queries, heads, QUERIES, HEADS)
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    at = (query.to(tl.int64) * heads + head)[:, None] * width + channel[None, :]
    q = tl.load(query_in + at, real[:, None] & inside[None, :], 0.0)
    first = tl.maximum(held - queries + tl.program_id(0) * QUERIES - window + 1, 0)
    last = tl.minimum(held - queries + (tl.program_id(0) + 1) * QUERIES, held)
    sees = tl.load(visible + query, query < queries, 0).to(tl.int32)
    seen_far = far
    if not PICKED:
        seen_far = tl.minimum(tl.max(sees, 0), far)
    near_steps = tl.cdiv(last - first, KEYS)
    share = tl.cdiv(near_steps + tl.cdiv(seen_far, KEYS), tl.num_programs(2))
    begin = tl.program_id(2) * share
    # The sink is one key more, whose value is zero: it counts once.
    counts = tl.program_id(2) == 0
    largest = tl.where(counts, tl.load(sink + head, head < heads, 0.0), LOWEST)
    total = tl.where(counts & real, 1.0, 0.0)
    joint = tl.zeros([QUERIES * HEADS, WIDTH], tl.float32)
    for step in range(begin, tl.minimum(begin + share, near_steps)):
        key, exists, seen = near(first + step * KEYS, query, queries, held, window, KEYS)
        attended = gathered(rows, key, exists, row_stride, channel, inside)
        largest, total, joint = _one_block(q, attended, seen, scale, largest, total, joint)
    begin -= near_steps
    for step in range(tl.maximum(begin, 0), tl.minimum(begin + share, tl.cdiv(seen_far, KEYS))):
        key, exists, seen = far_keys(step * KEYS, sees, picks, far, PICKED, KEYS)
        attended = gathered(entries, key, exists, entry_stride, channel, inside)
        largest, total, joint = _one_block(q, attended, seen, scale, largest, total, joint)
    # A slice without keys has no weight: its logarithm stays below all others.
    known = total > 0
    slice_at = tl.program_id(2).to(tl.int64) * queries * heads
    tl.store(
        outputs + slice_at * width + at,
        joint / tl.where(known, total, 1.0)[:, None],
        real[:, None] & inside[None, :],
    )
    logarithm = tl.where(known, largest + tl.log(tl.where(known, total, 1.0)), LOWEST)
    tl.store(logarithms + slice_at + query.to(tl.int64) * heads + head, logarithm, real)
