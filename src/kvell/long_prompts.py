"""A long prompt goes through a model in several steps, so that what a call needs besides its results and its cache
does not grow with the prompt. It is exact because any split into chunks is."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvell.cache import Cache

# What a step computes for its tokens takes memory: a long prompt goes through in steps of so many tokens. An
# accelerator has more of both, memory and units to be kept busy.
MAX_STEP, MAX_STEP_ON_ACCELERATOR = 1024, 16384

# Runs one step of (tokens, counts, cache): logits (W, V), and the residual (T, *C) where that is wanted too.
RunStep = Callable[[Tensor, list[int], Cache], tuple[Tensor, Tensor | None]]


def most_tokens(device: torch.device) -> int:
    """How many tokens a step on the device has at most."""
    return MAX_STEP if device.type == "cpu" else MAX_STEP_ON_ACCELERATOR


def in_steps(
    run_step: RunStep, tokens: Int[Tensor, " T"], lengths: Sequence[int], cache: Cache, most: int, *, last_only: bool
) -> tuple[Float[Tensor, "W V"], Float[Tensor, "T *C"] | None]:
    """Sequences of any lengths, laid end to end, in steps of at most `most` tokens: the logits of every token, or
    with `last_only` of each sequence's last one, and the residual where the steps give it."""
    cache.reserve(lengths)
    cache.begin_step()
    logits: list[list[Tensor]] = [[] for _ in lengths]
    hidden: list[list[Tensor]] = [[] for _ in lengths]
    waiting = list(tokens.split(list(lengths)))
    for piece in pieces(lengths, most):
        counts = list(piece.values())
        own = cache.part(list(piece))
        taken = [waiting[number][:count] for number, count in piece.items()]
        step_logits, step_hidden = run_step(torch.cat(taken), counts, own)
        rows = step_logits.split([1] * len(counts) if last_only else counts)
        for place, (number, count) in enumerate(piece.items()):
            waiting[number] = waiting[number][count:]
            if not last_only or not len(waiting[number]):
                logits[number].append(rows[place])
        if step_hidden is not None:
            for number, part in zip(piece, step_hidden.split(counts), strict=True):
                hidden[number].append(part)
    cache.end_step([0] * len(lengths))
    residual = [part for sequence in hidden for part in sequence]
    return torch.cat([part for sequence in logits for part in sequence]), torch.cat(residual) if residual else None


def pieces(lengths: Sequence[int], most: int) -> Iterator[dict[int, int]]:
    """Cuts sequences into steps of at most `most` tokens: how many of which sequence, by its number."""
    left = dict(enumerate(lengths))
    while left:
        room, piece = most, {}
        for number, tokens in left.items():
            if room:
                piece[number] = min(tokens, room)
                room -= piece[number]
        left = {number: tokens - piece.get(number, 0) for number, tokens in left.items()}
        left = {number: tokens for number, tokens in left.items() if tokens}
        yield piece
