"""A model's config written by hand: YAML or JSON with named parts and patterns, resolved into a ModelConfig.

    parts:
      csa: {attention: {kind: compressed, ...}, feed_forward: {kind: gated_mlp, intermediate_size: 512}}
      hca: {use: csa, attention: {compressor: {ratio: 64, overlap: false}, indexer: null}}
    layers: {pattern: [csa, hca], repeat: 4}

`layers` is an entry or a list of entries. An entry is a part's name; a layer written out; a part with changes (`use`,
merged into it at every depth); or a pattern, repeated. A negative `kv_source` or `state_source` counts back from its
own layer: -4 reads the layer four before. Everything else is as in ModelConfig. Anchors and merge keys (`<<: *a`) are
YAML's own: a merge key puts whole values beside others, where `use` merges at every depth.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvell.config import MOST_LAYERS, LayerConfig, ModelConfig, Problem, in_a_line, problems
from kvell.errors import CheckpointError, ConfigError
from kvell.layers.registry import source_fields

Values = dict[str, Any]
# From the part that a layer begins with, through what uses it, to the layer itself: places in the file, and the layer
# as it stands there.
Way = list[tuple[str, Values]]
ANY_LAYER = 1_000_000  # behind whatever a source may count back to
# Types of pydantic's errors: what a part may leave to those that use it.
UNFINISHED = frozenset({"missing", "union_tag_not_found", "value_error"})


def read_config_file(path: str | Path) -> ModelConfig:
    """The model that a file describes: the whole file, or what stands under `model` in a run's config."""
    values = read_mapping(path)
    where = Path(path).name
    if isinstance(values.get("model"), Mapping):
        values, where = values["model"], f"{where}: model"
    return resolve(values, where)


def read_mapping(path: str | Path) -> Values:
    """A YAML or JSON file's mapping. CheckpointError for a file that cannot be read, ConfigError for one that is not
    well-formed, with the line, or that names a key twice."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, UniqueKeys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"{path}: {place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping of names to values")
    return values


class UniqueKeys(yaml.SafeLoader):
    """YAML as it is safe to load. Keys are names; one that comes twice is an error, not the first one's loss, and so
    is a value that holds itself."""

    def construct_document(self, node: Any) -> Any:
        self.deep_construct = True  # else PyYAML would make what holds itself
        return super().construct_document(node)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node in self.recursive_objects:
            raise wrong(node, "this holds itself")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise wrong(key_node, f"{key!r} is no name, and only names are keys")
            if key in seen:
                raise wrong(key_node, f"{key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def wrong(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def resolve(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The config that a mapping describes; errors begin with `where` and point at the path in the file."""
    given = dict(values)
    parts = given.pop("parts", {})
    if not isinstance(parts, Mapping):
        raise ConfigError(f"{where}: parts: a mapping of names to layers, not {parts!r}")
    entries = given.get("layers")
    if entries is None:
        raise ConfigError(f"{where}: layers is missing")
    for name in parts:  # whether a layer uses it or not
        _check(_layer(name, parts, where, f"parts.{name}", ()), where, "", UNFINISHED)
    origins: list[str] = []
    layers: list[Values] = []
    for way in _expanded(entries, parts, where, "layers"):
        if len(layers) == MOST_LAYERS:
            raise ConfigError(f"{where}: layers: these are more than {MOST_LAYERS:,}, and Kvell builds no more")
        _check(way, where, f" (layer {len(layers)})")
        origin, layer = way[-1]
        layers.append(_absolute(layer, len(layers), f"{where}: {origin}"))
        origins.append(origin)
    try:
        return ModelConfig.from_dict({**given, "layers": layers}, where)
    except ConfigError as error:
        raise ConfigError(_pointing_home(str(error), where, origins)) from None


