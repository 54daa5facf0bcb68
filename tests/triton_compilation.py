"""Compiles whatever kernels are launched to machine code for a GPU, on a machine that has none: nothing runs, so what
comes out is not looked at. Run as a script it launches every kernel with numbers of a type, bfloat16 or float32, and
prints how much shared memory each takes."""

import json
import sys
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


def launch_all(dtype: torch.dtype) -> None:
    """Every kernel at sizes of the released models, forward and backward."""
    from kvell.kernels.triton.compressed import compressed_attention
    from kvell.kernels.triton.compressor import pooled_entries
    from kvell.kernels.triton.convolution import convolved_heads
    from kvell.kernels.triton.decode import ragged_decode
    from kvell.kernels.triton.hyper_connections import hyper_read, hyper_write
    from kvell.kernels.triton.index import pick
    from kvell.kernels.triton.rotation import rotate, rotate_last

    def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, requires_grad=True)

    wide = torch.float32
    h, coefficients = zeros(48, 4, 4096), (zeros(24, 16384, of=wide), zeros(24, of=wide), zeros(3, of=wide))
    x, post, mix = hyper_read(h, *coefficients, iterations=20, eps=1e-6, norm_eps=1e-6)
    (hyper_write(h, x, post, mix).sum() + x.sum()).backward()
    hyper_read(zeros(600, 4, 4096), *coefficients, iterations=20, eps=1e-6, norm_eps=1e-6)

    width = 512 if dtype == torch.bfloat16 else 128
    rows, entries = zeros(300, width), zeros(600, width)
    for count, heads in ((200, 64), (1, 64), (200, 16)):
        visible = torch.full((count,), 600)
        for picks in (torch.zeros(count, 512, dtype=torch.long), None):
            query, sink = zeros(count, heads, width), zeros(heads, of=wide)
            compressed_attention(query, rows, entries, visible, picks, sink, scale=1.0, window=128).sum().backward()
        pick(zeros(count, heads, 128), zeros(count, heads), zeros(600, 128), visible, 600)
    for ratio, channels in ((4, 2 * width), (128, width)):
        turned = zeros(5, 32, of=wide), zeros(5, 32, of=wide)
        raw = zeros(5 * ratio, 2 * channels)
        pooled_entries(raw, zeros(ratio, channels, of=wide), zeros(width), *turned, behind=0, eps=1e-6)
    for count in (100, 1):
        turned = zeros(count, 32), zeros(count, 32)
        kernels = zeros(1280, 1, 2), zeros(1280), zeros(1280, 128, 2), zeros(1280)
        convolved_heads(zeros(count + 2, 1280), *kernels, zeros(2), *turned, [count])
    for count in (100, 1):
        angles, wide_angles = torch.zeros(count, 32, dtype=dtype), torch.zeros(count, 32)
        rotate(zeros(count, 8, 128), angles, angles).sum().backward()
        for heads in (64, 1):
            rotate_last(zeros(count, heads, 512), wide_angles, wide_angles).sum().backward()
    for heads, kv_heads, head_dim in ((8, 1, width), (64, 8, 128), (6, 2, 40)):
        keys = [zeros(5000, kv_heads, head_dim).detach(), zeros(1, kv_heads, head_dim).detach()]
        ragged_decode(zeros(2, heads, head_dim).detach(), keys, keys, scale=1.0, window=None)


if __name__ == "__main__":
    with compiled_only() as kernels:
        launch_all(getattr(torch, sys.argv[1]))
    print(json.dumps({name: kernel.metadata.shared for name, kernel in kernels.items()}))
