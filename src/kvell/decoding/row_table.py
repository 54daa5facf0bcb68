"""Where the keys and values lie that a step of one token per sequence reads and writes, known before it runs.

What a layer with keys and values asks of the cache does not depend on the numbers: room for one row in each of its
streams. So a compiled step asks for all its layers before it begins, and their attention (kernels/cpp/decode.py)
writes and reads rows by a table, without Python between the layers.
"""

from array import array
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from kvell.kernels.cpp.decode import FIELDS, entry
from kvell.layers.key_values import KeyValueAttention
from kvell.step import Step

# Of one sequence and stream: its rows, of which the newest is yet to be written, and where else that is kept, if so.
Extended = tuple[Tensor, Tensor | None]


def empty_table(num_layers: int, batch_size: int) -> Int[Tensor, "L B fields"]:
    """An entry for each layer and sequence; those of layers without keys and values stay empty."""
    return torch.zeros(num_layers, batch_size, FIELDS, dtype=torch.int64, device="cpu")


def row_table(
    attentions: Sequence[KeyValueAttention], num_layers: int, step: Step
) -> tuple[Int[Tensor, "L B fields"], dict[int, list[tuple[Extended, Extended]]]]:
    """The table, and what it speaks of, to be held while the step runs. The streams count the new rows as theirs from
    here on."""
    cache, sequences = step.cache, range(len(step.counts))
    assert cache is not None
    numbers = array("q", bytes(8 * num_layers * len(sequences) * FIELDS))
    made: dict[int, list[tuple[Extended, Extended]]] = {}
    for attend in attentions:
        layer, source = attend.layer, attend.source
        if source is None:
            key, value = (layer, "key"), (layer, "value")
            made[layer] = [(cache.extend(index, key, 1), cache.extend(index, value, 1)) for index in sequences]
        at = layer * len(sequences) * FIELDS
        for (keys, kept_key), (values, kept_value) in made[layer if source is None else source]:
            kept = (kept_key, kept_value) if source is None else (None, None)
            numbers[at : at + FIELDS] = array("q", entry(keys, values, attend.window, *kept))
            at += FIELDS
    table = torch.frombuffer(numbers, dtype=torch.int64)
    return table.view(num_layers, len(sequences), FIELDS), made
