"""What a step costs, in parts. The losses of tokens are sums divided by how many of them the whole step has, so they
are the same however the step is divided into micro-batches. The index and balance losses are formed in each
micro-batch and averaged over them. On how many devices the micro-batches are, changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvell.model import Decoder
from kvell.step import Observed
from kvell.training.batches import MicroBatch
from kvell.training.settings import Losses


@dataclass(frozen=True)
class Totals:
    """How many there are in a whole step: tokens, answers, tokens after the next, and micro-batches."""

    tokens: int
    answers: int
    drafted: int
    micro_batches: int

    @classmethod
    def of(cls, step: Sequence[MicroBatch]) -> "Totals":
        counts = [count for batch in step for count in batch.counts]
        return cls(
            sum(counts), sum(len(batch.answers) for batch in step), sum(count - 1 for count in counts), len(step)
        )


@dataclass
class StepLoss:
    """A micro-batch's share of the step's loss, its parts for the record, and the experts' loads by layer."""

    loss: Float[Tensor, ""]
    parts: dict[str, Tensor] = field(default_factory=dict)
    expert_loads: dict[int, Tensor] = field(default_factory=dict)


def step_loss(model: Decoder, batch: MicroBatch, totals: Totals, weights: Losses) -> StepLoss:
    """The loss of one micro-batch: the next tokens, and whatever else is weighed in."""
    observed = Observed()
    wants_draft = model.draft_block is not None and weights.draft > 0
    tokens = batch.inputs[None]
    if wants_draft:
        logits, streams = model(tokens, counts=batch.counts, return_streams=True, observed=observed)
    else:
        logits, streams = model(tokens, counts=batch.counts, observed=observed), None
    nats = F.cross_entropy(logits[0].float(), batch.targets, reduction="none")
    parts = {"next": nats.sum() / totals.tokens}
    loss = parts["next"]
    if totals.answers and weights.answers:
        parts["answers"] = nats[batch.answers].sum() / totals.answers
        loss = loss + weights.answers * parts["answers"]
    if wants_draft and streams is not None and totals.drafted:
        parts["draft"] = draft_nats(model, batch, streams, observed).sum() / totals.drafted
        loss = loss + weights.draft * parts["draft"]
    for name, weight, each in (
        ("index", weights.index, observed.index_losses),
        ("balance", weights.balance, observed.balance_losses),
    ):
        if weight and each:
            parts[name] = torch.stack(list(each.values())).mean() / totals.micro_batches
            loss = loss + weight * parts[name]
    return StepLoss(loss, {name: part.detach() for name, part in parts.items()}, observed.expert_loads)


def draft_nats(
    model: Decoder, batch: MicroBatch, streams: Float[Tensor, "1 T *C"], observed: Observed
) -> Float[Tensor, " D"]:
    """What the tokens after the next ones cost the draft block (DeepSeek V3, arXiv 2412.19437, equation 24)."""
    before_last, second = inner(batch.counts, streams.device)
    counts = [count - 1 for count in batch.counts if count > 1]
    logits, _ = model.draft(streams[:, before_last], batch.inputs[second][None], counts=counts, observed=observed)
    return F.cross_entropy(logits[0].float(), batch.targets[second], reduction="none")


def inner(counts: Sequence[int], device: torch.device) -> tuple[Int[Tensor, " D"], Int[Tensor, " D"]]:
    """Of pieces laid end to end, the places that another follows in its piece, and those followers."""
    places = torch.arange(sum(counts), device=device).split(list(counts))
    return torch.cat([piece[:-1] for piece in places]), torch.cat([piece[1:] for piece in places])
