"""Weights in: every parameter is set by exactly one tensor (or by pieces that fill it exactly), and every tensor is
used or left out by a named rule. Anything else is an error, so no weight is ever random by accident."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kvell.checkpoint.quantised import FLOATS, QuantisedFiles
from kvell.checkpoint.reading import TensorFiles, read_no_further
from kvell.config import ModelConfig
from kvell.errors import CheckpointError, InputError, naming, warn
from kvell.families import FAMILIES, Placement, Placements, locate, read_config
from kvell.families.family import Family
from kvell.files import read_json
from kvell.layers.per_layer_embedding import MAPPED_SHARE, MappedTable
from kvell.model import Decoder

TABLE = "per_layer_inputs.table.weight"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*"]


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    map_per_layer_table: bool | None = None,
    released_rounding: bool = False,
) -> Decoder:
    """A model from a directory in Hugging Face layout, or from the hub.

    `dtype` None keeps the dtype that the embedding is stored in. On the CPU, weights already stored in the wanted
    dtype stay memory-mapped: the disk is read when they are first used. Weights stored in FP8 or FP4 are unpacked
    into the wanted dtype. `map_per_layer_table` keeps the table of per-layer embeddings on disk whatever dtype and
    device the rest has: only rows of used tokens are read, results are identical, but the table cannot be trained;
    None does so on the CPU for a table of more than a quarter of the model. `released_rounding`
    simulates the rounding of the released inference code (DeepSeek V4's FP8 rows and FP4 indexer). ConfigError or
    CheckpointError, naming the tensor, for anything that does not fit exactly.
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
    files = QuantisedFiles(TensorFiles(folder), family.scale_name if family else lambda name: None)
    if family:
        config = family.adapted(config, files.names())
    with naming(folder):
        sources, left_out = match(files, config, family)
    if left_out:
        warn(_notice(left_out))
    if dtype is None:
        dtype = files.dtype(next(iter(sources["embedding.weight"])))
    model = build_empty(config.with_released_rounding() if released_rounding else config, dtype)
    if map_per_layer_table is None:
        map_per_layer_table = device.type == "cpu" and _table_is_large(model)
    for parameter, placed in sources.items():
        mapped = parameter == TABLE and map_per_layer_table
        values = _assemble(files, model, parameter, placed, device, mapped)
        with naming(files.file(next(iter(placed)))):
            _check_loaded(model, parameter, values, next(iter(placed)))
        _set(model, parameter, values, mapped)
    return model.eval()


def known_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, by itself or by name; None for the stored one. InputError for one that no model computes in."""
    known = {str(one).removeprefix("torch."): one for one in FLOATS}
    for name, one in known.items():
        if dtype in (name, one):
            return one
    if dtype is None:
        return None
    raise InputError(f"dtype {dtype} is unknown: use one of {', '.join(known)}")


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


def match(
    files: QuantisedFiles, config: ModelConfig, family: Family | None
) -> tuple[dict[str, dict[str, Placement]], Counter[str]]:
    """For every parameter the file's tensors that set it, and how many are left out by each rule that is noticed.

    CheckpointError for a tensor nobody wants, for one spelled twice, and for a parameter that is left unset.
    """
    written = family.placements(config) if family else native_placements(config)
    known = written | (family.alternatives(config) if family else {})
    sources: dict[str, dict[str, Placement]] = defaultdict(dict)
    seen: dict[Placement, str] = {}
    rules = family.skip_rules if family else {}
    left_out: Counter[str] = Counter()
    canonical = family.spelling(files.names(), config) if family else str
    for name in files.names():
        plain = canonical(name)
        if plain in known:
            place = known[plain]
            if place in seen:
                raise CheckpointError(f"{name} and {seen[place]} are the same tensor, spelled in two ways")
            seen[place] = name
            sources[place.parameter][name] = place
        elif (rule := next((rule for rule, applies in rules.items() if applies(name, config)), None)) is None:
            raise CheckpointError(f"{files.file(name)}: unexpected tensor {name}: the config has no place for it")
        elif family and rule in family.noticed_rules:
            left_out[rule] += 2 if name in files.scales else 1
    pieces: dict[str, dict[str, Placement]] = defaultdict(dict)
    for name, place in known.items():
        if not place.whole:
            pieces[place.parameter][name] = place
    for name, place in written.items():
        if place in seen or Placement(place.parameter) in seen:
            continue
        absent = [piece for piece, where in pieces[place.parameter].items() if where not in seen]
        if not place.whole or len(absent) == len(pieces[place.parameter]):
            raise CheckpointError(f"missing tensor {name}")
        if absent:
            raise CheckpointError(f"missing tensor {absent[0]}")
    for parameter, placed in sources.items():
        if len(placed) > 1 and (twice := [name for name, place in placed.items() if place.whole]):
            raise CheckpointError(f"{twice[0]} and {next(n for n in placed if n != twice[0])} both set {parameter}")
    return dict(sources), left_out


def _notice(left_out: Counter[str]) -> str:
    counts = ", ".join(f"{count} by the rule {rule!r}" for rule, count in sorted(left_out.items()))
    return f"tensors of the checkpoint are left out: {counts}"


def _assemble(
    files: QuantisedFiles,
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
        tensor = files.get(name, place.of(target))
        if place.whole:
            return read_no_further(tensor) if mapped else tensor.to(device=device, dtype=target.dtype)
        if values is None:
            values = torch.empty(target.shape, dtype=target.dtype, device=device)
        place.of(values).copy_(tensor)
    assert values is not None
    return values


def _target(model: Decoder, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _check_loaded(model: Decoder, parameter: str, values: Tensor, name: str) -> None:
    """CheckpointError, with the file's name for the tensor, if the module it is for finds something wrong in it."""
    owner, _, leaf = parameter.rpartition(".")
    check = getattr(model.get_submodule(owner), "check_loaded", None)
    if check is not None and (reason := check(leaf, values)) is not None:
        raise CheckpointError(f"{name} {reason}")


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
    return dict(sizes).get(TABLE, 0) > model.num_parameters() * MAPPED_SHARE
