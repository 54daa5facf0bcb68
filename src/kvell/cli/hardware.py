"""What a command runs on: the threads it may use, the memory it has used."""

import sys
from pathlib import Path

from kvell.errors import InputError


def set_threads(threads: int | None) -> None:
    """Limits the threads torch computes with; None leaves the choice to torch."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"threads {threads} is less than 1")
    torch.set_num_threads(threads)


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
