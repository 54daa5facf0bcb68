"""The machine that figures belong to: what it is, and what it can do at best, measured in the same run."""

import os
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch


def describe(threads: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "busy_with_others": f"{busy_share():.0%}",
    }


def busy_share(interval: float = 1.0) -> float:
    """How much of the cores others use while this process sleeps. Above a few hundredths no figure can be trusted:
    two torch threads wait for each other at every operator."""
    before = _ticks()
    sleep(interval)
    after = _ticks()
    passed = [late - early for early, late in zip(before, after, strict=True)]
    idle = passed[3] + passed[4]  # idle, and waiting for a disk
    return 1 - idle / max(sum(passed), 1)


def read_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes a second of adding up an array that no cache holds."""
    values = torch.ones(nbytes // 4)
    return nbytes / median_seconds(values.sum, 7)


def row_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes a second of torch's product of a bf16 matrix with one row."""
    matrix, row = torch.ones(nbytes // 2 // 4096, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    return nbytes / median_seconds(lambda: matrix @ row, 7)


def matmul_peak(size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a square product."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / median_seconds(lambda: left @ right, 7)


def median_seconds(work: Callable[[], Any], times: int) -> float:
    work()
    taken = []
    for _ in range(times):
        start = perf_counter()
        work()
        taken.append(perf_counter() - start)
    return statistics.median(taken)


def _ticks() -> list[int]:
    """Clock ticks of all cores since the start, by what they were spent on."""
    return [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
