"""Compiles whatever kernels are launched to machine code for a GPU, on a machine that has none: nothing runs, so what
comes out is not looked at. Run as a script it launches every kernel and prints what each compiled to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)  # the H100 and the H200
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@contextmanager
def compiled_only() -> Iterator[dict[str, Any]]:
    """Within it, launching compiles. Gives the compiled kernels by name, those of several launches numbered."""
    compiled: dict[str, Any] = {}

    def compile_it(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        named = {
            parameter.name: options.pop(parameter.name) for parameter in self.params if parameter.name in options
        }
        values = [*args, *(named[parameter.name] for parameter in self.params[len(args) :])]
        divisible: dict[tuple[int], Any] = {}
        for number, (parameter, value) in enumerate(zip(self.params, values, strict=True)):
            # As a launch does: a 1 is a constant, and what 16 divides is known to be so.
            if parameter.is_constexpr or (type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                divisible[number,] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    divisible[number,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=divisible)
        name = self.fn.__name__
        earlier = sum(key.split(" ")[0] == name for key in compiled)
        compiled[f"{name} {earlier}"] = triton.compile(source, target=TARGET, options=options)

    before = JITFunction.run
    JITFunction.run = compile_it
    try:
        yield compiled
    finally:
        JITFunction.run = before
