"""Quantised weights: what the eight- and four-bit codes of a file stand for.

    FP8   weight float8_e4m3fn (N, K), a scale per block of 128 x 128 (Micikevicius et al. 2022, arXiv 2209.05433)
    FP4   weight int8 or uint8 (N, K/2), two e2m1 codes a byte, a scale per 32 of a row (OCP Microscaling Formats (MX)
          Specification v1.0)

value = code * scale, scales (blocks of rows, blocks of columns); the blocks at the edges may be partial. Scales are
powers of two (float8_e8m0fnu: 2^(byte - 127), byte 255 for NaN) or any positive fp32 numbers, which DeepSeek's files
call `weight_scale_inv`. What people get wrong: the low nibble is the first along K; byte 0 is the subnormal 2^-127,
not zero; a "scale_inv" is multiplied too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvell.checkpoint.reading import TensorFiles, same_bits
from kvell.errors import CheckpointError, naming

FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# Decoded at once: whole blocks, and never a large weight's second copy in a wider dtype.
ROWS = 128


@dataclass(frozen=True)
class Format:
    """What every byte stands for, `values` (256, codes per byte), and the `block` (rows, columns) of a scale."""

    values: Tensor
    block: tuple[int, int]

    def shape(self, codes: Tensor) -> list[int]:
        rows, columns = codes.shape
        return [rows, columns * self.values.shape[1]]

    def decode(self, codes: Tensor) -> Tensor:
        return self.values.index_select(0, codes.view(torch.uint8).int().flatten()).view(self.shape(codes))


BYTES = torch.arange(256, dtype=torch.uint8, device="cpu")
PAIRS = [[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)]
FP8 = Format(BYTES.view(torch.float8_e4m3fn).float()[:, None], block=(128, 128))
FP4 = Format(torch.tensor(PAIRS, dtype=torch.float32, device="cpu"), block=(1, 32))
FORMATS = {torch.float8_e4m3fn: FP8, torch.int8: FP4, torch.uint8: FP4}


class QuantisedFiles:
    """The tensors of a directory, quantised weights as what they stand for.

    `scale_names` is the family's. `scales` maps the name of every quantised weight to that of its scales: these
    belong to the weight, and are no tensors of their own.
    """

    def __init__(self, files: TensorFiles, scale_names: Callable[[str], Sequence[str]]) -> None:
        self._files, self._scale_names = files, scale_names
        self.scales: dict[str, str] = {}
        stored = set(files.names())
        for name in stored:
            scale = next((scale for scale in self._possible(name) if scale in stored), None)
            if scale is not None and files.get(name).dtype in FORMATS:
                self.scales[name] = scale

    def _possible(self, name: str) -> list[str]:
        return [scale for scale in self._scale_names(name) if scale != name]

    def names(self) -> list[str]:
        """The tensors, without scales that belong to one."""
        scales = set(self.scales.values())
        return [name for name in self._files.names() if name not in scales]

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files.file(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored alike to the bit, their scales included."""
        scales = self.scales.get(one), self.scales.get(other)
        pairs = [(one, other)] if scales == (None, None) else [(one, other), scales]
        return all(a and b and same_bits(self._files.get(a), self._files.get(b)) for a, b in pairs)

    def shape(self, name: str) -> list[int]:
        """The shape of what a tensor stands for."""
        tensor = self._files.get(name)
        coded = name in self.scales and tensor.dim() == 2
        return FORMATS[tensor.dtype].shape(tensor) if coded else list(tensor.shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in. CheckpointError if it is none to compute in."""
        stored = self._files.get(name).dtype
        if stored not in FLOATS:
            raise CheckpointError(
                f"{self.file(name)}: {name} is stored as {stored}, so the dtype to compute in must be given"
            )
        return stored

    def get(self, name: str, target: Tensor) -> Tensor:
        """A tensor to set `target` from: a quantised weight in the target's dtype, any other as it is stored.

        CheckpointError if it has another shape, is quantised without scales, has scales that do not fit, holds what
        the target's dtype cannot, or if only one of the two is of integers.
        """
        with naming(self.file(name)):
            return self._read(name, target)

    def _read(self, name: str, target: Tensor) -> Tensor:
        tensor, scale = self._files.get(name), self.scales.get(name)
        if scale is None:
            self._check_kind(name, tensor, target)
            _check_shape(name, list(tensor.shape), target)
            return tensor
        if not target.is_floating_point():
            raise CheckpointError(f"{name} has the scales {scale}, but integers are wanted, which have none")
        if tensor.dim() != 2:
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}, but only matrices are quantised")
        _check_shape(name, FORMATS[tensor.dtype].shape(tensor), target)
        return dequantise(name, tensor, self._files.get(scale), target.dtype)

    def _check_kind(self, name: str, tensor: Tensor, target: Tensor) -> None:
        if not target.is_floating_point():
            if tensor.dtype not in INTEGERS:
                raise CheckpointError(f"{name} is stored as {tensor.dtype}, wanted are integers")
        elif tensor.dtype not in FLOATS and tensor.dtype not in FORMATS:
            known = ", ".join(str(one).removeprefix("torch.") for one in FLOATS)
            raise CheckpointError(f"{name} is stored as {tensor.dtype}, wanted is one of {known}")
        elif tensor.dtype not in FLOATS:
            scales = self._possible(name)
            which = f", {scales[0]}, which are missing" if scales else ""
            raise CheckpointError(
                f"{name} is stored as {tensor.dtype}, which cannot be read without its scales{which}"
            )


def _check_shape(name: str, shape: list[int], target: Tensor) -> None:
    if shape != list(target.shape):
        raise CheckpointError(f"{name} has the shape {shape}, wanted is {list(target.shape)}")


def dequantise(name: str, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (N, K) of a matrix of codes, each the exact product of code and scale, rounded once to `dtype`.

    CheckpointError, with the matrix's name, for scales of another dtype or number, a scale that is no positive finite
    number, a code that is NaN, and a product that is too large for `dtype`.
    """
    coded = FORMATS[codes.dtype]
    (rows, columns), (height, width) = coded.shape(codes), coded.block
    wanted = [-(-rows // height), -(-columns // width)]
    if scales.dtype not in (torch.float8_e8m0fnu, torch.float32):
        raise CheckpointError(
            f"{name}: its scales are stored as {scales.dtype}, wanted is torch.float8_e8m0fnu or torch.float32"
        )
    if list(scales.shape) != wanted:
        shape, found = [rows, columns], list(scales.shape)
        raise CheckpointError(f"{name}, of the shape {shape}, has scales of the shape {found}, wanted is {wanted}")
    powers = scales.dtype == torch.float8_e8m0fnu
    if powers and (scales.view(torch.uint8) == 255).any():
        raise CheckpointError(f"{name}: a scale is NaN (byte 255)")
    if not powers and not ((scales > 0) & scales.isfinite()).all():
        raise CheckpointError(f"{name}: a scale is no positive finite number")
    # With a power of two the product is exact in fp32, four bits from 2^-136 on, unless it is too large; with 24 bits
    # more it is exact in fp64. Rounding comes after.
    wide = torch.float32 if powers and dtype != torch.float64 else torch.float64
    values = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, ROWS):
        part = values[start : start + ROWS]
        scale = scales[start // height : -(-(start + len(part)) // height)].to(wide)
        factors = scale.repeat_interleave(width, dim=1)[:, :columns]
        products = coded.decode(codes[start : start + ROWS]).to(wide) * factors
        part.copy_(products if dtype in (wide, torch.float32) else round_to_odd(products))
        extremes = torch.stack(part.aminmax())
        if not extremes.isfinite().all():
            what = "a code is NaN" if extremes.isnan().any() else f"a value times its scale is too large for {dtype}"
            raise CheckpointError(f"{name}: {what}")
    return values


def round_to_odd(values: Tensor) -> Tensor:
    """fp32 numbers that round to any narrower dtype as the given ones do. torch rounds fp64 to fp32 on the way to
    bf16 and fp16, and what comes to lie in the middle of two numbers there is rounded a second time.

    Cut off instead, with the last bit set where anything was lost, a number stays on its own side of every middle
    (S. Boldo, G. Melquiond: When double rounding is odd, 2005).
    """
    if values.dtype == torch.float32:
        return values
    nearest = values.float()
    cut = nearest.view(torch.int32) - (nearest.abs() > values.abs()).int()
    return (cut | (nearest != values).int()).view(torch.float32)
