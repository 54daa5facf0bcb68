"""Tasks with known answers, generated: toys of bare tokens, and texts that hide something and ask for it.

    associative_recall   key value pairs, then their keys again, in another order    k1 v1 k2 v2 ... k2 [v2] . k1 [v1]
    induction            a sequence, and the same sequence again                     < a b c ... < [a] [b] [c]
    needle               one of several pairs strewn into noise, asked at the end    ... ? k v ... ? k' v' ... ? k [v]
    passkey              one line hidden in a text, asked at its end
    needles              several such lines with different names, one of them asked

What stands in [brackets] is scored: it follows from the tokens before it alone. An answer's distance is how many
tokens before it the token stands that it repeats.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from kvell.errors import ConfigError, InputError
from kvell.layers.part import Part
from kvell.model import Decoder

Encode = Callable[[str], list[int]]  # text to ids, without special tokens
Depth = Annotated[float, Field(ge=0, le=1)]

NOT_SCORED = -100  # the target that torch's cross entropy ignores
FILLER = 0
NAMES = (
    *("Alice", "Bruno", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Louis"),
    *("Maria", "Nadia", "Oscar", "Paula", "Quinn", "Robin", "Sarah", "Tomas", "Ursula", "Victor", "Wanda", "Xenia"),
)


@dataclass(frozen=True)
class Example:
    """A prompt and its answers, one after another.

    `scored` are the positions, ascending, whose tokens are known answers, each predicted from all tokens before it;
    `distances` says how many tokens before each of them its source stands.
    """

    tokens: list[int]
    scored: list[int]
    distances: list[int]

    def __post_init__(self) -> None:
        if not self.scored or len(self.scored) != len(self.distances):
            raise ValueError(f"{len(self.scored)} scored tokens with {len(self.distances)} distances")
        if any(low >= high for low, high in pairwise([0, *self.scored, len(self.tokens)])):
            raise ValueError(f"scored {self.scored} are no ascending positions from 1 to {len(self.tokens) - 1}")


class AssociativeRecall(Part):
    """Multi-query associative recall (MQAR; Arora et al. 2023, arXiv 2312.04927, section 3.1).

    `num_pairs` pairs of a key and a value, then every key once more, in random order and at random places, each
    followed by its value; filler stands between. Keys differ; values may repeat, so that none can be told by
    elimination. Keys are the first half of the vocabulary behind the filler's id 0, values the second.
    """

    kind: Literal["associative_recall"] = "associative_recall"
    vocab_size: PositiveInt = 256
    length: PositiveInt = 256
    num_pairs: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _at_least("vocab_size", self.vocab_size, 1 + 2 * self.num_pairs, f"filler and {self.num_pairs} pairs")
        _at_least("length", self.length, 4 * self.num_pairs, f"{self.num_pairs} pairs and their queries")
        return self

    def draw(self, rng: random.Random) -> Example:
        keys, values = _shares(self.vocab_size, 1, 2)
        pairs = [(key, rng.choice(values)) for key in rng.sample(keys, self.num_pairs)]
        tokens = [token for pair in pairs for token in pair] + [FILLER] * (self.length - 2 * self.num_pairs)
        scored, distances = [], []
        queries = _places(rng, 2 * self.num_pairs, self.length, self.num_pairs, 2)
        for place, asked in zip(queries, rng.sample(range(self.num_pairs), self.num_pairs), strict=True):
            tokens[place : place + 2] = pairs[asked]
            scored.append(place + 1)
            distances.append(place - 2 * asked)
        return Example(tokens, scored, distances)


class Induction(Part):
    """A sequence repeated, what an induction head continues (Olsson et al. 2022, arXiv 2209.11895).

    The sequence has `span` different tokens, None for as many as fit twice; a start token, id 1, stands before each
    copy, and all of the second is scored. Filler, id 0, stands before, between and behind. Without filler the
    distance is the same in every example: position alone then tells where to look, so a `span` of less than the most
    that fits is the harder task.
    """

    kind: Literal["induction"] = "induction"
    vocab_size: PositiveInt = 256
    length: Annotated[int, Field(ge=4)] = 256
    span: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _at_least("length", self.length, 2 * self._span + 2, f"two copies of {self._span} tokens")
        _at_least("vocab_size", self.vocab_size, 2 + self._span, f"{self._span} different tokens, start and filler")
        return self

    @property
    def _span(self) -> int:
        return self.length // 2 - 1 if self.span is None else self.span

    def draw(self, rng: random.Random) -> Example:
        (ids,) = _shares(self.vocab_size, 2, 1)
        copy = [1, *rng.sample(ids, self._span)]
        tokens = [FILLER] * self.length
        first, second = _places(rng, 0, self.length, 2, len(copy))
        for place in (first, second):
            tokens[place : place + len(copy)] = copy
        scored = list(range(second + 1, second + len(copy)))
        return Example(tokens, scored, [second - first] * self._span)


class Needle(Part):
    """One pair of a key and a value among `num_distractors` others, strewn into noise and asked at the end.

    Every pair stands behind a mark, id 0, and so does the question. Keys, values and the tokens of the noise are a
    third of the other ids each; no key and no value comes twice but for the one that is asked.
    """

    kind: Literal["needle"] = "needle"
    vocab_size: PositiveInt = 256
    length: PositiveInt = 256
    num_distractors: NonNegativeInt = 3

    @model_validator(mode="after")
    def _fits(self) -> Self:
        pairs = self.num_distractors + 1
        _at_least("vocab_size", self.vocab_size, 1 + 3 * pairs, f"{pairs} pairs and as many tokens of noise")
        _at_least("length", self.length, 3 * pairs + 3, f"{pairs} marked pairs and a question")
        return self

    def draw(self, rng: random.Random) -> Example:
        keys, values, noise = _shares(self.vocab_size, 1, 3)
        count, question = self.num_distractors + 1, self.length - 3
        pairs = list(zip(rng.sample(keys, count), rng.sample(values, count), strict=True))
        tokens = rng.choices(noise, k=self.length)
        places = _places(rng, 0, question, count, 3)
        for place, pair in zip(places, pairs, strict=True):
            tokens[place : place + 3] = FILLER, *pair
        asked = rng.randrange(count)
        tokens[question:] = FILLER, *pairs[asked]
        return Example(tokens, [self.length - 1], [question - places[asked]])


class Passkey(Part):
    """One line with a number in a long text, and a question for it at the end (Mohtashami & Jaggi 2023,
    arXiv 2305.16300, section 4.2).

    The line stands at the line boundary nearest to `depth`, 0 for the beginning of the text and 1 for its end; None
    draws a depth for every example. An example has exactly `length` tokens.
    """

    kind: Literal["passkey"] = "passkey"
    length: PositiveInt = 1024
    depth: Depth | None = None

    def draw(self, rng: random.Random, haystack: Sequence[int], encode: Encode, bos: int | None = None) -> Example:
        """An example in the first tokens of `haystack`, behind `bos` if there is one.

        ConfigError where `length` does not hold the line and the question, InputError for a haystack too short.
        """
        lines, question = self._hiding(rng.randrange(10_000, 100_000))
        depth = rng.random() if self.depth is None else self.depth
        return hidden(self.kind, self.length, lines, [depth], question, haystack, encode, bos)

    def most_tokens(self, encode: Encode) -> int:
        """How many tokens the line and the question take at most."""
        return size(*encoded(*self._hiding(longest_number(encode)), encode))

    @staticmethod
    def _hiding(number: int) -> "tuple[list[Line], str]":
        line = Line("# The pass key is", f" {number}", ". Remember it.")
        return [line], "# What is the pass key? The pass key is"


class Needles(Part):
    """`num_needles` lines that differ by a name and their number, at random depths of a long text, and a question for
    one of them at the end: the passkey with distractors. `depth` is that of the line that is asked."""

    kind: Literal["needles"] = "needles"
    length: PositiveInt = 1024
    depth: Depth | None = None
    num_needles: Annotated[int, Field(ge=1, le=len(NAMES))] = 4

    def draw(self, rng: random.Random, haystack: Sequence[int], encode: Encode, bos: int | None = None) -> Example:
        """As a passkey's."""
        names = rng.sample(NAMES, self.num_needles)
        lines, question = self._hiding(names, rng.sample(range(10_000, 100_000), self.num_needles))
        depths = [rng.random() for _ in lines]
        if self.depth is not None:
            depths[0] = self.depth
        return hidden(self.kind, self.length, lines, depths, question, haystack, encode, bos)

    def most_tokens(self, encode: Encode) -> int:
        """As a passkey's."""
        names = sorted(NAMES, key=lambda name: len(encode(f" {name}")), reverse=True)[: self.num_needles]
        return size(*encoded(*self._hiding(names, [longest_number(encode)] * len(names)), encode))

    @staticmethod
    def _hiding(names: Sequence[str], numbers: Sequence[int]) -> "tuple[list[Line], str]":
        lines = [
            Line(f"# The pass key of {name} is", f" {number}", ".")
            for name, number in zip(names, numbers, strict=True)
        ]
        return lines, f"# What is the pass key of {names[0]}? The pass key of {names[0]} is"


