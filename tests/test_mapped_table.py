"""The table of per-layer embeddings, left on disk: what is read of it."""

import ctypes
import json
import os
from mmap import ACCESS_READ, PAGESIZE, mmap
from pathlib import Path

import numpy
import pytest
import torch
from oracle import GEMMA4

import kvell
from kvell.families import parse_config
from kvell.layers.per_layer_embedding import MappedTable

VOCAB = 1000
TABLE = "model.embed_tokens_per_layer.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose table is most of it: a row of 6 KiB for each token."""
    fields = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 256}
    kvell.Decoder(parse_config(GEMMA4 | fields)).save_pretrained(tmp_path)
    return tmp_path


def pages_of(start: int, end: int) -> set[int]:
    """The pages that these bytes of a file lie in."""
    return set(range(start // PAGESIZE, (end - 1) // PAGESIZE + 1))


def pages_in_memory(mapping: mmap) -> set[int]:
    """Which pages of a mapped file the system holds."""
    found = numpy.zeros(-(-len(mapping) // PAGESIZE), dtype=numpy.uint8)
    address = numpy.frombuffer(mapping, dtype=numpy.uint8).ctypes.data
    assert ctypes.CDLL(None).mincore(*map(ctypes.c_void_p, (address, len(mapping), found.ctypes.data))) == 0
    return set((found & 1).nonzero()[0].tolist())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing makes this system forget a file's pages")
def test_only_the_rows_of_used_tokens_are_read_off_the_disk(folder: Path) -> None:
    model = kvell.from_pretrained(folder)
    assert isinstance(model.per_layer_inputs.table, MappedTable)
    model(torch.tensor([[0]]))  # reads all other weights, and around them
    with open(folder / "model.safetensors", "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        start, end = (8 + header_bytes + at for at in json.loads(file.read(header_bytes))[TABLE]["data_offsets"])
        mapping = mmap(file.fileno(), 0, access=ACCESS_READ)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    table, before = pages_of(start, end), pages_in_memory(mapping)
    if len(before & table) > 0.1 * len(table):
        pytest.skip("this file system does not forget a file's pages")
    tokens, row = [700, 400, 999, 400], (end - start) // VOCAB
    model(torch.tensor([tokens]))
    used = set().union(*(pages_of(start + token * row, start + (token + 1) * row) for token in tokens))
    assert (pages_in_memory(mapping) - before) & table == used - before


def test_a_changed_row_makes_another_model(folder: Path) -> None:
    """Of 1.5 million values 4,096 are looked at: more than one in every row."""
    model = kvell.from_pretrained(folder)
    before = model.fingerprint()
    for token in (0, 617, VOCAB - 1):
        row = model.per_layer_inputs.table.table[token]
        kept = row.clone()
        row += 1
        assert model.fingerprint() != before
        row.copy_(kept)
