"""FLOPs of one decoded token and of a prefill, by part: 2 for every multiply-add of a matrix product."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvell.config import ModelConfig
from kvell.layers.cost import Form, Weight, Work
from kvell.planning.model_cost import Block, blocks, last_writer

# "Equivalent FP8 FLOPs", in which DeepSeek compares V4 with V3.2 (arXiv 2606.19348): a product of 16-bit numbers (the
# core attention, the head, the compressors) is worth two of 8 bits, one of an FP4 indexer half. Other weights count
# 1: FP4 experts meet FP8 activations, and routers and hyper-connections are 0.1 % of it. Sums in fp32 outside the
# matrix units, over an indexer's heads and over residual streams, are not counted.
TWICE = ("head", "compressor")
WORK_WORTH: dict[Form, float] = {"fp32": 0.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5, "int64": 0.0}


@dataclass(frozen=True)
class Flops:
    """FLOPs by part, and all of them in equivalent FP8 FLOPs."""

    by_part: dict[str, int]
    equivalent_fp8: float

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


def decode_flops(config: ModelConfig, context: int) -> Flops:
    """Of the token that makes the context `context` tokens long."""
    counted: list[tuple[Weight | Work, int]] = []
    for block in blocks(config):
        if block.place != "draft":
            counted += [(weight, weight.multiply_adds) for weight in block.cost.weights]
            counted += [(work, work.per_row * work.rows(context)) for work in block.cost.works]
    return _summed(counted)


def prefill_flops(config: ModelConfig, context: int, *, last_only: bool = True) -> Flops:
    """Of a prompt of `context` tokens in one step; with `last_only` without what only other tokens' logits need."""
    counted: list[tuple[Weight | Work, int]] = []
    last = last_writer(config)
    for block in blocks(config):
        if block.place != "draft":
            counted += _prefilled(block, context, last if last_only else None)
    return _summed(counted)


def _prefilled(block: Block, context: int, last: int | None) -> Iterator[tuple[Weight | Work, int]]:
    """A block's multiply-adds where only the last token is wanted behind layer `last`; None wants all tokens."""
    within = last is not None and block.layer == last and block.place in ("attention", "attention frame")
    whole = last is None or block.layer < last
    costs: list[Weight | Work] = [*block.cost.weights, *block.cost.works]
    for one in costs:
        for_all = whole or (within and one.every_token)
        # The last writer's connection is read once for all tokens, and once more for the one that goes on.
        again = within and one.every_token and block.place == "attention frame"
        if isinstance(one, Weight):
            yield one, one.multiply_adds * ((context if for_all else 1) + again)
        else:
            rows = one.rows_of_all(context) if for_all else one.rows(context)
            yield one, one.per_row * (rows + (one.rows(context) if again else 0))


def _summed(counted: list[tuple[Weight | Work, int]]) -> Flops:
    by_part: dict[str, int] = {}
    equivalent = 0.0
    for one, multiply_adds in counted:
        if multiply_adds:
            by_part[one.part] = by_part.get(one.part, 0) + 2 * multiply_adds
            equivalent += 2 * multiply_adds * _worth(one)
    return Flops(by_part, equivalent)


def _worth(one: Weight | Work) -> float:
    """Equivalent FP8 FLOPs of a FLOP."""
    if isinstance(one, Weight):
        return 2.0 if one.part in TWICE else 1.0
    return WORK_WORTH[one.form]
