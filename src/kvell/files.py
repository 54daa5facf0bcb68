"""Small files in, and writing so that nothing is lost: everything is written aside, and takes its place only once it
is whole.

Tensors are written in the safetensors format: the header's length (u64), the header (JSON), the tensors without gaps.
Every tensor that can begins at a multiple of 64 bytes. A file that is mapped into memory is then aligned as torch's
own memory is, and a matrix product, whose rounding depends on that, is the same to the last bit. So the header is
filled up with spaces, and the tensors whose size is no such multiple, the small ones, stand at the end.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvell.errors import CheckpointError
from kvell.scratch import scratch_in

ALIGNMENT = 64
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. CheckpointError, with the file's name, if it cannot be read."""
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for, and a device has no end
            raise CheckpointError(f"{file} is no regular file")
        text = file.read_text("utf-8")
        values = json.loads(text)
        if "\\ud" in text.lower():  # half a character, which no name or text can hold
            json.dumps(values, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {file}") from None
    except RecursionError:
        raise CheckpointError(f"{file} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes one file; whatever stood at `path` stays until the new file is whole. CheckpointError if it fails."""
    check_name(path)
    with beside(path.parent) as scratch:
        save_to(scratch / path.name, tensors, metadata)
        move_in(scratch, path.parent, [path.name])


def save_to(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a file and waits until the disk has it."""
    names = sorted(tensors, key=lambda name: _rank(name, tensors[name]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _rank(name: str, tensor: Tensor) -> tuple[bool, int, str]:
    """Where a tensor stands in a file: among those that are no multiple of the alignment, wide numbers come first,
    as each must begin at a multiple of its own width."""
    return tensor.nbytes % ALIGNMENT != 0, -tensor.itemsize, name


def move_in(scratch: Path, folder: Path, names: list[str]) -> None:
    """Renames finished files into their places, in this order; none if any place is taken by a directory."""
    check_places(folder, names)
    for name in names:
        os.replace(scratch / name, folder / name)


def check_places(folder: Path, names: list[str]) -> None:
    """OSError if any of the names is a directory's, which no file can replace."""
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a directory")


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder` (scratch.py), which is made if need be. CheckpointError for whatever the
    system refuses meanwhile: what stood in the folder must then be unchanged."""
    check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_in(folder) as scratch:
            yield scratch
    except OSError as error:
        raise CheckpointError(f"could not save to {folder}: {error}; what stood there is unchanged") from error


def check_name(path: Path) -> None:
    """CheckpointError for a path that no file can have."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise CheckpointError(f"could not save to {str(path)!r}: no file can have this name")
