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

from kvell.kernels.choice import reference_wanted, triton_wanted

# Queries per block: large enough to keep the matrix products efficient, small enough to keep memory flat.
QUERY_BLOCK = 256


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
    if triton_wanted(query):
        from kvell.kernels.triton.decode import ragged_decode, takes

        if takes(query, keys, counts):
            return ragged_decode(query, keys, values, scale=scale, window=window)
    run = attention_reference if reference_wanted() else attention_blocked
    fresh = all(len(key) == count for key, count in zip(keys, counts, strict=True))
    if len(counts) > 1 and fresh and len(set(counts)) == 1 and not reference_wanted():
        # Sequences of one length with nothing before them (training): one call for all of them.
        batched = query.unflatten(0, (len(counts), counts[0]))
        return _blocks(batched, torch.stack(list(keys)), torch.stack(list(values)), scale, window).flatten(0, 1)
    outputs = [
        run(q, key, value, scale=scale, window=window)
        for q, key, value in zip(query.split(list(counts)), keys, values, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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
        return _blocks(query[None], key[None], value[None], scale, window)[0]
    if window is not None:
        key, value = key[-window:], value[-window:]
    # The query heads that read one KV head stand as that head's rows: grouping without repeating a key.
    grouped = query.view(1, key.shape[1], -1, query.shape[2])
    k, v = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(query.shape)


def _blocks(
    query: Float[Tensor, "B n H D"],
    key: Float[Tensor, "B S K D"],
    value: Float[Tensor, "B S K D"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "B n H D"]:
    """Blocks of queries against the slice of keys that any of a block's queries sees."""
    count, total = query.shape[1], key.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if total == count and (window is None or window >= count):
        y = _grouped(q, k, v, scale=scale, is_causal=True)
        return y.transpose(1, 2)
    outputs = []
    for start in range(0, count, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, count)
        last = total - count + stop
        first = 0 if window is None else max(total - count + start - window + 1, 0)
        mask = _band(stop - start, last - first, window, query.device)
        block = (q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last])
        outputs.append(_grouped(*block, scale=scale, attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


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
