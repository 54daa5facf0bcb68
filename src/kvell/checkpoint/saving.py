"""Weights out: a released family's own format where the config still fits it, else Kvell's."""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from kvell.checkpoint.loading import native_placements
from kvell.checkpoint.reading import INDEX, SINGLE
from kvell.config import ModelConfig
from kvell.errors import CheckpointError, ConfigError
from kvell.families import FAMILIES, GENERATION, Placement, Placements, parse_config
from kvell.families.generation_config import updated
from kvell.files import beside, check_places, save_to
from kvell.model import Decoder

CONFIG, FORMER = "config.json", ".former-config.json"


def save_pretrained(model: Decoder, folder: Path, max_shard_bytes: int) -> None:
    """Writes config.json and the weights, in shards of at most `max_shard_bytes` where one file would be larger.

    Everything is written aside first: if that fails, CheckpointError, and what stood in the folder is unchanged.
    """
    values, placements = released_form(model.config) or own_form(model.config)
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    tensors = dict(model.named_tensors())
    shards = list(_shards(tensors, placements, max_shard_bytes))
    with beside(folder) as scratch:
        names = [SINGLE] if len(shards) == 1 else _free_names(folder, len(shards))
        for name, shard in zip(names, shards, strict=True):
            pieces = {theirs: place.of(tensors[place.parameter]) for theirs, place in shard.items()}
            save_to(scratch / name, pieces, {"format": "pt"})
        if len(shards) > 1:
            total = sum(_nbytes(tensors, place) for place in placements.values())
            weight_map = {theirs: name for name, shard in zip(names, shards, strict=True) for theirs in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (scratch / INDEX).write_text(json.dumps(index, indent=2))
        (scratch / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        if (generation := updated(folder / GENERATION, model.config)) is not None:
            (scratch / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        _move_in(scratch, folder, names)


def _move_in(scratch: Path, folder: Path, names: list[str]) -> None:
    """Puts a finished model into its folder so that whatever loads, at any moment, is all old or all new.

    New shards have names of their own: up to here nothing reads them. What makes them the model's is one rename, that
    of the index or the single file, or, where a single file stood before, which is read rather than an index, its
    removal. Where the config or generation_config.json changes with it, the old config goes first and the new one
    comes last: in between, the folder does not load. A process that is killed there leaves the old one under another
    name, until the next save is done.
    """
    head, shards = (SINGLE, []) if names == [SINGLE] else (INDEX, names)
    check_places(folder, [*names, head, CONFIG, GENERATION])
    config = folder / CONFIG
    generates_otherwise = (scratch / GENERATION).exists()
    changes = generates_otherwise or not config.exists() or config.read_bytes() != (scratch / CONFIG).read_bytes()
    withdrawn = False
    try:
        for name in shards:
            os.replace(scratch / name, folder / name)
        if changes and config.exists():
            os.replace(config, folder / FORMER)
            withdrawn = True
        os.replace(scratch / head, folder / head)
    except OSError:
        with _half_saved(folder):
            if withdrawn:
                os.replace(folder / FORMER, config)
            for name in shards:
                (folder / name).unlink(missing_ok=True)
        raise
    with _half_saved(folder):
        (folder / (SINGLE if head == INDEX else INDEX)).unlink(missing_ok=True)
        if generates_otherwise:
            os.replace(scratch / GENERATION, folder / GENERATION)
        if changes:
            os.replace(scratch / CONFIG, config)
        (folder / FORMER).unlink(missing_ok=True)
        for stale in folder.glob("model-*-of-*.safetensors"):
            if stale.name not in names and stale.is_file():
                stale.unlink()


@contextmanager
def _half_saved(folder: Path) -> Iterator[None]:
    """What a failure is where something has been put into its place already."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} is only half saved: {error}; save again") from None


def released_form(config: ModelConfig) -> tuple[dict[str, Any], Placements] | None:
    """The config and tensor names in its family's spelling, or None where reading them back would not give the
    same model."""
    family = FAMILIES.get(config.family or "")
    if family is None:
        return None
    try:
        values = family.write_config(config)
        # generation_config.json has the tokens that are never chosen: see families/generation_config.py.
        fits = parse_config(json.loads(json.dumps(values))) == config.model_copy(update={"suppress_tokens": ()})
    except ConfigError:  # no spelling, or one that the family itself does not read
        return None
    return (values, family.placements(config)) if fits else None


def own_form(config: ModelConfig) -> tuple[dict[str, Any], Placements]:
    """The config and tensor names in Kvell's own spelling."""
    return json.loads(config.to_json()), native_placements(config)


def _shards(tensors: dict[str, Tensor], placements: Placements, limit: int) -> Iterator[Placements]:
    shard: Placements = {}
    size = 0
    for name, place in placements.items():
        nbytes = _nbytes(tensors, place)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = place
        size += nbytes
    yield shard


def _nbytes(tensors: dict[str, Tensor], place: Placement) -> int:
    return place.of(tensors[place.parameter]).nbytes


def _free_names(folder: Path, count: int) -> list[str]:
    """Names for so many shards, none of which the folder has yet."""
    for generation in itertools.count(1):
        mark = "" if generation == 1 else f"-{generation}"
        names = [f"model-{index:05d}-of-{count:05d}{mark}.safetensors" for index in range(1, count + 1)]
        if not any((folder / name).exists() for name in names):
            return names
    raise AssertionError("there is always a free name")