Task = Annotated[AssociativeRecall | Induction | Needle | Passkey | Needles, Field(discriminator="kind")]


@dataclass(frozen=True)
class Line:
    """A line of text with a number in it that may be asked for."""

    before: str
    number: str
    after: str


def hidden(
    name: str,
    length: int,
    lines: Sequence[Line],
    depths: Sequence[float],
    question: str,
    haystack: Sequence[int],
    encode: Encode,
    bos: int | None,
) -> Example:
    """Lines at the haystack's line boundaries nearest to their depths, and a question for the first one's number.

    The haystack is never encoded again: the lines are put between its tokens, before those that begin with a line
    break, or at its end. Numbers are encoded on their own, so that an answer has the tokens that stood in its line.
    """
    pieces, end = encoded(lines, question, encode)
    start, answer = [] if bos is None else [bos], pieces[0][1]
    needed = len(start) + size(pieces, end)
    room = length - needed
    if room < 0:
        raise ConfigError(f"{name}: length {length} is too short for what is hidden and asked: it takes {needed}")
    if len(haystack) < room:
        raise InputError(f"{name}: length {length} takes a haystack of {room} tokens, not {len(haystack)}")
    text = list(haystack[:room])
    breaks = line_breaks(encode)
    boundaries = [place for place, token in enumerate(text) if token in breaks] + [room]
    places = [min(boundaries, key=lambda place: abs(place - depth * room)) for depth in depths]
    tokens, source, done = start, 0, 0
    for number in sorted(range(len(lines)), key=lambda number: places[number]):
        before, value, after = pieces[number]
        tokens += text[done : places[number]] + before
        done = places[number]
        if number == 0:
            source = len(tokens)
        tokens += value + after
    tokens += text[done:] + end
    scored = list(range(length - len(answer), length))
    return Example(tokens, scored, [scored[0] - source] * len(answer))


