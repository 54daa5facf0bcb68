"""What attentions can learn to recall, on a toy small enough for a test: six pairs of eight keys and eight values.

Every model is trained afresh on examples drawn anew at every step, and judged on others.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kvell import Decoder, ModelConfig
from kvell.step import Observed
from kvell.training.tasks import AssociativeRecall, Example, accuracy_by_distance, batch_of

TASK = AssociativeRecall(vocab_size=17, length=24, num_pairs=6)
HIDDEN = 64
ROTARY = {"kind": "default", "theta": 100.0}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rotary": ROTARY}
GROUPED_QUERY: dict[str, Any] = {"kind": "grouped_query", **HEADS}
CONVOLUTIONAL: dict[str, Any] = {"kind": "convolutional", **HEADS}
RANKS = {"query_rank": 32, "output_groups": 2, "output_rank": 32}
COMPRESSED: dict[str, Any] = {
    "kind": "compressed", "num_heads": 4, "head_dim": 32, "rotary": ROTARY, "rotary_width": 32, **RANKS
}  # fmt: skip
# Two layers with a window of 4 reach back 6 tokens: whatever stands further back is known by entries alone.
NARROW, REACH = {"sliding_window": 4}, 6
HEAVILY_COMPRESSED = {**COMPRESSED, **NARROW, "compressor": {"ratio": 2}}
COMPRESSED_SPARSE = {
    **COMPRESSED,
    **NARROW,
    "compressor": {"ratio": 2, "overlap": True},
    "indexer": {"num_heads": 2, "head_dim": 32, "top_k": 6},
}


def model_of(*attentions: dict[str, Any]) -> Decoder:
    """A layer each."""
    mlp = {"kind": "gated_mlp", "intermediate_size": 2 * HIDDEN}
    return Decoder(
        ModelConfig(
            vocab_size=TASK.vocab_size,
            hidden_size=HIDDEN,
            max_positions=TASK.length,
            initializer_range=0.05,
            layers=[{"attention": attention, "feed_forward": mlp} for attention in attentions],  # type: ignore[misc]
        )
    )


def train(model: Decoder, steps: int, examples: int = 16) -> None:
    """Muon on the layers' matrices, AdamW on the rest, `examples` new ones a step."""
    rng = random.Random(1)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and not name.startswith(("embedding", "head"))]
    others = [p for _, p in named if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20, 0.05 + 1.5 * (1 - step / steps))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = 0.02 * rate, 0.01 * rate
        inputs, targets, counts = batch_of([TASK.draw(rng) for _ in range(examples)])
        observed = Observed()
        loss = F.cross_entropy(model(inputs, counts=counts, observed=observed)[0], targets)
        (loss + sum(observed.index_losses.values())).backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()


def unseen(count: int = 64) -> list[Example]:
    rng = random.Random(2)
    return [TASK.draw(rng) for _ in range(count)]


@torch.no_grad()
def nats_of(model: Decoder, examples: Sequence[Example]) -> float:
    """What a scored answer costs."""
    inputs, targets, counts = batch_of(examples)
    return F.cross_entropy(model(inputs, counts=counts)[0], targets).item()


def accuracy(model: Decoder, examples: Sequence[Example], nearest: int = 0) -> float:
    """Of the answers at least `nearest` tokens behind their sources."""
    edges = sorted({0, nearest, TASK.length})
    return accuracy_by_distance(model, examples, edges)[nearest, TASK.length].share


@pytest.mark.parametrize(
    ("attentions", "steps", "examples"),
    [
        pytest.param([GROUPED_QUERY | {"sliding_window": 2}, GROUPED_QUERY], 150, 16, id="grouped_query"),
        pytest.param([CONVOLUTIONAL] * 2, 120, 16, id="convolutional"),
        pytest.param(
            [COMPRESSED | {"sliding_window": 2}, COMPRESSED | {"sliding_window": TASK.length}],
            200,
            16,
            id="compressed window alone",
        ),
        pytest.param([HEAVILY_COMPRESSED] * 2, 100, 16, id="heavily compressed"),
        pytest.param([COMPRESSED_SPARSE] * 2, 150, 8, id="compressed sparse"),
    ],
)
def test_two_layers_of_every_kind_learn_to_recall(
    attentions: list[dict[str, Any]], steps: int, examples: int
) -> None:
    """To below 0.1 nats an answer, in so many steps of so many examples; to guess among the values costs 2.1.

    Where nothing but attention can shift a token, the first layer sees only a token and the one before: with two full
    layers it depends on the seed whether the shift is found in a few hundred steps.
    """
    model, cases = model_of(*attentions), unseen()
    train(model, steps, examples)
    assert nats_of(model, cases) < 0.1
    assert accuracy(model, cases) > 0.95
    assert accuracy(model, cases, nearest=REACH + 1) > 0.95


def test_it_is_entries_that_recall_what_no_window_reaches() -> None:
    """The heavily compressed model without its compressor, in the steps that suffice with it."""
    model = model_of(*[COMPRESSED | NARROW] * 2)
    train(model, 100)
    assert accuracy(model, unseen(), nearest=REACH + 1) < 0.4


def test_one_convolutional_layer_recalls_what_one_grouped_query_layer_cannot() -> None:
    """Recall needs a shift: the query must meet a key's token and read the value of the NEXT one.

    A single layer of plain attention finds the token that equals the query, but its value there is made of that
    token, the key, alone; and the token that holds the answer has a key that says nothing of the one before it. So it
    does little better than to draw one of the values that it sees. It takes two layers: the first moves each token's
    neighbour into its residual (an induction head; Olsson et al. 2022, arXiv 2209.11895). In CCA the convolution
    brings the token before into a key, and the value shift brings it into half of a value, within one layer.
    """
    cases = unseen()
    convolutional = model_of(CONVOLUTIONAL)
    train(convolutional, 120)
    grouped_query = model_of(GROUPED_QUERY)
    train(grouped_query, 240)
    assert accuracy(convolutional, cases) > 0.95
    assert accuracy(grouped_query, cases) < 0.5
