"""Parameters that stay fp32 whatever dtype the model is moved to, and constants that take the model's."""

from collections.abc import Callable
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


def rounded(number: float, dtype: torch.dtype) -> float:
    """The number as a tensor of this dtype would hold it."""
    # What is traced must not depend on what ran before.
    return _rounded.__wrapped__(number, dtype) if torch.compiler.is_compiling() else _rounded(number, dtype)


@cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, device="cpu").to(dtype))


class KeepsFp32(nn.Module):
    """A module whose parameters and buffers named in `fp32` keep that dtype through `.to(bfloat16)` and the like.

    They are few and small, and rounding them would change which expert is chosen or how lanes are mixed. What is
    computed with them is kept out of autocast by `outside_autocast` (kernels/autocast.py).
    """

    fp32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name).data for name in self.fp32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = values.to(parameter.device)
        return self
