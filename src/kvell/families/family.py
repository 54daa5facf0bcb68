"""What a released family is to Kvell: the spelling of its config and of its tensors, both ways. No mathematics."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from kvell.config import ModelConfig
from kvell.errors import ConfigError
from kvell.layers.part import Part


@dataclass(frozen=True)
class Placement:
    """Where a file's tensor stands in the model: a whole parameter, or one expert's part of it, or rows of that or
    of all experts'."""

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def whole(self) -> bool:
        return self.expert is None and self.rows is None

    def of(self, parameter: Tensor) -> Tensor:
        part = parameter if self.expert is None else parameter[self.expert]
        return part if self.rows is None else part[..., self.rows[0] : self.rows[1], :]


Placements = dict[str, Placement]
P = TypeVar("P", bound=Part)
SkipRule = Callable[[str, ModelConfig], bool]


@dataclass(frozen=True)
class Family:
    """A released family.

    read_config     a released config.json -> ModelConfig; ConfigError if it cannot be built
    write_config    ModelConfig -> the released spelling; ConfigError where it has none for this config
    placements      the tensor names that are written, and where each belongs
    alternatives    other ways to store the same parameters: the names that are read, and where each belongs
    embedding       the tensor name in placements of the embedding's weight,
    head            and of the head's, which a file may hold though its config ties the two
    spelling        the names in a file, and its config -> what turns each of them into the one in placements
    adapted         a config, and the names in its file -> the config of what the file holds
    skip_rules      by name: tensors that a text decoder has no use for, which are left out knowingly
    noticed_rules   names of skip rules: what they leave out is told in a warning, as a user may miss it
    scale_names     a tensor's name as it stands in the file -> the names that the tensor of its scales would have, if
                    it were quantised; none for one that never is
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    placements: Callable[[ModelConfig], Placements]
    alternatives: Callable[[ModelConfig], Sequence[Placements]] = lambda config: ()
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    spelling: Callable[[Collection[str], ModelConfig], Callable[[str], str]] = lambda names, config: str
    adapted: Callable[[ModelConfig, Collection[str]], ModelConfig] = lambda config, names: config
    skip_rules: Mapping[str, SkipRule] = field(default_factory=dict)
    noticed_rules: frozenset[str] = frozenset()
    scale_names: Callable[[str], Sequence[str]] = lambda name: ()


_REQUIRED: Any = object()


class Released:
    """The fields of a released config.json, asked for one by one; ConfigError names what is missing or wrong.

    A field that is absent or null has its default. What Python computes with is checked here, by type; all the rest
    by the ModelConfig that comes of it.
    """

    def __init__(self, family: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{family} config: {values!r} is no JSON object")
        self.family, self.values = family, values

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None and default is _REQUIRED:
            raise ConfigError(f"{self.family} config: {name} is missing")
        return default if value is None else value

    def integer(self, name: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(
                f"{self.family} config: {name} is {value!r}, wanted is a whole number from {minimum} on"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.family} config: {name} is {value!r}, wanted is true or false")
        return value

    def mapping(self, name: str, default: Any = _REQUIRED) -> Mapping[str, Any]:
        value = self.get(name, default)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.family} config: {name} is {value!r}, wanted is an object")
        return value

    def per_layer(self, name: str, default: list[Any]) -> list[Any]:
        """A list with one entry per layer."""
        values, layers = self.get(name, default), self.integer("num_hidden_layers")
        if not isinstance(values, list):
            raise ConfigError(f"{self.family} config: {name} is {values!r}, wanted is a list")
        if len(values) != layers:
            raise ConfigError(f"{self.family} config: {name} has {len(values)} entries for {layers} layers")
        return list(values)

    def choice(self, name: str, value: Any, allowed: Mapping[Any, Any]) -> Any:
        """What `value`, found in field `name`, stands for."""
        for known, meaning in allowed.items():
            if type(known) is type(value) and known == value:
                return meaning
        raise ConfigError(f"{self.family} config: {name} is {value!r}, known are {', '.join(map(str, allowed))}")

    def refuse(self, name: str, unless: tuple[Any, ...], why: str) -> None:
        """ConfigError if a field asks for what is not there."""
        if self.values.get(name) not in unless:
            raise ConfigError(f"{self.family} config: {name} is {self.values[name]!r}: {why}")

    def rope_parameters(self, default: Mapping[str, Any]) -> Mapping[str, Any]:
        """`rope_parameters`, by layer type."""
        for older in ("rope_theta", "rope_scaling"):
            if "rope_parameters" not in self.values:
                self.refuse(older, (None,), "rope_parameters, by layer type, are wanted instead")
        return self.mapping("rope_parameters", default)


ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
RELEASED_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
KINDS = {"full_attention": "full", "sliding_attention": "sliding"}


def all_of_kind(parts: Sequence[Part], kind: type[P], family: str) -> list[P]:
    """The parts, if all are of the kind; ConfigError if the family has no spelling for one of them."""
    known = [part for part in parts if isinstance(part, kind)]
    if other := [part for part in parts if not isinstance(part, kind)]:
        raise ConfigError(f"{family} config: there is no spelling for {type(other[0]).__name__}")
    return known


def token_ids(value: Any) -> tuple[int, ...]:
    """An eos_token_id as released: none, one, or several."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def released_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
