"""Attention of one new token per sequence, in Triton, for sequences of any lengths in one launch.

Every sequence has keys and values in a buffer of its own. A table tells the kernel where: their addresses, how far
apart their rows lie, the first row that the query sees and the row behind the last, as 64-bit numbers, so that
nothing overflows beyond 2^31 elements. A program has the query heads of one KV head and a slice of one sequence's
rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.triton.launch import blocks, on_device_of, power_of_two, sent
from kvell.kernels.triton.products import product, product_added
from kvell.kernels.triton.slices import joined

PROGRAMS = 512  # enough to keep a large GPU busy
WIDEST_FP32 = 128  # blocks of wider fp32 heads do not fit into registers and shared memory: torch does these
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: a difference of two is a number


def refuses(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], **_: object
) -> str | None:
    """Why these are no single queries, of heads that fit, through which no gradient flows."""
    if any(count != 1 for count in counts):
        return "several queries of a sequence"
    if query.dtype == torch.float32 and query.shape[2] > WIDEST_FP32:
        return f"fp32 heads wider than {WIDEST_FP32}"
    if torch.is_grad_enabled() and (query.requires_grad or keys[0].requires_grad):
        return "gradients are recorded"
    return None


def ragged_decode(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    counts: Sequence[int] = (),
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """(B, H, D): each sequence's one query over its own keys[b] and values[b], (S_b, K, D)."""
    query = query.contiguous()
    count, heads, width = query.shape
    kv_heads, group = keys[0].shape[1], heads // keys[0].shape[1]
    keys, values = [_addressable(rows) for rows in keys], [_addressable(rows) for rows in values]
    firsts = [0 if window is None else max(len(rows) - window, 0) for rows in keys]
    rows = [
        [key.data_ptr() for key in keys],
        [value.data_ptr() for value in values],
        [key.stride(0) for key in keys],
        [value.stride(0) for value in values],
        firsts,
        [len(key) for key in keys],
    ]
    aligned = all(number % 16 == 0 for numbers in rows[:4] for number in numbers)
    longest = max(len(key) - first for key, first in zip(keys, firsts, strict=True))
    filled = power_of_two(width, 16)
    block = 64 if filled * query.dtype.itemsize <= 256 else 32
    slices = max(min(PROGRAMS // (count * kv_heads), blocks(longest, 2 * block)), 1)
    outputs = query.new_empty(slices, count * heads, width, dtype=query.dtype if slices == 1 else torch.float32)
    logarithms = query.new_empty(slices, count * heads, dtype=torch.float32)
    with on_device_of(query):
        _decode[count, kv_heads, slices](
            *(
                query,
                sent(torch.tensor(rows, device="cpu"), query.device),
                outputs,
                logarithms,
                count,
                heads,
                group,
                width,
                scale,
            ),
            *(aligned, power_of_two(group, 16), block, filled),
            num_warps=8 if filled > 256 else 4,
        )
    output = outputs[0] if slices == 1 else joined(outputs, logarithms, query.dtype)[0]
    return output.view_as(query)


def _addressable(rows: Tensor) -> Tensor:
    """The same rows, with a row's heads side by side."""
    return rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous()


@triton.jit
def _decode(
    query,
    table,
    outputs,
    logarithms,
    count,
    heads,
    group,
    width,
    scale,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, GROUP)
    real = row < group
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    own = sequence.to(tl.int64) * heads + kv_head * group + row
    q = tl.load(query + own[:, None] * width + channel[None, :], real[:, None] & inside[None, :], 0.0)
    keys = tl.load(table + sequence).to(tl.pointer_type(query.dtype.element_ty))
    values = tl.load(table + count + sequence).to(tl.pointer_type(query.dtype.element_ty))
    key_stride = tl.load(table + 2 * count + sequence)
    value_stride = tl.load(table + 3 * count + sequence)
    if ALIGNED:
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        key_stride, value_stride = tl.multiple_of(key_stride, 16), tl.multiple_of(value_stride, 16)
    first = tl.load(table + 4 * count + sequence)
    last = tl.load(table + 5 * count + sequence)
    share = tl.cdiv(tl.cdiv(last - first, KEYS), tl.num_programs(2)) * KEYS
    first += tl.program_id(2) * share
    last = tl.minimum(first + share, last)
    largest = tl.full([GROUP], LOWEST, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    joint = tl.zeros([GROUP, WIDTH], tl.float32)
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        exists = at < last
        mask = exists[:, None] & inside[None, :]
        column = kv_head * width + channel[None, :]
        key = tl.load(keys + at[:, None] * key_stride + column, mask, 0.0)
        value = tl.load(values + at[:, None] * value_stride + column, mask, 0.0)
        scores = tl.where(exists[None, :], product(q, tl.trans(key)) * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        fade = tl.exp(largest - larger)
        joint = product_added(weights.to(value.dtype), value, joint * fade[:, None])
        total = total * fade + tl.sum(weights, 1)
        largest = larger
    # A slice without rows has no weight: its logarithm stays below all others.
    known = total > 0
    total = tl.where(known, total, 1.0)
    own += tl.program_id(2).to(tl.int64) * count * heads
    tl.store(
        outputs + own[:, None] * width + channel[None, :],
        joint / total[:, None],
        real[:, None] & inside[None, :],
    )
    tl.store(logarithms + own, tl.where(known, largest + tl.log(total), LOWEST), real)
