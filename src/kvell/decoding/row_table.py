"""Where the keys and values lie that a step of one token per sequence reads and writes, known before it runs.

An operation that works in place (cache_operation.py) asks the cache for nothing but room for one row in each of its
streams. So a compiled step asks for all of them before it begins, and the machine code (kernels/cpp/decode.py) writes
and reads rows by a table, without Python between the layers.
"""

from array import array
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from kvell.cache import StreamKey
from kvell.cache.stream import Extended
from kvell.cache_operation import InPlace
from kvell.kernels.cpp.decode import FIELDS, Place, entry
from kvell.step import Step


def empty_table(num_layers: int, batch_size: int) -> Int[Tensor, "L B fields"]:
    """Entries for each operation in place, in their order, and sequence; those behind them stay empty."""
    return torch.zeros(num_layers, batch_size, FIELDS, dtype=torch.int64, device="cpu")


def row_table(
    operations: Sequence[InPlace], num_layers: int, step: Step
) -> tuple[Int[Tensor, "L B fields"], dict[StreamKey, list[Extended]]]:
    """The table, and what it speaks of, to be held while the step runs. The streams count the new rows as theirs from
    here on."""
    cache, sequences = step.cache, range(len(step.counts))
    assert cache is not None
    numbers = array("q")
    made: dict[StreamKey, list[Extended]] = {}
    for one in operations:
        if one.appends:
            made |= {stream: [cache.extend(index, stream, 1) for index in sequences] for stream in one.streams}
        for keys, values in zip(*(made[stream] for stream in one.streams), strict=True):
            kept = (_kept(keys), _kept(values)) if one.appends else (0, 0)
            numbers.extend(entry(_place(keys), _place(values), keys[0].itemsize, one.window, *kept))
    numbers.frombytes(bytes(8 * (num_layers - len(operations)) * len(sequences) * FIELDS))
    table = torch.frombuffer(numbers, dtype=torch.int64)
    return table.view(num_layers, len(sequences), FIELDS), made


def _place(extended: Extended) -> Place:
    buffer, first, last, _ = extended
    width = buffer.shape[1]
    return buffer.data_ptr() + first * width * buffer.itemsize, width, last - first


def _kept(extended: Extended) -> int:
    *_, rows = extended
    return 0 if rows is None else rows.data_ptr()
