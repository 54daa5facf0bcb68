"""What every part of a model's description has in common."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen, validated value that describes one part of a model. Unknown fields are errors, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


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