def _expanded(entry: Any, parts: Mapping[str, Any], where: str, path: str) -> Iterator[Way]:
    """The ways to the layers that an entry stands for."""
    if isinstance(entry, list):
        for number, one in enumerate(entry):
            yield from _expanded(one, parts, where, f"{path}.{number}")
    elif isinstance(entry, Mapping) and "pattern" in entry:
        if unknown := sorted(set(entry) - {"pattern", "repeat"}):
            raise ConfigError(f"{where}: {path}.{unknown[0]}: unknown field; a pattern has pattern and repeat")
        repeat = entry.get("repeat", 1)
        if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 1:
            raise ConfigError(f"{where}: {path}.repeat: {repeat!r} is no positive whole number")
        for _ in range(repeat):
            empty = True
            for way in _expanded(entry["pattern"], parts, where, f"{path}.pattern"):
                empty = False
                yield way
            if empty:  # however often it is repeated
                break
    else:
        yield _layer(entry, parts, where, path, ())


def _layer(entry: Any, parts: Mapping[str, Any], where: str, path: str, using: tuple[str, ...]) -> Way:
    """The way to one layer; `using` are the parts on the way here."""
    if isinstance(entry, str):
        entry = {"use": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: {path}: a part's name, a layer or a pattern, not {entry!r}")
    changes = dict(entry)
    name = changes.pop("use", None)
    if unknown := [field for field in changes if field not in LayerConfig.model_fields]:
        fields = ", ".join(LayerConfig.model_fields)
        raise ConfigError(
            f"{where}: {path}.{unknown[0]}: unknown field; a layer has use, {fields}; a pattern pattern and repeat"
        )
    if name is None:
        return [(path, changes)]
    if not isinstance(name, str) or name not in parts:
        known = ", ".join(parts) if parts else "there are none: write them under parts"
        raise ConfigError(f"{where}: {path}: no part is named {name!r}; known are {known}")
    if name in using:
        raise ConfigError(f"{where}: parts.{name}: uses itself ({' -> '.join([*using, name])})")
    way = _layer(parts[name], parts, where, f"parts.{name}", (*using, name))
    return [*way, (path, merged(way[-1][1], changes))]


def _check(way: Way, where: str, which: str, ignored: frozenset[str] = frozenset()) -> None:
    """ConfigError for what is wrong with a layer by itself, pointing at the first place on its way where it is so."""
    if found := _problems(way[-1][1], ignored):
        place = next(path for path, values in way if found[0] in _problems(values, ignored))
        raise ConfigError(f"{where}: {place}{which}: {in_a_line(found)}")


def _problems(layer: Values, ignored: frozenset[str]) -> list[Problem]:
    values = _absolute(layer, ANY_LAYER, "")
    try:
        LayerConfig.model_validate(values)
    except ValidationError as error:
        return problems(error, values, LayerConfig, ignored)
    return []


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Values:
    """`base` with changes at every depth. A part that changes its kind is a new one: it keeps nothing of the old."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        is_same_kind = isinstance(old, Mapping) and isinstance(value, Mapping) and "kind" not in value
        result[key] = merged(old, value) if is_same_kind and isinstance(old, Mapping) else value
    return result


def _absolute(layer: Values, index: int, path: str) -> Values:
    """The layer with sources that count back made absolute."""

    fields = source_fields()

    def counted(part: Any, inner: str) -> Any:
        if not isinstance(part, Mapping):
            return part
        result = {key: counted(value, f"{inner}.{key}") for key, value in part.items()}
        for field in fields:
            source = result.get(field)
            if isinstance(source, int) and not isinstance(source, bool) and source < 0:
                if index + source < 0:
                    raise ConfigError(
                        f"{path}: {inner}.{field}: {source} counts back from layer {index} to before the first layer"
                    )
                result[field] = index + source
        return result

    return {key: counted(value, key) for key, value in layer.items()}


def _pointing_home(message: str, where: str, origins: list[str]) -> str:
    """An error about layer i, pointing at where in the file that layer comes from."""
    head = f"{where}: layers."
    if not message.startswith(head):
        return message
    number, _, rest = message[len(head) :].partition(".")
    number, _, more = number.partition(":")  # the layer as a whole may be what is wrong
    if not number.isdigit() or int(number) >= len(origins):
        return message
    return f"{where}: {origins[int(number)]} (layer {number}): {rest or more.strip()}"
