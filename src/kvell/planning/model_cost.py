"""The costs of a whole model: what its parts state, laid out as the Decoder puts them together.

No module is built. Names are those of the Decoder's tensors, so that a test can compare the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from kvell.config import LayerConfig, ModelConfig, NormPlacement
from kvell.layers.cost import Cost, Weight, linear, norm, per_token, vector
from kvell.layers.part import Site

Place = Literal["inputs", "attention", "attention frame", "rest of layer", "end", "draft"]


@dataclass(frozen=True)
class Block:
    """What stands at one place: before the layers, in layer `layer`, behind them, or in the draft block."""

    place: Place
    layer: int
    cost: Cost


@lru_cache(maxsize=64)
def blocks(config: ModelConfig) -> tuple[Block, ...]:
    """All of a model, in the order in which a token passes through."""
    return tuple(_blocks(config))


def weights(config: ModelConfig) -> Iterator[Weight]:
    """All of a model's tensors."""
    for block in blocks(config):
        yield from block.cost.weights


def last_writer(config: ModelConfig) -> int:
    """The last layer that makes rows for later steps: what stands behind it is only needed for wanted tokens."""
    return max((layer for layer, _ in config.streams()), default=-1)


def _blocks(config: ModelConfig) -> Iterator[Block]:
    hidden, vocab = config.hidden_size, config.vocab_size
    # A tied table is also the head: all of it is read, and multiplied with.
    used = (1, 1) if config.tied_head else (1, vocab)
    table = Weight("embedding.weight", (vocab, hidden), "embedding", "bf16", multiplied=False, used=used)
    yield Block("inputs", -1, Cost((table,)))
    if config.per_layer_embedding is not None:
        inputs = config.per_layer_embedding.inputs_cost(config.site())
        yield Block("inputs", -1, inputs.under("per_layer_inputs"))
    for index, layer in enumerate(config.layers):
        yield from _layer(config, layer, config.site(index), f"layers.{index}")
    yield Block("end", config.num_layers, config.connection.ends_cost(config.site()).under("ends"))
    yield Block("end", config.num_layers, norm("norm", hidden))
    if config.tied_head:
        yield Block("end", config.num_layers, Cost(works=(per_token("head", vocab * hidden, form="bf16"),)))
    else:
        yield Block("end", config.num_layers, linear("head", vocab, hidden, "head", form="bf16"))
    if config.draft is not None:
        for cost in _draft(config, config.draft.layer):
            yield Block("draft", config.num_layers, cost.under("draft_block", "draft block"))


def _layer(config: ModelConfig, layer: LayerConfig, site: Site, name: str) -> Iterator[Block]:
    """Attention, feed-forward and what belongs to the layer's end. A draft block has no per-layer embedding."""
    source = None if layer.attention.kv_source is None else config.layers[layer.attention.kv_source].attention
    connection, index = config.connection.cost(site), site.index
    attention = layer.attention.cost(site, source).under(f"{name}.attention")
    yield Block("attention frame", index, connection.under(f"{name}.attention_frame.connection"))
    yield Block("attention frame", index, _norms(f"{name}.attention_frame", layer.attention_norm, site.hidden_size))
    yield Block("attention", index, attention)
    frame = f"{name}.feed_forward_frame"
    yield Block("rest of layer", index, connection.under(f"{frame}.connection"))
    yield Block("rest of layer", index, _norms(frame, layer.feed_forward_norm, site.hidden_size))
    yield Block("rest of layer", index, layer.feed_forward.cost(site).under(f"{name}.feed_forward"))
    if config.per_layer_embedding is not None and index < config.num_layers:
        embedding = config.per_layer_embedding.cost(site)
        yield Block("rest of layer", index, connection.under(f"{name}.per_layer_connection"))
        yield Block("rest of layer", index, embedding.under(f"{name}.per_layer_embedding"))
    if layer.layer_scalar:
        yield Block("rest of layer", index, Cost((vector(f"{name}.layer_scalar", 1, learnt=False),)))


def _draft(config: ModelConfig, layer: LayerConfig) -> Iterator[Cost]:
    hidden, site = config.hidden_size, config.site(config.num_layers)
    for name in ("embedding_norm", "residual_norm", "norm"):
        yield norm(name, hidden)
    for name in ("embedding_proj", "residual_proj"):
        yield linear(name, hidden, hidden, "draft block")
    yield config.connection.ends_cost(site).under("ends")
    for block in _layer(config, layer, site, "layer"):
        yield block.cost


def _norms(frame: str, placement: NormPlacement, width: int) -> Cost:
    """The norms before and after a block."""
    cost = Cost()
    if placement != "post":
        cost += norm(f"{frame}.input_norm", width)
    if placement != "pre":
        cost += norm(f"{frame}.output_norm", width)
    return cost
