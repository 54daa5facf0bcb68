"""The machine that figures belong to: what it is, and what it can do at best, measured in the same run."""

import os
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter
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
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def read_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes a second of adding up an array that no cache holds."""
    values = torch.ones(nbytes // 4)
    return nbytes / median_seconds(values.sum, 7)


def matmul_peak(size: int = 2048) -> float:
    """Floating-point operations a second of a square fp32 product."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / median_seconds(lambda: left @ right, 7)


def median_seconds(work: Callable[[], Any], times: int) -> float:
    work()
    taken = []
    for _ in range(times):
        start = perf_counter()
        work()
        taken.append(perf_counter() - start)
    return statistics.median(taken)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
