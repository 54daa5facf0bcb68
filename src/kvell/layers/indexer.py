"""The indexer of compressed sparse attention: which entries a query attends to (DeepSeek V4, arXiv 2606.19348,
section 2.3.1, equations 13 to 17; DeepSeek V3.2, arXiv 2512.02556, section 2.1).

    score_tj = sum_h weight_th relu(q_th . k_j),   q_t = rotate(Wq c_t),  weight_t = Ww x_t / sqrt(heads * width)

c_t is the layer's low-rank query, k_j the entries of a compressor of the indexer's own. The `top_k` best visible
entries are picked; of equal scores, and zeros are frequent, the first. What people get wrong: every query has picks
of its own, and sees none of the future.

The choice has no gradient, so the indexer does not learn from the model's loss, and nothing flows back from it: its
inputs are detached. `loss` trains it: the divergence KL(p || softmax(score)) over the visible entries, p being the
weight that the attention of all heads gives to each of them when none is left out (V3.2, equation 3).
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from kvell.kernels.compressed import index_scores, pick
from kvell.layers.compressor import Compressor, EntryCompressor, Rounding
from kvell.layers.contract import RotaryPart
from kvell.layers.cost import WeightRole, Work
from kvell.layers.linear import Linear
from kvell.layers.part import Part, Site
from kvell.layers.rotary import RotaryTable

if TYPE_CHECKING:
    from kvell.step import Step


class Indexer(Part):
    """Picks `top_k` entries per query, scoring them with `num_heads` heads of width `head_dim`."""

    num_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt

    def works(self, compressor: Compressor, site: Site) -> tuple[Work, Work]:
        """For each entry seen a product with every head, and their sum. Where there are no more entries than are
        picked, none is scored."""
        scored, reads = partial(Work, "indexer", stride=compressor.ratio, beyond=self.top_k), ((site.index, "index"),)
        products = scored(per_row=self.num_heads * self.head_dim, reads=reads, form="fp4")
        return products, scored(per_row=self.num_heads, form="fp32")


class Questions(NamedTuple):
    """What is asked of the entries."""

    query: Float[Tensor, "T H D"]
    weights: Float[Tensor, "T H"]


class EntryIndexer(nn.Module):
    weight_role: ClassVar[WeightRole] = WeightRole("indexer", bf16=("weights_proj",))

    def __init__(
        self,
        config: Indexer,
        compressor: Compressor,
        site: Site,
        query_rank: int,
        rotary: RotaryPart,
        rotary_width: int,
        rounding: Rounding | None,
    ) -> None:
        super().__init__()
        self.config, self.rounding = config, rounding
        self.q_proj = Linear(query_rank, config.num_heads * config.head_dim, bias=False)
        self.weights_proj = Linear(site.hidden_size, config.num_heads, bias=False)
        self.compressor = EntryCompressor(compressor, site, "index", config.head_dim, rotary, rotary_width, rounding)

    def forward(self, x: Float[Tensor, "T C"], low_rank: Float[Tensor, "T R"], turn: RotaryTable) -> Questions:
        query = turn.rotate_last(self.q_proj(low_rank).unflatten(1, (-1, self.config.head_dim)))
        scale = (self.config.num_heads * self.config.head_dim) ** -0.5
        weights = self.weights_proj(x).float() * scale
        return Questions(query if self.rounding is None else self.rounding(query), weights)

    def pick(
        self,
        questions: Questions,
        entries: Sequence[Float[Tensor, "_ D"]],
        visible: Sequence[Int[Tensor, " _"]],
        step: "Step",
    ) -> list[Int[Tensor, "_ P"] | None]:
        """Every sequence's picks; None where there are no more entries than `top_k`: then all visible ones count."""
        return [
            None if len(own) <= self.config.top_k else pick(query, weights, own, seen, self.config.top_k)
            for query, weights, own, seen in self._by_sequence(questions, entries, visible, step)
        ]

    def loss(
        self,
        questions: Questions,
        entries: Sequence[Float[Tensor, "_ D"]],
        visible: Sequence[Int[Tensor, " _"]],
        masses: Sequence[Float[Tensor, "_ _"]],
        step: "Step",
    ) -> Float[Tensor, ""]:
        """The mean divergence over all queries that give weight to an entry; zero if none does."""
        divergences = []
        for (query, weights, own, seen), mass in zip(
            self._by_sequence(questions, entries, visible, step), masses, strict=True
        ):
            # Of a query whose heads all give the entries no weight that is not zero, nothing can be learnt.
            asks = (seen > 0) & (mass.sum(-1) > 0)
            unseen = torch.arange(len(own), device=seen.device) >= seen[asks, None]
            scores = index_scores(query[asks], weights[asks], own).masked_fill(unseen, float("-inf"))
            wanted = mass[asks] / mass[asks].sum(-1, keepdim=True)
            gap = torch.log(wanted) - scores.log_softmax(-1)
            divergences.append(torch.where(wanted > 0, wanted * gap, 0).sum(-1))
        together = torch.cat(divergences)
        return together.sum() / max(len(together), 1)

    @staticmethod
    def _by_sequence(
        questions: Questions,
        entries: Sequence[Float[Tensor, "_ D"]],
        visible: Sequence[Int[Tensor, " _"]],
        step: "Step",
    ) -> zip:  # type: ignore[type-arg]
        query, weights = (step.by_sequence(part) for part in questions)
        return zip(query, weights, entries, visible, strict=True)
