"""The values of a released config.json, asked for one by one.

Whatever is missing or wrong is a ConfigError that names the file's own key: a value that a getter has let through is
one that the ModelConfig takes.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from kvell.config import MOST_LAYERS, ModelConfig
from kvell.errors import ConfigError
from kvell.families.keys import shown
from kvell.layers.experts import MOST_EXPERTS

REQUIRED: Any = object()
REFUSED: Any = object()
# Upper bounds of widths and numbers of heads, and of lengths and vocabularies: far more than any model has, and small
# enough that products of them still are valid tensor sizes.
MOST_CHANNELS = 2**20
MOST_TOKENS = 2**28


class Released:
    """An object of a released config.json: the whole file, or the object in it at `path`.

    A key that is absent has the default, which is that of the released config class. Null is refused like any other
    wrong value, except where `null` gives its meaning.
    """

    def __init__(self, family: str, values: Any, path: str = "") -> None:
        self.family, self.values, self.path = family, values, path
        if not isinstance(values, Mapping):
            place = (
                f"{path.removesuffix('.')} is {shown(values)}, wanted is an object"
                if path
                else f"{values!r} is no JSON object"
            )
            raise self.error(place)

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.family} config: {what}")

    def wrong(self, name: str, value: Any, wanted: str) -> ConfigError:
        return self.error(f"{self.path}{name} is {shown(value)}, wanted is {wanted}")

    def has(self, name: str) -> bool:
        """Whether a key is present and not null."""
        return self.values.get(name) is not None

    def within(self, name: str, value: Any = REQUIRED) -> "Released":
        """The object under a key, or `value` in its place."""
        return Released(
            self.family, self._value(name, REQUIRED) if value is REQUIRED else value, f"{self.path}{name}."
        )

    def integer(
        self, name: str, default: Any = REQUIRED, least: int = 1, most: int = MOST_CHANNELS, null: Any = REFUSED
    ) -> Any:
        value = self._value(name, default)
        if value is None and null is not REFUSED:
            return null
        return self.checked_integer(name, value, least, most, null is None)

    def checked_integer(
        self, name: str, value: Any, least: int = 1, most: int = MOST_CHANNELS, none: bool = False
    ) -> int:
        """`value`, which was found under `name`, if it is a whole number within these bounds. `none` says whether
        null would have been allowed, for the error message."""
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            raise self.error(f"{self.path}{name} is {shown(value)}, and Kvell builds no more than {most:,}")
        raise self.wrong(name, value, f"a whole number from {least} on" + (" or null" if none else ""))

    def even(self, name: str, default: Any) -> int:
        """A width of heads, whose channels turn in pairs."""
        width = int(self.integer(name, default))
        if width % 2:
            raise self.wrong(name, width, "an even number")
        return width

    def tokens(self, name: str, default: Any = REQUIRED) -> int:
        """A number of tokens: a vocabulary, a length."""
        return int(self.integer(name, default, most=MOST_TOKENS))

    def layers(self, name: str = "num_hidden_layers", default: Any = REQUIRED) -> int:
        return int(self.integer(name, default, most=MOST_LAYERS))

    def experts(self, name: str, default: Any = REQUIRED) -> int:
        return int(self.integer(name, default, most=MOST_EXPERTS))

    def number(
        self,
        name: str,
        default: Any = REQUIRED,
        *,
        above: float | None = 0,
        least: float | None = None,
        most: float | None = None,
        null: Any = REFUSED,
    ) -> Any:
        """A finite number: above `above`, or from `least` on, up to `most`."""
        value = self._value(name, default)
        if value is None and null is not REFUSED:
            return null
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if real and -sys.float_info.max <= value <= sys.float_info.max:
            low = value >= least if least is not None else above is None or value > above
            if low and (most is None or value <= most):
                return value
        kind = "positive number" if least is None and above == 0 else "number"
        bounds = f" from {least:g} on" if least is not None else f" above {above:g}" if above else ""
        bounds += f" up to {most:g}" if most is not None else ""
        raise self.wrong(name, value, f"a {kind}{bounds}" + (" or null" if null is None else ""))

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, default: Any, allowed: Mapping[Any, Any]) -> Any:
        """What the value stands for."""
        return self.meaning(name, self._value(name, default), allowed)

    def meaning(self, name: str, value: Any, allowed: Mapping[Any, Any]) -> Any:
        """What `value`, found under `name`, stands for."""
        for known, meaning in allowed.items():
            if type(known) is type(value) and known == value:
                return meaning
        raise self.error(f"{self.path}{name} is {shown(value)}, known are {', '.join(map(str, allowed))}")

    def mapping(self, name: str, default: Any = REQUIRED, null: Any = REFUSED) -> Mapping[str, Any]:
        value = self._value(name, default)
        if value is None and null is not REFUSED:
            value = null
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return value

    def per_layer(self, name: str, layers: int, default: list[Any]) -> list[Any]:
        """A list with one entry per layer; absent or null, the default."""
        values = self.values.get(name)
        values = default if values is None else values
        if not isinstance(values, list):
            raise self.wrong(name, values, "a list")
        if len(values) != layers:
            raise self.error(f"{self.path}{name} has {len(values)} entries for {layers} layers (num_hidden_layers)")
        return list(values)

    def token_id(self, name: str, default: int | None) -> int | None:
        value = self._value(name, default)
        return None if value is None else self.checked_integer(name, value, 0, MOST_TOKENS, none=True)

    def token_ids(self, name: str, default: int | None) -> tuple[int, ...]:
        """None, one or several."""
        value = self._value(name, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(self.checked_integer(name, one, 0, MOST_TOKENS, none=True) for one in ids)

    def build(self, fields: dict[str, Any], names: Mapping[str, str]) -> ModelConfig:
        """The config of these fields. An error about values that do not fit together names the file's keys: `names`
        maps Kvell's field names to them."""
        where = f"{self.family} config"
        try:
            return ModelConfig.from_dict(fields, where)
        except ConfigError as error:
            said = re.sub(r"\blayers\.(\d+)\.[\w.]+(?=:)", r"layer \1", str(error).removeprefix(f"{where}: "))
            for ours in sorted(names, key=len, reverse=True):
                said = re.sub(rf"\b{re.escape(ours)}\b", names[ours], said)
            raise self.error(said) from None

    def _value(self, name: str, default: Any) -> Any:
        if name in self.values:
            return self.values[name]
        if default is REQUIRED:
            raise self.error(f"{self.path}{name} is missing")
        return default
