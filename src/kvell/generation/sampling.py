"""The choice of the next token from a model's logits.

    scores = (logits - max(logits)) / temperature
    keep the top_k highest scores; of equal scores the lowest id
    keep the fewest best tokens whose probabilities sum to top_p (Holtzman et al. 2019, arXiv 1904.09751)
    keep tokens at least min_p times as probable as the best (Nguyen et al. 2024, arXiv 2407.01082)
    draw from what is left in proportion to exp(score)

Before all of it tokens that are never to be chosen get a logit of minus infinity, at temperature 0 too.
Each step renormalises what the one before it kept. What people get wrong: the token that takes the sum past
top_p belongs to the nucleus, so at least one token is always left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvell.errors import InputError, KvellError, whole_number


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. Temperature 0 takes the most probable token; None leaves a filter out.

    Raises InputError where a setting is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("temperature", Real), ("top_p", Real | None), ("min_p", Real | None)):
            if not isinstance(value := getattr(self, name), kinds):
                raise InputError(f"{name} must be a number, not {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature} is not a finite number of at least 0")
        if self.top_k is not None:
            whole_number("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p} is not between 0 and 1")
        whole_number("seed", self.seed, 0, 2**64 - 1)


class Sampler:
    """Chooses one sequence's tokens, none of `suppressed`. Equal settings and equal logits give equal tokens, on any
    device."""

    def __init__(self, settings: SamplingSettings, suppressed: Sequence[int] = ()) -> None:
        self.settings = settings
        self._suppressed = torch.tensor(suppressed, dtype=torch.long)
        self._generator = torch.Generator().manual_seed(int(settings.seed))

    def __call__(self, logits: Float[Tensor, " V"]) -> int:
        """The next token's id. Raises KvellError where the logits are not numbers."""
        if len(self._suppressed):
            self._suppressed = self._suppressed.to(logits.device)
            logits = logits.index_fill(-1, self._suppressed, -math.inf)
        highest, most_probable = logits.max(dim=-1)
        if not math.isfinite(highest):
            raise KvellError(
                f"the model's highest logit is {highest.item()}: "
                "its weights are damaged or its dtype overflows; try float32"
            )
        if self.settings.temperature == 0:
            return int(most_probable)
        scores, candidates = self._filter((logits.double() - highest).cpu() / self.settings.temperature)
        choice = torch.multinomial(scores.exp(), 1, generator=self._generator)
        return int(candidates[choice])

    def _filter(self, scores: Float[Tensor, " V"]) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
        """The scores and ids of the tokens that may be drawn."""
        candidates = torch.arange(len(scores))
        top_k, top_p, min_p = self.settings.top_k, self.settings.top_p, self.settings.min_p
        if top_k is not None and top_k < len(scores):
            kept = keep_top_k(scores, top_k)
            scores, candidates = scores[kept], candidates[kept]
        if top_p is not None and top_p < 1:
            kept = keep_top_p(scores, top_p)
            scores, candidates = scores[kept], candidates[kept]
        if min_p is not None:
            kept = keep_min_p(scores, min_p)
            scores, candidates = scores[kept], candidates[kept]
        return scores, candidates


def keep_top_k(scores: Float[Tensor, " V"], k: int) -> Int[Tensor, " k"]:
    """Indices of the k highest scores, highest first; of equal scores the lowest index."""
    # topk alone may break ties any way it likes, and sorting a whole vocabulary costs forty times as much.
    contenders = (scores >= scores.topk(k).values[-1]).nonzero().flatten()
    return contenders[_best_first(scores[contenders])[:k]]


def keep_top_p(scores: Float[Tensor, " V"], p: float) -> Int[Tensor, " N"]:
    """Indices of the fewest best tokens whose probabilities sum to at least p, best first."""
    probabilities = scores.softmax(dim=-1)
    # Tokens below this bound sum to less than 1 - p, so none of them is needed to reach p: fewer to sort.
    contenders = (probabilities > (1 - p) / len(scores)).nonzero().flatten()
    contenders = contenders[_best_first(probabilities[contenders])]
    chances = probabilities[contenders]
    better = chances.cumsum(dim=-1) - chances
    return contenders[better < p]


def keep_min_p(scores: Float[Tensor, " V"], p: float) -> Int[Tensor, " N"]:
    """Indices of the tokens whose probability is at least p times the highest."""
    return ((scores - scores.max()).exp() >= p).nonzero().flatten()


def _best_first(values: Float[Tensor, " V"]) -> Int[Tensor, " V"]:
    return values.sort(descending=True, stable=True).indices
