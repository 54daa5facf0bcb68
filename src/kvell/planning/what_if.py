"""What each technique saves: a config counted again without it.

The waterfall begins with every layer keeping keys and values of its own for every token, and takes techniques up one
after another. How much one saves depends on those before it, so each is also shown alone. The configs counted here
need not be ones that can be built: nothing is.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from kvell.cache import streams_nbytes
from kvell.config import LayerConfig, ModelConfig
from kvell.layers.cost import Technique
from kvell.layers.grouped_query import GroupedQuery
from kvell.plan_changes import CHANGES, GQA_HEADS, GQA_WIDTH, check_changes
from kvell.planning.flops import decode_flops
from kvell.planning.formats import StorageFormat

# In the order in which they are left out: what a layer is without compression decides what is left to leave out.
ORDER: tuple[Technique, ...] = ("compression", "windows", "sharing", "grouping")


@dataclass(frozen=True)
class Changed:
    """One sequence's cache, and a decoded token's FLOPs, after a change."""

    change: str
    cache_bytes: int
    flops_per_token: int


@dataclass(frozen=True)
class Saving:
    """What a technique saves behind those before it, and what it would save alone."""

    technique: str
    saved_bytes: int
    saved_alone_bytes: int


@dataclass(frozen=True)
class Waterfall:
    """From a cache of `plain_bytes` to `cache_bytes`."""

    plain_bytes: int
    savings: tuple[Saving, ...]
    cache_bytes: int


def without(config: ModelConfig, techniques: Collection[Technique]) -> ModelConfig:
    """The config without these techniques; to be counted, not built."""
    layers: list[LayerConfig] = []
    for index, layer in enumerate(config.layers):
        attention = layer.attention
        for technique in ORDER:
            if technique in techniques:
                attention = attention.without(technique, config.site(index))
        layers.append(layer.model_copy(update={"attention": attention}))
    return config.model_copy(update={"layers": tuple(layers)})


def changed_config(config: ModelConfig, change: str) -> ModelConfig:
    """The config after a change by name. InputError, with the known ones, for another."""
    check_changes([change])
    if CHANGES[change].techniques:
        return without(config, CHANGES[change].techniques)
    layers = []
    for layer in config.layers:
        heads = layer.attention.describe().num_heads
        attention = GroupedQuery(
            num_heads=-(-heads // GQA_HEADS) * GQA_HEADS, num_kv_heads=GQA_HEADS, head_dim=GQA_WIDTH, rotary=None
        )
        layers.append(layer.model_copy(update={"attention": attention}))
    return config.model_copy(update={"layers": tuple(layers)})


def what_if(config: ModelConfig, change: str, context: int, form: StorageFormat) -> Changed:
    """One change, counted."""
    other = changed_config(config, change)
    return Changed(change, _nbytes(other, context, form), decode_flops(other, context).total)


def waterfall(config: ModelConfig, context: int, form: StorageFormat) -> Waterfall:
    """Compression, windows and sharing, one after another and each alone. Techniques that change nothing are left
    out. Rows are counted as `form` stores plain ones: a packed row belongs to its technique."""
    own = [technique for technique in get_args(Technique) if technique != "grouping"]
    order = [technique for technique in ORDER if technique in own]
    kept: set[Technique] = set()
    plain = before = _nbytes(without(config, order), context, form)
    savings = []
    for technique in order:
        kept.add(technique)
        after = _nbytes(without(config, set(order) - kept), context, form)
        alone = plain - _nbytes(without(config, set(order) - {technique}), context, form)
        if before != after or alone:
            savings.append(Saving(technique, before - after, alone))
        before = after
    return Waterfall(plain, tuple(savings), before)


def _nbytes(config: ModelConfig, context: int, form: StorageFormat) -> int:
    return streams_nbytes(config.streams(), context, 0, form.row_dtype)
