"""The tensors of a checkpoint: one safetensors file or several, memory-mapped.

A tensor that is asked for is a view of its file: its bytes come off the disk when they are first used.
"""

import ctypes
import mmap
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvell.errors import CheckpointError
from kvell.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a directory by name. CheckpointError for files that are missing, damaged or inconsistent."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        # Kept open: a header names thousands of tensors, and opening a file reads all of it.
        self._opened: dict[Path, Any] = {}
        if not (folder / INDEX).is_file():
            single = folder / SINGLE
            if not single.is_file():
                raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
            self._files = dict.fromkeys(self._open(single), single)
            return
        named = _weight_map(folder / INDEX)
        for shard in sorted(set(named.values())):
            file = folder / shard
            if not file.is_file():
                raise CheckpointError(f"{folder}: the shard {shard}, named in {INDEX}, is missing")
            here = self._open(file)
            wanted = {name for name, where in named.items() if where == shard}
            if absent := sorted(wanted - here):
                raise CheckpointError(f"{file} does not hold {absent[0]}, which {INDEX} places there")
            if twice := sorted(here & self._files.keys()):
                raise CheckpointError(f"{file} and {self._files[twice[0]]} both hold {twice[0]}")
            self._files |= dict.fromkeys(here, file)

    def names(self) -> list[str]:
        return list(self._files)

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name]

    def get(self, name: str) -> Tensor:
        """A tensor, (its shape), as a private view of its file."""
        file = self._files[name]
        try:
            return self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from None

    def _open(self, file: Path) -> set[str]:
        """The names of the file's tensors."""
        try:
            self._opened[file] = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or cut short: {error}") from None
        return set(self._opened[file].keys())


def _weight_map(index: Path) -> dict[str, str]:
    """By tensor, the shard that an index places it in."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(shard, str) for shard in named.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to the names of their files")
    return named


def read_no_further(tensor: Tensor) -> Tensor:
    """The tensor, a view of a file of which only the rows used are to be read: the system would read megabytes around
    each of them. It is advice, and changes no result."""
    if hasattr(mmap, "MADV_RANDOM"):
        before = tensor.data_ptr() % mmap.PAGESIZE
        start, length = ctypes.c_void_p(tensor.data_ptr() - before), ctypes.c_size_t(tensor.nbytes + before)
        ctypes.CDLL(None).madvise(start, length, mmap.MADV_RANDOM)
    return tensor
