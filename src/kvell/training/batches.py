"""Steps of packed pieces: what the model sees at every step, as a function of the step's number and the seed alone.

A piece is at most `length` tokens of one document, or one example of a task; the model sees no other piece beside it,
so nothing leaks between documents, and nothing is padded. Documents are cut at other places in every epoch, and short
ones and the ends of long ones are used as they are.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor

from kvell.config import in_a_line, problems
from kvell.errors import ConfigError
from kvell.training.settings import MixedTask, Stage, TrainingConfig
from kvell.training.tasks import Example, Needles, Passkey, Task
from kvell.training.tokens import TokenDocument

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Piece:
    """Tokens with one more than the model's inputs, the last one's target. `answers` are the places, among the
    targets, whose tokens are a task's known answers."""

    name: str
    ids: Sequence[int]
    answers: tuple[int, ...] = ()

    def __len__(self) -> int:
        """How many inputs it has."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Pieces laid end to end: inputs (T) and targets (T), the pieces' lengths, and which targets are answers."""

    names: list[str]
    counts: list[int]
    inputs: Int[Tensor, " T"]
    targets: Int[Tensor, " T"]
    answers: Int[Tensor, " A"]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "MicroBatch":
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece))
        return cls(
            [piece.name for piece in pieces],
            [len(piece) for piece in pieces],
            torch.cat([torch.as_tensor(piece.ids[:-1], dtype=torch.long) for piece in pieces]),
            torch.cat([torch.as_tensor(piece.ids[1:], dtype=torch.long) for piece in pieces]),
            torch.tensor(
                [start + place for start, piece in zip(starts, pieces, strict=False) for place in piece.answers],
                dtype=torch.long,
            ),
        )

    def to(self, device: torch.device) -> "MicroBatch":
        moved = (tensor.to(device) for tensor in (self.inputs, self.targets, self.answers))
        return MicroBatch(self.names, self.counts, *moved)


