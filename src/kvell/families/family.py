"""What a released family is to Kvell: the spelling of its config and of its tensors, both ways. No mathematics."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from kvell.config import ModelConfig
from kvell.errors import ConfigError
from kvell.families.keys import Keys
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

    keys            a released config.json -> the keys that are known in it (keys.py)
    read_config     a released config.json, of known keys -> ModelConfig; ConfigError if it cannot be built
    write_config    ModelConfig -> the released spelling; ConfigError where it has none for this config
    placements      the tensor names that are written, and where each belongs
    alternatives    other ways to store the same parameters: the names that are read, and where each belongs
    embedding       the name in placements of the embedding's weight
    head            the name of the head's weight, which a file may hold though its config ties it to the embedding
    experts         the key of how many experts a layer has
    spelling        the names in a file, and its config -> what turns each of them into the one in placements
    adapted         a config, and the names in its file -> the config of what the file holds
    skip_rules      by name: tensors that a text decoder has no use for, which are left out knowingly
    noticed_rules   names of skip rules: what they leave out is told in a warning, as a user may miss it
    scale_names     a tensor's name as it stands in the file -> the names that the tensor of its scales would have, if
                    it were quantised; none for one that never is
    """

    name: str
    model_types: tuple[str, ...]
    keys: Callable[[Mapping[str, Any]], Keys]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    placements: Callable[[ModelConfig], Placements]
    alternatives: Callable[[ModelConfig], Sequence[Placements]] = lambda config: ()
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    experts: str = "num_experts"
    spelling: Callable[[Collection[str], ModelConfig], Callable[[str], str]] = lambda names, config: str
    adapted: Callable[[ModelConfig, Collection[str]], ModelConfig] = lambda config, names: config
    skip_rules: Mapping[str, SkipRule] = field(default_factory=dict)
    noticed_rules: frozenset[str] = frozenset()
    scale_names: Callable[[str], Sequence[str]] = lambda name: ()


ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
RELEASED_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
KINDS = {"full_attention": "full", "sliding_attention": "sliding"}


def all_of_kind(parts: Sequence[Part], kind: type[P], family: str) -> list[P]:
    """The parts, if all are of the kind; ConfigError if the family has no spelling for one of them."""
    known = [part for part in parts if isinstance(part, kind)]
    if other := [part for part in parts if not isinstance(part, kind)]:
        raise ConfigError(f"{family} config: there is no spelling for {type(other[0]).__name__}")
    return known


def released_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
