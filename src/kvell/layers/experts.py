"""Mixture of experts: each token takes `top_k` of E small feed-forwards, chosen by a router.

    y = sum over the chosen e of weight_e * expert_e(x)   (* routed_scale)   (+ shared expert)

Routers here:
    sigmoid   scores = sigmoid(Wr x), the sigmoid in fp32; choose by score + a bias learnt outside the loss
              (selection only; Wang et al. 2024, arXiv 2408.15664); weights = the unbiased scores / their sum
              (Laguna, DeepSeek V3)
    softmax   probabilities = softmax(Wr (norm(x) * scale / sqrt(C))) in fp32; weights = the chosen / their sum
              * a scale per expert (Gemma 4)

Equal scores: the expert of the lowest index is chosen. What people get wrong: weighting by the biased score.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from kvell.kernels.experts import experts
from kvell.kernels.top_k import top_k_lowest_first
from kvell.layers.feed_forward import ACTIVATIONS, ActivationName, GatedFeedForward, GatedMLP
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Part, Site

if TYPE_CHECKING:
    from kvell.step import Step


class SigmoidRouter(Part):
    """Independent scores with a selection bias; `logit_softcap` 0 means none."""

    kind: Literal["sigmoid"] = "sigmoid"
    logit_softcap: NonNegativeFloat = 0.0

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return SigmoidRouting(self, site, num_experts, top_k)


class SoftmaxRouter(Part):
    """Softmax over all experts of the normalised, scaled input."""

    kind: Literal["softmax"] = "softmax"

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return SoftmaxRouting(site, num_experts, top_k)


Router = Annotated[SigmoidRouter | SoftmaxRouter, Field(discriminator="kind")]


class MixtureOfExperts(Part):
    """`num_experts` gated feed-forwards of `intermediate_size`, of which a token takes `top_k`."""

    kind: Literal["mixture_of_experts"] = "mixture_of_experts"
    num_experts: PositiveInt
    top_k: PositiveInt
    intermediate_size: PositiveInt
    shared_intermediate_size: PositiveInt | None = None
    router: Router
    routed_scale: float = 1.0
    activation: ActivationName = "silu"

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self

    def build(self, site: Site) -> "MixtureFeedForward":
        return MixtureFeedForward(self, site)

    def describe(self) -> str:
        shared = f" + shared {self.shared_intermediate_size}" if self.shared_intermediate_size else ""
        return f"{self.top_k} of {self.num_experts} experts of {self.intermediate_size}{shared}"


class DenseBesideExperts(Part):
    """A dense feed-forward and a mixture side by side, each with norms of its own (Gemma 4 26B-A4B).

    It reads the residual un-normed: use it in a layer whose `feed_forward_norm` is "post".
    """

    kind: Literal["dense_beside_experts"] = "dense_beside_experts"
    dense: GatedMLP
    mixture: MixtureOfExperts

    def build(self, site: Site) -> "DenseBesideExpertsFeedForward":
        return DenseBesideExpertsFeedForward(self, site)

    def describe(self) -> str:
        return f"{self.dense.describe()} beside {self.mixture.describe()}"


class SigmoidRouting(nn.Module):
    def __init__(self, config: SigmoidRouter, site: Site, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.softcap = top_k, config.logit_softcap
        self.proj = nn.Linear(site.hidden_size, num_experts, bias=False)
        # Moved by load balancing, not by the loss; fp32 whatever the model's dtype.
        self.selection_bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.selection_bias.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.selection_bias.dtype != bias.dtype:  # model.to(bfloat16), say: rounding would change who is chosen
            self.selection_bias.data = bias.to(self.selection_bias.device)
        return self

    def forward(self, x: Float[Tensor, "T C"]) -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]]:
        logits = self.proj(x).float()
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        scores = logits.sigmoid()
        chosen = top_k_lowest_first(scores + self.selection_bias, self.top_k)
        weights = scores.gather(-1, chosen)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), chosen


class SoftmaxRouting(nn.Module):
    def __init__(self, site: Site, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = RMSNorm(site.hidden_size, site.norm_eps, weighted=False)
        self.scale = nn.Parameter(torch.ones(site.hidden_size))
        self.proj = nn.Linear(site.hidden_size, num_experts, bias=False)
        self.expert_scale = nn.Parameter(torch.ones(num_experts))

    def forward(self, x: Float[Tensor, "T C"]) -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]]:
        logits = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)
        probabilities = logits.softmax(-1, dtype=torch.float32)
        chosen = top_k_lowest_first(probabilities, self.top_k)
        weights = probabilities.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * self.expert_scale[chosen]
        return weights.to(x.dtype), chosen


class MixtureFeedForward(nn.Module):
    """`gate_up_proj` holds each expert's gate rows, then its up rows."""

    def __init__(self, config: MixtureOfExperts, site: Site) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        count, width, hidden = config.num_experts, config.intermediate_size, site.hidden_size
        self.router = config.router.build(site, count, config.top_k)
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.shared_expert = None
        if config.shared_intermediate_size is not None:
            shared = GatedMLP(intermediate_size=config.shared_intermediate_size, activation=config.activation)
            self.shared_expert = GatedFeedForward(shared, hidden)

    def forward(
        self,
        x: Float[Tensor, "T C"],
        step: "Step | None" = None,
        *,
        router_input: Float[Tensor, "T C"] | None = None,
    ) -> Float[Tensor, "T C"]:
        """The experts see x; the choice is made by `router_input` where that is something else."""
        weights, chosen = self.router(x if router_input is None else router_input)
        y = experts(x, weights, chosen, self.gate_up_proj, self.down_proj, self.activation)
        y = y * self.config.routed_scale
        return y if self.shared_expert is None else y + self.shared_expert(x)


class DenseBesideExpertsFeedForward(nn.Module):
    def __init__(self, config: DenseBesideExperts, site: Site) -> None:
        super().__init__()
        self.dense = config.dense.build(site)
        self.mixture = config.mixture.build(site)
        self.dense_input_norm, self.dense_output_norm, self.mixture_input_norm, self.mixture_output_norm = (
            RMSNorm(site.hidden_size, site.norm_eps) for _ in range(4)
        )

    def forward(self, x: Float[Tensor, "T C"], step: "Step | None" = None) -> Float[Tensor, "T C"]:
        dense = self.dense_output_norm(self.dense(self.dense_input_norm(x)))
        routed = self.mixture(self.mixture_input_norm(x), router_input=x)
        return dense + self.mixture_output_norm(routed)
