"""How good a model is: bits per byte of held-out text, the loss by position, and tasks with known answers."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kvell.model import Decoder
from kvell.training.batches import Encode, drawn
from kvell.training.settings import Evaluation
from kvell.training.stopping import nothing
from kvell.training.tasks import accuracy_by_distance, right_answers
from kvell.training.tokens import TokenDocument

POSITIONS = (0, 256, 1024, 4096, 16384, 65536)
CHUNK = 1024


@torch.no_grad()
def nats_of(model: Decoder, ids: Sequence[int] | NDArray[np.int32]) -> Tensor:
    """What every token but the first costs, given all before it: len(ids) - 1 numbers, on the CPU."""
    tokens = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    cache = model.make_cache()
    chunks = []
    for inputs, targets in zip(tokens[:-1].split(CHUNK), tokens[1:].split(CHUNK), strict=True):
        logits = model(inputs[None], cache=cache)[0].float()
        chunks.append(F.cross_entropy(logits, targets, reduction="none").cpu())
    return torch.cat(chunks).double()


def nats_in_pieces(model: Decoder, ids: NDArray[np.int32]) -> list[Tensor]:
    """What every token but the first costs, in pieces of as many as the model has positions, each of which sees only
    the tokens of its own piece."""
    size = model.config.max_positions
    return [nats_of(model, ids[start : start + size + 1]) for start in range(0, len(ids) - 1, size)]


def evaluate_texts(
    model: Decoder,
    documents: Sequence[TokenDocument],
    length: int | None = None,
    tokens: int | None = None,
    before_each: Callable[[], None] = nothing,
) -> dict[str, Any]:
    """Bits per byte over documents, each cut at `length`, until `tokens` have been seen; nats a token by position;
    and nats of the tokens that end documents.

    Bits and bytes are those of the same stretch of text, see TokenDocument.measured: `bits_per_byte` is None where
    there is none. A document longer than the model's positions is evaluated in pieces, which `in_pieces_of` then
    says. `before_each` is called before every document, and may raise to end it.
    """
    nats: list[Tensor] = []
    ends: list[float] = []
    measured, nbytes, seen, count, in_pieces = 0.0, 0, 0, 0, False
    for document in documents:
        before_each()
        if tokens is not None and seen >= tokens:
            break
        ids = document.ids[:length]
        if len(ids) < 2:
            continue
        pieces = nats_in_pieces(model, ids)
        nats += pieces
        in_pieces |= len(pieces) > 1
        count += 1
        seen += len(ids)
        costs = torch.cat(pieces)  # the cost of the token at place i is costs[i - 1]
        first, last, size = document.measured(len(ids))
        measured += float(costs[first - 1 : last - 1].sum()) if size else 0.0
        nbytes += size
        ends += costs[document.text_stop - 1 :].tolist()
    by_position = {}
    for low, high in pairwise(POSITIONS):
        span = torch.cat([one[low:high] for one in nats]) if nats else torch.zeros(0)
        if len(span):
            by_position[f"{low}-{high}"] = {"nats_per_token": float(span.mean()), "tokens": len(span)}
    figures: dict[str, Any] = {
        "bits_per_byte": measured / math.log(2) / nbytes if nbytes else None,
        "bytes": nbytes,
        "documents": count,
        "tokens": sum(len(one) for one in nats),
        "nats_per_end": sum(ends) / len(ends) if ends else None,
        "loss_by_position": by_position,
    }
    return figures | ({"in_pieces_of": model.config.max_positions} if in_pieces else {})


def evaluate_tasks(
    model: Decoder,
    settings: Evaluation,
    documents: Sequence[TokenDocument],
    encode: Encode,
    bos: int | None,
    seed: int,
    before_each: Callable[[], None] = nothing,
) -> dict[str, Any]:
    """For every task and length how many of the drawn cases are solved, and the answers' accuracy by distance."""
    figures = {}
    for number, task in enumerate(settings.tasks):
        for length in settings.lengths:
            rng = random.Random(f"{seed} evaluation {number} {length}")
            cases = [drawn(task, length, documents, encode, bos, rng) for _ in range(settings.cases)]
            right = []
            for case in cases:
                before_each()
                right.append(right_answers(model, case))
            shares = accuracy_by_distance(model, cases, [0, *(2**power for power in range(8, 21, 2))], right)
            figures[f"{task.kind} at {length}"] = {
                "cases": len(cases),
                "solved": sum(all(answers) for answers in right),
                "accuracy_by_distance": {f"{low}-{high}": asdict(each) for (low, high), each in shares.items()},
            }
    return figures
