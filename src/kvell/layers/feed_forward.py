"""The gated feed-forward (GLU variants; Shazeer 2020, arXiv 2002.05202).

y = down(act(gate x) * up x)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from kvell.layers.part import Part, Site

if TYPE_CHECKING:
    from kvell.step import Step

ActivationName = Literal["silu", "gelu_tanh"]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


class GatedMLP(Part):
    """A dense gated feed-forward of `intermediate_size` channels."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    intermediate_size: PositiveInt
    activation: ActivationName = "silu"

    def build(self, site: Site) -> "GatedFeedForward":
        return GatedFeedForward(self, site.hidden_size)

    def describe(self) -> str:
        return f"gated {self.intermediate_size}"


class GatedFeedForward(nn.Module):
    def __init__(self, config: GatedMLP, hidden_size: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "T C"], step: "Step | None" = None) -> Float[Tensor, "T C"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
