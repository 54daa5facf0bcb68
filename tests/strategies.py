"""Small random models over everything that is registered.

Each kind of part has a strategy here, and test_house_rule.py fails for a registered kind that has none.
"""

from typing import Annotated, Any, get_args, get_origin

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy, composite

from kvell import Decoder, ModelConfig
from kvell.config import LayerConfig
from kvell.layers.experts import DenseBesideExperts, MixtureOfExperts, SigmoidRouter, SoftmaxRouter
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.part import Part
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.residual import PlainResidual
from kvell.layers.rotary import DefaultRotary, ProportionalRotary, YarnRotary

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
ROUTERS = st.one_of(
    st.builds(SigmoidRouter, logit_softcap=st.sampled_from([0.0, 5.0])),
    st.builds(SoftmaxRouter),
)
DENSE = st.builds(GatedMLP, intermediate_size=st.just(24), activation=ACTIVATIONS)
MIXTURE = st.builds(
    MixtureOfExperts,
    num_experts=st.integers(3, 5),
    top_k=st.integers(1, 3),
    intermediate_size=st.just(8),
    shared_intermediate_size=st.sampled_from([None, 12]),
    router=ROUTERS,
    routed_scale=st.sampled_from([1.0, 2.5]),
    activation=ACTIVATIONS,
)


@composite
def grouped_query(draw: DrawFn, earlier: list[Any]) -> GroupedQuery:
    """A layer with keys of its own, or one that reads an earlier layer's."""
    common: dict[str, Any] = {
        "query_norm": draw(st.booleans()),
        "output_gate": draw(st.sampled_from([None, "per_head", "per_element"])),
        "bias": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.5])),
    }
    producers = [i for i, a in enumerate(earlier) if isinstance(a, GroupedQuery) and a.kv_source is None]
    if producers and draw(st.booleans()):
        source = draw(st.sampled_from(producers))
        producer = earlier[source]
        window = producer.sliding_window
        return GroupedQuery(
            **common,
            num_heads=producer.num_kv_heads * draw(st.integers(1, 3)),
            num_kv_heads=producer.num_kv_heads,
            head_dim=producer.head_dim,
            rotary=producer.rotary,
            kv_source=source,
            sliding_window=draw(WINDOWS if window is None else st.integers(1, window)),
        )
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


# By kind; an attention's strategy is told the attentions of the earlier layers.
ATTENTIONS = {"grouped_query": grouped_query}
FEED_FORWARDS: dict[str, SearchStrategy[Any]] = {
    "gated_mlp": DENSE,
    "mixture_of_experts": MIXTURE,
    "dense_beside_experts": st.builds(DenseBesideExperts, dense=DENSE, mixture=MIXTURE),
}
CONNECTIONS: dict[str, SearchStrategy[Any]] = {"plain": st.builds(PlainResidual)}


def registered_kinds(union: Any) -> set[str]:
    """The kinds of a registry's union."""
    part = get_args(union)[0] if get_origin(union) is Annotated else union
    parts: tuple[type[Part], ...] = get_args(part) or (part,)
    return {one.model_fields["kind"].default for one in parts}


@composite
def configs(draw: DrawFn) -> ModelConfig:
    attentions: list[Any] = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(sorted(ATTENTIONS)))
        attentions.append(draw(ATTENTIONS[kind](attentions)))
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
                feed_forward=draw(st.one_of(*FEED_FORWARDS.values())),
                attention_norm=draw(st.sampled_from(["pre", "sandwich", "post"])),
                feed_forward_norm=draw(st.sampled_from(["pre", "sandwich", "post"])),
                layer_scalar=draw(st.booleans()),
            )
            for attention in attentions
        ),
    )


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model none of whose weights has a value that hides a mistake, as ones and zeros would."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config).eval()
    with torch.no_grad():
        for _, tensor in model.named_tensors():
            spread = 0.15 if tensor.dim() > 1 else 0.2
            tensor.mul_(0 if tensor.dim() > 1 else 1).add_(torch.randn(tensor.shape, generator=generator) * spread)
    return model
