"""What each of a model's parameters is to an optimizer, and which of the run's parameter groups it belongs to."""

import difflib
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from kvell.errors import ConfigError
from kvell.model import Decoder
from kvell.training.settings import ParameterGroup

# A hidden matrix is a linear layer's (2-D), or one for each expert (3-D), inside the model: besides linear layers,
# what a module's `matrices` name. A matrix is any other that mixes channels: the head, the kernels of a convolution.
# A table's rows are looked up by tokens. All else counts as vectors: norms, biases, sinks, temperatures, scales,
# kernels of one channel, biases by position, and the weights of hyper-connections, which begin as the identity: decay
# would pull them away from it.
Role = Literal["hidden matrix", "matrix", "table", "vector"]


def roles(model: Decoder) -> dict[str, Role]:
    """What every parameter is, by its name."""
    owners = dict(model.named_modules())
    found: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        found[name] = role(owners[path], own, parameter, is_head=path == "head")
    return found


def role(module: nn.Module, name: str, parameter: nn.Parameter, *, is_head: bool) -> Role:
    if isinstance(module, nn.Embedding):
        return "table"
    if isinstance(module, nn.Linear) and name == "weight":
        return "matrix" if is_head else "hidden matrix"
    if name in getattr(module, "matrices", ()):
        return "hidden matrix"
    if isinstance(module, nn.Conv1d) and name == "weight" and parameter.shape[1] > 1:
        return "matrix"
    return "vector"


def group_of(name: str, groups: tuple[ParameterGroup, ...]) -> ParameterGroup | None:
    """The first whose pattern matches a parameter's name."""
    return next((group for group in groups if fnmatchcase(name, group.pattern)), None)


def check_groups(model: Decoder, groups: tuple[ParameterGroup, ...]) -> None:
    """ConfigError for a group that no parameter belongs to, and where nothing is left to learn."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    belongs = {name: group_of(name, groups) for name in names}
    for index, group in enumerate(groups):
        if any(mine is group for mine in belongs.values()):
            continue
        where = f"optimizer.parameter_groups.{index}.pattern: {group.pattern!r}"
        if any(fnmatchcase(name, group.pattern) for name in names):
            raise ConfigError(f"{where} matches only parameters that groups before it match: the first one counts")
        near = difflib.get_close_matches(group.pattern, names, 1, 0) or names[:1]
        raise ConfigError(f"{where} matches no parameter that learns; their names are like {near[0]}")
    if all(group is not None and group.freeze for group in belongs.values()):
        raise ConfigError("optimizer.parameter_groups: every parameter is frozen, and nothing is left to learn")


def freeze(model: Decoder, groups: tuple[ParameterGroup, ...]) -> None:
    """Parameters of groups that are frozen get no gradients any more."""
    for name, parameter in model.named_parameters():
        group = group_of(name, groups)
        if group is not None and group.freeze:
            parameter.requires_grad_(False)
