"""A few small models in which every two techniques stand together at least once.

All techniques with all others would be thousands of models; of the mistakes that two of them make together, all pairs
find as many. A technique is a part of some kind, in a variant that has code of its own. Those that stand in layers
have room for LAYERS of them in a model; of the others a model has one each.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from typing import Any, Literal

from strategies import HIDDEN, VOCAB

from kvell import ModelConfig
from kvell.config import DraftConfig, LayerConfig
from kvell.layers.compressed import Compressed
from kvell.layers.compressor import Compressor
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import DenseBesideExperts, MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnections
from kvell.layers.indexer import Indexer
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.residual import PlainResidual, ScaledResidual
from kvell.layers.rotary import DefaultRotary, YarnRotary
from kvell.layers.routers import HashRouter, MLPRouter, SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter

LAYERS = 5
Place = Literal["attention", "feed_forward", "connection", "per_layer_embedding", "draft"]
ROOM: dict[Place, int] = {
    "attention": LAYERS,
    "feed_forward": LAYERS,
    "connection": 1,
    "per_layer_embedding": 1,
    "draft": 1,
}


@dataclass(frozen=True)
class Technique:
    """`make` builds the part, given the index of the layer that it reads: one that holds the technique `source`."""

    place: Place
    name: str
    make: Callable[[int | None], Any]
    source: str | None = None


def grouped_query(source: int | None, **fields: Any) -> GroupedQuery:
    return GroupedQuery(num_kv_heads=2, head_dim=8, rotary=PLAIN, kv_source=source, **({"num_heads": 4} | fields))


def convolutional(source: int | None, **fields: Any) -> Convolutional:
    return Convolutional(num_kv_heads=2, head_dim=8, rotary=PLAIN, kv_source=source, **({"num_heads": 4} | fields))


def compressed(source: int | None, **fields: Any) -> Compressed:
    return Compressed(
        head_dim=8,
        rotary=TURNED,
        rotary_width=4,
        query_rank=12,
        output_rank=6,
        kv_source=source,
        **({"num_heads": 4, "output_groups": 2, "sliding_window": 5} | fields),
    )


def mixture(router: Any, **fields: Any) -> MixtureOfExperts:
    return MixtureOfExperts(num_experts=4, top_k=2, intermediate_size=8, router=router, **fields)


def draft(attention: Any, feed_forward: Any) -> DraftConfig:
    return DraftConfig(layer=LayerConfig(attention=attention, feed_forward=feed_forward))


PLAIN = DefaultRotary(theta=1000.0, fraction=0.5)
TURNED = YarnRotary(theta=500.0, factor=4.0, original_positions=16, attention_factor=1.0)
HEAVY, SPARSE = Compressor(ratio=5), Compressor(ratio=3, overlap=True)
INDEXER, OTHER_INDEXER = (Indexer(num_heads=heads, head_dim=8, top_k=2) for heads in (2, 3))
DENSE = GatedMLP(intermediate_size=24)
STATE = MLPRouter(hidden_size=6, skip_expert="identity")

TECHNIQUES = (
    Technique("attention", "grouped-query", grouped_query),
    Technique("attention", "grouped-query, windowed", lambda _: grouped_query(None, sliding_window=6)),
    Technique("attention", "convolutional", convolutional),
    Technique("attention", "convolutional, windowed", lambda _: convolutional(None, sliding_window=4)),
    Technique("attention", "window only", compressed),
    Technique("attention", "heavily compressed", lambda _: compressed(None, compressor=HEAVY)),
    Technique("attention", "sparse", lambda _: compressed(None, compressor=SPARSE, indexer=INDEXER)),
    Technique(
        "attention",
        "grouped-query of grouped-query",
        lambda at: grouped_query(at, num_heads=2, sliding_window=7, output_gate="per_head"),
        "grouped-query",
    ),
    Technique(
        "attention", "grouped-query of convolutional", lambda at: grouped_query(at, num_heads=6), "convolutional"
    ),
    Technique(
        "attention", "convolutional of grouped-query", lambda at: convolutional(at, num_heads=2), "grouped-query"
    ),
    Technique(
        "attention",
        "convolutional of convolutional",
        lambda at: convolutional(at, num_heads=6, sliding_window=7, grouped_kernel=3),
        "convolutional",
    ),
    Technique(
        "attention",
        "heavily compressed of the same",
        lambda at: compressed(at, compressor=HEAVY, num_heads=2, sliding_window=3),
        "heavily compressed",
    ),
    Technique(
        "attention",
        "sparse with its source's picks",
        lambda at: compressed(at, compressor=SPARSE, source_picks=True),
        "sparse",
    ),
    Technique(
        "attention",
        "sparse with picks of its own",
        lambda at: compressed(at, compressor=SPARSE, indexer=OTHER_INDEXER, sliding_window=2),
        "sparse",
    ),
    Technique("attention", "every entry of a sparse one", lambda at: compressed(at, compressor=SPARSE), "sparse"),
    Technique("feed_forward", "dense", lambda _: DENSE),
    Technique("feed_forward", "sigmoid router", lambda _: mixture(SigmoidRouter(logit_softcap=5.0))),
    Technique(
        "feed_forward", "sqrt-softplus router", lambda _: mixture(SqrtSoftplusRouter(), shared_intermediate_size=12)
    ),
    Technique("feed_forward", "hash router", lambda _: mixture(HashRouter(), limit=0.5)),
    Technique("feed_forward", "softmax router", lambda _: mixture(SoftmaxRouter(), routed_scale=2.5)),
    Technique("feed_forward", "MLP router", lambda _: mixture(STATE)),
    Technique(
        "feed_forward",
        "MLP router with an earlier state",
        lambda at: mixture(STATE.model_copy(update={"state_source": at, "skip_expert": "zero"})),
        "MLP router",
    ),
    Technique(
        "feed_forward",
        "dense beside experts",
        lambda _: DenseBesideExperts(dense=DENSE, mixture=mixture(SoftmaxRouter(), activation="gelu_tanh")),
    ),
    Technique("connection", "plain residual", lambda _: PlainResidual()),
    Technique("connection", "scaled residual", lambda _: ScaledResidual()),
    Technique("connection", "hyper-connections", lambda _: HyperConnections(streams=3, iterations=4)),
    Technique("per_layer_embedding", "per-layer embeddings", lambda _: PerLayerEmbedding(width=4)),
    Technique("per_layer_embedding", "no per-layer embeddings", lambda _: None),
    Technique("draft", "draft block", lambda _: draft(compressed(None, compressor=HEAVY), mixture(STATE))),
    Technique("draft", "no draft block", lambda _: None),
)
BY_NAME = {technique.name: technique for technique in TECHNIQUES}

Pair = frozenset[str]


def pairs_of(names: list[str]) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(names, 2)}


def wanted_pairs() -> list[Pair]:
    """Every two techniques that can stand in one model: of a place with room for one, no two can."""
    return [
        frozenset((one.name, other.name))
        for one, other in combinations(TECHNIQUES, 2)
        if one.place != other.place or ROOM[one.place] > 1
    ]


def with_source(name: str) -> list[str]:
    """A technique behind what it reads."""
    source = BY_NAME[name].source
    return [name] if source is None else [*with_source(source), name]


def joined(model: list[str], name: str) -> list[str] | None:
    """The model with this technique and what it reads, or None where it is there already or has no room."""
    if name in model:
        return None
    larger = [*model, *(one for one in with_source(name) if one not in model)]
    for place, room in ROOM.items():
        if sum(BY_NAME[one].place == place for one in larger) > room:
            return None
    return larger


@cache
def models() -> tuple[tuple[str, ...], ...]:
    """The names of each model's techniques, what is read before what reads it.

    A model begins with a pair that no model has yet, those first that take up most room with what they read. It is
    filled with one technique after another: always the one with which most pairs meet for the first time for every
    place taken, and of equal ones the one that has been used least.
    """
    missing, found = set(wanted_pairs()), []
    used: Counter[str] = Counter()
    for pair in sorted(wanted_pairs(), key=lambda pair: -len({one for name in pair for one in with_source(name)})):
        if pair not in missing:
            continue
        model = list[str]()
        for name in sorted(pair, key=list(BY_NAME).index):
            model = joined(model, name) or model
        while options := [larger for name in BY_NAME if (larger := joined(model, name)) is not None]:
            model = min(options, key=partial(_cost, model, missing, used))
        missing -= pairs_of(model)
        used.update(model)
        found.append(tuple(model))
    return tuple(found)


def _cost(model: list[str], missing: set[Pair], used: Counter[str], larger: list[str]) -> tuple[float, float]:
    """How little is won by making the model larger, for every technique that is added."""
    added = larger[len(model) :]
    won = len((pairs_of(larger) - pairs_of(model)) & missing)
    return -won / len(added), sum(used[name] for name in added) / len(added)


def config_of(names: tuple[str, ...], number: int) -> ModelConfig:
    """The model of these techniques; `number` varies what is no technique: norms, the head, layer scalars, and
    whether those that read others stand in the order of their names or behind all that read none."""
    techniques = [BY_NAME[name] for name in names]
    if number % 2:
        techniques.sort(key=lambda technique: technique.source is not None)
    parts = {place: _parts([one for one in techniques if one.place == place]) for place in ROOM}
    norms: list[Literal["pre", "sandwich", "post"]] = ["pre", "sandwich", "post"]
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_positions=256,
        layers=tuple(
            LayerConfig(
                attention=attention,
                feed_forward=feed_forward,
                attention_norm=norms[(number + index) % 3],
                feed_forward_norm="post" if feed_forward.kind == "dense_beside_experts" else norms[number % 3],
                layer_scalar=(number + index) % 2 == 0,
            )
            for index, (attention, feed_forward) in enumerate(
                zip(parts["attention"], parts["feed_forward"], strict=True)
            )
        ),
        connection=parts["connection"][0],
        per_layer_embedding=parts["per_layer_embedding"][0],
        draft=parts["draft"][0],
        tied_head=number % 2 == 0,
        embedding_scale=4.0 if number % 3 == 0 else 1.0,
        logit_softcap=30.0 if number % 4 == 0 else None,
    )


def _parts(techniques: list[Technique]) -> list[Any]:
    names = [technique.name for technique in techniques]
    return [one.make(None if one.source is None else names.index(one.source)) for one in techniques]


def configs() -> dict[str, ModelConfig]:
    """The models' configs, by the techniques in them."""
    return {" + ".join(names): config_of(names, number) for number, names in enumerate(models())}
