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
from kvell.kernels.triton.launch import Recomputed, blocks, on_device_of, power_of_two
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
    return _forward(*_in_order(*tensors), scale, window)[0]


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
        tensors = _in_order(query, rows, entries, visible, picks, sink)
        output, logarithm = _forward(*tensors, scale, window)
        ctx.save_for_backward(*tensors, output, logarithm)
        ctx.settings = scale, window
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, window = ctx.settings
        return (*_backward(ctx.saved_tensors, gradient.contiguous(), scale, window), None, None)


def _in_order(
    query: Tensor, rows: Tensor, entries: Tensor, visible: Tensor, picks: Tensor | None, sink: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The tensors as the kernels address them: rows and entries may lie in a larger buffer."""
    rows, entries = (x if x.stride(1) == 1 else x.contiguous() for x in (rows, entries))
    picks = None if picks is None else picks.contiguous()
    return query.contiguous(), rows, entries, visible.contiguous(), picks, sink.float().contiguous()


def _shape(query: Tensor, picked: bool, backward: bool = False) -> dict[str, int]:
    """Sides of a program's blocks, and its warps: what of queries, keys and sums fits into registers."""
    _, heads, width = query.shape
    filled = power_of_two(width, 16)
    if backward or query.dtype.itemsize > 2:
        most = keys = 32 if filled * query.dtype.itemsize <= 256 else 16
    else:
        most, keys = 64, 64 if filled <= 128 else 32
    at_once = min(power_of_two(heads), most)
    if picked:
        at_once, queries = max(at_once, 16), 1
    else:
        queries = most // at_once
    return {
        "QUERIES": queries,
        "HEADS": at_once,
        "KEYS": keys,
        "WIDTH": filled,
        "num_warps": 8 if filled > 256 else 4,
        "num_stages": 2,
    }


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
    shape = _shape(query, picks is not None)
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


def _backward(saved: tuple[Tensor, ...], gradient: Tensor, scale: float, window: int) -> tuple[Tensor | None, ...]:
    query, rows, entries, visible, picks, sink, output, logarithm = saved
    count, heads, width = query.shape
    shape = _shape(query, picks is not None, backward=True)
    grad_query = torch.empty_like(query)
    grad_rows, grad_entries = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (rows, entries))
    level = (gradient.float() * output.float()).sum(-1)
    if count:
        with on_device_of(query):
            _attend_backward[blocks(count, shape["QUERIES"]), blocks(heads, shape["HEADS"])](
                *(query, rows, entries, visible, visible if picks is None else picks, gradient, logarithm, level),
                *(grad_query, grad_rows, grad_entries),
                *(count, heads, width, len(rows), len(entries) if picks is None else picks.shape[1]),
                *(rows.stride(0), entries.stride(0), scale, window, picks is not None),
                **shape,
            )
    grad_sink = -((sink - logarithm.view(count, heads)).exp() * level).sum(0)
    return grad_query, grad_rows.to(rows.dtype), grad_entries.to(entries.dtype), None, None, grad_sink


