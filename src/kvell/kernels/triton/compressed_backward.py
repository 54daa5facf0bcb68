"""The backward pass of attention over a window and compressed entries.

With the weights p made again from the logarithm of their sum, g the gradient of the output o, kv a row or an entry:

    level = g . o,   g_score = p (g . kv - level)
    g_q = scale * sum over kv of g_score kv,   g_kv = sum over queries and heads of p g + scale * g_score q
    g_sink = - sum over queries of exp(sink - logarithm) level
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.triton.compressed_blocks import far_keys, gathered, near, own_rows, sides
from kvell.kernels.triton.launch import blocks, on_device_of
from kvell.kernels.triton.products import product, product_added


def attention_backward(
    saved: tuple[Tensor, ...], gradient: Tensor, scale: float, window: int
) -> tuple[Tensor | None, ...]:
    query, rows, entries, visible, picks, sink, output, logarithm = saved
    count, heads, width = query.shape
    shape = sides(query, picks is not None, backward=True)
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
    query, head, real = own_rows(queries, heads, QUERIES, HEADS)
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
        key, exists, seen = near(start, query, queries, held, window, KEYS)
        attended = gathered(rows, key, exists, row_stride, channel, inside)
        to_query, to_keys = _one_block_backward(q, flow, attended, seen, scale, logarithm, level, to_query)
        tl.atomic_add(
            grad_rows + key[:, None].to(tl.int64) * width + channel[None, :],
            to_keys,
            exists[:, None] & inside[None, :],
            sem="relaxed",
        )
    for start in range(0, seen_far, KEYS):
        key, exists, seen = far_keys(start, sees, picks, far, PICKED, KEYS)
        attended = gathered(entries, key, exists, entry_stride, channel, inside)
        to_query, to_keys = _one_block_backward(q, flow, attended, seen, scale, logarithm, level, to_query)
        tl.atomic_add(
            grad_entries + key[:, None] * width + channel[None, :],
            to_keys,
            exists[:, None] & inside[None, :],
            sem="relaxed",
        )
    tl.store(grad_query + at, to_query, both)
