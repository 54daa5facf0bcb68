"""Weights in: every parameter is set by exactly one tensor (or by pieces that fill it exactly), and every tensor is
used or left out by a named rule. Anything else is an error, so no weight is ever random by accident."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kvell.checkpoint.reading import TensorFiles
from kvell.config import ModelConfig
from kvell.errors import CheckpointError, InputError
from kvell.families import FAMILIES, Placement, Placements, locate, read_config, read_json
from kvell.families.family import Family
from kvell.layers.per_layer_embedding import MappedTable
from kvell.model import Decoder

TABLE = "per_layer_inputs.table.weight"
DTYPES = ("bfloat16", "float32", "float16", "float64")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*"]


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    map_per_layer_table: bool | None = None,
) -> Decoder:
    """A model from a directory in Hugging Face layout, or from the hub.

    `dtype` None keeps the dtype that the embedding is stored in. On the CPU, weights already stored in the wanted
    dtype stay memory-mapped: the disk is read when they are first used. `map_per_layer_table` keeps the table of
    per-layer embeddings on disk whatever dtype and device the rest has: only rows of used tokens are read, results
    are identical, but the table cannot be trained; None does so on the CPU for a table of more than a quarter of the
    model. ConfigError or CheckpointError, naming the tensor, for anything that does not fit exactly.
    """
    device = available_device(device)
    dtype = known_dtype(dtype)
    folder = locate(path, HUB_FILES)
    if not folder.is_dir():
        raise CheckpointError(f"{path} is not a directory with a model's config.json and weights")
    config = read_config(folder)
    # A family's model that no longer fits the family is stored in Kvell's own form.
    own_form = read_json(folder / "config.json").get("model_type") == "kvell"
    family = None if own_form else FAMILIES[config.family or ""]
    files = TensorFiles(folder)
    sources = match(files.names(), config, family)
    if dtype is None:
        dtype = files.get(next(iter(sources["embedding.weight"]))).dtype
    model = build_empty(config, dtype)
    if map_per_layer_table is None:
        map_per_layer_table = device.type == "cpu" and _table_is_large(model)
    for parameter, placed in sources.items():
        mapped = parameter == TABLE and map_per_layer_table
        _set(model, parameter, _assemble(files, model, parameter, placed, device, mapped), mapped)
    return model.eval()


def known_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, by itself or by name; None for the stored one. InputError for one that no model computes in."""
    for name in DTYPES:
        if dtype in (name, getattr(torch, name)):
            return getattr(torch, name)
    if dtype is None:
        return None
    raise InputError(f"dtype {dtype} is unknown: use one of {', '.join(DTYPES)}")


def available_device(device: torch.device | str) -> torch.device:
    """The device. InputError, with those that there are, for one that this machine lacks."""
    known = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        known += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(device) not in known:
        raise InputError(f"device {device} is not to be had here: use one of {', '.join(known)}")
    return torch.device(device)


def build_empty(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The model's shape in a dtype, without memory for its weights."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Decoder(config)
    finally:
        torch.set_default_dtype(previous)


def native_placements(config: ModelConfig) -> Placements:
    """Kvell's own format: every tensor under its own name."""
    return {name: Placement(name) for name, _ in build_empty(config, torch.float32).named_tensors()}


def match(names: list[str], config: ModelConfig, family: Family | None) -> dict[str, dict[str, Placement]]:
    """For every parameter the file's tensors that set it. CheckpointError for a tensor nobody wants, for one spelled
    twice, and for a parameter that is left unset."""
    written = family.placements(config) if family else native_placements(config)
    known = written | (family.alternatives(config) if family else {})
    sources: dict[str, dict[str, Placement]] = defaultdict(dict)
    seen: dict[Placement, str] = {}
    for name in names:
        plain = family.canonical(name) if family else name
        if plain in known:
            place = known[plain]
            if place in seen:
                raise CheckpointError(f"{name} and {seen[place]} are the same tensor, spelled in two ways")
            seen[place] = name
            sources[place.parameter][name] = place
        elif family is None or not any(rule(name, config) for rule in family.skip_rules.values()):
            raise CheckpointError(f"unexpected tensor {name}: the config has no place for it")
    for name, place in written.items():
        if place not in seen and Placement(place.parameter) not in seen:
            raise CheckpointError(f"missing tensor {name}")
    for parameter, placed in sources.items():
        if len(placed) > 1 and (twice := [name for name, place in placed.items() if place.whole]):
            raise CheckpointError(f"{twice[0]} and {next(n for n in placed if n != twice[0])} both set {parameter}")
    return dict(sources)


def _assemble(
    files: TensorFiles,
    model: Decoder,
    parameter: str,
    placed: dict[str, Placement],
    device: torch.device,
    mapped: bool,
) -> Tensor:
    """A parameter's values from its tensors: the file's own memory where nothing has to change."""
    target = _target(model, parameter)
    values: Tensor | None = None
    for name, place in placed.items():
        tensor = files.get(name)
        wanted = place.of(target).shape
        if tensor.shape != wanted:
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}, wanted is {list(wanted)}")
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise CheckpointError(f"{name} is stored as {tensor.dtype}, which cannot be read without its scales")
        if place.whole:
            return tensor if mapped else tensor.to(device=device, dtype=target.dtype)
        if values is None:
            values = torch.empty(target.shape, dtype=target.dtype, device=device)
        place.of(values).copy_(tensor)
    assert values is not None
    return values


def _target(model: Decoder, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _set(model: Decoder, name: str, values: Tensor, mapped: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if mapped:
        parent, _, attribute = owner.rpartition(".")
        setattr(model.get_submodule(parent), attribute, MappedTable(values))
    elif leaf in module._buffers:
        module._buffers[leaf] = values
    else:
        old: nn.Parameter = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(values, requires_grad=old.requires_grad))


def _table_is_large(model: Decoder) -> bool:
    sizes: Iterator[tuple[str, int]] = ((name, tensor.numel()) for name, tensor in model.named_tensors())
    return dict(sizes).get(TABLE, 0) > model.num_parameters() / 4
