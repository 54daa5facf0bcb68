"""The registries: which class stands for which `kind` in a config, for each contract.

A technique joins by `register`, from this package (layers/__init__.py) or from any other:

    @kvell.register
    class Linear(AttentionPart):
        kind: Literal["linear"] = "linear"
        ...

A field of the type `Annotated[AttentionPart, ATTENTIONS]` takes every registered attention, also one that is
registered later.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from kvell.errors import ConfigError
from kvell.layers.contract import AttentionPart, ConnectionPart, FeedForwardPart, RotaryPart, RouterPart
from kvell.layers.part import Part, Reads

P = TypeVar("P", bound=Part)
C = TypeVar("C", bound=type[Part])


class Registry(Generic[P]):
    """The kinds of one contract. As metadata of a pydantic field it validates a mapping by its `kind`."""

    def __init__(self, name: str, contract: type[P]) -> None:
        self.name, self.contract = name, contract
        self.kinds: dict[str, type[P]] = {}

    def register(self, part: type[P]) -> None:
        """ConfigError for a class that does not keep the contract, or whose kind is another's."""
        kind = part.model_fields["kind"].default if "kind" in part.model_fields else None
        if not isinstance(kind, str):
            raise ConfigError(f"{part.__name__}: kind has no default: give it one, as kind: Literal['x'] = 'x'")
        if missing := sorted(part.__abstractmethods__):
            raise ConfigError(f"{part.__name__} cannot be registered ({self.name}): it lacks {', '.join(missing)}")
        if differing := [problem for name in vars(self.contract) if (problem := self._differs(part, name))]:
            raise ConfigError(f"{part.__name__} cannot be registered ({self.name}): {differing[0]}")
        if self.kinds.setdefault(kind, part) is not part:
            raise ConfigError(f"{part.__name__}: the {self.name} kind {kind!r} is {self.kinds[kind].__name__}'s")

    def part_of(self, values: Any) -> type[P] | None:
        """The class that the `kind` of a mapping names, if it names one."""
        kind = values.get("kind") if isinstance(values, Mapping) else None
        return self.kinds.get(kind) if isinstance(kind, str) else None

    def validate(self, values: Any) -> P:
        """A part from its values; a part stays as it is."""
        if isinstance(values, self.contract):
            return values
        if not isinstance(values, Mapping):
            raise PydanticKnownError("model_type", {"class_name": self.name})
        if "kind" not in values:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        part = self.part_of(values)
        if part is None:
            known = ", ".join(map(repr, self.kinds))
            tag = {"discriminator": "'kind'", "tag": str(values["kind"]), "expected_tags": known}
            raise PydanticKnownError("union_tag_invalid", tag)
        return part.model_validate(values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        serialization = core_schema.plain_serializer_function_ser_schema(_written)
        return core_schema.no_info_plain_validator_function(self.validate, serialization=serialization)

    def _differs(self, part: type[P], name: str) -> str | None:
        """How a method of the class cannot be called as the contract's, or None."""
        promised, own = vars(self.contract)[name], getattr(part, name, None)
        if name.startswith("_") or not inspect.isfunction(promised) or not inspect.isfunction(own):
            return None
        wanted, found = list(inspect.signature(promised).parameters), inspect.signature(own).parameters
        needed = [key for key, value in found.items() if value.default is inspect.Parameter.empty]
        if list(found)[: len(wanted)] != wanted or len(needed) > len(wanted):
            return f"{name} takes ({', '.join(found)}), wanted is ({', '.join(wanted)})"
        return None


def _written(part: Part) -> dict[str, Any]:
    return part.model_dump()


ATTENTIONS = Registry[AttentionPart]("attention", AttentionPart)  # type: ignore[type-abstract]
FEED_FORWARDS = Registry[FeedForwardPart]("feed-forward", FeedForwardPart)  # type: ignore[type-abstract]
CONNECTIONS = Registry[ConnectionPart]("connection", ConnectionPart)  # type: ignore[type-abstract]
ROUTERS = Registry[RouterPart]("router", RouterPart)  # type: ignore[type-abstract]
ROTARIES = Registry[RotaryPart]("rotary", RotaryPart)  # type: ignore[type-abstract]
REGISTRIES: tuple[Registry[Any], ...] = (ATTENTIONS, FEED_FORWARDS, CONNECTIONS, ROUTERS, ROTARIES)


def register(part: C) -> C:
    """Makes a technique known to configs under its `kind`; usable as a decorator. ConfigError for a class that keeps
    none of the contracts (layers/contract.py), or whose kind is taken."""
    for registry in REGISTRIES:
        if issubclass(part, registry.contract):
            registry.register(part)
            return part
    names = ", ".join(registry.contract.__name__ for registry in REGISTRIES)
    raise ConfigError(f"{part.__name__} cannot be registered: it derives from none of {names}")


def source_fields() -> frozenset[str]:
    """The names of all fields that hold the index of an earlier layer."""
    parts = [part for registry in REGISTRIES for part in registry.kinds.values()]
    return frozenset(
        name
        for part in parts
        for name, field in part.model_fields.items()
        if any(isinstance(mark, Reads) for mark in field.metadata)
    )
