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

from kvell.cache import Cache
from kvell.model import Decoder
from kvell.training.batches import Encode, drawn
from kvell.training.settings import Evaluation
from kvell.training.tasks import accuracy_by_distance, right_answers
from kvell.training.tokens import TokenDocument

POSITIONS = (0, 256, 1024, 4096, 16384, 65536)
CHUNK = 1024


@torch.no_grad()
def nats_of(model: Decoder, ids: Sequence[int] | NDArray[np.int32]) -> Tensor:
    """What every token but the first costs, given all before it: len(ids) - 1 numbers, on the CPU."""
    tokens = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    # Not the model's own make_cache, whose fingerprint would need weights that may lie in shards.
    cache = Cache(model.config.streams(), 1, dtype=model.dtype, device=model.device)
    chunks = []
    for inputs, targets in zip(tokens[:-1].split(CHUNK), tokens[1:].split(CHUNK), strict=True):
        logits = model(inputs[None], cache=cache)[0].float()
        chunks.append(F.cross_entropy(logits, targets, reduction="none").cpu())
    return torch.cat(chunks).double()


def nothing() -> None:
    pass


def evaluate_texts(
    model: Decoder,
    documents: Sequence[TokenDocument],
    length: int | None = None,
    tokens: int | None = None,
    before_each: Callable[[], None] = nothing,
) -> dict[str, Any]:
    """Bits per byte over documents, each cut at `length`, until `tokens` have been seen; nats a token by position.

    A document that is cut counts with the share of its bytes that its share of tokens stands for. `before_each` is
    called before every document, and may raise to end it.
    """
    nats, nbytes, seen = [], 0.0, 0
    for document in documents:
        before_each()
        if tokens is not None and seen >= tokens:
            break
        ids = document.ids[:length]
        if len(ids) < 2:
            continue
        nats.append(nats_of(model, ids))
        nbytes += document.nbytes * len(ids) / len(document.ids)
        seen += len(ids)
    bits = sum(float(one.sum()) for one in nats) / math.log(2)
    by_position = {}
    for low, high in pairwise(POSITIONS):
        span = torch.cat([one[low:high] for one in nats]) if nats else torch.zeros(0)
        if len(span):
            by_position[f"{low}-{high}"] = {"nats_per_token": float(span.mean()), "tokens": len(span)}
    return {
        "bits_per_byte": bits / nbytes if nbytes else None,
        "documents": len(nats),
        "tokens": sum(len(one) for one in nats),
        "loss_by_position": by_position,
    }


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