def steps_of(
    stages: Sequence[Stage],
    documents: Sequence[TokenDocument],
    tasks: Sequence[MixedTask],
    encode: Encode,
    bos: int | None,
    seed: int,
    first: int = 0,
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of every step from `first` on: the same that a run from the beginning would see."""
    for number, stage in enumerate(stages):
        text = pieces_of_texts(documents, stage.length, random.Random(f"{seed} texts {number}"))
        plans = planned(stage, tasks, random.Random(f"{seed} tasks {number}"))
        for step in range(stage.steps):
            micro_batches: list[MicroBatch] = []
            for plan in islice(plans, stage.micro_batches):
                room = stage.tokens // stage.micro_batches - sum(size for _, size in plan)
                pieces = filling(room, text)
                if step < first:
                    continue
                for place, (mixed, size) in enumerate(plan):
                    rng = random.Random(f"{seed} example {number} {step} {len(micro_batches)} {place}")
                    pieces.append(example(mixed, size, documents, encode, bos, rng))
                micro_batches.append(MicroBatch.of(pieces))
            if step >= first:
                yield micro_batches
        first = max(first - stage.steps, 0)


def planned(stage: Stage, tasks: Sequence[MixedTask], rng: random.Random) -> Iterator[list[tuple[MixedTask, int]]]:
    """For every micro-batch, which tasks have examples in it, and of how many inputs.

    A task earns its share of every micro-batch's tokens; its next example, of a size drawn between its shortest and
    the stage's length, stands in the first that it has earned enough for.
    """
    tokens = stage.tokens // stage.micro_batches
    earned = [0.0] * len(tasks)
    wanted = [log_uniform(mixed.shortest, stage.length, rng) for mixed in tasks]
    while True:
        room, plan = tokens, []
        for index, mixed in enumerate(tasks):
            earned[index] += mixed.share * tokens
            while wanted[index] <= min(earned[index], room):
                plan.append((mixed, wanted[index]))
                room -= wanted[index]
                earned[index] -= wanted[index]
                wanted[index] = log_uniform(mixed.shortest, stage.length, rng)
        yield plan


def pieces_of_texts(documents: Sequence[TokenDocument], length: int, rng: random.Random) -> Iterator[Piece]:
    """Pieces of all documents, shuffled, epoch after epoch."""
    while True:
        places = []
        for number, document in enumerate(documents):
            offset = rng.randrange(length) + 1 - length
            places += [(number, cut) for cut in range(offset, len(document.ids) - 1, length)]
        rng.shuffle(places)
        for number, cut in places:
            document = documents[number]
            yield Piece(document.name, document.ids[max(cut, 0) : cut + length + 1].tolist())


def filling(room: int, text: Iterator[Piece]) -> list[Piece]:
    """Pieces of text that make `room` inputs together; the last one is cut where it would be too long."""
    pieces = []
    while room:
        piece = next(text)
        pieces.append(piece if len(piece) <= room else Piece(piece.name, piece.ids[: room + 1]))
        room -= len(pieces[-1])
    return pieces


def example(
    mixed: MixedTask,
    size: int,
    documents: Sequence[TokenDocument],
    encode: Encode,
    bos: int | None,
    rng: random.Random,
) -> Piece:
    """An example of a task that makes `size` inputs."""
    made = drawn(mixed.task, size + 1, documents, encode, bos, rng)
    return Piece(f"{mixed.task.kind} task", made.tokens, tuple(place - 1 for place in made.scored))


def check_tasks(config: TrainingConfig, encode: Encode, bos: int | None) -> None:
    """ConfigError if a run would come to a task's example that cannot be made."""
    longest = max(stage.length for stage in config.stages) + 1
    asked = [
        (f"evaluation.lengths.{index}", task, length)
        for index, length in enumerate(config.evaluation.lengths)
        for task in config.evaluation.tasks
    ]
    for index, mixed in enumerate(config.data.tasks):
        asked.append((f"data.tasks.{index}.shortest", mixed.task, mixed.shortest + 1))
        asked.append((f"data.tasks.{index}", mixed.task, longest))
    for field, task, length in asked:
        if problem := unmakeable(task, length, config.model.vocab_size, encode, bos):
            raise ConfigError(f"{field}: {task.kind}: {problem}")


def unmakeable(task: Task, length: int, vocab_size: int, encode: Encode, bos: int | None) -> str | None:
    """Why some example of a length cannot be made, if that is so."""
    if isinstance(task, Passkey | Needles):
        needed = task.most_tokens(encode) + (bos is not None)
        return f"{length} tokens do not hold what is hidden and asked: {needed} would" if length < needed else None
    if task.vocab_size > vocab_size:
        return f"vocab_size {task.vocab_size} is more than the model's {vocab_size}"
    try:
        type(task).model_validate(dict(task) | {"length": length})
    except ValidationError as error:
        return in_a_line(problems(error, dict(task), type(task)))
    return None


def drawn(
    task: Task,
    length: int,
    documents: Sequence[TokenDocument],
    encode: Encode,
    bos: int | None,
    rng: random.Random,
) -> Example:
    """An example of `length` tokens: bare ones, or lines hidden in a stretch of the documents."""
    sized = task.model_copy(update={"length": length})
    if not isinstance(sized, Passkey | Needles):
        return sized.draw(rng)
    haystack = text_of(documents, rng.choice(documents), length, rng)
    return sized.draw(rng, haystack, encode, bos)


def text_of(documents: Sequence[TokenDocument], first: TokenDocument, size: int, rng: random.Random) -> list[int]:
    """At least `size` tokens of text from somewhere in a document, going on in others where it ends."""
    start = rng.randrange(max(len(first.ids) - size, 1))
    tokens: list[int] = first.ids[start : start + size].tolist()
    while len(tokens) < size:
        tokens += rng.choice(documents).ids[: size - len(tokens)].tolist()
    return tokens


def log_uniform(low: int, high: int, rng: random.Random) -> int:
    """A whole number between the two, every octave as probable as the next."""
    return min(high, round(low * (high / low) ** rng.random()))
