"""The decoder: one model for every config.

    tokens -> embed -> connection.open -> layers -> connection.close -> norm -> head

T tokens of a step, of all its sequences end to end; C hidden size; V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvell.cache import Cache, StreamSpecs
from kvell.config import ModelConfig
from kvell.draft import DraftBlock
from kvell.errors import InputError, warn, whole_number
from kvell.fingerprint import fingerprint
from kvell.kernels.choice import Choice, chosen, left_open, use
from kvell.kernels.heap import keep_freed_memory
from kvell.kernels.linear import linear
from kvell.layer import Layer
from kvell.layers.linear import Embedding, Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.per_layer_embedding import MappedTable
from kvell.layers.precision import rounded
from kvell.long_prompts import in_steps, most_tokens
from kvell.model_input import check_cache, lengths_of, warn_of_length
from kvell.step import Observed, Step

if TYPE_CHECKING:
    from kvell.decoding import DecodingStep


class Decoder(nn.Module):
    """A language model with fresh weights, built from a config.

    `activation_checkpointing` recomputes each layer in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        site = config.site()
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        ple = config.per_layer_embedding
        self.per_layer_inputs = ple.build_inputs(site) if ple else None
        self.ends = config.connection.build_ends(site)
        self.layers = nn.ModuleList(
            Layer(config, layer, index, per_layer_embedding=ple is not None)
            for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied_head:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.draft_block = DraftBlock(config, config.draft) if config.draft else None
        self._sources = config.reads()
        self._streams, self._draft_streams = config.streams(), config.draft_streams()
        self._last_writer = max(layer for layer, _ in self._streams)
        self._compiled: dict[int, DecodingStep] = {}  # by the number of sequences
        self._code: Path | None = None  # where kernels in C++ are kept, once they are wanted
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @overload
    def forward(
        self,
        tokens: Int[Tensor, "B n"],
        cache: Cache | None = ...,
        *,
        counts: Sequence[int] | None = ...,
        last_only: bool = ...,
        return_streams: Literal[False] = ...,
        observed: Observed | None = ...,
    ) -> Float[Tensor, "B m V"]: ...

    @overload
    def forward(
        self,
        tokens: Int[Tensor, "B n"],
        cache: Cache | None = ...,
        *,
        counts: Sequence[int] | None = ...,
        last_only: bool = ...,
        return_streams: Literal[True],
        observed: Observed | None = ...,
    ) -> tuple[Float[Tensor, "B m V"], Float[Tensor, "B n *C"]]: ...

    def forward(
        self,
        tokens: Int[Tensor, "B n"],
        cache: Cache | None = None,
        *,
        counts: Sequence[int] | None = None,
        last_only: bool = False,
        return_streams: bool = False,
        observed: Observed | None = None,
    ) -> Float[Tensor, "B m V"] | tuple[Float[Tensor, "B m V"], Float[Tensor, "B n *C"]]:
        """Logits of every token, (B, n, V), or of each sequence's last one, (B, 1, V), with `last_only`.

        With a cache every sequence continues where it stands, and nothing is recorded for gradients. `counts` lays
        sequences of different lengths end to end in one row: tokens is (1, sum of counts), sequence i continues the
        cache's sequence i, none sees another, and the logits are (1, sum of counts, V), or (1, sequences, V) with
        `last_only`. `return_streams` adds the residual of every token before the last collapse and norm, (B, n, C) or
        (B, n, N, C), which `draft` starts from. `observed` collects what training needs of the step besides. Where no
        gradients are recorded and nothing is observed, a long prompt is worked through in steps of MAX_STEP tokens
        (MAX_STEP_ON_ACCELERATOR on one), so what a call needs besides results and cache does not grow with it.
        InputError for tokens that cannot be; CacheError for a cache that does not fit. On an accelerator ids are not
        compared with the vocabulary, as looking would make it wait: there an id outside of it is the device's own
        error, and who takes ids from elsewhere compares them before, as `generate` does.
        """
        lengths = lengths_of(tokens, counts, self.device, self.config)
        check_cache(cache, lengths, self._streams, self)
        warn_of_length(lengths, cache, self.config.max_positions)
        if self.device.type == "cpu":
            keep_freed_memory()
        recorded = torch.is_grad_enabled() and cache is None
        with torch.set_grad_enabled(recorded), self._kernels():
            most = most_tokens(self.device)
            if recorded or observed is not None or sum(lengths) <= most:
                step = Step.of(tokens.flatten(), lengths, cache, self._sources, observed)
                logits, streams = self._step(step, last_only, return_streams)
            else:
                held = self._cache_for(lengths) if cache is None else cache

                def run(tokens: Tensor, counts: list[int], cache: Cache) -> tuple[Tensor, Tensor | None]:
                    return self._step(Step.of(tokens, counts, cache, self._sources), last_only, return_streams)

                logits, streams = in_steps(run, tokens.flatten(), lengths, held, most, last_only=last_only)
        logits = logits.view(tokens.shape[0], -1, logits.shape[1])
        return (logits, streams.unflatten(0, (tokens.shape[0], -1))) if streams is not None else logits

    def draft(
        self,
        streams: Float[Tensor, "B n *C"],
        next_tokens: Int[Tensor, "B n"],
        cache: Cache | None = None,
        *,
        counts: Sequence[int] | None = None,
        observed: Observed | None = None,
    ) -> tuple[Float[Tensor, "B n V"], Float[Tensor, "B n *C"]]:
        """Proposes the tokens after the next ones, by the draft block: logits, and the block's own streams.

        Row i pairs the streams of the token at position p, as a forward with `return_streams` gives them, with the id
        of the token at p + 1; its logits are about the token at p + 2. The streams returned can stand in for the next
        position's, to propose one token more. The cache is one of `make_draft_cache`; `counts` and `observed` are as
        in `forward`. InputError for a model without a draft block, and for streams and tokens that do not fit.
        """
        if self.draft_block is None:
            raise InputError("the model has no draft block: its config's draft is null")
        lengths = lengths_of(next_tokens, counts, self.device, self.config)
        if streams.shape[:2] != next_tokens.shape:
            raise InputError(f"streams of the shape {tuple(streams.shape)} for tokens {tuple(next_tokens.shape)}")
        check_cache(cache, lengths, self._draft_streams, self)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None), self._kernels():
            step = Step.of(next_tokens.flatten(), lengths, cache, observed=observed)
            x, h = self.draft_block(streams.flatten(0, 1), self._embed(step.tokens), step)
            logits = self._logits(x)
        if cache is not None:
            cache.end_step(lengths)
        return logits.unflatten(0, next_tokens.shape), h.unflatten(0, next_tokens.shape)

    def index_loss(self, tokens: Int[Tensor, "B n"], *, counts: Sequence[int] | None = None) -> Float[Tensor, ""]:
        """The loss that trains the indexers of compressed sparse attention, the mean over the layers that have one.

        What an indexer picks has no gradient, so the model's loss does not train it; this one does, and nothing else:
        see layers/indexer.py. InputError for a model without an indexer.
        """
        lengths = lengths_of(tokens, counts, self.device, self.config)
        step = Step.of(tokens.flatten(), lengths, None, self._sources)
        step.observed = Observed()
        self._run(step, last_only=False)
        if not step.observed.index_losses:
            raise InputError("the model has no indexer to train")
        return torch.stack(list(step.observed.index_losses.values())).mean()

    def make_cache(self, batch_size: int = 1, max_rewind: int = 0, max_length: int | None = None) -> Cache:
        """An empty cache for this model; see Cache."""
        return self._make_cache(self._streams, batch_size, max_rewind, max_length)

    def make_draft_cache(self, batch_size: int = 1, max_rewind: int = 0, max_length: int | None = None) -> Cache:
        """An empty cache for the draft block. InputError for a model without one."""
        if self.draft_block is None:
            raise InputError("the model has no draft block: its config's draft is null")
        return self._make_cache(self._draft_streams, batch_size, max_rewind, max_length)

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
        """Tells this model's weights from another's, by its config and up to 4,096 values of every tensor."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        tensors = dict(self.named_tensors())
        mapped = dict.fromkeys(tensors.keys() - own.keys(), self.dtype)
        return fingerprint(self.config.digest(), tensors, self.device, mapped)

    def compile_decoding(self, batch_size: int = 1, *, folder: str | Path | None = None) -> Self:
        """Makes the step that decodes, one token for each of `batch_size` sequences with a cache, several times as
        fast: compiled to machine code on the CPU, recorded as CUDA graphs on a CUDA device.

        From here on `forward` runs it whenever a call is such a step and asks for logits alone (no `return_streams`);
        compiled, its logits are equal to float tolerance, recorded, to the bit. Its other calls take kernels in C++
        where there are some (kernels/cpp/). Compiling takes up to a minute; the code is kept in `folder`
        (`~/.cache/kvell`, or in XDG_CACHE_HOME) and found there by later processes, within seconds. Weights that
        change in place are seen; where they move, compiled decoding ends with a warning: after `.to()`, or when other
        tensors take their place, call this again. Copies of the model are without it. InputError on other devices,
        without a C++ compiler, and where the folder cannot be written.
        """
        from kvell.decoding import decoding_step

        count = whole_number("batch_size", batch_size, error=InputError)
        self._compiled[count] = decoding_step(self, count, folder)
        self._code = self._compiled[count].folder
        return self

    def save_pretrained(self, path: str | Path, *, max_shard_bytes: int = 4 * 2**30) -> None:
        """Writes config.json and safetensors: in the released family's own format where the config came from one
        and still fits it, else in Kvell's. No tokenizer, which is not the model's: whoever has one copies its
        tokenizer.json there."""
        from kvell.checkpoint import save_pretrained

        save_pretrained(self, Path(path), max_shard_bytes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: matrices normal with the config's initializer_range, norms and scales one, biases zero, and
        what a technique asks for besides (`init_parameters`)."""
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
            initialise = getattr(module, "init_parameters", None)
            if initialise is not None and not self.embedding.weight.is_meta:
                initialise()

    def _step(self, step: Step, last_only: bool, streams: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (W, V) and, if wanted, the streams (T, *C) of one step, at the end of which the cache stands."""
        compiled = None if streams else self._compiled_for(step)
        if compiled is not None:
            logits, h = compiled(step), None
        else:
            h = self._run(step, last_only and not streams)
            logits = self._behind(step.last().select(h) if last_only and streams else h)
        if step.cache is not None:
            step.cache.end_step(step.counts)
        return logits, h if streams else None

    def logits_of(self, step: Step) -> Float[Tensor, "T V"]:
        """Logits of every token of a step: what is compiled by `compile_decoding`."""
        return self._behind(self._run(step, last_only=False))

    def _behind(self, h: Float[Tensor, "W *C"]) -> Float[Tensor, "W V"]:
        """What stands behind the layers."""
        return self._logits(self.norm(self.ends.close(h)))

    def _compiled_for(self, step: Step) -> "DecodingStep | None":
        """What runs a step of one token per sequence with a cache, if there is anything and it is to be used."""
        compiled = self._compiled.get(len(step.counts))
        if compiled is None or step.cache is None or step.observed is not None:
            return None
        if len(step.tokens) != len(step.counts) or chosen() not in ("fast", "cpp"):
            return None
        if compiled.weights.have_moved():
            self._compiled = {}
            warn("weights have moved since compile_decoding: decoding is not compiled any more")
            return None
        return compiled

    def _kernels(self) -> AbstractContextManager[None]:
        """Once compiled, a model on the CPU takes kernels in C++, unless its caller chose others."""
        return use("cpp", self._code) if self._code is not None and left_open() else nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": {}, "_code": None}

    def _run(self, step: Step, last_only: bool) -> Float[Tensor, "W *C"]:
        """The residual after all layers, of every token, or of each sequence's last.

        Only layers that make something for later steps need every token. What stands behind the last of them is
        computed for the wanted tokens alone: with cross-layer sharing that is more than half of the model.
        """
        embedded = self._embed(step.tokens)
        inputs = self.per_layer_inputs(embedded, step) if self.per_layer_inputs is not None else None
        h = self.ends.open(embedded)
        for index, layer in enumerate(self.layers):
            wanted = step.last() if last_only and index == self._last_writer else None
            mine = inputs[:, index] if inputs is not None else None
            if self.activation_checkpointing and torch.is_grad_enabled() and step.cache is None:
                h = checkpoint(layer, h, step, mine, wanted, use_reentrant=False, context_fn=_checkpoint_contexts)
            else:
                h = layer(h, step, mine, wanted)
            if wanted is not None:
                step, inputs = wanted, wanted.select(inputs) if inputs is not None else None
        return h

    def _embed(self, tokens: Int[Tensor, " T"]) -> Float[Tensor, "T C"]:
        return self.embedding(tokens) * rounded(self.config.embedding_scale, self.dtype)

    def _logits(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T V"]:
        weight = self.embedding.weight if self.config.tied_head else self.head.weight
        logits = linear(x, weight)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _cache_for(self, lengths: list[int]) -> Cache:
        """What a prompt in several steps remembers, where its caller has no cache."""
        return Cache(self._streams, len(lengths), max_length=max(lengths), dtype=self.dtype, device=self.device)

    def _make_cache(self, streams: StreamSpecs, batch_size: int, max_rewind: int, max_length: int | None) -> Cache:
        return Cache(
            streams,
            batch_size,
            max_rewind,
            max_length,
            dtype=self.dtype,
            device=self.device,
            maker=self,
        )


def _checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts in which a layer runs, and is recomputed in the backward pass, when the caller's `kernels.use` may
    have ended already."""
    return nullcontext(), Choice()
