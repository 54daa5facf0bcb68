"""Writing so that nothing is lost: everything is written aside, and takes its place only once it is whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvell.errors import CheckpointError


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes one file; whatever stood at `path` stays until the new file is whole. CheckpointError if it fails."""
    with beside(path.parent) as scratch:
        save_to(scratch / path.name, tensors, metadata)
        move_in(scratch, path.parent, [path.name])


def save_to(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a file and waits until the disk has it."""
    path.touch()
    permissions = path.stat().st_mode  # what the user's umask gives; safetensors lets only the owner read
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(permissions)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def move_in(scratch: Path, folder: Path, names: list[str]) -> None:
    """Renames finished files into their places, in this order; none if any place is taken by a directory."""
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a directory")
    for name in names:
        os.replace(scratch / name, folder / name)


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder`, so that renaming out of it is atomic; gone afterwards in any case."""
    scratch = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        yield scratch
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not save to {folder}: {error}; what stood there is unchanged") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
