"""A released model's shapes with random bf16 weights, written shard by shard: this needs disk, not memory."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import kvell
from kvell.checkpoint import build_empty
from kvell.checkpoint.reading import INDEX
from kvell.families import FAMILIES
from kvell.files import save_to

SHARD_BYTES = 1 << 30
POOL = 1 << 24


def released_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """A built-in Gemma 4 config as released; with `layers` only so many, the later half reading shared keys."""
    released = json.loads((files("kvell.families") / "configs" / f"{name}.json").read_text())
    released = released.get("text_config", released)
    if layers is not None:
        kinds = released["layer_types"]
        period = kinds.index("full_attention") + 1
        if layers % (2 * period):
            raise ValueError(f"{layers} layers: {name} can be cut to multiples of {2 * period}")
        released |= {
            "num_hidden_layers": layers,
            "layer_types": kinds[:layers],
            "num_kv_shared_layers": layers // 2,
        }
    return released | {"dtype": "bfloat16"}


def write_random_checkpoint(name: str, folder: Path, layers: int | None = None) -> None:
    """Writes the checkpoint unless the folder holds it: the config first, the index last."""
    released = released_config(name, layers)
    if (folder / INDEX).is_file() and json.loads((folder / "config.json").read_text()) == released:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released, indent=2))
    config = kvell.ModelConfig.from_pretrained(folder / "config.json")
    shapes = dict(build_empty(config, torch.bfloat16).named_tensors())
    pool = (torch.randn(POOL + 1, generator=torch.Generator().manual_seed(0)) * config.initializer_range).bfloat16()
    places = FAMILIES[config.family or ""].placements(config)
    shards: list[list[str]] = [[]]
    size = 0
    for theirs, place in places.items():
        nbytes = place.of(shapes[place.parameter]).numel() * 2
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(theirs)
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for theirs in names:
            shape = places[theirs].of(shapes[places[theirs].parameter]).shape
            plain = theirs.endswith(("norm.weight", "layer_scalar"))
            count = shape.numel()
            values = pool[:POOL].repeat(-(-count // POOL))[:count].view(shape)
            tensors[theirs] = torch.ones(shape, dtype=torch.bfloat16) if plain else values
        save_to(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
