"""What every part of a model's description has in common."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, model_validator


@dataclass(frozen=True)
class Reads:
    """Marks a field that holds the index of an earlier layer: `what` the layer reads of the things that one makes.

    kv_source: Annotated[NonNegativeInt | None, Reads("key_values")] = None
    """

    what: str


class Source(NamedTuple):
    """What a part reads of an earlier layer: the path of the field that says so, what it is, the layer's index."""

    path: str
    what: str
    layer: int


class Part(BaseModel):
    """A frozen, validated value that describes one part of a model. Unknown fields are errors, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number_is_true(cls, values: Any) -> Any:
        """Pydantic would read true as 1."""
        for name, field in cls.model_fields.items():
            value = values.get(name) if isinstance(values, Mapping) else None
            if bool in (field.annotation, *get_args(field.annotation)):
                continue
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, bool):
                    raise ValueError(f"{name} cannot be {str(one).lower()}")
        return values

    def layer_sources(self) -> Iterator[Source]:
        """Everything that this part, or a part inside it, reads of earlier layers."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Part):
                for inner in value.layer_sources():
                    yield inner._replace(path=f"{name}.{inner.path}")
            elif value is not None:
                yield from (Source(name, mark.what, value) for mark in field.metadata if isinstance(mark, Reads))

    def reading(self, layer: int) -> Self:
        """The same part, reading everything that it reads of that layer."""
        changed: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Part):
                changed[name] = value.reading(layer)
            elif value is not None and any(isinstance(mark, Reads) for mark in field.metadata):
                changed[name] = layer
        return self.model_copy(update=changed)


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
