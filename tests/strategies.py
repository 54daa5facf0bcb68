"""Small random models over everything that is registered.

Each kind of part has a strategy here, and test_house_rule.py fails for a registered kind that has none.
"""

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy, composite

from kvell import Decoder, ModelConfig
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
from kvell.layers.rotary import DefaultRotary, ProportionalRotary, YarnRotary
from kvell.layers.routers import HashRouter, MLPRouter, SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter

VOCAB, HIDDEN = 31, 16

ACTIVATIONS = st.sampled_from(["silu", "gelu_tanh"])
ROTARIES = st.one_of(
    st.none(),
    st.builds(DefaultRotary, theta=st.sampled_from([100.0, 10000.0]), fraction=st.sampled_from([0.5, 1.0])),
    st.builds(ProportionalRotary, theta=st.just(1000.0), fraction=st.sampled_from([0.25, 0.5])),
    st.builds(
        YarnRotary,
        theta=st.just(500.0),
        fraction=st.sampled_from([0.5, 1.0]),
        factor=st.just(4.0),
        original_positions=st.just(16),
        attention_factor=st.sampled_from([None, 1.0, 1.2]),
    ),
)
WINDOWS = st.one_of(st.none(), st.integers(1, 12))
LIMITS = st.sampled_from([None, 0.5])
DENSE = st.builds(GatedMLP, intermediate_size=st.just(24), activation=ACTIVATIONS, limit=LIMITS)


@composite
def mlp_router(draw: DrawFn, earlier: list[Any]) -> MLPRouter:
    """A router with a state of its own, or one that adds an earlier layer's."""
    states = [i for i, part in enumerate(earlier) if router_of(part) == "mlp"]
    return MLPRouter(
        hidden_size=6,
        state_source=draw(st.sampled_from(states)) if states and draw(st.booleans()) else None,
        skip_expert=draw(st.sampled_from([None, "identity", "zero"])),
    )


# By kind; a strategy is told the feed-forwards of the earlier layers.
ROUTERS = {
    "sigmoid": lambda earlier: st.builds(SigmoidRouter, logit_softcap=st.sampled_from([0.0, 5.0])),
    "sqrt_softplus": lambda earlier: st.builds(SqrtSoftplusRouter),
    "hash": lambda earlier: st.builds(HashRouter, score=st.sampled_from(["sqrt_softplus", "sigmoid"])),
    "softmax": lambda earlier: st.builds(SoftmaxRouter),
    "mlp": mlp_router,
}


def router_of(part: Any) -> str | None:
    """The kind of a feed-forward's router, if it has one."""
    return getattr(getattr(getattr(part, "mixture", part), "router", None), "kind", None)


@composite
def mixture(draw: DrawFn, earlier: list[Any]) -> MixtureOfExperts:
    return MixtureOfExperts(
        num_experts=draw(st.integers(3, 5)),
        top_k=draw(st.integers(1, 3)),
        intermediate_size=8,
        shared_intermediate_size=draw(st.sampled_from([None, 12])),
        router=draw(ROUTERS[draw(st.sampled_from(sorted(ROUTERS)))](earlier)),
        routed_scale=draw(st.sampled_from([1.0, 2.5])),
        activation=draw(ACTIVATIONS),
        limit=draw(LIMITS),
    )


@composite
def shared_keys(draw: DrawFn, earlier: list[Any]) -> dict[str, Any] | None:
    """The fields of a layer that reads an earlier layer's keys and values, or None for one that makes its own."""
    producers = [i for i, a in enumerate(earlier) if hasattr(a, "num_kv_heads") and a.kv_source is None]
    if not producers or not draw(st.booleans()):
        return None
    source = draw(st.sampled_from(producers))
    producer = earlier[source]
    window = producer.sliding_window
    return {
        "num_heads": producer.num_kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": producer.num_kv_heads,
        "head_dim": producer.head_dim,
        "rotary": producer.rotary,
        "kv_source": source,
        "sliding_window": draw(WINDOWS if window is None else st.integers(1, window)),
    }


@composite
def grouped_query(draw: DrawFn, earlier: list[Any]) -> GroupedQuery:
    """A layer with keys of its own, or one that reads an earlier layer's."""
    common: dict[str, Any] = {
        "query_norm": draw(st.booleans()),
        "output_gate": draw(st.sampled_from([None, "per_head", "per_element"])),
        "bias": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.5])),
    }
    if (shared := draw(shared_keys(earlier))) is not None:
        return GroupedQuery(**common, **shared)
    kv_heads = draw(st.sampled_from([1, 2]))
    return GroupedQuery(
        **common,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        rotary=draw(ROTARIES),
        sliding_window=draw(WINDOWS),
        key_norm=draw(st.booleans()),
        value_norm=draw(st.booleans()),
        value_from_key=draw(st.booleans()),
    )


