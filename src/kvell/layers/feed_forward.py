"""The gated feed-forward (GLU variants; Shazeer 2020, arXiv 2002.05202).

y = down(act(gate x) * up x)

With a limit (DeepSeek V4's swiglu_limit) the gate is cut off above and the up projection on both sides, before they
meet: act(min(gate x, limit)) * clamp(up x, -limit, limit). What people get wrong: the shared expert is limited too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from kvell.layers.contract import FeedForwardModule, FeedForwardPart, TokenWise
from kvell.layers.cost import WeightRole
from kvell.layers.linear import Linear
from kvell.layers.part import Site

if TYPE_CHECKING:
    from kvell.step import Step

ActivationName = Literal["silu", "gelu_tanh"]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


@dataclass(frozen=True)
class GatedUnit:
    """What happens between the projections: act(gate) * up, both within the limit if there is one."""

    activation: ActivationName
    limit: float | None = None

    def __call__(self, gate: Float[Tensor, "*shape I"], up: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape I"]:
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return ACTIVATIONS[self.activation](gate) * up


class GatedMLP(FeedForwardPart):
    """A dense gated feed-forward of `intermediate_size` channels."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    intermediate_size: PositiveInt
    activation: ActivationName = "silu"
    limit: PositiveFloat | None = None

    def build(self, site: Site) -> "GatedFeedForward":
        return GatedFeedForward(self, site.hidden_size)

    def describe(self) -> str:
        return f"gated {self.intermediate_size}"


class GatedFeedForward(TokenWise, FeedForwardModule):
    weight_role = WeightRole("feed-forward")

    def __init__(self, config: GatedMLP, hidden_size: int) -> None:
        super().__init__()
        self.unit = GatedUnit(config.activation, config.limit)
        self.gate_proj = Linear(hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "T C"], step: "Step | None" = None) -> Float[Tensor, "T C"]:
        return self.down_proj(self.unit(self.gate_proj(x), self.up_proj(x)))

    def output_weights(self) -> tuple[Tensor, ...]:
        return (self.down_proj.weight,)
