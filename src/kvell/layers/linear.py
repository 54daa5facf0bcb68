"""The projections and tables of all layers: torch's, except that they are not initialised on the meta device. Tensors
there hold no values, and initialising them would make torch load its compiler."""

from jaxtyping import Float
from torch import Tensor, nn

from kvell.kernels.linear import linear


class Linear(nn.Linear):
    """A projection, by the kernel that suits the machine (kernels/linear.py)."""

    def forward(self, x: Float[Tensor, "*shape in"]) -> Float[Tensor, "*shape out"]:
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """A table of which rows are looked up."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
