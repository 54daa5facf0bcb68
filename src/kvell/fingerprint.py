"""Tells one model's weights from another's, without reading all of them."""

import hashlib
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor


def fingerprint(
    described: str, tensors: Mapping[str, Tensor], device: torch.device, converted: Mapping[str, torch.dtype]
) -> str:
    """32 hexadecimal digits of a description, of the tensors' names and shapes, and of up to 4,096 values of each.
    `converted` are tables whose rows take another dtype when they are looked up: as which they count."""
    named = dict(sorted(tensors.items()))
    whole = f"{described} {[(name, tuple(tensor.shape)) for name, tensor in named.items()]}"
    samples = [sample(tensor).to(converted.get(name, tensor.dtype)) for name, tensor in named.items()]
    values = torch.cat([part.view(torch.uint8).to(device) for part in samples]).cpu()
    return hashlib.sha256(whole.encode() + values.numpy().tobytes()).hexdigest()[:32]


def sample(tensor: Tensor) -> Shaped[Tensor, " n"]:
    """Values from all over a tensor: everything of a small one, else 4,096 or fewer in at most 1,024 runs. The odd
    step meets other columns in every row. A very large one, which may be a table on disk, has fewer runs: with every
    page that is read the system maps up to half a megabyte around it."""
    values = tensor.detach().flatten()
    if len(values) <= 4096:
        return values
    runs = 1024 if len(values) < 2**28 else 128
    return values.unfold(0, 4096 // runs, -(-len(values) // runs) | 1).flatten()
