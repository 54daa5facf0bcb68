"""Files that Kvell writes: aligned for mapping, and read by everyone else."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kvell.errors import CheckpointError
from kvell.files import ALIGNMENT, DTYPE_NAMES, read_json, save_to


def some_tensors() -> dict[str, torch.Tensor]:
    """Of every dtype, some of them multiples of 64 bytes and some not, in an order that fits nothing."""
    tensors = {"scalar": torch.tensor(3.0), "nothing": torch.zeros(0, 5), "transposed": torch.randn(16, 8).t()}
    for number, dtype in enumerate(DTYPE_NAMES):
        for size in (1, 3, 64, 67):
            tensors[f"{number * 7 % 10}.{size}.{DTYPE_NAMES[dtype]}"] = torch.randint(0, 2, (size, 2)).to(dtype)
    return tensors


def test_what_is_written_is_read_by_safetensors_as_it_was(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_to(tmp_path / "file", tensors, {"format": "pt", "text": "süß"})
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "text": "süß"}


@pytest.mark.parametrize("metadata_length", [0, 1, 5, 17, 100])
def test_tensors_are_mapped_as_aligned_as_memory_is(metadata_length: int, tmp_path: Path) -> None:
    save_to(tmp_path / "file", some_tensors(), {"filler": "x" * metadata_length})
    with safe_open(tmp_path / "file", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            wanted = tensor.itemsize if tensor.nbytes % ALIGNMENT else ALIGNMENT
            assert tensor.data_ptr() % wanted == 0, name


def test_only_regular_files_are_read_as_json(tmp_path: Path) -> None:
    """Reading a pipe waits for whoever writes, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE42", "\\uDE42\\ud83d"])
def test_half_a_character_in_json_is_refused_and_a_pair_is_read(half: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": "\\ud83d\\uDE42"}')
    assert read_json(file) == {"a": "🙂"}
    file.write_text(f'{{"a": "{half}"}}')
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        read_json(file)
