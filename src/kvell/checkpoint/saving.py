"""Weights out: a released family's own format where the config still fits it, else Kvell's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kvell.checkpoint.loading import native_placements
from kvell.checkpoint.reading import INDEX, SINGLE
from kvell.config import ModelConfig
from kvell.errors import ConfigError
from kvell.families import FAMILIES, Placement, Placements, parse_config
from kvell.files import beside, move_in, save_to
from kvell.model import Decoder


def save_pretrained(model: Decoder, folder: Path, max_shard_bytes: int) -> None:
    """Writes config.json and the weights, in shards of at most `max_shard_bytes` where one file would be larger.

    Everything is written aside first: if that fails, CheckpointError, and what stood in the folder is unchanged.
    """
    values, placements = released_form(model.config) or own_form(model.config)
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    tensors = dict(model.named_tensors())
    shards = list(_shards(tensors, placements, max_shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    with beside(folder) as scratch:
        for name, shard in zip(names, shards, strict=True):
            pieces = {theirs: place.of(tensors[place.parameter]) for theirs, place in shard.items()}
            save_to(scratch / name, pieces, {"format": "pt"})
        if len(shards) > 1:
            total = sum(_nbytes(tensors, place) for place in placements.values())
            weight_map = {theirs: name for name, shard in zip(names, shards, strict=True) for theirs in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (scratch / INDEX).write_text(json.dumps(index, indent=2))
            names.append(INDEX)
        (scratch / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        move_in(scratch, folder, [*names, "config.json"])
        for stale in [*folder.glob("model-*-of-*.safetensors"), folder / INDEX, folder / SINGLE]:
            if stale.name not in names:
                stale.unlink(missing_ok=True)


def released_form(config: ModelConfig) -> tuple[dict[str, Any], Placements] | None:
    """The config and tensor names in its family's spelling, or None where reading them back would not give the
    same model."""
    family = FAMILIES.get(config.family or "")
    if family is None:
        return None
    try:
        values = family.write_config(config)
        fits = parse_config(json.loads(json.dumps(values))) == config
    except (ConfigError, AttributeError, TypeError):
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


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
