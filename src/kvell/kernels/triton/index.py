"""The indexer's picks in Triton: scores of blocks of queries by a kernel, the choice among them by torch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvell.kernels.compressed import pick_blocked
from kvell.kernels.top_k import top_k_ascending, top_k_of_ranked
from kvell.kernels.triton.launch import blocks, on_device_of, power_of_two
from kvell.kernels.triton.products import product

# Scores held at once: 128 MiB. Rows (queries times heads) and entries of a block.
SCORES, ROWS, ENTRIES = 1 << 25, 128, 64
WIDEST = 512  # bytes of a head: wider ones' blocks do not fit into shared memory, torch does these
FEW = 16  # queries that choose without the host waiting: for one it is faster by itself, for 128 slower
# Blocks of entries that one program goes through with its queries in registers.
BLOCKS = 8


def pick(query: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, top_k: int) -> Tensor:
    if power_of_two(query.shape[2]) * query.dtype.itemsize > WIDEST:
        return pick_blocked(query, weights, keys, visible, top_k)
    count, most = query.shape[0], min(top_k, keys.shape[0])
    if count <= FEW and most:
        # Decoded tokens, which see nearly all there is. What is not seen is ranked last.
        best = top_k_of_ranked(masked_scores(query, weights, keys, visible, ranks=True), most)
        return torch.where(best < visible[:, None], best, -1)
    picks = query.new_full((count, most), -1, dtype=torch.long)
    size = max(SCORES // max(len(keys), 1), 1)
    for start in range(0, len(query), size):
        block = slice(start, min(start + size, len(query)))
        seen = visible[block]
        # Later queries see more: what the last ones see is all that any does, but nothing promises it.
        most = int(seen.max())
        if most == 0:
            continue
        best = top_k_ascending(masked_scores(query[block], weights[block], keys[:most], seen), min(top_k, most))
        picks[block, : best.shape[1]] = torch.where(best < seen[:, None], best, -1)
    return picks


def masked_scores(query: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, *, ranks: bool = False) -> Tensor:
    """Every query's score of every entry, (n, E) in fp32; minus infinity for those that it does not see. Or with
    `ranks` what kernels/top_k.py's `ranked` makes of them."""
    count, heads, width = query.shape
    query, weights, visible = query.contiguous(), weights.float().contiguous(), visible.contiguous()
    keys = keys if keys.stride(1) == 1 else keys.contiguous()
    scores = torch.empty(count, len(keys), dtype=torch.int64 if ranks else torch.float32, device=query.device)
    filled = power_of_two(heads)
    # As many queries as make a block of rows, no more than there are, and rows for at least one product.
    rows, block = (ROWS, ENTRIES) if query.dtype.itemsize == 2 else (ROWS // 4, ENTRIES // 2)
    queries = max(min(max(rows // filled, 1), power_of_two(count)), blocks(16, filled))
    with on_device_of(query):
        _scores[blocks(count, queries), blocks(len(keys), block * BLOCKS)](
            *(query, weights, keys, visible, scores, count, heads, width, len(keys), keys.stride(0)),
            *(queries, filled, power_of_two(width, 16), block, BLOCKS, ranks),
        )
    return scores


@triton.jit
def _scores(
    query_in,
    weights_in,
    keys,
    visible,
    scores,
    queries,
    heads,
    width,
    entries,
    stride,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.arange(0, QUERIES * HEADS)
    query, head = tl.program_id(0) * QUERIES + row // HEADS, row % HEADS
    real = (query < queries) & (head < heads)
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    at = query.to(tl.int64) * heads + head
    q = tl.load(query_in + at[:, None] * width + channel[None, :], real[:, None] & inside[None, :], 0.0)
    weights = tl.load(weights_in + at, real, 0.0)
    one = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    sees = tl.load(visible + one, one < queries, 0)
    for block in range(BLOCKS):
        entry = (tl.program_id(1) * BLOCKS + block) * ENTRIES + tl.arange(0, ENTRIES)
        exists = entry < entries
        key = tl.load(
            keys + entry[:, None].to(tl.int64) * stride + channel[None, :], exists[:, None] & inside[None, :], 0.0
        )
        relevant = tl.maximum(product(q, tl.trans(key)), 0.0) * weights[:, None]
        score = tl.sum(tl.reshape(relevant, [QUERIES, HEADS, ENTRIES]), 1)
        score = tl.where(entry[None, :] < sees[:, None], score, float("-inf"))
        if RANKS:
            bits = (score + 0.0).to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            score = (bits.to(tl.int64) << 32) + (entries - 1 - entry)[None, :]
        tl.store(
            scores + one[:, None].to(tl.int64) * entries + entry[None, :],
            score,
            (one < queries)[:, None] & exists[None, :],
        )