@triton.jit
def _own_rows(queries, heads, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """The query and the head of every row of this program's block, and which rows there are."""
    row = tl.arange(0, QUERIES * HEADS)
    query = tl.program_id(0) * QUERIES + row // HEADS
    head = tl.program_id(1) * HEADS + row % HEADS
    return query, head, (query < queries) & (head < heads)


@triton.jit
def _near(at, query, queries, held, window, KEYS: tl.constexpr):
    """Rows of the window from `at` on: where they lie, which exist, and which of them each query sees."""
    key = at + tl.arange(0, KEYS)
    own = held - queries + query
    exists = key < held
    seen = (key[None, :] <= own[:, None]) & (key[None, :] > own[:, None] - window)
    return key, exists, seen & exists[None, :]


@triton.jit
def _far(at, sees, picks, far, PICKED: tl.constexpr, KEYS: tl.constexpr):
    """Entries from `at` on, or of those that one query picked, in the same words."""
    key = at + tl.arange(0, KEYS)
    exists = key < far
    if PICKED:
        key = tl.load(picks + tl.program_id(0).to(tl.int64) * far + key, exists, -1)
        exists = key >= 0
        return key, exists, exists[None, :] & (sees >= 0)[:, None]
    return key.to(tl.int64), exists, (key[None, :] < sees[:, None]) & exists[None, :]


@triton.jit
def _gathered(rows, key, exists, stride, channel, inside):
    return tl.load(
        rows + key[:, None].to(tl.int64) * stride + channel[None, :], exists[:, None] & inside[None, :], 0.0
    )


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
    query, head, real = _own_rows(queries, heads, QUERIES, HEADS)
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
        key, exists, seen = _near(first + step * KEYS, query, queries, held, window, KEYS)
        attended = _gathered(rows, key, exists, row_stride, channel, inside)
        largest, total, joint = _one_block(q, attended, seen, scale, largest, total, joint)
    begin -= near_steps
    for step in range(tl.maximum(begin, 0), tl.minimum(begin + share, tl.cdiv(seen_far, KEYS))):
        key, exists, seen = _far(step * KEYS, sees, picks, far, PICKED, KEYS)
        attended = _gathered(entries, key, exists, entry_stride, channel, inside)
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


@triton.jit
def _one_block_backward(q, flow, attended, seen, scale, logarithm, level, to_query):
    """What flows to the queries, with a block of keys more, and what flows to these keys."""
    scores = product(q, tl.trans(attended)) * scale
    weights = tl.where(seen, tl.exp(scores - logarithm[:, None]), 0.0)
    through = product(flow, tl.trans(attended))
    to_scores = (weights * (through - level[:, None]) * scale).to(attended.dtype)
    to_query = product_added(to_scores, attended, to_query)
    to_keys = product(tl.trans(weights.to(attended.dtype)), flow)
    return to_query, product_added(tl.trans(to_scores), q, to_keys)


@triton.jit
def _attend_backward(
    query_in,
    rows,
    entries,
    visible,
    picks,
    gradient,
    logarithms,
    levels,
    grad_query,
    grad_rows,
    grad_entries,
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
    query, head, real = _own_rows(queries, heads, QUERIES, HEADS)
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    row = query.to(tl.int64) * heads + head
    at = row[:, None] * width + channel[None, :]
    both = real[:, None] & inside[None, :]
    q = tl.load(query_in + at, both, 0.0)
    flow = tl.load(gradient + at, both, 0.0)
    logarithm = tl.load(logarithms + row, real, float("inf"))
    level = tl.load(levels + row, real, 0.0)
    first = tl.maximum(held - queries + tl.program_id(0) * QUERIES - window + 1, 0)
    last = tl.minimum(held - queries + (tl.program_id(0) + 1) * QUERIES, held)
    sees = tl.load(visible + query, query < queries, 0).to(tl.int32)
    seen_far = far
    if not PICKED:
        seen_far = tl.minimum(tl.max(sees, 0), far)
    to_query = tl.zeros([QUERIES * HEADS, WIDTH], tl.float32)
    for start in range(first, last, KEYS):
        key, exists, seen = _near(start, query, queries, held, window, KEYS)
        attended = _gathered(rows, key, exists, row_stride, channel, inside)
        to_query, to_keys = _one_block_backward(q, flow, attended, seen, scale, logarithm, level, to_query)
        tl.atomic_add(
            grad_rows + key[:, None].to(tl.int64) * width + channel[None, :],
            to_keys,
            exists[:, None] & inside[None, :],
            sem="relaxed",
        )
    for start in range(0, seen_far, KEYS):
        key, exists, seen = _far(start, sees, picks, far, PICKED, KEYS)
        attended = _gathered(entries, key, exists, entry_stride, channel, inside)
        to_query, to_keys = _one_block_backward(q, flow, attended, seen, scale, logarithm, level, to_query)
        tl.atomic_add(
            grad_entries + key[:, None] * width + channel[None, :],
            to_keys,
            exists[:, None] & inside[None, :],
            sem="relaxed",
        )
    tl.store(grad_query + at, to_query, both)
