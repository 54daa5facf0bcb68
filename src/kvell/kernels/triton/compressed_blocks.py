"""What both directions of attention over a window and compressed entries share: how a program's block is shaped, and
which rows and entries are whose."""

import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.triton.launch import power_of_two


def in_order(
    query: Tensor, rows: Tensor, entries: Tensor, visible: Tensor, picks: Tensor | None, sink: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The tensors as the kernels address them: rows and entries may lie in a larger buffer."""
    rows, entries = (x if x.stride(1) == 1 else x.contiguous() for x in (rows, entries))
    picks = None if picks is None else picks.contiguous()
    return query.contiguous(), rows, entries, visible.contiguous(), picks, sink.float().contiguous()


def sides(query: Tensor, picked: bool, backward: bool = False) -> dict[str, int]:
    """Sides of a program's blocks, and its warps: what of queries, keys and sums fits into registers."""
    _, heads, width = query.shape
    filled = power_of_two(width, 16)
    narrow = backward or query.dtype.itemsize > 2
    if narrow:
        most = keys = 32 if filled * query.dtype.itemsize <= 256 else 16
    else:
        # At a width of 512 blocks of 64 keys that lie side by side were faster on an H200 (215 against 176 TFLOP/s).
        most, keys = 64, 64 if filled <= 128 or (filled == 512 and not picked) else 32
    at_once = min(power_of_two(heads), most)
    if picked:
        at_once, queries = max(at_once, 16), 1
    else:
        queries = most // at_once
    # 16 rows are too few to share out among eight warps: four were twice as fast on an H200 (102 against 52).
    few = picked and at_once == 16 and not narrow
    return {
        "QUERIES": queries,
        "HEADS": at_once,
        "KEYS": keys,
        "WIDTH": filled,
        "num_warps": 8 if filled > 256 and not few else 4,
        "num_stages": 2,
    }


@triton.jit
def own_rows(queries, heads, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """The query and the head of every row of this program's block, and which rows there are."""
    row = tl.arange(0, QUERIES * HEADS)
    query = tl.program_id(0) * QUERIES + row // HEADS
    head = tl.program_id(1) * HEADS + row % HEADS
    return query, head, (query < queries) & (head < heads)


@triton.jit
def near(at, query, queries, held, window, KEYS: tl.constexpr):
    """Rows of the window from `at` on: where they lie, which exist, and which of them each query sees."""
    key = at + tl.arange(0, KEYS)
    own = held - queries + query
    exists = key < held
    seen = (key[None, :] <= own[:, None]) & (key[None, :] > own[:, None] - window)
    return key, exists, seen & exists[None, :]


@triton.jit
def far_keys(at, sees, picks, far, PICKED: tl.constexpr, KEYS: tl.constexpr):
    """Entries from `at` on, or of those that one query picked, in the same words."""
    key = at + tl.arange(0, KEYS)
    exists = key < far
    if PICKED:
        key = tl.load(picks + tl.program_id(0).to(tl.int64) * far + key, exists, -1)
        exists = key >= 0
        return key, exists, exists[None, :] & (sees >= 0)[:, None]
    return key.to(tl.int64), exists, (key[None, :] < sees[:, None]) & exists[None, :]


@triton.jit
def gathered(rows, key, exists, stride, channel, inside):
    return tl.load(
        rows + key[:, None].to(tl.int64) * stride + channel[None, :], exists[:, None] & inside[None, :], 0.0
    )
