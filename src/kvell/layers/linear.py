"""The projections of all layers."""

from jaxtyping import Float
from torch import Tensor, nn

from kvell.kernels.linear import linear


class Linear(nn.Linear):
    """torch's nn.Linear, by the kernel that suits the machine (kernels/linear.py)."""

    def forward(self, x: Float[Tensor, "*shape in"]) -> Float[Tensor, "*shape out"]:
        return linear(x, self.weight, self.bias)
