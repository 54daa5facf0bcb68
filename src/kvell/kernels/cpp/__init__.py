"""Kernels in C++, for the CPU: one file for each, beside the Python that calls it.

A kernel is an operator of torch, compiled for the shapes it meets, in about two seconds, by the compiler that torch
finds, and kept in a folder. It sees torch through its stable interface alone; its threads are torch's own. Nothing is
compiled before a caller asks for it: `kernels.use("cpp")`, or a decoding step that is compiled anyway.
"""

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvell.hardware import check_compiler, keeping_code_in, processor
from kvell.kernels.choice import code_folder

# After those that torch compiles its own kernels with, which leave out fused products.
FLAGS = ("-ffp-contract=fast", "-fno-math-errno")


@cache
def operator(kernel: str, **constants: int | str) -> Any:
    """The operator of a kernel for these constants. InputError where it cannot be compiled."""
    name = "_".join([kernel, *map(str, constants.values())])
    here, folder = Path(__file__).parent, code_folder()
    source = here / f"{kernel}.cpp"
    flags = [*FLAGS, *(f"-D{constant}={value}" for constant, value in (constants | {"OPERATOR": name}).items())]
    said = [(here / "common.h").read_text(), source.read_text(), str(flags), torch.__version__, processor()]
    file = folder / f"{name}-{hashlib.sha256(''.join(said).encode()).hexdigest()[:32]}.so"
    with keeping_code_in(folder):
        if not file.exists():
            _compile(source, file, flags)
        torch.ops.load_library(file)
    return getattr(torch.ops.kvell, name).default


def _compile(source: Path, file: Path, flags: list[str]) -> None:
    """Aside first, so that whoever finds the file finds all of it."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    check_compiler(torch.device("cpu"), "do without kernels in C++")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as aside:
        # What the processor can do the compiler finds out by itself.
        options = CppTorchOptions(vec_isa=invalid_vec_isa, extra_flags=flags)
        builder: Any = CppBuilder(name=file.stem, sources=str(source), BuildOption=options, output_dir=aside)
        builder.build()
        os.replace(builder.get_target_file_path(), file)
