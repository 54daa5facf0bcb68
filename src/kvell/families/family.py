"""What a released family is to Kvell: the spelling of its config and of its tensors, both ways. No mathematics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvell.config import ModelConfig
from kvell.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where a file's tensor stands in the model: a whole parameter, or one expert's part of it, or rows of that."""

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def whole(self) -> bool:
        return self.expert is None and self.rows is None

    def of(self, parameter: Tensor) -> Tensor:
        part = parameter if self.expert is None else parameter[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


Placements = dict[str, Placement]
SkipRule = Callable[[str, ModelConfig], bool]


@dataclass(frozen=True)
class Family:
    """A released family.

    read_config     a released config.json -> ModelConfig; ConfigError if it cannot be built
    write_config    ModelConfig -> the released spelling; ConfigError where it has none for this config
    placements      the tensor names that are written, and where each belongs
    alternatives    further names that are read, for other ways to store the same parameters
    canonical       any spelling of a tensor's name -> the one in placements
    skip_rules      by name: tensors that a text decoder has no use for, which are left out knowingly
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    placements: Callable[[ModelConfig], Placements]
    alternatives: Callable[[ModelConfig], Placements] = lambda config: {}
    canonical: Callable[[str], str] = lambda name: name
    skip_rules: Mapping[str, SkipRule] = field(default_factory=dict)


class Released:
    """The fields of a released config.json, asked for one by one; what is missing or wrong is named."""

    def __init__(self, family: str, values: Mapping[str, Any]) -> None:
        self.family, self.values = family, values

    def need(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise ConfigError(f"{self.family} config: {name} is missing")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def per_layer(self, name: str, default: list[Any]) -> list[Any]:
        """A list with one entry per layer."""
        values = list(self.get(name, default))
        layers = self.need("num_hidden_layers")
        if len(values) != layers:
            raise ConfigError(f"{self.family} config: {name} has {len(values)} entries for {layers} layers")
        return values

    def choice(self, name: str, value: Any, allowed: Mapping[Any, Any]) -> Any:
        """What `value`, found in field `name`, stands for."""
        if value not in allowed:
            known = ", ".join(str(key) for key in allowed)
            raise ConfigError(f"{self.family} config: {name} is {value!r}, known are {known}")
        return allowed[value]

    def refuse(self, name: str, unless: tuple[Any, ...], why: str) -> None:
        """ConfigError if a field asks for what is not there."""
        if self.values.get(name) not in unless:
            raise ConfigError(f"{self.family} config: {name} is {self.values[name]!r}: {why}")


ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
RELEASED_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
KINDS = {"full_attention": "full", "sliding_attention": "sliding"}


def token_ids(value: Any) -> tuple[int, ...]:
    """An eos_token_id as released: none, one, or several."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def released_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
