"""The decoder: one model for every config.

    tokens -> embed -> connection.open -> layers -> connection.close -> norm -> head

T tokens of a step, of all its sequences end to end; C hidden size; V vocabulary.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvell.cache import Cache
from kvell.config import ModelConfig, NormPlacement
from kvell.errors import CacheError, InputError
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Site
from kvell.layers.per_layer_embedding import MappedTable
from kvell.step import Step


class Decoder(nn.Module):
    """A language model with fresh weights, built from a config.

    `activation_checkpointing` recomputes each layer in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        site = config.site()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        ple = config.per_layer_embedding
        self.per_layer_inputs = ple.build_inputs(site) if ple else None
        self.ends = config.connection.build_ends(site)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied_head:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._sources = frozenset(
            layer.attention.kv_source for layer in config.layers if layer.attention.kv_source is not None
        )
        self._streams = config.streams()
        self._last_writer = max(layer for layer, _ in self._streams)
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(
        self,
        tokens: Int[Tensor, "B n"],
        cache: Cache | None = None,
        *,
        counts: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "B m V"]:
        """Logits of every token, (B, n, V), or of each sequence's last one, (B, 1, V), with `last_only`.

        With a cache every sequence continues where it stands, and nothing is recorded for gradients. `counts` lays
        sequences of different lengths end to end in one row: tokens is (1, sum of counts), sequence i continues the
        cache's sequence i, none sees another, and the logits are (1, sum of counts, V), or (1, sequences, V) with
        `last_only`. InputError for tokens that cannot be; CacheError for a cache that does not fit.
        """
        self._check_tokens(tokens, counts)
        lengths = list(counts) if counts is not None else [tokens.shape[1]] * tokens.shape[0]
        if cache is not None:
            self._check_cache(cache)
            cache.check_step(lengths)
        step = Step.of(tokens.flatten(), lengths, cache, self._sources)
        self._warn_of_length(step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            logits = self._head(self._run(step, last_only))
        if cache is not None:
            cache.end_step(lengths)
        return logits.unflatten(0, (tokens.shape[0], -1))

    def make_cache(self, batch_size: int = 1, max_rewind: int = 0, max_length: int | None = None) -> Cache:
        """An empty cache for this model; see Cache."""
        return Cache(
            self._streams,
            batch_size,
            max_rewind,
            max_length,
            dtype=self.dtype,
            device=self.device,
            fingerprint=self.fingerprint(),
        )

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that a checkpoint stores, by name: parameters, buffers, and memory-mapped tables."""
        yield from self.named_parameters()
        yield from self.named_buffers()
        for name, module in self.named_modules():
            if isinstance(module, MappedTable):
                yield f"{name}.weight", module.table

    def num_parameters(self) -> int:
        """Numbers learnt, memory-mapped tables included; tied weights count once."""
        buffers = dict(self.named_buffers())
        return sum(tensor.numel() for name, tensor in self.named_tensors() if name not in buffers)

    def fingerprint(self) -> str:
        """Tells this model's weights from another's, by its config and a few values of every tensor."""
        tensors = dict(sorted(self.named_tensors()))
        some = [t.detach().flatten()[:: max(t.numel() // 4, 1)].to(self.embedding.weight) for t in tensors.values()]
        described = f"{self.config.digest()} {[(name, tuple(t.shape)) for name, t in tensors.items()]}"
        return hashlib.sha256(f"{described} {torch.cat(some).tolist()}".encode()).hexdigest()[:32]

    def save_pretrained(self, path: str | Path, *, max_shard_bytes: int = 4 * 2**30) -> None:
        """Writes config.json and safetensors: in the released family's own format where the config came from one
        and still fits it, else in Kvell's."""
        from kvell.checkpoint import save_pretrained

        save_pretrained(self, Path(path), max_shard_bytes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: matrices normal with the config's initializer_range, norms and scales one, biases zero."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    continue
                if parameter.dim() > 1:
                    parameter.normal_(0, self.config.initializer_range)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.fill_(1)

    def _run(self, step: Step, last_only: bool) -> Float[Tensor, "W C"]:
        """The residual after all layers, of every token, or of each sequence's last.

        Only layers that make something for later steps need every token. What stands behind the last of them is
        computed for the wanted tokens alone: with cross-layer sharing that is more than half of the model.
        """
        scale = torch.tensor(self.config.embedding_scale).to(self.dtype).item()
        embedded = self.embedding(step.tokens) * scale
        inputs = self.per_layer_inputs(step.tokens, embedded) if self.per_layer_inputs is not None else None
        h = self.ends.open(embedded)
        for index, layer in enumerate(self.layers):
            wanted = step.last() if last_only and index == self._last_writer else None
            mine = inputs[:, index] if inputs is not None else None
            if self.activation_checkpointing and torch.is_grad_enabled() and step.cache is None:
                h = checkpoint(layer, h, step, mine, wanted, use_reentrant=False)
            else:
                h = layer(h, step, mine, wanted)
            if wanted is not None:
                step, inputs = wanted, wanted.select(inputs) if inputs is not None else None
        return self.ends.close(h)

    def _head(self, h: Float[Tensor, "T C"]) -> Float[Tensor, "T V"]:
        weight = self.embedding.weight if self.config.tied_head else self.head.weight
        logits = nn.functional.linear(self.norm(h), weight)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _check_tokens(self, tokens: Tensor, counts: Sequence[int] | None) -> None:
        """InputError for tokens that cannot be."""
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens must be a tensor, not {type(tokens).__name__}")
        if tokens.device != self.device:
            raise InputError(f"the tokens are on {tokens.device}, the model is on {self.device}")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise InputError(f"tokens must be (batch, tokens), at least one of each, not {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"tokens must be int64 or int32, not {tokens.dtype}")
        if counts is not None and (tokens.shape[0] != 1 or sum(counts) != tokens.shape[1] or min(counts) < 1):
            raise InputError(f"counts {list(counts)} do not lay out tokens of the shape {tuple(tokens.shape)}")
        if tokens.device.type == "cpu":  # on an accelerator looking would make it wait
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise InputError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")

    def _check_cache(self, cache: Cache) -> None:
        """CacheError for a cache that was made for a model of other streams, dtype or device."""
        if cache.specs != self._streams:
            raise CacheError("the cache was made for another model: its streams are not this model's")
        if (cache.dtype, cache.device) != (self.dtype, self.device):
            mine, its = f"{self.dtype} on {self.device}", f"{cache.dtype} on {cache.device}"
            raise CacheError(f"the cache holds {its}, the model is {mine}: make a cache after moving the model")

    def _warn_of_length(self, step: Step) -> None:
        """At the step in which a sequence outgrows the model's positions."""
        limit = self.config.max_positions
        starts = [0] * len(step.counts) if step.cache is None else step.cache.lengths
        for start, count in zip(starts, step.counts, strict=True):
            if start <= limit < start + count:
                warnings.warn(
                    f"{start + count} tokens, and the model has {limit} positions: it extrapolates", stacklevel=5
                )


class Layer(nn.Module):
    """Attention, feed-forward, and what belongs to the layer's end."""

    layer_scalar: Tensor | None

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        layer, site = config.layers[index], config.site(index)
        self.attention = layer.attention.build(site)
        self.attention_frame = Frame(config, site, layer.attention_norm)
        self.feed_forward = layer.feed_forward.build(site)
        self.feed_forward_frame = Frame(config, site, layer.feed_forward_norm)
        ple = config.per_layer_embedding
        self.per_layer_embedding = ple.build(site) if ple else None
        # Stored with the weights but not learnt, as Gemma 4's released models have it.
        self.register_buffer("layer_scalar", torch.ones(1) if layer.layer_scalar else None)

    def forward(
        self, h: Float[Tensor, "T *C"], step: Step, inputs: Float[Tensor, "T P"] | None, wanted: Step | None
    ) -> Float[Tensor, "W *C"]:
        """`inputs` are the layer's per-layer embeddings. With `wanted` all tokens make their keys and values, and
        only the wanted ones go on from there."""
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
            h = self.per_layer_embedding(h, inputs)
        return h if self.layer_scalar is None else h * self.layer_scalar


class Frame(nn.Module):
    """Between the residual and a block: the connection, and the norms before and after the block."""

    def __init__(self, config: ModelConfig, site: Site, norm: NormPlacement) -> None:
        super().__init__()
        self.connection = config.connection.build(site)
        self.input_norm = RMSNorm(site.hidden_size, site.norm_eps) if norm != "post" else None
        self.output_norm = RMSNorm(site.hidden_size, site.norm_eps) if norm != "pre" else None

    def read(self, h: Float[Tensor, "T *C"]) -> tuple[Float[Tensor, "T C"], Any]:
        x, reading = self.connection.read(h)
        return (x if self.input_norm is None else self.input_norm(x)), reading

    def write(self, h: Float[Tensor, "T *C"], y: Float[Tensor, "T C"], reading: Any) -> Float[Tensor, "T *C"]:
        return self.connection.write(h, y if self.output_norm is None else self.output_norm(y), reading)
