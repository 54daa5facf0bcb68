"""The tensors of a checkpoint: one safetensors file or several, memory-mapped.

A tensor that is asked for is a view of its file: its bytes come off the disk when they are first used.
"""

import ctypes
import mmap
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvell.errors import CheckpointError
from kvell.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_NAME = 255
COMPARED_AT_ONCE = 2**24


class TensorFiles:
    """The tensors of a directory by name. CheckpointError for files that are missing, damaged or inconsistent."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        # Kept open: a header names thousands of tensors, and opening a file reads all of it.
        self._opened: dict[Path, Any] = {}
        single = folder / SINGLE
        # Before the index, which transformers leaves where it was when it saves a model again, in one file.
        if os.path.lexists(single):  # whatever it is: it comes first
            self._files = dict.fromkeys(self._open(single), single)
            return
        if not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
        named = _weight_map(folder / INDEX)
        wanted: dict[str, set[str]] = defaultdict(set)
        for name, shard in named.items():
            wanted[shard].add(name)
        for shard in sorted(wanted):
            _check_name(folder / INDEX, shard)
            file = folder / shard
            if not file.is_file():
                raise CheckpointError(f"{folder}: the shard {shard}, named in {INDEX}, is missing")
            here = self._open(file)
            if absent := sorted(wanted[shard] - here):
                raise CheckpointError(f"{file} does not hold {absent[0]}, which {INDEX} places there")
            for name in sorted(here & self._files.keys()):
                # In some files every rank has stored its own copy of the tensors that all ranks share.
                if not same_bits(self._tensor(file, name), self.get(name)):
                    raise CheckpointError(f"{file} and {self._files[name]} both hold {name}, and not the same values")
            self._files = dict.fromkeys(here, file) | self._files

    def names(self) -> list[str]:
        return list(self._files)

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name]

    def get(self, name: str) -> Tensor:
        """A tensor, (its shape), as a private view of its file."""
        return self._tensor(self._files[name], name)

    def _tensor(self, file: Path, name: str) -> Tensor:
        try:
            return self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from None

    def _open(self, file: Path) -> set[str]:
        """The names of the file's tensors."""
        _check_inside(file)
        try:
            self._opened[file] = safe_open(file, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or cut short: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        return set(self._opened[file].keys())


def _weight_map(index: Path) -> dict[str, str]:
    """By tensor, the shard that an index places it in."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(shard, str) for shard in named.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to the names of their files")
    return named


def _check_name(index: Path, shard: str) -> None:
    """CheckpointError if an index names a shard that is not the name of a file in its own folder."""
    named = shard.isprintable() and shard not in ("", ".", "..") and not set(shard) & set("/\\")
    if not named or len(shard.encode()) > LONGEST_NAME:
        raise CheckpointError(
            f"{index} places tensors in {shard[:LONGEST_NAME]!r}, which is not the name of a file in the same folder"
        )


def _check_inside(file: Path) -> None:
    """CheckpointError if a file of a folder is a link to one outside it.

    The hub's cache is no exception: models--ORG--NAME/snapshots/REVISION is a folder of links to files in
    models--ORG--NAME/blobs, so what belongs together there is the whole repository.
    """
    folder, real = file.parent.resolve(), file.resolve()
    inside = folder
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            inside = parent.parent
    if not real.is_relative_to(inside):
        raise CheckpointError(f"{file} is a link to {real}, outside {inside}: put the file itself there")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike in shape, dtype and every bit. Reading stops at the first block that differs."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    blocks = [tensor.flatten().view(torch.uint8).split(COMPARED_AT_ONCE) for tensor in (one, other)]
    return all(torch.equal(*pair) for pair in zip(*blocks, strict=True))


def read_no_further(tensor: Tensor) -> Tensor:
    """The tensor, a view of a file of which only the rows used are to be read: the system would read megabytes around
    each of them. It is advice, and changes no result."""
    if hasattr(mmap, "MADV_RANDOM"):
        before = tensor.data_ptr() % mmap.PAGESIZE
        start, length = ctypes.c_void_p(tensor.data_ptr() - before), ctypes.c_size_t(tensor.nbytes + before)
        ctypes.CDLL(None).madvise(start, length, mmap.MADV_RANDOM)
    return tensor
