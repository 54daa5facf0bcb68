"""Causal attention of every sequence's newest tokens over what each sequence holds.

A sequence with S rows of keys and values and n queries: its queries are its last n rows, so query i stands at row
S - n + i, sees the rows up to its own, and with a window only the last `window` of them.

    o_i = sum_s softmax_s(scale * q_i . k_s) v_s

B sequences, T queries of all sequences laid end to end, S rows seen, H query heads, K KV heads, D head width.
Neither version pads or holds T x S scores for all queries: the fast one works in blocks of queries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.autocast import outside_autocast
from kvell.kernels.table import CPP, TRITON, Kernel, KernelVersion

# Queries per block: large enough to keep the matrix products efficient, small enough to keep memory flat.
QUERY_BLOCK = 256
# A window narrower than this has blocks of so many queries all the same.
SMALLEST_BLOCK = 64


def attention(
    query: Float[Tensor, "T H D"],
    keys: Sequence[Float[Tensor, "_ K D"]],
    values: Sequence[Float[Tensor, "_ K D"]],
    counts: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "T H D"]:
    """Attention of sequence b's `counts[b]` queries over `keys[b]`, `values[b]`."""
    attended: Tensor = ATTENTION(query, keys, values, counts, scale=scale, window=window)
    return attended


def attention_by_sequence(
    query: Float[Tensor, "T H D"],
    keys: Sequence[Float[Tensor, "_ K D"]],
    values: Sequence[Float[Tensor, "_ K D"]],
    counts: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "T H D"]:
    """One sequence after another."""
    if len(counts) == 1:
        only: Tensor = ATTENTION_OF_ONE(query, keys[0], values[0], scale=scale, window=window)
        return only
    each = zip(query.split(list(counts)), keys, values, strict=True)
    return torch.cat([ATTENTION_OF_ONE(*own, scale=scale, window=window) for own in each])


def attention_of_equals(
    query: Float[Tensor, "T H D"],
    keys: Sequence[Float[Tensor, "_ K D"]],
    values: Sequence[Float[Tensor, "_ K D"]],
    counts: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "T H D"]:
    """Sequences of one length with nothing before them (training): one call for all of them."""
    batched = query.unflatten(0, (len(counts), counts[0]))
    return _several(batched, torch.stack(list(keys)), torch.stack(list(values)), scale, window).flatten(0, 1)


def _unequal(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], **_: Any
) -> str | None:
    if len(counts) == 1:
        return "a single sequence"
    if len(set(counts)) > 1 or any(len(key) != count for key, count in zip(keys, counts, strict=True)):
        return "sequences of several lengths, or with a past"
    return None


def compile_in_cpp(dtype: torch.dtype, width: int, group: int) -> None:
    """The kernels in C++ for such heads. InputError where they cannot be."""
    from kvell.kernels.cpp.attention import attention_operator, worth
    from kvell.kernels.cpp.decode import ELEMENTS, decode_operator

    if dtype in ELEMENTS:
        decode_operator(dtype, width, group)
        if worth(dtype):
            attention_operator(dtype, width, group)


