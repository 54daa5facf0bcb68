"""What a part costs: its weights and its work, as plain values. Planning adds them up and knows no technique. Shapes
of weights are the module's; what shapes do not tell a technique states in its own file: the role of its weights
(`WeightRole`) and its work per row (`Work`).

    multiply-adds of one token = sum over weights of numel * used + sum over works of per_row * rows seen

A product counts 2 FLOPs per multiply-add. What is no matrix product (norms, activations, softmax, rotary, pooling) is
not counted: together it is well below a percent.

`every_token` marks what must be done for every token of a prompt because it makes rows that a stream keeps; the rest
of a layer is needed only for tokens whose output somebody wants. What people get wrong: counting all experts, or an
embedding table, as multiplied; and counting the last layers of a prefill for every token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
class WeightRole:
    """What a plan must know of a module's weights beside their shapes. A module states it in `weight_role`; it also
    applies to modules inside that have no role of their own. A weight is named by the submodule that holds it
    (`q_proj`), or by its own name where the module itself holds it.

    part         the heading under which a plan counts the weights; those of a norm always count as "norms"
    form         the narrowest form of the matrices in a released model; vectors and embedding tables are bf16
    every_token  weights that make rows which a stream keeps, so every token of a prompt needs them
    bf16         matrices that are bf16 in released models, whatever `form` says
    added        weights of two dimensions or more that are added or looked up, not multiplied with
    used         the share of a weight that a token uses, as (used, all) equal parts; all of it where none is given
    parts        weights that are counted under another heading
    """

    part: WeightPart
    form: Form = "fp8"
    every_token: tuple[str, ...] = ()
    bf16: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    used: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    parts: Mapping[str, WeightPart] = field(default_factory=dict)


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


def per_token(part: WorkPart, multiply_adds: int, *, form: Form, every_token: bool = False) -> Work:
    """Work that does not grow with the context."""
    return Work(part, multiply_adds, most=1, form=form, every_token=every_token)
