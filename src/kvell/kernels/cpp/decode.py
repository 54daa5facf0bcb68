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


def readable(*tensors: Tensor) -> bool:
    """Whether these are all of one dtype that a kernel knows, which they need not be under autocast, and no gradient
    flows through any."""
    first = tensors[0].dtype
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return first in ELEMENTS and not recorded and all(tensor.dtype is first for tensor in tensors)


def takes(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int]) -> bool:
    """Whether these are single queries and rows that the kernel can read."""
    return readable(query, keys[0], values[0]) and all(count == 1 for count in counts)


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
    rows = [[side_by_side(own) for own in every] for every in (keys, values)]
    places = [[(own.data_ptr(), own.stride(0), own.shape[0]) for own in every] for every in rows]
    entries = [entry(key, value, query.itemsize, window) for key, value in zip(*places, strict=True)]
    run = decode_operator(query.dtype, query.shape[2], query.shape[1] // kv_heads)
    output: Tensor = run(query.contiguous(), None, None, torch.tensor(entries, device="cpu"), scale)
    return output


def takes_shared(query: Tensor, rows: Tensor, entries: Tensor, sink: Tensor) -> bool:
    """The same for `shared_decode`. Of many wide heads torch multiplies faster, and reads no row more often."""
    recorded = torch.is_grad_enabled() and sink.requires_grad
    return readable(query, rows, entries) and not recorded and few(*query.shape[1:])


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
