"""Where the keys and values lie that a step of one token per sequence reads and writes, known before it runs.

What a layer with keys and values asks of the cache does not depend on the numbers: room for one row in each of its
streams. So a compiled step asks for all its layers before it begins, and their attention (kernels/cpp/decode.py)
writes and reads rows by a table, without Python between the layers.
"""

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


def fill_table(
    table: Int[Tensor, "L B fields"], attentions: Sequence[KeyValueAttention], step: Step
) -> dict[int, list[tuple[Extended, Extended]]]:
    """Returns what the table then speaks of, to be held while the step runs. The streams count the new rows as theirs
    from here on."""
    cache = step.cache
    assert cache is not None
    entries = table.numpy()
    made: dict[int, list[tuple[Extended, Extended]]] = {}
    for attend in attentions:
        layer, source = attend.layer, attend.source
        if source is None:
            made[layer] = [
                (cache.extend(index, (layer, "key"), 1), cache.extend(index, (layer, "value"), 1))
                for index in range(len(step.counts))
            ]
        for index, ((keys, kept_key), (values, kept_value)) in enumerate(made[layer if source is None else source]):
            kept = (kept_key, kept_value) if source is None else (None, None)
            entries[layer, index] = entry(keys, values, attend.window, *kept)
    return made
