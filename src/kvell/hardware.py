"""What a program runs on: the threads it may use, the memory it has used, what it can compile with."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvell.errors import InputError, whole_number

if TYPE_CHECKING:
    import torch

# More threads a CPU than this gain nothing, and some ten thousand of them are more than a process survives.
THREADS_PER_CPU = 8


def set_threads(threads: int | None) -> None:
    """Limits the threads torch computes with; None leaves the choice to torch. InputError for a number that this
    machine cannot use."""
    import torch

    if threads is None:
        return
    torch.set_num_threads(whole_number("threads", threads, most=THREADS_PER_CPU * (os.cpu_count() or 1)))


def peak_resident_bytes() -> int:
    """The most memory this program has held, as the operating system counts it."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux's getrusage counts from the peak of whoever started the program; this figure does not.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_compiler(device: "torch.device", otherwise: str) -> None:
    """InputError where torch has nothing to compile with, a C++ compiler for the CPU, Triton for others; it ends with
    what can be done `otherwise`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InputError(
                "compile: no C++ compiler works here: install g++, name another in the environment's CXX, or "
                f"{otherwise}"
            ) from None
    elif not has_triton():
        raise InputError(f"compile: no Triton works on {device}: install it, or {otherwise}")
