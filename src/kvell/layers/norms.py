"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight, in fp32, returned in x's dtype

The weight multiplies as it is: released Gemma 4 weights are not stored as (weight - 1), as Gemma 2's were.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvell.kernels.norms import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; without `weighted` it only scales to unit mean square."""

    def __init__(self, width: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, weighted={self.weight is not None}"
