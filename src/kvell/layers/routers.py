"""Routers: which experts a token takes, and with what weight.

    sigmoid        scores = sigmoid(Wr x); choose by score + a bias learnt outside the loss (selection only; Wang et
                   al. 2024, arXiv 2408.15664); weights = the unbiased scores / their sum (Laguna, DeepSeek V3)
    sqrt_softplus  the same with scores = sqrt(softplus(Wr x)) (DeepSeek V4, arXiv 2606.19348, section 2.1)
    hash           a table names each token id's experts, Wr only weighs them (DeepSeek V4's first layers; Roller et
                   al. 2021, arXiv 2106.04426)
    softmax        probabilities = softmax(Wr (norm(x) * scale / sqrt(C))); weights = the chosen / their sum * a
                   scale per expert (Gemma 4)
    mlp            state = Wd x + b + (an earlier layer's state) * scale; probabilities = softmax(MLP(norm(state)));
                   choose by probability + bias, weights = the unbiased probabilities as they are (ZAYA1, arXiv
                   2605.05365). With a skip expert there is one class more, which computes nothing.

Scores are fp32, and autocast does not round what they are made of. Of equal scores the expert of the lowest index is
chosen. What people get wrong: weighting by the biased score; normalising a single probability to 1.

A router is built with the mixture's number of experts E and top_k k. It returns the weights (T, k) and the experts
(T, k), where E stands for none, and leaves with `step.observed`, where training asks for it, what balances the load:

    loads_e = how many tokens chose e
    loss    = E sum_e (loads_e / (k T)) mean_t(score_te / sum_e score_te)     (Fedus et al. 2021, arXiv 2101.03961,
                                                                               equations 4 to 6): 1 where it is even
    rebalance: bias_e += rate * sign(mean load - loads_e)                     (Wang et al. 2024, algorithm 1)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from kvell.kernels.autocast import outside_autocast
from kvell.kernels.top_k import top_k_lowest_first
from kvell.layers.contract import RouterPart
from kvell.layers.cost import WeightRole
from kvell.layers.linear import Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Reads, Site
from kvell.layers.precision import KeepsFp32
from kvell.layers.registry import ROUTERS, register

if TYPE_CHECKING:
    from kvell.step import Step

ROUTER_STATE = "router_state"
ROLE = WeightRole("router", form="bf16")


def sqrt_softplus(logits: Tensor) -> Tensor:
    return F.softplus(logits).sqrt()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "sqrt_softplus": sqrt_softplus}


class SigmoidRouter(RouterPart):
    """Independent scores with a selection bias; `logit_softcap` 0 means none."""

    kind: Literal["sigmoid"] = "sigmoid"
    logit_softcap: NonNegativeFloat = 0.0

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return ScoreRouting(site, num_experts, top_k, SCORES["sigmoid"], self.logit_softcap)


class SqrtSoftplusRouter(RouterPart):
    """Independent scores that are not bounded above, with a selection bias."""

    kind: Literal["sqrt_softplus"] = "sqrt_softplus"

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return ScoreRouting(site, num_experts, top_k, SCORES["sqrt_softplus"])


class HashRouter(RouterPart):
    """Experts by token id; `score` says how the chosen ones are weighed."""

    kind: Literal["hash"] = "hash"
    score: Literal["sqrt_softplus", "sigmoid"] = "sqrt_softplus"

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return HashRouting(site, num_experts, top_k, SCORES[self.score])


class SoftmaxRouter(RouterPart):
    """Softmax over all experts of the normalised, scaled input."""

    kind: Literal["softmax"] = "softmax"

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return SoftmaxRouting(site, num_experts, top_k)


class MLPRouter(RouterPart):
    """A small network with a state of `hidden_size` channels; with `state_source` that layer's state is added.

    `skip_expert` adds a class that computes nothing: its output is the probability times the mixture's input
    ("identity", as the released ZAYA1 weights were trained) or zero ("zero", as transformers 5.23 has it).
    """

    kind: Literal["mlp"] = "mlp"
    hidden_size: PositiveInt
    state_source: Annotated[NonNegativeInt | None, Reads(ROUTER_STATE)] = None
    skip_expert: Literal["identity", "zero"] | None = None

    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        return MLPRouting(self, site, num_experts, top_k)

    def skipped(self) -> Literal["identity", "zero"] | None:
        return self.skip_expert

    def check_source(self, source: RouterPart) -> str | None:
        if not isinstance(source, MLPRouter):
            return "whose router leaves no state"
        if source.hidden_size != self.hidden_size:
            return f"whose router state has {source.hidden_size} channels, not {self.hidden_size}"
        return None

    def classes(self, num_experts: int) -> int:
        """What is chosen among: the experts, and none of them if there is a skip expert."""
        return num_experts + (self.skip_expert is not None)


for _router in (SigmoidRouter, SqrtSoftplusRouter, HashRouter, SoftmaxRouter, MLPRouter):
    register(_router)
Router = Annotated[RouterPart, ROUTERS]


class ScoreRouting(KeepsFp32):
    fp32: ClassVar[tuple[str, ...]] = ("selection_bias",)
    weight_role: ClassVar[WeightRole] = ROLE

    def __init__(
        self,
        site: Site,
        num_experts: int,
        top_k: int,
        score: Callable[[Tensor], Tensor],
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.index, self.top_k, self.score, self.softcap = site.index, top_k, score, softcap
        self.proj = Linear(site.hidden_size, num_experts, bias=False)
        # Moved by load balancing, not by the loss.
        self.selection_bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)

    @outside_autocast
    def forward(self, x: Float[Tensor, "T C"], step: "Step") -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]]:
        logits = self.proj(x.to(self.proj.weight.dtype)).float()
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        scores = self.score(logits)
        chosen = top_k_lowest_first(scores + self.selection_bias, self.top_k)
        observe(step, self.index, scores, chosen)
        return normalised(scores.gather(-1, chosen)).to(x.dtype), chosen

    def rebalance(self, loads: Int[Tensor, " E"], rate: float) -> None:
        """Moves the selection bias against the load of the last step."""
        self.selection_bias.add_(towards_even(loads).to(self.selection_bias), alpha=rate)


class HashRouting(nn.Module):
    """`table` (V, k) names each token id's experts. A fresh one deals them out in turn; released models bring
    theirs."""

    def __init__(self, site: Site, num_experts: int, top_k: int, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts, self.score = num_experts, score
        self.weight_role = replace(ROLE, added=("table",), used={"table": (1, site.vocab_size)})
        self.proj = Linear(site.hidden_size, num_experts, bias=False)
        self.table: Tensor
        self.register_buffer("table", torch.zeros(site.vocab_size, top_k, dtype=torch.long))

    @outside_autocast
    def forward(self, x: Float[Tensor, "T C"], step: "Step") -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]]:
        scores = self.score(self.proj(x.to(self.proj.weight.dtype)).float())
        chosen = self.table[step.tokens]
        return normalised(scores.gather(-1, chosen)).to(x.dtype), chosen

    def init_parameters(self) -> None:
        in_turn = torch.arange(self.table.numel(), device=self.table.device) % self.num_experts
        self.table.copy_(in_turn.view_as(self.table))

    def check_loaded(self, name: str, values: Tensor) -> str | None:
        """What is wrong with a table read from a file, if anything."""
        if name != "table":
            return None
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high >= self.num_experts:
            return f"names expert {low if low < 0 else high}, and there are {self.num_experts}"
        return None


class SoftmaxRouting(nn.Module):
    weight_role: ClassVar[WeightRole] = ROLE

    def __init__(self, site: Site, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.index, self.top_k = site.index, top_k
        self.norm = RMSNorm(site.hidden_size, site.norm_eps, weighted=False)
        self.scale = nn.Parameter(torch.ones(site.hidden_size))
        self.proj = Linear(site.hidden_size, num_experts, bias=False)
        self.expert_scale = nn.Parameter(torch.ones(num_experts))

    @outside_autocast
    def forward(self, x: Float[Tensor, "T C"], step: "Step") -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]]:
        scaled = self.norm(x.to(self.proj.weight.dtype)) * self.scale * x.shape[-1] ** -0.5
        logits = self.proj(scaled)
        probabilities = logits.softmax(-1, dtype=torch.float32)
        chosen = top_k_lowest_first(probabilities, self.top_k)
        observe(step, self.index, probabilities, chosen)
        weights = normalised(probabilities.gather(-1, chosen)) * self.expert_scale[chosen]
        return weights.to(x.dtype), chosen


class MLPRouting(KeepsFp32):
    fp32: ClassVar[tuple[str, ...]] = ("selection_bias",)
    weight_role: ClassVar[WeightRole] = ROLE

    def __init__(self, config: MLPRouter, site: Site, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.index, self.top_k = config, site.index, top_k
        width, classes = config.hidden_size, config.classes(num_experts)
        self.down_proj = Linear(site.hidden_size, width)
        if config.state_source is not None:
            self.state_scale = nn.Parameter(torch.ones(width))
        self.norm = RMSNorm(width, site.norm_eps)
        self.fc1, self.fc2 = Linear(width, width), Linear(width, width)
        self.out_proj = Linear(width, classes, bias=False)
        # Moved by load balancing, not by the loss; a buffer, as in the released model's count of parameters.
        self.selection_bias: Tensor
        self.register_buffer("selection_bias", torch.zeros(classes, dtype=torch.float32))

    @outside_autocast
    def forward(self, x: Float[Tensor, "T C"], step: "Step") -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]]:
        state = self.down_proj(x.to(self.down_proj.weight.dtype))
        if self.config.state_source is not None:
            state = state + step.rows_left_by(self.config.state_source, ROUTER_STATE) * self.state_scale
        step.leave(self.index, ROUTER_STATE, state)
        hidden = F.gelu(self.fc2(F.gelu(self.fc1(self.norm(state)))))
        probabilities = self.out_proj(hidden).softmax(-1, dtype=torch.float32)
        chosen = top_k_lowest_first(probabilities + self.selection_bias, self.top_k)
        observe(step, self.index, probabilities, chosen)
        return probabilities.gather(-1, chosen).to(x.dtype), chosen

    def rebalance(self, loads: Int[Tensor, " E"], rate: float) -> None:
        """Moves the selection bias against the load of the last step."""
        self.selection_bias.add_(towards_even(loads), alpha=rate)

    def init_parameters(self) -> None:
        """The skip expert starts out of reach."""
        self.selection_bias.zero_()
        if self.config.skip_expert is not None:
            self.selection_bias[-1] = -1.0


def observe(step: "Step", layer: int, scores: Float[Tensor, "T E"], chosen: Int[Tensor, "T k"]) -> None:
    """Leaves a router's loads and auxiliary loss where training asks for them."""
    if step.observed is None:
        return
    classes = scores.shape[1]
    loads = torch.bincount(chosen.flatten(), minlength=classes)
    share = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).mean(0)
    step.observed.expert_loads[layer] = loads
    step.observed.balance_losses[layer] = classes * (loads / chosen.numel() * share).sum()


def towards_even(loads: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """+1 for a class with less than the mean load, -1 for one with more."""
    return torch.sign(loads.float().mean() - loads.float())


def normalised(scores: Float[Tensor, "T k"]) -> Float[Tensor, "T k"]:
    """Each token's scores over their sum; all zero where that has underflowed."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)
