"""Small models with everything that a family mixes, where drawn ones would take too long."""

from typing import Any

from strategies import VOCAB

from kvell import ModelConfig
from kvell.config import LayerConfig
from kvell.layers.compressed import Compressed
from kvell.layers.compressor import Compressor
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnections
from kvell.layers.indexer import Indexer
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.residual import PlainResidual, ScaledResidual
from kvell.layers.rotary import DefaultRotary, ProportionalRotary
from kvell.layers.routers import MLPRouter, SigmoidRouter

MIXED = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    max_positions=64,
    per_layer_embedding=PerLayerEmbedding(width=4),
    layers=tuple(
        LayerConfig(
            attention=GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=8, rotary=DefaultRotary(theta=100.0)),
            feed_forward=MixtureOfExperts(num_experts=3, top_k=2, intermediate_size=8, router=router),
        )
        for router in (SigmoidRouter(), MLPRouter(hidden_size=6, skip_expert="identity"))
    ),
)


def model_like(kind: str) -> ModelConfig:
    turn = DefaultRotary(theta=100.0)
    connections = {"deepseek_v4": HyperConnections(streams=3, iterations=4), "zaya": ScaledResidual()}
    common: dict[str, Any] = {
        "num_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "rotary": turn,
        "rotary_width": 4,
        "query_rank": 12,
        "output_rank": 6,
    }
    layers: dict[str, list[Any]] = {
        "deepseek_v4": [
            Compressed(
                **common,
                compressor=Compressor(ratio=2, overlap=True),
                indexer=Indexer(num_heads=2, head_dim=4, top_k=3),
            ),
            Compressed(**common, compressor=Compressor(ratio=8)),
        ],
        "zaya": [
            Convolutional(num_heads=4, num_kv_heads=2, head_dim=8, rotary=DefaultRotary(theta=100.0, fraction=0.5)),
            Convolutional(num_heads=2, num_kv_heads=2, head_dim=8, rotary=None, sliding_window=4),
        ],
        "gemma4": [
            GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=8, rotary=turn, sliding_window=4),
            GroupedQuery(
                num_heads=2, num_kv_heads=1, head_dim=16, rotary=ProportionalRotary(theta=1000.0, fraction=0.25)
            ),
            GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=8, rotary=turn, sliding_window=4, kv_source=0),
        ],
    }
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        max_positions=64,
        connection=connections.get(kind, PlainResidual()),
        layers=tuple(
            LayerConfig(attention=layer, feed_forward=GatedMLP(intermediate_size=24)) for layer in layers[kind]
        ),
    )
