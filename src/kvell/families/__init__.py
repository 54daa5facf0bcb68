"""The released families, and where a model's description is found: a directory, a file, a built-in name, the hub."""

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from kvell.config import ModelConfig
from kvell.config_file import read_config_file
from kvell.errors import CheckpointError, ConfigError, naming
from kvell.families import deepseek_v4, gemma4, laguna, zaya
from kvell.families.family import Family, Placement, Placements
from kvell.families.generation_config import GENERATION, GenerationDefaults
from kvell.families.keys import check_keys
from kvell.files import read_json

FAMILIES: dict[str, Family] = {
    family.name: family for family in (gemma4.FAMILY, laguna.FAMILY, zaya.FAMILY, deepseek_v4.FAMILY)
}


def builtin_names() -> list[str]:
    """The released models whose config comes with the package."""
    folder = resources.files("kvell.families") / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def parse_config(values: Mapping[str, Any], *, strict: bool = True) -> ModelConfig:
    """A ModelConfig from the contents of a config.json, Kvell's own or a released family's. ConfigError for keys of a
    released config that are unknown; with `strict` false one warning. Of Kvell's own every key must be known."""
    model_type = values.get("model_type")
    if model_type == "kvell":
        # The dtype the weights are stored in stands in every config.json, and is no part of the description.
        return ModelConfig.from_dict({name: value for name, value in values.items() if name != "dtype"})
    for family in FAMILIES.values():
        if isinstance(model_type, str) and model_type in family.model_types:
            check_keys(f"{family.name} config", values, family.keys(values), strict)
            return family.read_config(values)
    known = ["kvell", *(name for family in FAMILIES.values() for name in family.model_types)]
    what = f"unknown model_type {model_type!r}" if "model_type" in values else "model_type is missing"
    raise ConfigError(f"{what}, known are {', '.join(known)}")


def read_config(path: str | Path, *, strict: bool = True) -> ModelConfig:
    """The config of a directory, a config.json, a YAML or JSON file written by hand (config_file.py), a built-in
    name, or a repository on the hub; `strict` as for parse_config."""
    if str(path) in builtin_names() and not Path(path).exists():
        text = (resources.files("kvell.families") / "configs" / f"{path}.json").read_text()
        return parse_config(json.loads(text))
    file = locate(path, patterns=["config.json", GENERATION])
    file = file / "config.json" if file.is_dir() else file
    if file.suffix in (".yaml", ".yml"):
        return read_config_file(file)
    values = read_json(file)
    if "model_type" not in values and ("layers" in values or "model" in values):
        if "dtype" in values:  # Kvell's own, as it is saved beside weights, but for its model_type
            values["model_type"] = "kvell"
        else:
            return read_config_file(file)
    with naming(file):
        config = parse_config(values, strict=strict)
    return GenerationDefaults.read(file.with_name(GENERATION)).added_to(config)


def locate(path: str | Path, patterns: list[str]) -> Path:
    """A local path, or the local copy of a hub repository's files. CheckpointError if there is neither."""
    try:
        if Path(path).exists():
            return Path(path)
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"{str(path)[:80]} cannot be looked up: {error.strerror}") from None
    if str(path) in builtin_names():
        raise CheckpointError(f"{path} is a built-in config, without weights: give the directory of a model")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise CheckpointError(
            f"{path} is neither a directory nor a file nor a built-in config ({', '.join(builtin_names())})"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except GatedRepoError:
        answer = "the Hugging Face hub gives that repository only to those who asked and are logged in"
    except (RepositoryNotFoundError, HFValidationError):
        answer = "the Hugging Face hub has no repository of that name"
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        answer = "the Hugging Face hub could not be asked for a repository of that name"
    raise CheckpointError(f"there is no folder {path}, and {answer}")


__all__ = [
    "FAMILIES",
    "GENERATION",
    "Family",
    "GenerationDefaults",
    "Placement",
    "Placements",
    "builtin_names",
    "locate",
    "parse_config",
    "read_config",
]
