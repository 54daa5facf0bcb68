"""Storage formats: how many bytes weights and cached rows take.

float32, bfloat16, float16   every number so, besides what a model keeps in fp32
fp8                          matrices and rows a byte a number, the rest bf16; scales are left out
released                     as the family's released files and inference code have it: DeepSeek V4's FP8 and FP4
                             weights with their scales, its entries of 584 bytes and its indexer's of 68;
                             bf16 for families that are released so
released-fp8-index           the same with the indexer's entries in FP8, 132 bytes
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kvell.cache import StreamSpec, StreamSpecs
from kvell.config import ModelConfig
from kvell.errors import InputError
from kvell.layers.cost import Form, Weight

# Numbers of a matrix that share a scale of one byte: blocks of 128 x 128 in FP8, 32 along a row in FP4.
FP8_BLOCK, FP4_BLOCK = 128, 32


@dataclass(frozen=True)
class StorageFormat:
    """`dtype` is that of the rows and of weights in 16 bits; `narrow` says what matrices take that may be narrower.

    `index_form` is that of an indexer's entries where rows are packed as released, None where they are not.
    """

    name: str
    dtype: torch.dtype
    row_dtype: torch.dtype
    narrow: Literal["none", "fp8", "released fp8", "released fp4"] = "none"
    index_form: Literal["fp4", "fp8"] | None = None


def _plain(name: str, dtype: torch.dtype) -> StorageFormat:
    return StorageFormat(name, dtype, dtype)


BFLOAT16 = _plain("bfloat16", torch.bfloat16)
PLAIN: Mapping[str, StorageFormat] = {
    "float32": _plain("float32", torch.float32),
    "bfloat16": BFLOAT16,
    "float16": _plain("float16", torch.float16),
    "fp8": StorageFormat("fp8", torch.bfloat16, torch.float8_e4m3fn, "fp8"),
}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
RELEASED: tuple[tuple[str, Literal["fp4", "fp8"]], ...] = (("released", "fp4"), ("released-fp8-index", "fp8"))
# By family; others are released in bf16.
RELEASED_WEIGHTS: Mapping[str, Literal["released fp8", "released fp4"]] = {
    "deepseek_v4": "released fp4",
    "deepseek_v32": "released fp8",
}


def storage_format(dtype: str | torch.dtype, config: ModelConfig) -> StorageFormat:
    """A format by name. InputError, with the known ones, for another; and where a config has no released format."""
    name = str(dtype).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name in PLAIN:
        return PLAIN[name]
    for released, index_form in RELEASED:
        if name == released:
            if config.family is None:
                raise InputError(f"dtype {name}: the model is of no released family: use one of {', '.join(PLAIN)}")
            if config.family not in RELEASED_WEIGHTS:
                return BFLOAT16
            narrow = RELEASED_WEIGHTS[config.family]
            return StorageFormat(name, torch.bfloat16, torch.bfloat16, narrow, index_form)
    known = [*PLAIN, *(released for released, _ in RELEASED)]
    raise InputError(f"dtype {dtype} is unknown: use one of {', '.join(known)}")


def stored_streams(config: ModelConfig, form: StorageFormat) -> StreamSpecs:
    """What a sequence must remember, as stored: a technique that a released engine packs says so itself."""
    if form.index_form is None:
        return config.streams()
    specs: dict[tuple[int, str], StreamSpec] = {}
    for index, layer in enumerate(config.layers):
        streams = layer.attention.released_streams(form.index_form)
        specs |= {(index, spec.name): spec for spec in streams}
    return specs


def weight_nbytes(weight: Weight, form: StorageFormat) -> int:
    """Bytes of a tensor, scales included where they are stored."""
    kept: dict[Form, int] = {"fp32": 4, "int64": 8}
    if weight.form in kept:
        return weight.numel * kept[weight.form]
    if weight.form == "bf16" or form.narrow == "none":
        return weight.numel * form.dtype.itemsize
    if form.narrow == "fp8":
        return weight.numel
    *_, rows, columns = weight.shape
    if weight.form == "fp4" and form.narrow == "released fp4":
        return weight.numel // 2 + weight.numel // columns * -(-columns // FP4_BLOCK)
    matrices = weight.numel // (rows * columns)
    return weight.numel + matrices * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK)