@outside_autocast
def attention_reference(
    query: Float[Tensor, "T H D"],
    key: Float[Tensor, "S K D"],
    value: Float[Tensor, "S K D"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "T H D"]:
    """One sequence, one query at a time, softmax in fp32."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for i, q in enumerate(query):
        last = key.shape[0] - query.shape[0] + i + 1
        first = 0 if window is None else max(last - window, 0)
        k = key[first:last].repeat_interleave(group, dim=1)
        v = value[first:last].repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,shd->hs", q.float(), k.float()) * scale
        outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v.float()))
    return torch.stack(outputs).to(query.dtype)


def attention_blocked(
    query: Float[Tensor, "T H D"],
    key: Float[Tensor, "S K D"],
    value: Float[Tensor, "S K D"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "T H D"]:
    """One sequence; a single query needs no mask at all, more run in blocks."""
    if query.shape[0] > 1:
        return _several(query[None], key[None], value[None], scale, window)[0]
    if window is not None:
        key, value = key[-window:], value[-window:]
    # The query heads that read one KV head stand as that head's rows: grouping without repeating a key.
    grouped = query.view(key.shape[1], -1, query.shape[2])
    k, v = key.transpose(0, 1), value.transpose(0, 1)
    return F.scaled_dot_product_attention(grouped[None], k[None], v[None], scale=scale).reshape(query.shape)


def _several(
    query: Float[Tensor, "B n H D"],
    key: Float[Tensor, "B S K D"],
    value: Float[Tensor, "B S K D"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "B n H D"]:
    """Sequences of one length, with several queries each: the cheapest way for the part of the past they see."""
    count, total = query.shape[1], key.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if window is not None and window < total:
        y = _banded(q, k, v, scale, window)
    elif total == count:
        y = _grouped(q, k, v, scale=scale, is_causal=True)
    elif q.device.type == "cpu" and not torch.is_grad_enabled():
        y = _past_and_present(q, k, v, scale)
    else:
        y = _masked(q, k, v, scale, None)
    return y.transpose(1, 2)


def _past_and_present(
    q: Float[Tensor, "B H n D"], k: Float[Tensor, "B K S D"], v: Float[Tensor, "B K S D"], scale: float
) -> Float[Tensor, "B H n D"]:
    """All of what stands before the step, which needs no mask, and the step itself, which is causal: two softmaxes,
    joined by their sums. The heads of a group stand as one head's rows over the past, so no key is repeated."""
    count, past, group = q.shape[2], k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    folded = q.unflatten(1, (-1, group)).flatten(2, 3)
    before, before_sum = flash(folded, k[:, :, :past], v[:, :, :past], scale=scale)
    own_k, own_v = (x[:, :, past:].repeat_interleave(group, dim=1) for x in (k, v))
    own, own_sum = flash(q, own_k, own_v, is_causal=True, scale=scale)
    before = before.unflatten(2, (group, count)).flatten(1, 2)
    before_sum = before_sum.unflatten(2, (group, count)).flatten(1, 2)
    share = torch.sigmoid(before_sum - own_sum)[..., None].to(own.dtype)
    return torch.lerp(own, before, share)


def _banded(
    q: Float[Tensor, "B H n D"], k: Float[Tensor, "B K S D"], v: Float[Tensor, "B K S D"], scale: float, window: int
) -> Float[Tensor, "B H n D"]:
    """Queries in blocks that all see as many rows, in one call; the rest, at the sequence's beginning and the step's
    end, by itself."""
    count, total = q.shape[2], k.shape[2]
    block = min(max(window, SMALLEST_BLOCK), QUERY_BLOCK)
    reach = block + window - 1  # the rows that a block's queries see
    first = max(window - 1 - (total - count), 0)  # queries before this one have less than a window behind them
    blocks = (count - first) // block
    if blocks < 2:
        return _masked(q, k, v, scale, window)
    stop, rows = first + blocks * block, total - count + first - (window - 1)
    k_blocks, v_blocks = (
        x[:, :, rows : rows + (blocks - 1) * block + reach].unfold(2, reach, block).mT.transpose(1, 2).flatten(0, 1)
        for x in (k, v)
    )
    q_blocks = q[:, :, first:stop].unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    mask = _band(block, reach, window, q.device)
    inner = _grouped(q_blocks, k_blocks, v_blocks, scale=scale, attn_mask=mask)
    inner = inner.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
    ends = [inner]
    if first:
        behind = total - count + first
        ends.insert(0, _masked(q[:, :, :first], k[:, :, :behind], v[:, :, :behind], scale, window))
    if stop < count:
        ends.append(_masked(q[:, :, stop:], k, v, scale, window))
    return torch.cat(ends, dim=2) if len(ends) > 1 else inner


def _masked(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "B H n D"]:
    """Blocks of queries, each with a mask over the slice of keys that any of them sees."""
    count, total = q.shape[2], k.shape[2]
    outputs = []
    for start in range(0, count, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, count)
        last = total - count + stop
        first = 0 if window is None else max(total - count + start - window + 1, 0)
        mask = _band(stop - start, last - first, window, q.device)
        block = (q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last])
        outputs.append(_grouped(*block, scale=scale, attn_mask=mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _grouped(
    q: Float[Tensor, "B H n D"], k: Float[Tensor, "B K S D"], v: Float[Tensor, "B K S D"], scale: float, **mask: Any
) -> Float[Tensor, "B H n D"]:
    """torch's attention for grouped heads. Off the CPU its kernels that take groups take neither masks nor fp32 nor
    wide heads, and what is left would hold all scores at once: there keys are repeated for their group."""
    if q.device.type != "cpu":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.device.type == "cpu", **mask)


def _band(queries: int, rows: int, window: int | None, device: torch.device) -> Bool[Tensor, "n S"]:
    """Which of `rows` rows each of the last `queries` of them sees."""
    mask = torch.ones(queries, rows, dtype=torch.bool, device=device).tril(rows - queries)
    return mask if window is None else mask.triu(rows - queries - window + 1)


ATTENTION_OF_ONE = Kernel(
    "attention_of_one_sequence",
    KernelVersion("c++", "cpp", f"{CPP}.attention:causal_attention", f"{CPP}.attention:refuses"),
    KernelVersion("blocks", "torch", attention_blocked),
    KernelVersion("reference", "reference", attention_reference),
)
ATTENTION = Kernel(
    "attention",
    KernelVersion(
        "triton, one query",
        "triton",
        f"{TRITON}.decode:ragged_decode",
        f"{TRITON}.decode:refuses",
    ),
    KernelVersion("c++, one query", "cpp", f"{CPP}.decode:ragged_decode", f"{CPP}.decode:refuses"),
    KernelVersion("c++, by sequence", "cpp", attention_by_sequence, f"{CPP}.attention:refuses_all"),
    KernelVersion("equal lengths", "torch", attention_of_equals, _unequal),
    KernelVersion("by sequence", "torch", attention_by_sequence),
    KernelVersion("by sequence, reference", "reference", attention_by_sequence),
)