Pieces = list[tuple[list[int], list[int], list[int]]]


def encoded(lines: Sequence[Line], question: str, encode: Encode) -> tuple[Pieces, list[int]]:
    """The tokens before, in and behind the number of every line; and the question's, with the answer."""
    pieces = [(encode("\n" + line.before), encode(line.number), encode(line.after)) for line in lines]
    return pieces, encode("\n" + question) + pieces[0][1]


def size(pieces: Pieces, end: Sequence[int]) -> int:
    return sum(len(part) for piece in pieces for part in piece) + len(end)


def longest_number(encode: Encode) -> int:
    """The number of most tokens among some of those that are hidden: a tokenizer may join digits."""
    return max(range(10_000, 100_000, 997), key=lambda number: len(encode(f" {number}")))


def line_breaks(encode: Encode) -> frozenset[int]:
    """The tokens that begin with a line break: those that come first for one with anything that may merge with it."""
    letter = encode("x")
    blanks = [
        "\r\n",
        *("\n" * lines + blank * count for lines in (1, 2, 3) for blank in " \t" for count in range(40)),
    ]
    encoded = [encode("x" + blank) for blank in blanks]
    return frozenset(ids[len(letter)] for ids in encoded if len(ids) > len(letter) and ids[: len(letter)] == letter)


