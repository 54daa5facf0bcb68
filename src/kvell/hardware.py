"""What a program runs on: its threads, the memory it has used, what it can compile with and where that is kept."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvell.errors import InputError, whole_number
from kvell.private_files import make_private

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
    what can be done `otherwise`. InputError also where other users can write to the folder of torch's code."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
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
    # Where torch keeps intermediate code. Some goes to its default folder even where the variable names another.
    folders = {"TMPDIR": default_cache_dir()}
    if named := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        folders["TORCHINDUCTOR_CACHE_DIR"] = named
    for variable, folder in folders.items():
        with keeping_code_in(Path(folder).absolute(), f"name a folder of your own in the environment's {variable}"):
            pass


def user_code_folder() -> Path:
    """Where compiled code is kept if no folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "kvell"


OWN_FOLDER = "name a folder of your own, by folder= or by XDG_CACHE_HOME in the environment"


@contextmanager
def keeping_code_in(folder: Path, otherwise: str = OWN_FOLDER) -> Iterator[None]:
    """Makes the folder that code is compiled into and loaded from, if it is missing. Failures in this block become
    InputErrors; so does a folder that other users can write to, with what can be done `otherwise`."""
    from torch._inductor.exc import CppCompileError

    try:
        make_private(folder, otherwise)
        yield
    except OSError as error:
        raise InputError(f"compiled code cannot be kept in {folder}: {error.strerror or error}") from None
    except CppCompileError as error:
        said = str(error).strip().splitlines()
        first = next((line for line in said if " error: " in line), said[-1])
        raise InputError(f"compile: the C++ compiler failed: {first}") from None


def processor() -> str:
    """The processor, as far as code compiled for it depends on it: such code may use every instruction it has."""
    import torch

    known = Path("/proc/cpuinfo")
    if not known.is_file():
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    lines = known.read_text().splitlines()
    return platform.machine() + "".join(
        next((line for line in lines if line.startswith(field)), "") for field in ("model name", "flags", "Features")
    )
