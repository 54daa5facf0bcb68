"""What generation needs of a model, and nothing more: `kvell.Decoder` has it, and so may anything else."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class SequenceCache(Protocol):
    """What a model remembers of the sequences seen so far, and their lengths in tokens."""

    @property
    def lengths(self) -> Sequence[int]: ...


@runtime_checkable
class LanguageModelConfig(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


@runtime_checkable
class LanguageModel(Protocol):
    """A model that continues a sequence where its cache stands."""

    @property
    def config(self) -> LanguageModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    def make_cache(self) -> SequenceCache: ...

    def __call__(
        self, tokens: Int[Tensor, "B T"], *, cache: SequenceCache, last_only: bool
    ) -> Float[Tensor, "B 1 V"]: ...