@dataclass(frozen=True)
class Accuracy:
    """How many of how many answers were right."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """NaN where there was nothing to answer."""
        return self.correct / self.total if self.total else float("nan")


def accuracy_by_distance(
    model: Decoder, examples: Sequence[Example], edges: Sequence[int], right: Sequence[Sequence[bool]] | None = None
) -> dict[tuple[int, int], Accuracy]:
    """How many answers are right, by their distance: (low, high) holds those of low <= distance < high.

    `right` is what `right_answers` said of every example, where that is known already. InputError for edges that do
    not rise and for a distance outside them.
    """
    if len(edges) < 2 or any(low >= high for low, high in pairwise(edges)):
        raise InputError(f"edges {list(edges)}: at least two, each larger than the one before")
    distances = [distance for example in examples for distance in example.distances]
    if outside := [distance for distance in distances if not edges[0] <= distance < edges[-1]]:
        raise InputError(f"an answer at a distance of {outside[0]} is outside the edges {edges[0]} to {edges[-1]}")
    if right is None:
        right = [right_answers(model, example) for example in examples]
    answers = [answer for each in right for answer in each]
    found = {}
    for low, high in pairwise(edges):
        own = [answer for answer, distance in zip(answers, distances, strict=True) if low <= distance < high]
        found[low, high] = Accuracy(sum(own), len(own))
    return found


def solved(model: Decoder, examples: Sequence[Example]) -> list[bool]:
    """Of every example, whether all its answers are right.

    The true tokens stand before each answer. For an answer of several tokens that is the same as free greedy
    decoding: as long as all are right, what was decoded is what is true, and at the first wrong one both have failed.
    """
    return [all(right_answers(model, example)) for example in examples]


@torch.no_grad()
def right_answers(model: Decoder, example: Example) -> list[bool]:
    """Which answers are the tokens with the largest logits, given the true tokens before them.

    What stands before the first answer goes through with `last_only`, so a long prompt costs one token's logits; what
    follows, up to the token before the last answer, goes through at once.
    """
    tokens = torch.tensor([example.tokens], device=model.device)
    first, last = example.scored[0], example.scored[-1]
    cache = model.make_cache(max_length=last)
    chosen = model(tokens[:, :first], cache, last_only=True)[0].argmax(-1)
    if last > first:
        chosen = torch.cat([chosen, model(tokens[:, first:last], cache)[0].argmax(-1)])
    # chosen[i] is about the token at first + i.
    right: list[bool] = (chosen == tokens[0, first : last + 1]).tolist()
    return [right[place - first] for place in example.scored]


def batch_of(examples: Sequence[Example]) -> tuple[Int[Tensor, "1 T"], Int[Tensor, " T"], list[int]]:
    """Examples laid end to end for training: inputs, targets, and how many tokens each example has of them.

    An example's last token is a target only; a target that is no answer is -100, which cross entropy ignores.
    """
    inputs, targets = [], []
    for example in examples:
        inputs += example.tokens[:-1]
        scored = set(example.scored)
        targets += [
            token if place in scored else NOT_SCORED for place, token in enumerate(example.tokens) if place > 0
        ]
    return torch.tensor([inputs]), torch.tensor(targets), [len(example.tokens) - 1 for example in examples]


def _at_least(field: str, value: int, needed: int, what: str) -> None:
    if value < needed:
        raise ValueError(f"{field} {value} is too small for {what}: {needed} would be enough")


def _shares(vocab_size: int, first: int, count: int) -> list[range]:
    """The ids from `first` on, in `count` equal shares."""
    size = (vocab_size - first) // count
    return [range(first + size * share, first + size * (share + 1)) for share in range(count)]


def _places(rng: random.Random, start: int, stop: int, count: int, width: int) -> list[int]:
    """Where `count` runs of `width` tokens begin between `start` and `stop`, ascending; any arrangement that does
    not overlap is as probable as any other."""
    chosen = sorted(rng.sample(range(stop - start - count * (width - 1)), count))
    return [start + place + number * (width - 1) for number, place in enumerate(chosen)]
