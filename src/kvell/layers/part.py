"""What every part of a model's description has in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


class Part(BaseModel):
    """A frozen, validated value that describes one part of a model. Unknown fields are errors, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


@dataclass(frozen=True)
class Site:
    """Where a part is built: what it must know of the model around it.

    `index` is the layer's number, -1 outside the layers.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    norm_eps: float
    index: int = -1


@dataclass(frozen=True)
class StreamSpec:
    """One kind of row that outlives a step: `width` values for every `stride` tokens of a sequence.

    `past` is how many rows the next step looks back on: None for all of them, window - 1 for a sliding
    window. Rewinding by r tokens needs r rows more. `dtype` None means the model's own.
    """

    name: str
    width: int
    past: int | None = None
    stride: int = 1
    dtype: "torch.dtype | None" = None

    def rows(self, length: int, rewindable: int = 0) -> int:
        """Rows held for a sequence of `length` tokens of which the last `rewindable` can be taken back."""
        total = length // self.stride
        if self.past is None:
            return total
        return min(total, self.past + -(-rewindable // self.stride))

    def nbytes(self, length: int, rewindable: int, dtype: "torch.dtype") -> int:
        """Bytes of those rows, `dtype` being the model's."""
        return self.rows(length, rewindable) * self.width * (self.dtype or dtype).itemsize