@composite
def convolutional(draw: DrawFn, earlier: list[Any]) -> Convolutional:
    """A layer with keys of its own, or one that reads an earlier layer's."""
    common: dict[str, Any] = {
        "depthwise_kernel": draw(st.integers(1, 3)),
        "grouped_kernel": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
    }
    if (shared := draw(shared_keys(earlier))) is not None:
        return Convolutional(**common, **shared)
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Convolutional(
        **common,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        rotary=draw(ROTARIES),
        sliding_window=draw(WINDOWS),
    )


@composite
def compressed(draw: DrawFn, earlier: list[Any], picking: bool = True) -> Compressed:
    """A layer with a window only, with all entries, or with picked ones; or one that reads an earlier layer's."""
    heads = draw(st.sampled_from([2, 4]))
    common: dict[str, Any] = {
        "num_heads": heads,
        "query_rank": 12,
        "output_groups": draw(st.sampled_from([1, heads])),
        "output_rank": 6,
    }
    indexer = st.builds(
        Indexer, num_heads=st.integers(1, 3), head_dim=st.sampled_from([4, 8]), top_k=st.sampled_from([1, 2, 5, 40])
    )
    producers = [i for i, a in enumerate(earlier) if isinstance(a, Compressed) and a.kv_source is None]
    if producers and draw(st.booleans()):
        source = draw(st.sampled_from(producers))
        producer = earlier[source]
        source_picks = producer.indexer is not None and draw(st.booleans())
        own_picks = producer.compressor is not None and not source_picks
        return Compressed(
            **common,
            head_dim=producer.head_dim,
            sliding_window=draw(st.integers(1, producer.sliding_window)),
            rotary=producer.rotary,
            rotary_width=producer.rotary_width,
            compressor=producer.compressor,
            indexer=draw(st.one_of(st.none(), indexer)) if own_picks else None,
            kv_source=source,
            source_picks=source_picks,
        )
    compressor = draw(
        st.one_of(
            st.none(),
            st.builds(Compressor, ratio=st.integers(2, 9), overlap=st.booleans()),
        )
    )
    return Compressed(
        **common,
        head_dim=draw(st.sampled_from([8, 16])),
        sliding_window=draw(st.integers(1, 12)),
        rotary=draw(
            st.sampled_from(
                [
                    DefaultRotary(theta=100.0),
                    YarnRotary(theta=500.0, factor=4.0, original_positions=16, attention_factor=1.0),
                ]
            )
        ),
        rotary_width=draw(st.sampled_from([2, 4])),
        compressor=compressor,
        indexer=draw(st.one_of(st.none(), indexer)) if picking and compressor is not None else None,
    )


# By kind; an attention's and a feed-forward's strategy is told those of the earlier layers.
ATTENTIONS = {"grouped_query": grouped_query, "convolutional": convolutional, "compressed": compressed}
FEED_FORWARDS = {
    "gated_mlp": lambda earlier: DENSE,
    "mixture_of_experts": mixture,
    "dense_beside_experts": lambda earlier: st.builds(DenseBesideExperts, dense=DENSE, mixture=mixture(earlier)),
}
CONNECTIONS: dict[str, SearchStrategy[Any]] = {
    "plain": st.builds(PlainResidual),
    "scaled": st.builds(ScaledResidual),
    "hyper": st.builds(
        HyperConnections, streams=st.integers(1, 4), iterations=st.sampled_from([1, 20]), constrained=st.booleans()
    ),
}


@composite
def configs(draw: DrawFn) -> ModelConfig:
    attentions: list[Any] = []
    feed_forwards: list[Any] = []
    for _ in range(draw(st.integers(1, 5))):
        attentions.append(draw(ATTENTIONS[draw(st.sampled_from(sorted(ATTENTIONS)))](attentions)))
        feed_forwards.append(draw(FEED_FORWARDS[draw(st.sampled_from(sorted(FEED_FORWARDS)))](feed_forwards)))
    norms = st.sampled_from(["pre", "sandwich", "post"])
    draft = LayerConfig(
        attention=draw(compressed([], picking=False)), feed_forward=draw(mixture([])), attention_norm=draw(norms)
    )
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_positions=256,
        connection=draw(st.one_of(*CONNECTIONS.values())),
        per_layer_embedding=draw(st.one_of(st.none(), st.just(PerLayerEmbedding(width=4)))),
        embedding_scale=draw(st.sampled_from([1.0, 4.0])),
        tied_head=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([None, 30.0])),
        layers=tuple(
            LayerConfig(
                attention=attention,
                feed_forward=feed_forward,
                attention_norm=draw(norms),
                feed_forward_norm=draw(norms),
                layer_scalar=draw(st.booleans()),
            )
            for attention, feed_forward in zip(attentions, feed_forwards, strict=True)
        ),
        draft=draw(st.sampled_from([None, DraftConfig(layer=draft)])),
    )


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model none of whose weights has a value that hides a mistake, as ones and zeros would."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config).eval()
    with torch.no_grad():
        for _, tensor in model.named_tensors():
            if not tensor.is_floating_point():
                continue
            spread = 0.15 if tensor.dim() > 1 else 0.2
            tensor.mul_(0 if tensor.dim() > 1 else 1).add_(torch.randn(tensor.shape, generator=generator) * spread)
    return model
