"""A cache on disk: one safetensors file, a tensor per sequence and stream, and a header that says whose it is."""

from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from kvell.cache.cache import Cache
from kvell.cache.origin import Fingerprinted
from kvell.errors import CacheError
from kvell.files import write_safetensors

FORMAT: Literal["kvell cache 1"] = "kvell cache 1"


class CacheMaker(Fingerprinted, Protocol):
    """What a saved cache needs of its model."""

    @property
    def dtype(self) -> torch.dtype: ...

    def make_cache(self, batch_size: int, max_rewind: int, max_length: int | None) -> Cache: ...


class Header(BaseModel, extra="forbid"):
    """What a file says of the cache it holds."""

    format: Literal["kvell cache 1"] = FORMAT
    model: str
    dtype: str
    max_rewind: NonNegativeInt
    max_length: PositiveInt | None
    lengths: list[NonNegativeInt]
    rewindable: list[NonNegativeInt]

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not self.lengths or len(self.lengths) != len(self.rewindable):
            raise ValueError("lengths and rewindable do not name the same sequences")
        for length, back in zip(self.lengths, self.rewindable, strict=True):
            if back > min(length, self.max_rewind) or length > (self.max_length or length):
                raise ValueError(f"a sequence of {length} tokens cannot have {back} to take back")
        return self


def save(cache: Cache, path: Path) -> None:
    cache.check_whole()
    fingerprint = cache.fingerprint
    if fingerprint is None:
        raise CacheError("only a cache made by model.make_cache can be saved: this one knows no model")
    header = Header(
        model=fingerprint,
        dtype=str(cache.dtype),
        max_rewind=cache.max_rewind,
        max_length=cache.max_length,
        lengths=cache.lengths,
        rewindable=cache.rewindable,
    )
    tensors = {
        _name(index, layer, name): stream.held.contiguous()
        for index, sequence in enumerate(cache.sequences)
        for (layer, name), stream in sequence.streams.items()
    }
    write_safetensors(path, tensors, {"kvell": header.model_dump_json()})


def load(path: Path, model: CacheMaker) -> Cache:
    try:
        with safe_open(path, "pt") as file:
            header = Header.model_validate_json((file.metadata() or {}).get("kvell", "{}"))
            if header.dtype != str(model.dtype):
                raise CacheError(f"{path} holds {header.dtype} rows, the model works in {model.dtype}")
            if header.model != model.fingerprint():
                raise CacheError(f"{path} was saved by another model: its rows mean nothing to this one")
            cache = model.make_cache(len(header.lengths), header.max_rewind, header.max_length)
            for index, sequence in enumerate(cache.sequences):
                sequence.length, sequence.rewindable = header.lengths[index], header.rewindable[index]
                for (layer, name), stream in sequence.streams.items():
                    rows = file.get_tensor(_name(index, layer, name))
                    wanted = (stream.spec.rows(sequence.length, sequence.rewindable), stream.spec.width)
                    if rows.shape != wanted or rows.dtype != stream.buffer.dtype:
                        found = f"{tuple(rows.shape)} {rows.dtype}"
                        raise CacheError(f"{path}: layer {layer}'s {name} rows are {found}, wanted are {wanted}")
                    stream.fill(rows)
            return cache
    except FileNotFoundError:
        raise CacheError(f"no such file: {path}") from None
    except ValidationError as error:
        raise CacheError(f"{path} is not a readable cache file: {error.errors()[0]['msg']}") from None
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is not a readable cache file: {error}") from None


def _name(index: int, layer: int, name: str) -> str:
    return f"sequences.{index}.layers.{layer}.{name}"
