"""Attention of one new token per sequence, in C++, for sequences of any lengths in one call.

torch's attention on the CPU is made for blocks of queries and has a thread for each KV head. Here threads share the
rows of all sequences. A table of whole numbers tells the kernel where they lie; it can also be given the newest rows,
which it writes behind the others: then nothing but the table has to be made before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvell.kernels.cpp import Address, known, operator

FEW_NUMBERS = 4096  # of all of a query's heads
ELEMENTS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
# Where rows lie: the first one's address, how many elements further the next one does, and how many there are.
Place = tuple[int, int, int]


class Entry(NamedTuple):
    """An entry of the table: the rows that a sequence's query sees. Strides count elements; a row has its KV heads
    side by side. Where a newest row is given, it becomes the last one, and is also written to where else it is kept,
    if it is. kernels/cpp/decode.cpp is compiled with this very layout.
    """

    keys: Address
    values: Address
    key_stride: int
    value_stride: int
    rows: int
    kept_key: Address
    kept_value: Address


FIELDS = len(Entry._fields)


def unreadable(*tensors: Tensor) -> str | None:
    """Why a kernel cannot read these: dtypes that it does not know or that differ, which they may under autocast, or
    gradients, which none of them has."""
    first = tensors[0].dtype
    if first not in ELEMENTS or any(tensor.dtype is not first for tensor in tensors):
        return "not all in fp32, or all in bf16"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are recorded"
    return None


def refuses(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], **_: Any
) -> str | None:
    """Why these are no single queries, or no rows that the kernel can read."""
    if any(count != 1 for count in counts):
        return "several queries of a sequence"
    return unreadable(query, keys[0], values[0])


def ragged_decode(
    query: Float[Tensor, "B H D"],
    keys: Sequence[Float[Tensor, "_ K D"]],
    values: Sequence[Float[Tensor, "_ K D"]],
    counts: Sequence[int] = (),
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "B H D"]:
    """Each sequence's one query over its own keys[b] and values[b], or the last `window` rows of them."""
    kv_heads = keys[0].shape[1]
    rows = [[side_by_side(own) for own in every] for every in (keys, values)]
    places = [[(own.data_ptr(), own.stride(0), own.shape[0]) for own in every] for every in rows]
    entries = [entry(key, value, query.itemsize, window) for key, value in zip(*places, strict=True)]
    run = decode_operator(query.dtype, query.shape[2], query.shape[1] // kv_heads)
    output: Tensor = run(query.contiguous(), None, None, torch.tensor(entries, device="cpu"), scale)
    return output


def refuses_shared(
    query: Tensor,
    rows: Tensor,
    entries: Tensor,
    visible: Tensor,
    picks: Tensor | None,
    sink: Tensor,
    **_: Any,
) -> str | None:
    """The same for `shared_decode`. Of many wide heads torch multiplies faster, and reads no row more often."""
    if query.shape[0] > 1:
        return "several queries"
    if torch.is_grad_enabled() and sink.requires_grad:
        return "gradients are recorded"
    if not few(*query.shape[1:]):
        return f"more than {FEW_NUMBERS} numbers a query"
    return unreadable(query, rows, entries)


def few(heads: int, width: int) -> bool:
    """Whether heads that share their keys are so few and narrow that the kernel is worth it."""
    return heads * width <= FEW_NUMBERS


def shared_decode(
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
    """kernels/compressed.py's attention for one query: rows and entries are key and value at once for all heads."""
    rows, entries = (own if own.stride(1) == 1 else own.contiguous() for own in (rows, entries))
    run = _shared_operator(query.dtype, query.shape[2], query.shape[1])
    chosen = None if picks is None else picks.long().contiguous()
    y: Tensor = run(query.contiguous(), rows, entries, visible.long(), chosen, sink.float(), scale, window)
    return y


def side_by_side(rows: Float[Tensor, "S K D"]) -> Float[Tensor, "S K D"]:
    """Rows whose heads lie one behind the other, as a cache has them."""
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


def entry(
    keys: Place, values: Place, itemsize: int, window: int | None, kept_key: int = 0, kept_value: int = 0
) -> Entry:
    """A sequence's rows, or the last `window` of them, and the addresses where else its newest ones are kept."""
    key, key_stride, held = keys
    value, value_stride, _ = values
    rows = held if window is None else min(window, held)
    skipped = (held - rows) * itemsize
    return Entry(
        Address(key + skipped * key_stride),
        Address(value + skipped * value_stride),
        key_stride,
        value_stride,
        rows,
        Address(kept_key),
        Address(kept_value),
    )


def decode_operator(dtype: torch.dtype, width: int, group: int) -> Any:
    """decode(query (B, H, D), newest keys (B, K, D) or None, newest values or None, table (B, fields), scale),
    contiguous, for heads of `width` channels and `group` query heads to a KV head: (B, H, D)."""
    return known(operator("decode", Entry, WIDTH=width, GROUP=group, ELEMENT=ELEMENTS[dtype]))


def _shared_operator(dtype: torch.dtype, width: int, heads: int) -> Any:
    """The same kernel's other operator: all heads read one."""
    name = decode_operator(dtype, width, heads).name().removeprefix("kvell::")
    return getattr(torch.ops.kvell, f"{name}_shared").default
