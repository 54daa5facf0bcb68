"""Attention of one new token per sequence, in C++, for sequences of any lengths in one call.

torch's attention on the CPU is made for blocks of queries and has a thread for each KV head. Here threads share the
rows of all sequences. A table of whole numbers tells the kernel where they lie; it can also be given the newest rows,
which it writes behind the others: then nothing but the table has to be made before.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvell.kernels.cpp import operator

ELEMENTS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
FIELDS = 7  # of a table's entry
Entry = tuple[int, int, int, int, int, int, int]


def takes(query: Tensor, keys: Sequence[Tensor], counts: Sequence[int]) -> bool:
    """Whether these are single queries, of a dtype that the kernel knows, through which no gradient flows."""
    recorded = torch.is_grad_enabled() and (query.requires_grad or keys[0].requires_grad)
    alike = query.dtype is keys[0].dtype  # which they are not under autocast, with a cache
    return alike and query.dtype in ELEMENTS and not recorded and all(count == 1 for count in counts)


def ragged_decode(
    query: Float[Tensor, "B H D"],
    keys: Sequence[Float[Tensor, "_ K D"]],
    values: Sequence[Float[Tensor, "_ K D"]],
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "B H D"]:
    """Each sequence's one query over its own keys[b] and values[b], or the last `window` rows of them."""
    kv_heads = keys[0].shape[1]
    rows = [[_side_by_side(own) for own in every] for every in (keys, values)]
    entries = [entry(key, value, window) for key, value in zip(*rows, strict=True)]
    run = decode_operator(query.dtype, query.shape[2], query.shape[1] // kv_heads)
    output: Tensor = run(query.contiguous(), None, None, torch.tensor(entries, device="cpu"), scale)
    return output


def _side_by_side(rows: Float[Tensor, "S K D"]) -> Float[Tensor, "S KD"]:
    """Rows with their heads side by side."""
    flat = rows.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def entry(
    keys: Float[Tensor, "S KD"],
    values: Float[Tensor, "S KD"],
    window: int | None,
    kept_key: Float[Tensor, "1 KD"] | None = None,
    kept_value: Float[Tensor, "1 KD"] | None = None,
) -> Entry:
    """Where a sequence's rows lie, or the last `window` of them, and where else its newest ones are kept."""
    held, itemsize = keys.shape[0], keys.itemsize
    rows = held if window is None else min(window, held)
    key_stride, value_stride, skipped = keys.stride(0), values.stride(0), (held - rows) * itemsize
    return (
        keys.data_ptr() + skipped * key_stride,
        values.data_ptr() + skipped * value_stride,
        key_stride,
        value_stride,
        rows,
        0 if kept_key is None else kept_key.data_ptr(),
        0 if kept_value is None else kept_value.data_ptr(),
    )


@cache
def decode_operator(dtype: torch.dtype, width: int, group: int) -> Any:
    """decode(query, newest keys or None, newest values or None, table, scale) for heads of `width` channels, `group`
    query heads to a KV head: (B, H, D), (B, K, D) twice and (B, 7), all contiguous -> (B, H, D)."""
    made = operator("decode", WIDTH=width, GROUP=group, ELEMENT=ELEMENTS[dtype])
    torch.library.register_fake(made.name(), lambda query, *_: torch.empty_like(query))
    return made
