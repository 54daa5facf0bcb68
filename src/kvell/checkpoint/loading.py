"""Weights in: every parameter is set by exactly one tensor (or by pieces that fill it exactly), and every tensor is
used or left out by a named rule. Anything else is an error, so no weight is ever random by accident."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvell.checkpoint.quantised import FLOATS, QuantisedFiles
from kvell.checkpoint.reading import INDEX, SINGLE, TensorFiles, read_no_further
from kvell.config import ModelConfig
from kvell.errors import CheckpointError, ConfigError, InputError, naming, warn
from kvell.families import FAMILIES, GENERATION, GenerationDefaults, Placement, Placements, locate, read_config
from kvell.families.family import Family
from kvell.families.keys import shown
from kvell.files import read_json
from kvell.layers.per_layer_embedding import MappedTable, stays_on_disk
from kvell.model import Decoder

TABLE = "per_layer_inputs.table.weight"
EMBEDDING, HEAD = "embedding.weight", "head.weight"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*"]
RUN = "training.json"  # which `kvell train` writes when a run begins; the model follows at its end


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    map_per_layer_table: bool | None = None,
    released_rounding: bool = False,
    strict: bool = True,
) -> Decoder:
    """A model from a directory in Hugging Face layout, or from the hub.

    `dtype` None keeps the dtype that the embedding is stored in. On the CPU, weights already stored in the wanted
    dtype stay memory-mapped: the disk is read when they are first used. Weights stored in FP8 or FP4 are unpacked
    into the wanted dtype. `map_per_layer_table` keeps the table of per-layer embeddings on disk whatever dtype and
    device the rest has: only rows of used tokens are read, results are identical, but the table cannot be trained;
    None does so on the CPU for a table of more than a quarter of the model. `released_rounding`
    simulates the rounding of the released inference code (DeepSeek V4's FP8 rows and FP4 indexer). With `strict`
    false keys of the config that Kvell does not know are left out with one warning. ConfigError or CheckpointError,
    naming the key or the tensor, for anything that does not fit exactly.
    """
    device = available_device(device)
    dtype = known_dtype(dtype)
    folder = model_folder(path)
    config = read_config(folder, strict=strict)
    released = read_json(folder / "config.json")
    tensors = TensorFiles(folder)
    with naming(folder / "config.json"):
        check_counts(released, tensors)
    # A family's model that no longer fits the family is stored in Kvell's own form, and so is a config by hand.
    own_form = released.get("model_type", "kvell") == "kvell"
    family = None if own_form else FAMILIES[config.family or ""]
    files = QuantisedFiles(tensors, family.scale_names if family else lambda name: ())
    if family:
        config = family.adapted(config, files.names())
    with naming(folder):
        config = keeping_its_head(config, files, family)
        sources, left_out = match(files, config, family)
    if left_out:
        warn(_notice(left_out))
    if ignored := GenerationDefaults.read(folder / GENERATION).unsupported:
        warn(f"{folder / GENERATION} asks for {', '.join(ignored)}, which Kvell does not do: texts may differ")
    if dtype is None:
        dtype = files.dtype(next(iter(sources[EMBEDDING])))
    model = build_empty(config.with_released_rounding() if released_rounding else config, dtype)
    if map_per_layer_table is None:
        map_per_layer_table = stays_on_disk(_table_numbers(model), model.num_parameters(), device.type)
    for parameter, placed in sources.items():
        mapped = parameter == TABLE and map_per_layer_table
        values = _assemble(files, model, parameter, placed, device, mapped)
        with naming(files.file(next(iter(placed)))):
            _check_loaded(model, parameter, values, next(iter(placed)))
        _set(model, parameter, values, mapped)
    return model.eval()


def model_folder(path: str | Path) -> Path:
    """The folder, local or brought from the hub, with a model's config.json and weights. CheckpointError, with what
    to do, for one that has none."""
    folder = locate(path, HUB_FILES)
    if not folder.is_dir():
        raise CheckpointError(
            f"{path} is a file, without weights: give the folder of a model, which `kvell train` makes of a config"
        )
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return folder
    if (folder / RUN).is_file():
        raise CheckpointError(
            f"{folder} holds a training run that has no model yet: the same `kvell train` command goes on with it, "
            "and its end leaves the model there"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no model: there is no config.json in it")
    raise CheckpointError(f"{folder} holds no weights, neither {SINGLE} nor {INDEX}")


# In a tensor's name: the number of its layer, that of its expert, and how the name of all experts' tensor ends.
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERT = re.compile(r"\.(?:local_)?experts\.(\d+)\.")
STACKED = re.compile(r"\.(?:experts|switch_mlp)\.[a-z_]+(?:\.weight)?$")


def check_counts(values: Mapping[str, Any], files: TensorFiles) -> None:
    """ConfigError if a released config has more layers or experts than there are tensors of. Checked before anything
    is built, or any tensor's name is made, for all of them."""
    family = next((one for one in FAMILIES.values() if values.get("model_type") in one.model_types), None)
    text = values.get("text_config", values)
    if family is None or not isinstance(text, Mapping):
        return
    names = files.names()
    layers = len({found[1] for name in names if (found := LAYER.search(name))})
    experts = len({found[1] for name in names if (found := EXPERT.search(name))})
    if (stacked := next(filter(STACKED.search, names), None)) is not None and files.get(stacked).dim() == 3:
        experts = max(experts, len(files.get(stacked)))
    for key, stored in (("num_hidden_layers", layers), (family.experts, experts)):
        given = text.get(key)
        if stored and isinstance(given, int) and given > stored:
            raise ConfigError(f"{family.name} config: {key} is {shown(given)}, and there are tensors of {stored}")


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
        why = _why_no_cuda() if str(device).startswith("cuda") else ""
        raise InputError(f"device {device} is not to be had here{why}: use one of {', '.join(known)}")
    return torch.device(device)


def _why_no_cuda() -> str:
    if not torch.backends.cuda.is_built():
        return f" (this build of torch, {torch.__version__}, has no CUDA)"
    return "" if torch.cuda.is_available() else " (torch finds no CUDA device)"


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


def keeping_its_head(config: ModelConfig, files: QuantisedFiles, family: Family | None) -> ModelConfig:
    """The config of what the file holds, where it ties the head to the embedding and the file has a head of its own.

    As transformers has it: a head that equals the embedding to the last bit is tied to it, any other is the model's,
    and a warning tells of it.
    """
    if not config.tied_head:
        return config
    canonical = family.spelling(files.names(), config) if family else str
    wanted = (family.head, family.embedding) if family else (HEAD, EMBEDDING)
    stored = {plain: name for name in files.names() if (plain := canonical(name)) in wanted}
    if len(stored) < len(wanted) or files.same(*(stored[plain] for plain in wanted)):
        return config
    head, embedding = (stored[plain] for plain in wanted)
    own, other = files.shape(head), files.shape(embedding)
    if own != other:
        raise CheckpointError(f"{files.file(head)}: {head} has the shape {own}, {embedding} {other}")
    warn(
        f"{files.file(head)}: {head} is not {embedding}, though the config ties them"
        f" ({'tie_word_embeddings' if family else 'tied_head'}): the model keeps the file's head, and is not tied"
    )
    return ModelConfig.from_dict(config.model_dump() | {"tied_head": False})


def match(
    files: QuantisedFiles, config: ModelConfig, family: Family | None
) -> tuple[dict[str, dict[str, Placement]], Counter[str]]:
    """For every parameter the file's tensors that set it, and how many are left out by each rule that is noticed.

    A head whose config ties it stands for the embedding; where both are stored, they are alike (`keeping_its_head`).
    CheckpointError for a tensor nobody wants, for one spelled twice, and for a parameter that is left unset.
    """
    written = family.placements(config) if family else native_placements(config)
    layouts = [written, *(family.alternatives(config) if family else ())]
    known = {name: place for layout in layouts for name, place in layout.items()}
    if config.tied_head:
        known[family.head if family else HEAD] = Placement(HEAD)
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
    if config.tied_head and (head := sources.pop(HEAD, None)) and EMBEDDING not in sources:
        sources[EMBEDDING] = dict.fromkeys(head, Placement(EMBEDDING))
    ways: dict[str, list[dict[Placement, str]]] = defaultdict(list)
    for layout in layouts:
        own: dict[str, dict[Placement, str]] = defaultdict(dict)
        for name, place in layout.items():
            own[place.parameter][place] = name
        for parameter, places in own.items():
            ways[parameter].append(places)
    for parameter, layouts_of_it in ways.items():
        _check_complete(sources.get(parameter, {}), layouts_of_it)
    return dict(sources), left_out


def _check_complete(placed: Mapping[str, Placement], ways: Sequence[Mapping[Placement, str]]) -> None:
    """CheckpointError unless a parameter's tensors are exactly those of one of the ways to store it."""
    found = set(placed.values())
    way = next((way for way in ways if found <= set(way)), None)
    if way is None:
        names = sorted(placed, key=lambda name: not placed[name].whole)
        one = names[0]
        beside_it = {place for way in ways if placed[one] in way for place in way}
        other = next(name for name in names if placed[name] not in beside_it)
        raise CheckpointError(f"{one} and {other} both set {placed[one].parameter}")
    if absent := [name for place, name in way.items() if place not in found]:
        raise CheckpointError(f"missing tensor {absent[0]}")


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


def _table_numbers(model: Decoder) -> int:
    """How many numbers the table of per-layer embeddings has; 0 without one."""
    sizes: Iterator[tuple[str, int]] = ((name, tensor.numel()) for name, tensor in model.named_tensors())
    return dict(sizes).get(TABLE, 0)
