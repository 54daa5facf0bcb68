"""A cache on disk: one safetensors file, a tensor per sequence and stream, and a header that says whose it is."""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from kvell.cache.cache import Cache
from kvell.errors import CacheError
from kvell.files import write_safetensors

FORMAT = "kvell cache 1"


class CacheMaker(Protocol):
    """What a saved cache needs of its model."""

    @property
    def dtype(self) -> torch.dtype: ...

    def fingerprint(self) -> str: ...

    def make_cache(self, batch_size: int, max_rewind: int, max_length: int | None) -> Cache: ...


def save(cache: Cache, path: Path) -> None:
    cache.check_whole()
    if cache.fingerprint is None:
        raise CacheError("only a cache made by model.make_cache can be saved: this one knows no model")
    header = {
        "format": FORMAT,
        "model": cache.fingerprint,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "max_rewind": cache.max_rewind,
        "max_length": cache.max_length,
        "lengths": cache.lengths,
        "rewindable": cache.rewindable,
    }
    tensors = {
        _name(index, layer, name): stream.held.contiguous()
        for index, sequence in enumerate(cache.sequences)
        for (layer, name), stream in sequence.streams.items()
    }
    write_safetensors(path, tensors, {"kvell": json.dumps(header)})


def load(path: Path, model: CacheMaker) -> Cache:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("kvell", "{}"))
            if header.get("format") != FORMAT:
                raise CacheError(f"{path} is not a saved cache of this version of Kvell")
            if header["model"] != model.fingerprint():
                raise CacheError(f"{path} was saved by another model: its rows mean nothing to this one")
            if getattr(torch, header["dtype"]) != model.dtype:
                raise CacheError(f"{path} holds {header['dtype']} rows, the model works in {model.dtype}")
            cache = model.make_cache(len(header["lengths"]), header["max_rewind"], header["max_length"])
            for index, sequence in enumerate(cache.sequences):
                sequence.length, sequence.rewindable = header["lengths"][index], header["rewindable"][index]
                for (layer, name), stream in sequence.streams.items():
                    rows = file.get_tensor(_name(index, layer, name))
                    if rows.shape != (
                        stream.spec.rows(sequence.length, sequence.rewindable),
                        stream.spec.width,
                    ):
                        raise CacheError(f"{path}: layer {layer}'s {name} rows have the shape {tuple(rows.shape)}")
                    stream.fill(rows)
            return cache
    except FileNotFoundError:
        raise CacheError(f"no such file: {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CacheError(f"{path} is not a readable cache file: {error}") from None


def _name(index: int, layer: int, name: str) -> str:
    return f"sequences.{index}.layers.{layer}.{name}"
