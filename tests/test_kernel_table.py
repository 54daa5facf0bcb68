"""Every version of every kernel computes what the reference does: the last version of a kernel that has none."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvell.kernels.attention
import kvell.kernels.compressed
import kvell.kernels.compressor
import kvell.kernels.convolution
import kvell.kernels.experts
import kvell.kernels.hyper_connections
import kvell.kernels.linear
import kvell.kernels.norms
import kvell.kernels.rotation  # noqa: F401
from kvell import kernels
from kvell.kernels.table import KERNELS, KernelVersion
from kvell.layers.feed_forward import GatedUnit

Call = tuple[tuple[Any, ...], dict[str, Any]]


def turned(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, pairs)
    return angles.cos(), angles.sin()


def attention_calls() -> Iterator[Call]:
    """One query, several, sequences of several lengths with a past, and equal ones without."""
    for counts, held in (([1, 1], [9, 4]), ([3, 2], [9, 4]), ([5, 5], [5, 5]), ([4], [9])):
        keys, values = ([torch.randn(length, 2, 8) for length in held] for _ in range(2))
        for window in (None, 3):
            yield (torch.randn(sum(counts), 4, 8), keys, values, counts), {"scale": 0.3, "window": window}


def one_sequence_calls() -> Iterator[Call]:
    for count in (1, 4):
        rows = [torch.randn(9, 2, 8) for _ in range(2)]
        yield (torch.randn(count, 4, 8), *rows), {"scale": 0.3, "window": 5}


def compressed_calls() -> Iterator[Call]:
    for count in (1, 6):
        visible = torch.arange(10 - count, 10) // 2
        picks = torch.stack([torch.tensor([0, 1, -1]) if seen < 3 else torch.tensor([0, 1, 2]) for seen in visible])
        for chosen in (None, picks):
            yield (
                (torch.randn(count, 3, 8), torch.randn(12, 8), torch.randn(5, 8), visible, chosen, torch.randn(3)),
                {"scale": 0.3, "window": 4},
            )


def pick_calls() -> Iterator[Call]:
    for count in (1, 6):
        visible = torch.arange(10 - count, 10)
        yield (torch.randn(count, 2, 8), torch.randn(count, 2), torch.randn(9, 8), visible, 4), {}


def entry_calls() -> Iterator[Call]:
    for width, behind in ((4, 0), (8, 0), (8, 1)):
        rows = torch.randn(3 * (3 + behind), 2 * width)
        yield (rows, torch.randn(3, width), torch.randn(4), *turned(3, 2)), {"behind": behind, "eps": 1e-6}


def convolution_calls() -> Iterator[Call]:
    for temperature, channels in ((torch.rand(1), 24), (None, 16)):
        kernels_ = (
            torch.randn(channels, 1, 2),
            torch.randn(channels),
            torch.randn(channels, 8, 2),
            torch.randn(channels),
        )
        for counts in ([7], [4, 3]):
            yield (torch.randn(7 + 2 * len(counts), channels), *kernels_, temperature, *turned(7, 3), counts), {}


def hyper_calls() -> Iterator[Call]:
    weights = torch.randn(15, 24), torch.randn(15), torch.randn(3)
    for iterations in (None, 4):
        yield (torch.randn(5, 3, 8), *weights), {"iterations": iterations, "eps": 1e-6, "norm_eps": 1e-6}


def expert_calls() -> Iterator[Call]:
    weights = torch.randn(4, 16, 8), torch.randn(4, 8, 8), GatedUnit("silu", 0.7)
    for tokens in (1, 5):
        chosen = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
        yield (torch.randn(tokens, 8), torch.rand(tokens, 2), chosen, *weights), {}


def row_calls(*weights: Any) -> Iterator[Call]:
    for rows in (1, 9):
        yield (torch.randn(rows, 8), *weights), {}


CALLS = {
    "attention": attention_calls,
    "attention_of_one_sequence": one_sequence_calls,
    "compressed_attention": compressed_calls,
    "pick": pick_calls,
    "pooled_entries": entry_calls,
    "convolved_heads": convolution_calls,
    "hyper_read": hyper_calls,
    "hyper_write": lambda: iter(
        [((torch.randn(5, 3, 8), torch.randn(5, 8), torch.rand(5, 3), torch.rand(5, 3, 3)), {})]
    ),
    "sinkhorn": lambda: iter([((torch.randn(6, 3, 3), 5, 1e-6), {})]),
    "experts": expert_calls,
    "linear": partial(row_calls, torch.randn(6, 8), torch.randn(6)),
    "rms_norm": partial(row_calls, torch.randn(8), 1e-6),
    "rotate": lambda: iter([((torch.randn(5, 2, 8), *turned(5, 3)), {})]),
    "rotate_last": lambda: iter([((torch.randn(5, 2, 8), *turned(5, 3)), {})]),
}
# Of versions that take no call on a CPU: made for a device, for tracing, or for bf16 on some processors.
ELSEWHERE = {"indexed", "gathered", "grouped product", "gathered, recorded", "widened"}


def test_every_kernel_is_called_here() -> None:
    assert set(CALLS) == set(KERNELS)


@pytest.mark.parametrize("name", CALLS)
def test_versions_compute_what_the_reference_does(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Those in torch and in C++ that take a call; tests/test_triton_kernels.py has those in Triton."""
    kernel, taken = KERNELS[name], set[str]()
    folder: Path = tmp_path_factory.getbasetemp() / "code"
    with torch.no_grad(), kernels.use("cpp", folder):
        for arguments, named in CALLS[name]():
            with kernels.use("reference"):
                wanted = kernel(*arguments, **named)
            for version in kernel.versions:
                if version.made_in != "triton" and takes(version, arguments, named):
                    taken.add(version.name)
                    torch.testing.assert_close(version.run(*arguments, **named), wanted, atol=1e-4, rtol=1e-4)
    listed = {version.name for version in kernel.versions if version.made_in != "triton"}
    assert listed - taken <= ELSEWHERE, "no call here is one that these take"


def takes(version: KernelVersion, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    return version.why_not(arguments, named) is None
