"""Attention over the last tokens and over compressed entries of everything before, in one softmax.

A sequence with S rows held, E entries and n queries at the positions p: query i sees the rows of its window (its own
and window - 1 before it) and the entries j < visible_i = (p_i + 1) // ratio, or those of them that were picked for
it. A learned sink per head takes part in the softmax and gives nothing.

    o_h = (sum_s exp(q_h . r_s) r_s + sum_j exp(q_h . e_j) e_j) / (exp(sink_h) + sum_s exp(..) + sum_j exp(..))

with q . r times the scale. Rows and entries are keys and values at once, shared by all heads (DeepSeek V4, arXiv
2606.19348, section 2.3). Which entries are picked is scored by a small attention of its own, the indexer:

    score_j = sum_h weight_h * relu(q_h . k_j)

n queries of one sequence, S rows, E entries, H heads, D width, P picks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.autocast import outside_autocast
from kvell.kernels.table import CPP, TRITON, Kernel, KernelVersion
from kvell.kernels.top_k import top_k_of_seen

# Scores of a block of queries are at most about so many numbers: large enough to keep matrix products efficient.
BLOCK_NUMBERS = 1 << 22
MAX_BLOCK = 128
# Gathering a query's own entries costs more per entry than multiplying with all of them and masking most.
GATHER_FROM = 4
# Queries whose windows are cut out together: the fewer, the less of what is cut out is masked again.
WINDOW_BLOCK = 64


def compressed_attention(
    query: Float[Tensor, "n H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    picks: Int[Tensor, "n P"] | None,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    window: int,
) -> Float[Tensor, "n H D"]:
    """One sequence's queries, its last n rows', over its rows and entries. Picks of -1 stand for none."""
    attended: Tensor = COMPRESSED_ATTENTION(query, rows, entries, visible, picks, sink, scale=scale, window=window)
    return attended


def _not_alone(query: Tensor, *_: Any, **__: Any) -> str | None:
    return None if query.shape[0] == 1 else "several queries"


def _not_joined(query: Tensor, rows: Tensor, entries: Tensor, *_: Any, **__: Any) -> str | None:
    """Why window and entries do not go through torch's streaming attention."""
    if query.device.type != "cpu":
        return "not on the CPU"
    if not query.dtype == rows.dtype == entries.dtype:
        return "several dtypes"  # as under autocast, with a cache
    return "gradients are recorded" if torch.is_grad_enabled() else None


