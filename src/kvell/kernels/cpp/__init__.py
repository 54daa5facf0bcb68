"""Kernels in C++, for the CPU: one file for each, and the Python that calls it where there is more to say than that.

A kernel is an operator of torch, compiled for the shapes it meets, in about two seconds, by the compiler that torch
finds, and kept in a folder. It sees torch through its stable interface alone; its threads are torch's own. Nothing is
compiled before a caller asks for it: `kernels.use("cpp")`, or a decoding step that is compiled anyway.
"""

import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NewType, get_type_hints

import torch

from kvell.errors import InputError
from kvell.hardware import check_compiler, keeping_code_in, processor
from kvell.kernels.choice import code_folder
from kvell.private_files import is_kept, keep

HERE, COMMON = Path(__file__).parent, "common.h"
# After those that torch compiles its own kernels with, which leave out fused products.
FLAGS = ("-ffp-contract=fast", "-fno-math-errno")
Constants = tuple[tuple[str, int | str], ...]


Address = NewType("Address", int)  # of a kernel's elements in memory


def operator(kernel: str, entry: type[NamedTuple] | None = None, **constants: int | str) -> Any:
    """The operator of a kernel for these constants. `entry` is the layout of a table of whole numbers that it reads,
    which its source includes as entry.h. InputError where it cannot be compiled."""
    return _operator(kernel, entry, tuple(constants.items()), code_folder())


def c_struct(entry: type[NamedTuple]) -> str:
    """The layout in C++: an `Element*` for an address, an `int64_t` for any other number."""
    kinds = {Address: "Element*", int: "int64_t"}
    fields = [f"    {kinds[kind]} {name};\n" for name, kind in get_type_hints(entry).items()]
    return f"struct {entry.__name__} {{\n{''.join(fields)}}};\n"


@cache
def _operator(kernel: str, entry: type[NamedTuple] | None, constants: Constants, folder: Path) -> Any:
    name = "_".join([kernel, *(str(value) for _, value in constants)])
    flags = [*FLAGS, *(f"-D{constant}={value}" for constant, value in (*constants, ("OPERATOR", name)))]
    said = [(HERE / file).read_text() for file in (COMMON, f"{kernel}.cpp")]
    header = "" if entry is None else c_struct(entry)
    said += [header, str(flags), torch.__version__, processor()]
    file = folder / f"{name}-{hashlib.sha256(''.join(said).encode()).hexdigest()[:32]}.so"
    with keeping_code_in(folder):
        if not is_kept(file):
            _compile(kernel, header, file, flags)
    if not hasattr(torch.ops.kvell, name):  # from whichever folder: an operator can be defined once
        try:
            torch.ops.load_library(file)
        except OSError as error:
            raise InputError(f"compiled code in {file} cannot be read: delete it, and it is made anew") from error
    return getattr(torch.ops.kvell, name).default


@cache
def known(made: Any) -> Any:
    """The operator, known to torch's compiler: its result is like its first argument."""
    torch.library.register_fake(made.name(), lambda first, *_: torch.empty_like(first))
    return made


def _compile(kernel: str, header: str, file: Path, flags: list[str]) -> None:
    """Aside first, so that whoever finds the file finds all of it. The compiler works in a folder of its own: it is
    not given names with spaces, nor relative ones."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    check_compiler(torch.device("cpu"), "do without kernels in C++")
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory(dir=file.parent) as aside:
        for source in (COMMON, f"{kernel}.cpp"):
            shutil.copy(HERE / source, work)
        (Path(work) / "entry.h").write_text(header)
        # What the processor can do the compiler finds out by itself.
        options = CppTorchOptions(vec_isa=invalid_vec_isa, extra_flags=flags)
        builder: Any = CppBuilder(name=kernel, sources=f"{work}/{kernel}.cpp", BuildOption=options, output_dir=work)
        builder.build()
        keep(Path(shutil.copy(builder.get_target_file_path(), aside)), file)
