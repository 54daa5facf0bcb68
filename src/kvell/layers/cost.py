"""What a part costs: its weights and its work, as plain values. Each technique states them in its own file; planning
adds them up and knows no technique.

    multiply-adds of one token = sum over weights of numel * used + sum over works of per_row * rows seen

A product counts 2 FLOPs per multiply-add. What is no matrix product (norms, activations, softmax, rotary, pooling) is
not counted: together it is well below a percent.

`every_token` marks what must be done for every token of a prompt because it makes rows that a stream keeps; the rest
of a layer is needed only for tokens whose output somebody wants. What people get wrong: counting all experts, or an
embedding table, as multiplied; and counting the last layers of a prefill for every token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

# What a plan lists apart.
WeightPart = Literal[
    "embedding",
    "head",
    "per-layer table",
    "per-layer embedding",
    "projections",
    "compressor",
    "indexer",
    "feed-forward",
    "experts",
    "router",
    "connection",
    "norms",
    "draft block",
]
WorkPart = Literal["attention", "indexer", "connection", "head"]

# The narrowest form in which a released model keeps a weight. fp32 and int64 are kept whatever the model's dtype is.
Form = Literal["fp32", "int64", "bf16", "fp8", "fp4"]

# What makes a context cheap, and a plan can leave out to see what it saves.
Technique = Literal["sharing", "windows", "compression", "grouping"]

Rows = tuple[int, str]  # a stream's rows, by the layer that holds them and the stream's name


@dataclass(frozen=True)
class Weight:
    """One tensor. A token uses `used[0]` of every `used[1]` parts of it: 6 of 256 experts, one row of a table.

    `multiplied` says whether a token is multiplied with what it uses. `learnt` is False for buffers.
    """

    name: str
    shape: tuple[int, ...]
    part: WeightPart
    form: Form
    multiplied: bool
    every_token: bool = False
    used: tuple[int, int] = (1, 1)
    learnt: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def multiply_adds(self) -> int:
        """Of one token."""
        return self.numel * self.used[0] // self.used[1] if self.multiplied else 0


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one query beyond its weights: `per_row` for each row that it sees.

    Of the rows made every `stride` tokens it sees those that are complete, at most the last or best `most`, and none
    if there are no more than `beyond` in all. `reads` are the streams whose rows it reads. `form` is the narrowest
    in which a released model computes it.
    """

    part: WorkPart
    per_row: int
    stride: int = 1
    most: int | None = None
    beyond: int = 0
    reads: tuple[Rows, ...] = ()
    form: Form = "bf16"
    every_token: bool = False

    def rows(self, tokens: int) -> int:
        """Rows that the last of `tokens` tokens sees."""
        complete = tokens // self.stride
        if complete <= self.beyond:
            return 0
        return complete if self.most is None else min(complete, self.most)

    def rows_of_all(self, tokens: int) -> int:
        """Rows that all of `tokens` tokens see, together."""
        stride, complete = self.stride, tokens // self.stride
        if complete <= self.beyond:
            return 0
        grown = complete if self.most is None else min(complete, self.most)
        # `stride` tokens see j rows, for each j up to the last one that still grows; then every token sees as many.
        before = stride * (grown - 1) * grown // 2 if grown else 0
        return before + (tokens - stride * grown + 1) * grown


class Cost(NamedTuple):
    """All weights and works of a part."""

    weights: tuple[Weight, ...] = ()
    works: tuple[Work, ...] = ()

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.weights + other.weights, self.works + other.works)

    def under(self, prefix: str, part: WeightPart | None = None) -> Self:
        """The same with names that begin with a module's; `part` takes the place of the weights' own."""
        weights = (replace(one, name=f"{prefix}.{one.name}", part=part or one.part) for one in self.weights)
        return self._replace(weights=tuple(weights))


def linear(
    name: str,
    rows: int,
    columns: int,
    part: WeightPart,
    *,
    bias: bool = False,
    every_token: bool = False,
    form: Form = "fp8",
) -> Cost:
    """A matrix (rows, columns) that tokens are multiplied with, and its bias."""
    matrix = Weight(f"{name}.weight", (rows, columns), part, form, multiplied=True, every_token=every_token)
    return Cost((matrix, vector(f"{name}.bias", rows, part=part))) if bias else Cost((matrix,))


def vector(name: str, *shape: int, part: WeightPart = "norms", form: Form = "bf16", learnt: bool = True) -> Weight:
    """Numbers that scale, shift or choose: no product of matrices."""
    return Weight(name, shape, part, form, multiplied=False, learnt=learnt)


def norm(name: str, width: int) -> Cost:
    """The weight of an RMSNorm."""
    return Cost((vector(f"{name}.weight", width),))


def per_token(part: WorkPart, multiply_adds: int, *, form: Form, every_token: bool = False) -> Work:
    """Work that does not grow with the context."""
    return Work(part, multiply_adds, most=1, form=form, every_token=every_token)


def together(costs: Iterable[Cost]) -> Cost:
    """The sum of several costs."""
    weights: list[Weight] = []
    works: list[Work] = []
    for cost in costs:
        weights += cost.weights
        works += cost.works
    return Cost(tuple(weights), tuple(works))