@outside_autocast
def compressed_attention_reference(
    query: Float[Tensor, "n H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    picks: Int[Tensor, "n P"] | None,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    window: int,
) -> Float[Tensor, "n H D"]:
    """One query at a time, in fp32."""
    outputs = []
    for i, q in enumerate(query):
        last = len(rows) - len(query) + i + 1
        seen = entries[: visible[i]] if picks is None else entries[picks[i][picks[i] >= 0]]
        attended = torch.cat([rows[max(last - window, 0) : last], seen]).float()
        scores = torch.cat([sink.float()[:, None], q.float() @ attended.T * scale], dim=1)
        outputs.append(scores.softmax(-1)[:, 1:] @ attended)
    return torch.stack(outputs).to(query.dtype)


def compressed_attention_of_one(
    query: Float[Tensor, "1 H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " 1"],
    picks: Int[Tensor, "1 P"] | None,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    window: int,
) -> Float[Tensor, "1 H D"]:
    """A single query sees all of what is cut out for it: nothing to mask."""
    q, near, seen = query[0] * scale, rows[-window:], int(visible)
    stop = 1 + near.shape[0]
    scores = [sink.float()[:, None], (q @ near.T).float()]
    if not seen:
        weights = torch.cat(scores, dim=1).softmax(-1).to(q.dtype)
        return (weights[:, 1:] @ near)[None]
    # Picks ascend, and those of none stand behind them.
    far = entries[:seen] if picks is None else entries.index_select(0, picks[0, : min(seen, picks.shape[1])])
    weights = torch.cat([*scores, (q @ far.T).float()], dim=1).softmax(-1).to(q.dtype)
    return torch.addmm(weights[:, 1:stop] @ near, weights[:, stop:], far)[None]


def compressed_attention_blocked(
    query: Float[Tensor, "n H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    picks: Int[Tensor, "n P"] | None,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    window: int,
) -> Float[Tensor, "n H D"]:
    """Blocks of queries, each against the rows that any of the block's queries sees and their entries."""
    outputs = [
        near_weights @ near + far_weights @ far
        for near, far, near_weights, far_weights in _blocks(query, rows, entries, visible, picks, sink, scale, window)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def compressed_attention_joined(
    query: Float[Tensor, "n H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    picks: Int[Tensor, "n P"] | None,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    window: int,
) -> Float[Tensor, "n H D"]:
    """Window and entries each in torch's streaming attention of the CPU; the two and the sink are joined by the sums
    of their exponentials. Those have no gradients, so neither has this."""
    y, total = _over_windows(query, rows, scale, window)
    if not int(visible.max()):
        return (y * (total - sink).sigmoid()[..., None]).to(query.dtype)
    far_y, far_total = _over_entries(query, entries, visible, picks, scale)
    shares = torch.stack([total, far_total, sink.float().expand_as(total)], dim=2).softmax(2)
    return (y * shares[..., :1]).addcmul_(far_y, shares[..., 1:2]).to(query.dtype)


def _over_windows(
    query: Float[Tensor, "n H D"], rows: Float[Tensor, "S D"], scale: float, window: int
) -> tuple[Float[Tensor, "n H D"], Float[Tensor, "n H"]]:
    """Every query over its window, and the logarithm of its exponentials' sum. All blocks of queries see as many
    rows: before a sequence's beginning and behind its end stand rows of zeros."""
    count = len(query)
    block = min(WINDOW_BLOCK, count)
    blocks = -(-count // block)
    behind, reach = blocks * block - count, block + window - 1
    there = rows[-(count + window - 1) :]
    before = count + window - 1 - len(there)
    near = F.pad(there, (0, 0, before, behind)).unfold(0, reach, block).mT
    own = (F.pad(query, (0, 0, 0, 0, 0, behind)) if behind else query).unflatten(0, (blocks, block))
    mask = torch.ones(1, block, reach, dtype=torch.bool, device=query.device).tril(window - 1).triu()
    # The first blocks reach back to before the beginning, each from another place.
    first = min(-(-before // block), blocks)
    begins = torch.arange(0, first * block, block, device=query.device)[:, None, None]
    begun = mask & (begins + torch.arange(reach, device=query.device) >= before)
    cuts = [(own[:first], near[:first], begun), (own[first:], near[first:], mask)]
    found = [_streamed(*cut, scale) for cut in cuts if len(cut[0])]
    y, total = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    return y.flatten(0, 1)[:count], total.flatten(0, 1)[:count]


def _over_entries(
    query: Float[Tensor, "n H D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    picks: Int[Tensor, "n P"] | None,
    scale: float,
) -> tuple[Float[Tensor, "n H D"], Float[Tensor, "n H"]]:
    """Every query over its entries, and the logarithm of its exponentials' sum: of none, minus infinity."""
    outputs, totals = [], []
    gather = picks is not None and len(entries) > GATHER_FROM * picks.shape[1]
    heads, width = query.shape[1:]
    numbers = picks.shape[1] * width if picks is not None and gather else heads * len(entries)
    size = max(BLOCK_NUMBERS // numbers, 1)
    for start in range(0, len(query), size):
        block = slice(start, start + size)
        own, seen, chosen = query[block], visible[block], None if picks is None else picks[block]
        if chosen is not None and gather:
            far, mask = F.embedding(chosen.clamp_min(0), entries), chosen >= 0
            blocks = own[:, None]  # of one query each
        else:
            far = entries[None, : max(int(seen.max()), 1)]
            mask = _allowed(seen, chosen, far.shape[1])
            blocks = own[None]
        # What torch makes of a query that sees nothing is not said: it sees something, which counts for nothing.
        blind = ~mask.any(1, keepdim=True)
        y, total = _streamed(blocks, far, (mask | blind).view(*blocks.shape[:2], -1), scale)
        outputs.append(y.view_as(own))
        totals.append(total.view(own.shape[:2]).masked_fill(blind, float("-inf")))
    return (outputs[0], totals[0]) if len(outputs) == 1 else (torch.cat(outputs), torch.cat(totals))


def _streamed(
    query: Float[Tensor, "B b H D"], attended: Float[Tensor, "B S D"], mask: Bool[Tensor, "_ b S"], scale: float
) -> tuple[Float[Tensor, "B b H D"], Float[Tensor, "B b H"]]:
    """torch's streaming attention of B blocks of b queries, each over S rows, and the logarithms of its sums. The
    heads of all of a block's queries stand as rows of one: nothing is made once for every head."""
    bias = None
    if not mask.all():
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
        bias = bias.repeat_interleave(query.shape[2], dim=1)[:, None]
    if attended.stride(-1) != 1:  # torch's kernel does not look
        attended = attended.contiguous()
    rows, keys = query.flatten(1, 2)[:, None].contiguous(), attended[:, None]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, total = flash(rows, keys, keys, attn_mask=bias, scale=scale)
    return y.view(query.shape), total.view(query.shape[:3])


@torch.no_grad()
@outside_autocast
def attention_mass(
    query: Float[Tensor, "n H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    window: int,
) -> Float[Tensor, "n E"]:
    """How much weight all heads together give to each entry where every visible one is attended to, fp32."""
    query, rows, entries = query.float(), rows.float(), entries.float()
    masses = [
        F.pad(far_weights.sum(1), (0, len(entries) - far_weights.shape[2]))
        for *_, far_weights in _blocks(query, rows, entries, visible, None, sink, scale, window)
    ]
    return torch.cat(masses)


def _blocks(
    query: Float[Tensor, "n H D"],
    rows: Float[Tensor, "S D"],
    entries: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    picks: Int[Tensor, "n P"] | None,
    sink: Float[Tensor, " H"],
    scale: float,
    window: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For every block of b queries: the W rows they see (W, D), the entries (E', D) or each query's own (b, P, D),
    and the weights of both, (b, H, W) and (b, H, E' or P)."""
    count, heads, width = query.shape
    gather = picks is not None and len(entries) > GATHER_FROM * picks.shape[1]
    numbers = picks.shape[1] * (width + heads) if picks is not None and gather else heads * max(len(entries), window)
    size = min(max(BLOCK_NUMBERS // numbers, 1), MAX_BLOCK)
    for start in range(0, count, size):
        stop = min(start + size, count)
        own = query[start:stop]
        first, last = max(len(rows) - count + start - window + 1, 0), len(rows) - count + stop
        near, newest = rows[first:last], last - first - (stop - start)
        near_mask = torch.ones(stop - start, len(near), dtype=torch.bool, device=own.device)
        near_mask = near_mask.tril(newest).triu(newest - window + 1)
        if picks is not None and gather:
            chosen = picks[start:stop]
            far, far_mask = entries[chosen.clamp_min(0)], chosen >= 0
        else:
            far = entries[: int(visible[start:stop].max())]
            far_mask = _allowed(visible[start:stop], None if picks is None else picks[start:stop], len(far))
        scores = [
            sink.float()[None, :, None].expand(stop - start, -1, 1),
            ((own @ near.T).float() * scale).masked_fill(~near_mask[:, None], float("-inf")),
            ((own @ far.mT).float() * scale).masked_fill(~far_mask[:, None], float("-inf")),
        ]
        weights = torch.cat(scores, dim=2).softmax(-1).to(own.dtype)
        yield near, far, weights[..., 1 : 1 + len(near)], weights[..., 1 + len(near) :]


def _allowed(visible: Int[Tensor, " n"], picks: Int[Tensor, "n P"] | None, entries: int) -> Bool[Tensor, "n E"]:
    """Which of the first `entries` entries each query attends to."""
    if picks is None:
        return torch.arange(entries, device=visible.device) < visible[:, None]
    mask = torch.zeros(len(visible), entries + 1, dtype=torch.bool, device=visible.device)
    return mask.scatter_(1, torch.where(picks < 0, entries, picks), True)[:, :-1]


@outside_autocast
def index_scores(
    query: Float[Tensor, "n H D"], weights: Float[Tensor, "n H"], keys: Float[Tensor, "E D"]
) -> Float[Tensor, "n E"]:
    """The indexer's score of every entry for every query, fp32."""
    if query.shape[0] == 1:
        return weights.float() @ (query[0].float() @ keys.float().T).relu_()
    relevant = (query.float() @ keys.float().T).relu_()
    return (weights.float()[:, None] @ relevant).squeeze(1)


def compile_in_cpp(dtype: torch.dtype, heads: int, width: int, index: tuple[int, int] | None) -> None:
    """The kernels in C++ of attention with so many heads, and of an indexer's. InputError where they cannot be."""
    from kvell.kernels.cpp.decode import ELEMENTS, decode_operator, few
    from kvell.kernels.cpp.pick import pick_operator

    if dtype not in ELEMENTS:
        return
    if few(heads, width):
        decode_operator(dtype, width, heads)
    if index is not None:
        pick_operator(dtype, *index)


def pick(
    query: Float[Tensor, "n H D"],
    weights: Float[Tensor, "n H"],
    keys: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    top_k: int,
) -> Int[Tensor, "n P"]:
    """The `top_k` best visible entries of every query, ascending, then -1 where fewer are visible.

    Of equal scores the lowest index. P is top_k, or E if there are fewer entries.
    """
    picks: Tensor = PICK(query, weights, keys, visible, top_k)
    return picks


def pick_reference(
    query: Float[Tensor, "n H D"],
    weights: Float[Tensor, "n H"],
    keys: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    top_k: int,
) -> Int[Tensor, "n P"]:
    """One query at a time, by sorting."""
    picks = query.new_full((len(query), min(top_k, len(keys))), -1, dtype=torch.long)
    for i in range(len(query)):
        scores = index_scores(query[i : i + 1], weights[i : i + 1], keys[: visible[i]])[0]
        best = scores.sort(descending=True, stable=True).indices[:top_k].sort().values
        picks[i, : len(best)] = best
    return picks


def pick_for_one(
    query: Float[Tensor, "1 H D"],
    weights: Float[Tensor, "1 H"],
    keys: Float[Tensor, "E D"],
    visible: Int[Tensor, " 1"],
    top_k: int,
) -> Int[Tensor, "1 P"]:
    """A single query: nothing to mask."""
    seen = int(visible)
    best = top_k_of_seen(index_scores(query, weights, keys[:seen]), None, min(top_k, seen))
    missing = min(top_k, len(keys)) - best.shape[1]
    return F.pad(best, (0, missing), value=-1) if missing else best


def pick_blocked(
    query: Float[Tensor, "n H D"],
    weights: Float[Tensor, "n H"],
    keys: Float[Tensor, "E D"],
    visible: Int[Tensor, " n"],
    top_k: int,
) -> Int[Tensor, "n P"]:
    """Blocks of queries, each against the entries that any of the block's queries sees."""
    picks = query.new_full((len(query), min(top_k, len(keys))), -1, dtype=torch.long)
    size = min(max(BLOCK_NUMBERS // (query.shape[1] * max(len(keys), 1)), 1), MAX_BLOCK)
    for start in range(0, len(query), size):
        block = slice(start, min(start + size, len(query)))
        seen = visible[block]
        most = int(seen.max())
        if most == 0:
            continue
        best = top_k_of_seen(index_scores(query[block], weights[block], keys[:most]), seen, min(top_k, most))
        picks[block, : best.shape[1]] = best
    return picks


COMPRESSED_ATTENTION = Kernel(
    "compressed_attention",
    KernelVersion("triton", "triton", f"{TRITON}.compressed:compressed_attention"),
    KernelVersion("c++, one query", "cpp", f"{CPP}.decode:shared_decode", f"{CPP}.decode:refuses_shared"),
    KernelVersion("one query", "torch", compressed_attention_of_one, _not_alone),
    KernelVersion("joined", "torch", compressed_attention_joined, _not_joined),
    KernelVersion("blocks", "torch", compressed_attention_blocked),
    KernelVersion("reference", "reference", compressed_attention_reference),
)
PICK = Kernel(
    "pick",
    KernelVersion("triton", "triton", f"{TRITON}.index:pick"),
    KernelVersion("c++", "cpp", f"{CPP}.pick:pick", f"{CPP}.pick:refuses"),
    KernelVersion("one query", "torch", pick_for_one, _not_alone),
    KernelVersion("blocks", "torch", pick_blocked),
    KernelVersion("reference", "reference", pick_reference),
)
