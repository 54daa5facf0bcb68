"""Mixture of experts: each token takes `top_k` of E small feed-forwards, chosen by a router.

    y = sum over the chosen e of weight_e * expert_e(x)   (* routed_scale)   (+ shared expert)

The routers stand in routers.py. A skip expert (ZAYA1) is a class past the last expert: a token that chooses it gets
weight * x or nothing. What people get wrong: the routed scale is for the routed experts only, not the shared one.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from kvell.kernels.experts import experts
from kvell.layers.contract import FeedForwardModule, FeedForwardPart
from kvell.layers.cost import WeightRole
from kvell.layers.feed_forward import ActivationName, GatedFeedForward, GatedMLP, GatedUnit
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Part, Site
from kvell.layers.routers import Router

if TYPE_CHECKING:
    from kvell.step import Step

# Far more experts than any model has. A config that asks for more is refused before anything is built for it.
MOST_EXPERTS = 65536


class MixtureOfExperts(FeedForwardPart):
    """`num_experts` gated feed-forwards of `intermediate_size`, of which a token takes `top_k`.

    `limit` cuts off what the gated units see, the shared expert's included; see feed_forward.py.
    """

    kind: Literal["mixture_of_experts"] = "mixture_of_experts"
    num_experts: Annotated[int, Field(gt=0, le=MOST_EXPERTS)]
    top_k: PositiveInt
    intermediate_size: PositiveInt
    shared_intermediate_size: PositiveInt | None = None
    router: Router
    routed_scale: float = 1.0
    activation: ActivationName = "silu"
    limit: PositiveFloat | None = None

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self

    def check_source(self, source: Part) -> str | None:
        """By the routers: what else the layers have does not matter."""
        theirs = source.mixture if isinstance(source, DenseBesideExperts) else source
        if not isinstance(theirs, MixtureOfExperts):
            return "whose router leaves no state"
        return self.router.check_source(theirs.router)

    def build(self, site: Site) -> "MixtureFeedForward":
        return MixtureFeedForward(self, site)

    @property
    def shared(self) -> GatedMLP | None:
        """The expert that every token takes."""
        if self.shared_intermediate_size is None:
            return None
        return GatedMLP(intermediate_size=self.shared_intermediate_size, activation=self.activation, limit=self.limit)

    def describe(self) -> str:
        shared = f" + shared {self.shared_intermediate_size}" if self.shared_intermediate_size else ""
        skip = " or none" if self.router.skipped() else ""
        by = f" ({self.router.kind.replace('_', ' ')})"
        return f"{self.top_k} of {self.num_experts} experts of {self.intermediate_size}{skip}{shared}{by}"


class DenseBesideExperts(FeedForwardPart):
    """A dense feed-forward and a mixture side by side, each with norms of its own (Gemma 4 26B-A4B).

    It reads the residual un-normed: use it in a layer whose `feed_forward_norm` is "post".
    """

    kind: Literal["dense_beside_experts"] = "dense_beside_experts"
    dense: GatedMLP
    mixture: MixtureOfExperts

    def check_source(self, source: Part) -> str | None:
        return self.mixture.check_source(source)

    def build(self, site: Site) -> "DenseBesideExpertsFeedForward":
        return DenseBesideExpertsFeedForward(self, site)

    def describe(self) -> str:
        return f"{self.dense.describe()} beside {self.mixture.describe()}"


class MixtureFeedForward(FeedForwardModule):
    """`gate_up_proj` holds each expert's gate rows, then its up rows."""

    matrices: ClassVar[tuple[str, ...]] = ("gate_up_proj", "down_proj")

    def __init__(self, config: MixtureOfExperts, site: Site) -> None:
        super().__init__()
        self.config = config
        self.unit = GatedUnit(config.activation, config.limit)
        count, width, hidden = config.num_experts, config.intermediate_size, site.hidden_size
        self.router = config.router.build(site, count, config.top_k)
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.shared_expert = None
        if config.shared is not None:
            self.shared_expert = GatedFeedForward(config.shared, hidden)
            self.shared_expert.weight_role = WeightRole("experts")
        share = (config.top_k, count)
        self.weight_role = WeightRole("experts", form="fp4", used={"gate_up_proj": share, "down_proj": share})

    def forward(
        self,
        x: Float[Tensor, "T C"],
        step: "Step",
        *,
        router_input: Float[Tensor, "T C"] | None = None,
    ) -> Float[Tensor, "T C"]:
        """The experts see x; the choice is made by `router_input` where that is something else."""
        weights, chosen = self.router(x if router_input is None else router_input, step)
        y = experts(x, weights, chosen, self.gate_up_proj, self.down_proj, self.unit)
        if self.config.router.skipped() == "identity":
            y = y + x * (weights * (chosen == self.config.num_experts)).sum(-1, keepdim=True)
        if self.config.routed_scale != 1:
            y = y * self.config.routed_scale
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def output_weights(self) -> tuple[Tensor, ...]:
        """Those of the experts, and of the shared one."""
        return (self.down_proj, *(() if self.shared_expert is None else self.shared_expert.output_weights()))


class DenseBesideExpertsFeedForward(FeedForwardModule):
    weight_role = WeightRole("feed-forward")

    def __init__(self, config: DenseBesideExperts, site: Site) -> None:
        super().__init__()
        self.dense = config.dense.build(site)
        self.mixture = config.mixture.build(site)
        self.dense_input_norm, self.dense_output_norm, self.mixture_input_norm, self.mixture_output_norm = (
            RMSNorm(site.hidden_size, site.norm_eps) for _ in range(4)
        )

    def forward(self, x: Float[Tensor, "T C"], step: "Step") -> Float[Tensor, "T C"]:
        dense = self.dense_output_norm(self.dense(self.dense_input_norm(x)))
        routed = self.mixture(self.mixture_input_norm(x), step, router_input=x)
        return dense + self.mixture_output_norm(routed)

    def output_weights(self) -> tuple[Tensor, ...]:
        """Those of the norms of both sides."""
        weights = (self.dense_output_norm.weight, self.mixture_output_norm.weight)
        return tuple(weight for weight in weights if weight is not None)
