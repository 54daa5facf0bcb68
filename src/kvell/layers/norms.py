"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight, in fp32, returned in x's dtype

The weight multiplies as it is: released Gemma 4 weights are not stored as (weight - 1), as Gemma 2's were.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; without `weighted` it only scales to unit mean square."""

    def __init__(self, width: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        weight = self.weight
        if x.device.type == "cpu" and len(x) > 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return self._of_many_rows(x)
        same = weight is None or weight.dtype == x.dtype
        # On CUDA torch has one kernel for bf16, which computes in fp32 and rounds nothing but the result, as below.
        if same and (x.dtype == torch.float32 or (x.is_cuda and x.dtype == torch.bfloat16)):
            return nn.functional.rms_norm(x, (self.width,), weight, self.eps)
        wide = None if weight is None else weight.float()
        return nn.functional.rms_norm(x.float(), (self.width,), wide, self.eps).to(x.dtype)

    def _of_many_rows(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """On the CPU torch's own, which is faster for a single row, writes the squares of many down."""
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(self.width)
        y = wide * mean_square.add_(self.eps).rsqrt_()
        return (y if self.weight is None else y.mul_(self.weight)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, weighted={self.weight is not None}"
