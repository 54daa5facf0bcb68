"""One layer of the decoder: attention, feed-forward, and what stands between them and the residual.

T tokens of a step, W of them wanted; C hidden size, P width of per-layer embeddings; the residual is (T, C), or
(T, N, C) with N streams.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvell.config import LayerConfig, ModelConfig, NormPlacement
from kvell.layers.contract import BlockModule
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Site
from kvell.step import Step


class Layer(nn.Module):
    """Attention, feed-forward, and what belongs to the layer's end."""

    layer_scalar: Tensor | None

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int, *, per_layer_embedding: bool) -> None:
        super().__init__()
        site, connection = config.site(index), config.connection
        # The model's blocks are counted through: attention, feed-forward, and a per-layer embedding if there is one.
        first = index * (3 if config.per_layer_embedding is not None else 2)
        self.attention = layer.attention.build(site)
        self.attention_frame = Frame(config, site, layer.attention_norm, first)
        self.feed_forward = layer.feed_forward.build(site)
        self.feed_forward_frame = Frame(config, site, layer.feed_forward_norm, first + 1)
        self.per_layer_embedding = None
        if per_layer_embedding and config.per_layer_embedding is not None:
            self.per_layer_embedding = config.per_layer_embedding.build(site)
            self.per_layer_connection = connection.build(site, first + 2)
        # Stored with the weights but not learnt, as Gemma 4's released models have it.
        self.register_buffer("layer_scalar", torch.ones(1) if layer.layer_scalar else None)

    def forward(
        self, h: Float[Tensor, "T *C"], step: Step, inputs: Float[Tensor, "T P"] | None, wanted: Step | None
    ) -> Float[Tensor, "W *C"]:
        """`inputs` are the layer's per-layer embeddings. With `wanted` all tokens make their keys and values, and
        only the wanted ones go on from there."""
        reading: Any
        x, reading = self.attention_frame.read(h)
        y = self.attention(x, step, wanted)
        if wanted is not None:
            h, step = wanted.select(h), wanted
            inputs = None if inputs is None else wanted.select(inputs)
            _, reading = self.attention_frame.read(h)  # a reading is about its tokens: these are fewer
        h = self.attention_frame.write(h, y, reading)

        x, reading = self.feed_forward_frame.read(h)
        h = self.feed_forward_frame.write(h, self.feed_forward(x, step), reading)

        if self.per_layer_embedding is not None:
            x, reading = self.per_layer_connection.read(h)
            h = self.per_layer_connection.write(h, self.per_layer_embedding(x, inputs), reading)
        return h if self.layer_scalar is None else h * self.layer_scalar

    def output_weights(self) -> tuple[Tensor, ...]:
        """For each block the weights that produce what it adds to the residual: those of the norm behind the block
        (1-D) where there is one, else the block's own output projections (2-D, or 3-D for experts)."""
        weights = [*self.attention_frame.output_weights(self.attention)]
        weights += self.feed_forward_frame.output_weights(self.feed_forward)
        if self.per_layer_embedding is not None:
            weights += self.per_layer_embedding.output_weights()
        return tuple(weights)


class Frame(nn.Module):
    """Between the residual and a block: the connection, and the norms before and after the block."""

    def __init__(self, config: ModelConfig, site: Site, norm: NormPlacement, block: int) -> None:
        super().__init__()
        self.connection = config.connection.build(site, block)
        self.input_norm = RMSNorm(site.hidden_size, site.norm_eps) if norm != "post" else None
        self.output_norm = RMSNorm(site.hidden_size, site.norm_eps) if norm != "pre" else None

    def read(self, h: Float[Tensor, "T *C"]) -> tuple[Float[Tensor, "T C"], Any]:
        x, reading = self.connection.read(h)
        return (x if self.input_norm is None else self.input_norm(x)), reading

    def write(self, h: Float[Tensor, "T *C"], y: Float[Tensor, "T C"], reading: Any) -> Float[Tensor, "T *C"]:
        return self.connection.write(h, y if self.output_norm is None else self.output_norm(y), reading)

    def output_weights(self, block: BlockModule) -> tuple[Tensor, ...]:
        """The weights that produce what `block` gives to the connection."""
        norm = self.output_norm
        return block.output_weights() if norm is None or norm.weight is None else (norm.weight,)
