"""A plan: what a context costs, before anything is loaded.

No model is built. Bytes come from the stream specifications that the cache itself allocates by, weights and FLOPs
from what each technique states in its own file (layers/cost.py).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvell.cache import StreamSpecs, reserved_nbytes, streams_nbytes
from kvell.config import ModelConfig
from kvell.errors import InputError, whole_number
from kvell.layers.contract import AttentionDescription
from kvell.layers.per_layer_embedding import stays_on_disk
from kvell.planning.fit import largest_batch, longest_context
from kvell.planning.flops import decode_flops, prefill_flops
from kvell.planning.formats import StorageFormat, storage_format, stored_streams, weight_nbytes
from kvell.planning.model_cost import blocks, weights
from kvell.planning.peak import working_nbytes
from kvell.planning.references import known_config
from kvell.planning.roofline import Device, known_device, seconds

TABLE = "per-layer table"


@dataclass(frozen=True)
class PlannedWeights:
    """One part of the weights. What is `mapped` stays on disk; only rows of used tokens are read."""

    part: str
    numbers: int
    nbytes: int
    mapped: bool


@dataclass(frozen=True)
class PlannedStream:
    """What all layers together hold of one kind of row, for one sequence. `past` None keeps all rows."""

    name: str
    layers: tuple[int, ...]
    past: int | None
    stride: int
    row_bytes: int
    rows: int
    nbytes: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose attention is the same, and what they hold for one sequence."""

    attention: str
    layers: tuple[int, ...]
    bytes_per_token: float
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What `batch_size` sequences of `context` tokens cost.

    `cache_bytes` is what they hold (Cache.nbytes), `reserved_bytes` what a cache made for just that `max_length`
    allocates and `grown_bytes` what one that grows does, filled in one step (Cache.allocated_nbytes). Each token adds
    `bytes_per_token` to a sequence, whose `constant_bytes` do not grow. FLOPs are of one sequence: of the token that
    makes the context so long, and of a prompt as long, with and without what only the logits of tokens before the
    last need. A step of decoding reads `read_bytes` for the whole batch. Seconds are lower bounds on `device`, for
    the prompts and for a step of the whole batch. `working_bytes` estimates what a prefill needs beside weights and
    cache, with Kvell's kernels for CPUs.
    """

    model: str
    context: int
    batch_size: int
    max_rewind: int
    dtype: str
    warnings: tuple[str, ...]
    weights: tuple[PlannedWeights, ...]
    streams: tuple[PlannedStream, ...]
    layer_groups: tuple[LayerGroup, ...]
    cache_bytes: int
    reserved_bytes: int
    grown_bytes: int
    bytes_per_token: float
    constant_bytes: int
    decode_flops: dict[str, int]
    prefill_flops: dict[str, int]
    prefill_flops_all_logits: int
    equivalent_fp8_flops_per_token: float
    read_bytes: int
    working_bytes: int
    device: Device
    seconds_to_first_token: float
    seconds_per_token: float

    @property
    def parameters(self) -> int:
        return sum(part.numbers for part in self.weights)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, on disk or in memory."""
        return sum(part.nbytes for part in self.weights)

    @property
    def resident_weight_bytes(self) -> int:
        """Bytes of those in memory."""
        return sum(part.nbytes for part in self.weights if not part.mapped)

    @property
    def flops_per_token(self) -> int:
        """Of one decoded token of one sequence."""
        return sum(self.decode_flops.values())

    @property
    def intensity(self) -> float:
        """FLOPs of a step of decoding for each byte that it reads."""
        return self.flops_per_token * self.batch_size / self.read_bytes

    @property
    def peak_bytes(self) -> int:
        """What a prefill of the context needs at once: resident weights, the reserved cache, the working set."""
        return self.resident_weight_bytes + self.reserved_bytes + self.working_bytes

    def to_dict(self) -> dict[str, object]:
        """Plain data: every field, and what follows from them."""
        derived = (
            "parameters",
            "weight_bytes",
            "resident_weight_bytes",
            "flops_per_token",
            "intensity",
            "peak_bytes",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def plan(
    config: ModelConfig | str | Path,
    context: int,
    batch_size: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    *,
    max_rewind: int = 0,
    device: str | Device = "h100",
    map_per_layer_table: bool | None = None,
    name: str | None = None,
) -> Plan:
    """What a context costs. `config` is a ModelConfig, whatever ModelConfig.from_pretrained takes, or a reference
    ("deepseek-v3.2", "llama-3.1-8b", "llama-2-7b").

    `dtype` is a storage format (planning/formats.py), `device` one of a table (planning/roofline.py) or a Device.
    `map_per_layer_table` None leaves a large table of per-layer embeddings on disk where loading does: on a device
    that is a CPU. `name` is what the plan calls the model. InputError for sizes below 1 and for an unknown dtype or
    device.
    """
    for what, value, least in (("context", context, 1), ("batch_size", batch_size, 1), ("max_rewind", max_rewind, 0)):
        whole_number(what, value, least)
    model = name or ("config" if isinstance(config, ModelConfig) else str(config))
    config = config if isinstance(config, ModelConfig) else known_config(str(config))
    form = storage_format(dtype, config)
    device = known_device(device) if isinstance(device, str) else device
    specs = stored_streams(config, form)
    decoding, prefill = decode_flops(config, context), prefill_flops(config, context)
    rewindable = min(max_rewind, context)
    read = _read_weights(config, form, batch_size) + batch_size * _read_rows(config, specs, context, form)
    planned = planned_weights(config, form, device, map_per_layer_table)
    # Of the per-layer table a prompt reads the rows of its tokens, wherever the table is.
    whole = sum(part.nbytes for part in planned if part.part not in (TABLE, "draft block"))
    growing = {key: spec for key, spec in specs.items() if spec.past is None}
    constant = {key: spec for key, spec in specs.items() if spec.past is not None}
    return Plan(
        model=model,
        context=context,
        batch_size=batch_size,
        max_rewind=max_rewind,
        dtype=form.name,
        warnings=_warnings(config, context),
        weights=planned,
        streams=_planned_streams(specs, context, rewindable, form),
        layer_groups=_layer_groups(config, specs, context, rewindable, form),
        cache_bytes=batch_size * streams_nbytes(specs, context, rewindable, form.row_dtype),
        reserved_bytes=batch_size * reserved_nbytes(specs, context, max_rewind, form.row_dtype),
        grown_bytes=batch_size * reserved_nbytes(specs, context, rewindable, form.row_dtype, exactly=False),
        bytes_per_token=_bytes_per_token(growing, form),
        constant_bytes=streams_nbytes(constant, context, rewindable, form.row_dtype),
        decode_flops=decoding.by_part,
        prefill_flops=prefill.by_part,
        prefill_flops_all_logits=prefill_flops(config, context, last_only=False).total,
        equivalent_fp8_flops_per_token=decoding.equivalent_fp8,
        read_bytes=read,
        working_bytes=working_nbytes(config, form, context, batch_size),
        device=device,
        seconds_to_first_token=batch_size * seconds(prefill, whole / batch_size, device, form),
        seconds_per_token=batch_size * seconds(decoding, read / batch_size, device, form),
    )


def planned_weights(
    config: ModelConfig, form: StorageFormat, device: Device, map_per_layer_table: bool | None = None
) -> tuple[PlannedWeights, ...]:
    """The weights by part, in the order in which a token meets them, as loading on the device places them."""
    numbers: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    for weight in weights(config):
        numbers[weight.part] = numbers.get(weight.part, 0) + weight.numel * weight.learnt
        nbytes[weight.part] = nbytes.get(weight.part, 0) + weight_nbytes(weight, form)
    mapped = map_per_layer_table
    if mapped is None:
        mapped = stays_on_disk(numbers.get(TABLE, 0), sum(numbers.values()), device.type)
    return tuple(PlannedWeights(part, numbers[part], nbytes[part], mapped and part == TABLE) for part in numbers)


def context_that_fits(
    config: ModelConfig,
    memory: int,
    batch_size: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    max_rewind: int = 0,
    *,
    device: str | Device = "h100",
) -> int:
    """The longest context whose prefill's peak fits into `memory` bytes of a device like `device`: all of the model's
    positions, or as many blocks of 64 tokens as fit. InputError where none does, or the weights alone do not."""
    peak = _peak_of(config, memory, dtype, max_rewind, device)
    return longest_context(peak, memory, batch_size, config.max_positions)


def batch_that_fits(
    config: ModelConfig,
    memory: int,
    context: int,
    dtype: str | torch.dtype = "bfloat16",
    max_rewind: int = 0,
    *,
    device: str | Device = "h100",
) -> int:
    """The largest batch of that context whose prefill's peak fits into `memory` bytes. InputError as above."""
    return largest_batch(_peak_of(config, memory, dtype, max_rewind, device), memory, context)


def _peak_of(
    config: ModelConfig, memory: int, dtype: str | torch.dtype, max_rewind: int, device: str | Device
) -> Callable[[int, int], int]:
    """Bytes of a prefill's peak by context and batch size. InputError where the weights do not fit."""
    if memory < 1:
        raise InputError(f"memory must be at least 1 byte, not {memory}")
    form = storage_format(dtype, config)
    specs = stored_streams(config, form)
    device = known_device(device) if isinstance(device, str) else device
    resident = sum(part.nbytes for part in planned_weights(config, form, device) if not part.mapped)
    if resident > memory:
        raise InputError(
            f"the weights take {resident:,} bytes, {resident - memory:,} more than the {memory:,} of the memory"
        )

    def peak(context: int, batch_size: int) -> int:
        reserved = batch_size * reserved_nbytes(specs, context, max_rewind, form.row_dtype)
        return resident + reserved + working_nbytes(config, form, context, batch_size)

    return peak


def _warnings(config: ModelConfig, context: int) -> tuple[str, ...]:
    if context <= config.max_positions:
        return ()
    return (f"{context} tokens, and the model has {config.max_positions} positions: it extrapolates",)


def _planned_streams(
    specs: StreamSpecs, context: int, rewindable: int, form: StorageFormat
) -> tuple[PlannedStream, ...]:
    """Streams alike in all but their layer stand together."""
    groups: dict[tuple[str, int | None, int, int], list[tuple[int, int, int]]] = {}
    for (index, name), spec in specs.items():
        kind = (name, spec.past, spec.stride, spec.row_nbytes(form.row_dtype))
        rows, nbytes = spec.rows(context, rewindable), spec.nbytes(context, rewindable, form.row_dtype)
        groups.setdefault(kind, []).append((index, rows, nbytes))
    return tuple(
        PlannedStream(
            name,
            tuple(index for index, _, _ in held),
            past,
            stride,
            row_bytes,
            sum(rows for _, rows, _ in held),
            sum(nbytes for _, _, nbytes in held),
        )
        for (name, past, stride, row_bytes), held in groups.items()
    )


def _layer_groups(
    config: ModelConfig, specs: StreamSpecs, context: int, rewindable: int, form: StorageFormat
) -> tuple[LayerGroup, ...]:
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(config.layers):
        groups.setdefault(_described(layer.attention.kind, layer.attention.describe()), []).append(index)
    planned = []
    for attention, layers in groups.items():
        own = {key: spec for key, spec in specs.items() if key[0] in layers}
        growing = {key: spec for key, spec in own.items() if spec.past is None}
        nbytes = streams_nbytes(own, context, rewindable, form.row_dtype)
        planned.append(LayerGroup(attention, tuple(layers), _bytes_per_token(growing, form), nbytes))
    return tuple(planned)


def _described(kind: str, fields: AttentionDescription) -> str:
    """A layer's attention in a few words."""
    words = [f"{kind.replace('_', '-')} {fields.num_heads}/{fields.num_kv_heads} x {fields.head_dim}"]
    words += [f"window {fields.sliding_window}"] if fields.sliding_window is not None else []
    words += [fields.compression] if fields.compression is not None else []
    words += ["shared"] if fields.kv_source is not None else []
    return ", ".join(words)


def _bytes_per_token(growing: StreamSpecs, form: StorageFormat) -> float:
    return sum(spec.row_nbytes(form.row_dtype) / spec.stride for spec in growing.values())


def _read_weights(config: ModelConfig, form: StorageFormat, batch_size: int) -> int:
    """Bytes of weights that a step of decoding reads: a part that a token uses k of n of is used by none of the batch
    with the probability (1 - k / n) ** batch."""
    read = 0.0
    for block in blocks(config):
        for weight in block.cost.weights if block.place != "draft" else ():
            used, parts = weight.used
            read += weight_nbytes(weight, form) * (1 - (1 - used / parts) ** batch_size)
    return round(read)


def _read_rows(config: ModelConfig, specs: StreamSpecs, context: int, form: StorageFormat) -> int:
    """Bytes of cached rows that one sequence's decoded token reads; a shared row is read by each layer."""
    works = [work for block in blocks(config) if block.place != "draft" for work in block.cost.works]
    return sum(work.rows(context) * specs[key].row_nbytes(form.row_dtype) for work in works for key in work.reads)
