"""What generation needs of a model, and nothing more: `kvell.Decoder` has it, and so may anything else."""

from collections.abc import Sequence
from typing import Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class SequenceCache(Protocol):
    """What a model remembers of the sequences seen so far, and their lengths in tokens.

    `warned_of_length` says whether its user knows that a text outgrows the model's positions. Only speculation asks
    for the rest: `max_rewind` of the newest tokens can be taken back, and no more than `max_length` be held (None: as
    many as there are).
    """

    warned_of_length: bool

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def max_rewind(self) -> int: ...

    @property
    def max_length(self) -> int | None: ...

    def rewind(self, tokens: int, /) -> None: ...


@runtime_checkable
class LanguageModelConfig(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def suppress_tokens(self) -> tuple[int, ...]:
        """Ids that are never chosen."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """A model that continues a sequence where its cache stands."""

    @property
    def config(self) -> LanguageModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    def make_cache(self, *, max_rewind: int = ...) -> SequenceCache: ...

    def __call__(
        self, tokens: Int[Tensor, "B T"], *, cache: SequenceCache, last_only: bool
    ) -> Float[Tensor, "B t V"]:
        """Logits of every token (t = T), or of the last one (t = 1) with `last_only`."""
        ...


@runtime_checkable
class DraftingModelConfig(LanguageModelConfig, Protocol):
    @property
    def draft(self) -> object | None:
        """What the draft block is, None where the model has none."""
        ...


@runtime_checkable
class DraftingModel(Protocol):
    """A language model that may have a draft block, which proposes the token after the next one."""

    @property
    def config(self) -> DraftingModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    def make_cache(self, *, max_rewind: int = ...) -> SequenceCache: ...

    def make_draft_cache(self, *, max_rewind: int = ...) -> SequenceCache: ...

    @overload
    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        cache: SequenceCache,
        last_only: bool,
        return_streams: Literal[False] = ...,
    ) -> Float[Tensor, "B t V"]: ...

    @overload
    def __call__(
        self, tokens: Int[Tensor, "B T"], *, cache: SequenceCache, last_only: bool, return_streams: Literal[True]
    ) -> tuple[Float[Tensor, "B t V"], Float[Tensor, "B T *C"]]:
        """With the streams of all T tokens, also under `last_only`."""
        ...

    def draft(
        self, streams: Float[Tensor, "B n *C"], next_tokens: Int[Tensor, "B n"], *, cache: SequenceCache
    ) -> tuple[Float[Tensor, "B n V"], Float[Tensor, "B n *C"]]:
        """Row i takes the streams of the token at position p and the id of the token at p + 1. Its logits are about
        the token at p + 2, and its streams may stand in for those of the token at p + 1."""
        ...
