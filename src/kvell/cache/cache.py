"""The cache of a batch: for every sequence its length and its streams.

Sequences stand alone. Each has its own length and its own buffers, so a batch may be as ragged as it likes, and
forking, merging and saving are copies of rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvell.cache.origin import Fingerprinted, Origin
from kvell.cache.stream import Extended, Stream, StreamSpec
from kvell.errors import CacheError, whole_number

if TYPE_CHECKING:
    from kvell.cache.file import CacheMaker

StreamKey = tuple[int, str]  # the layer's index and the stream's name
StreamSpecs = Mapping[StreamKey, StreamSpec]


def streams_nbytes(specs: StreamSpecs, length: int, rewindable: int, dtype: torch.dtype) -> int:
    """Bytes one sequence of `length` tokens holds, of which the last `rewindable` can be taken back."""
    return sum(spec.nbytes(length, rewindable, dtype) for spec in specs.values())


def reserved_nbytes(
    specs: StreamSpecs, length: int, rewindable: int, dtype: torch.dtype, *, exactly: bool = True
) -> int:
    """Bytes reserved for it: by a cache made for a `max_length` of so many tokens, or by one that grows (not
    `exactly`) once a prompt of as many tokens went through in one step."""
    return sum(spec.reserved_nbytes(length, rewindable, dtype, exactly=exactly) for spec in specs.values())


@dataclasses.dataclass
class SequenceState:
    """What one sequence remembers. `rewindable` of its last tokens can be taken back exactly."""

    length: int
    rewindable: int
    streams: dict[StreamKey, Stream]

    def copy(self) -> "SequenceState":
        streams = {key: stream.copy() for key, stream in self.streams.items()}
        return SequenceState(self.length, self.rewindable, streams)


class Cache:
    """The streams of a batch of sequences.

    `max_rewind` is how many of the newest tokens can always be taken back (fewer right after a rewind).
    `max_length` reserves the memory for so many tokens a sequence exactly and refuses more; without it buffers grow,
    with at most an eighth and one block of rows in reserve. `dtype` is the model's, and `maker` is the model
    itself, to which the cache keeps a reference: another model refuses the cache unless config and weights are the
    same. A cache without a maker cannot be saved.
    """

    def __init__(
        self,
        specs: StreamSpecs,
        batch_size: int = 1,
        max_rewind: int = 0,
        max_length: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        maker: Fingerprinted | None = None,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, error=CacheError)
        self.specs = specs
        self.max_rewind = whole_number("max_rewind", max_rewind, 0, error=CacheError)
        if max_length is not None:
            max_length = whole_number("max_length", max_length, most=2**63 - 1, error=CacheError)
        self.max_length = max_length
        self.dtype, self.device = dtype, torch.device(device)
        self._origin = None if maker is None else Origin(maker)
        try:
            self.sequences = [self._new_sequence() for _ in range(batch_size)]
        except RuntimeError as error:
            if max_length is None:
                raise
            needed = batch_size * reserved_nbytes(self.specs, max_length, self.max_rewind, dtype)
            raise CacheError(
                f"max_length={max_length} for {batch_size} sequences: {device} has no memory for {needed} bytes"
            ) from error
        self.warned_of_length = False  # whether its user knows that a sequence outgrows the model's positions
        self._step_open = False

    @property
    def batch_size(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens held, per sequence."""
        return [sequence.length for sequence in self.sequences]

    @property
    def rewindable(self) -> list[int]:
        """How many of its newest tokens each sequence can take back."""
        return [sequence.rewindable for sequence in self.sequences]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return sum(stream.nbytes for _, stream in self._all_streams())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers that hold them."""
        return sum(stream.allocated_nbytes for _, stream in self._all_streams())

    def rewind(self, tokens: int | Sequence[int]) -> None:
        """Forgets the last `tokens` of every sequence (or so many of each), as if they had never been seen.

        CacheError if any sequence cannot: then none is changed.
        """
        self.check_whole()
        try:
            amounts = [index(t) for t in ([tokens] * self.batch_size if not isinstance(tokens, Sequence) else tokens)]
        except TypeError:
            raise CacheError(f"rewind takes a whole number of tokens, not {tokens!r}") from None
        if len(amounts) != self.batch_size:
            raise CacheError(f"rewind got {len(amounts)} amounts for {self.batch_size} sequences")
        for number, (amount, sequence) in enumerate(zip(amounts, self.sequences, strict=True)):
            if amount < 0:
                raise CacheError(f"cannot rewind by a negative number of tokens: {amount}")
            if amount > sequence.length:
                raise CacheError(f"cannot rewind sequence {number} by {amount}: it holds {sequence.length} tokens")
            if amount > sequence.rewindable:
                raise CacheError(
                    f"cannot rewind sequence {number} by {amount}: {sequence.rewindable} tokens can be taken back now"
                    f" (the cache was made with max_rewind={self.max_rewind})"
                )
        for amount, sequence in zip(amounts, self.sequences, strict=True):
            sequence.length -= amount
            sequence.rewindable -= amount
            for stream in sequence.streams.values():
                stream.truncate(stream.spec.rows(sequence.length, sequence.rewindable))

    def fork(self) -> "Cache":
        """An independent copy."""
        return self.select(range(self.batch_size))

    def select(self, indices: Sequence[int]) -> "Cache":
        """An independent copy of these sequences, in this order; one may be named more than once."""
        self.check_whole()
        if unknown := [number for number in indices if not 0 <= number < self.batch_size]:
            raise CacheError(f"there is no sequence {unknown[0]} in a cache of {self.batch_size}")
        return self._with([self.sequences[number].copy() for number in indices])

    def part(self, indices: Sequence[int]) -> "Cache":
        """These sequences themselves, not copies: what a step appends to them is appended here."""
        return self._with([self.sequences[number] for number in indices])

    @staticmethod
    def merge(caches: Sequence["Cache"]) -> "Cache":
        """One batch of all the caches' sequences, copied, whatever their lengths.

        CacheError if they do not belong to one model or were made with different settings.
        """
        if not caches:
            raise CacheError("merge needs at least one cache")
        first = caches[0]
        for other in caches:
            other.check_whole()
            for name in ("specs", "dtype", "device", "max_rewind", "max_length"):
                if getattr(other, name) != getattr(first, name):
                    raise CacheError(f"cannot merge caches whose {'streams' if name == 'specs' else name} differs")
            if not _same_origin(first._origin, other._origin):
                raise CacheError("cannot merge caches whose model differs")
        return first._with([sequence.copy() for cache in caches for sequence in cache.sequences])

    def save(self, path: str | Path) -> None:
        """Writes the rows held to one safetensors file. An existing file is replaced only once all is written."""
        from kvell.cache.file import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path, model: "CacheMaker") -> "Cache":
        """A saved cache, for the model that made it. CacheError if it is another model's or is damaged."""
        from kvell.cache.file import load

        return load(Path(path), model)

    @property
    def fingerprint(self) -> str | None:
        """Identifies the model that made the cache; None for a cache made without a model."""
        return None if self._origin is None else self._origin.fingerprint()

    def check_model(self, model: Fingerprinted) -> None:
        """CacheError if another model made this cache. A model of the same config and weights, such as the same files
        loaded again, is accepted and becomes the maker."""
        if self._origin is None or self._origin.model is model:
            return
        here = Origin(model)
        if not self._origin.is_same(here):
            raise CacheError("the cache was made by another model: its rows mean nothing to this one")
        self._origin = here

    def check_step(self, counts: Sequence[int]) -> None:
        """CacheError if a step of `counts[i]` new tokens for sequence i does not fit."""
        self.check_whole()
        if len(counts) != self.batch_size:
            raise CacheError(f"the step has {len(counts)} sequences, the cache {self.batch_size}")
        if self.max_length is not None:
            longest = max(sequence.length + n for sequence, n in zip(self.sequences, counts, strict=True))
            if longest > self.max_length:
                raise CacheError(f"the cache was made for max_length={self.max_length} tokens, not {longest}")

    def append(self, number: int, key: StreamKey, rows: Tensor, count: int) -> Tensor:
        """Adds sequence `number`'s rows (n, width) for this step's `count` tokens; returns all it may see."""
        self.begin_step()
        sequence = self.sequences[number]
        stream = sequence.streams[key]
        rewindable = min(self.max_rewind, sequence.rewindable + count)
        return stream.append(rows, stream.spec.rows(sequence.length + count, rewindable))

    def extend(self, number: int, key: StreamKey, count: int) -> Extended:
        """The same for a stream of one row per token, before the rows are there: see Stream.extend."""
        self.begin_step()
        sequence = self.sequences[number]
        stream = sequence.streams[key]
        rewindable = min(self.max_rewind, sequence.rewindable + count)
        return stream.extend(count, stream.spec.rows(sequence.length + count, rewindable))

    def reserve(self, counts: Sequence[int]) -> None:
        """Makes room for `counts[i]` tokens more of sequence i, which several steps will bring."""
        for sequence, count in zip(self.sequences, counts, strict=True):
            rewindable = min(self.max_rewind, sequence.rewindable + count)
            for stream in sequence.streams.values():
                stream.reserve(stream.spec.rows(sequence.length + count, rewindable))

    def begin_step(self) -> None:
        """From here to `end_step` an interruption leaves the cache unusable; appending begins a step by itself."""
        self._step_open = True

    def end_step(self, counts: Sequence[int]) -> None:
        for sequence, count in zip(self.sequences, counts, strict=True):
            sequence.length += count
            sequence.rewindable = min(self.max_rewind, sequence.rewindable + count)
        self._step_open = False

    def check_whole(self) -> None:
        """CacheError if a step was interrupted in its middle: some layers would know its tokens and others not."""
        if self._step_open:
            raise CacheError(
                "a step with this cache was interrupted before its end; the cache cannot be used further"
            )

    def _all_streams(self) -> list[tuple[StreamKey, Stream]]:
        return [item for sequence in self.sequences for item in sequence.streams.items()]

    def _new_sequence(self) -> SequenceState:
        streams = {
            key: Stream.empty(spec, self.max_rewind, self.max_length, self.dtype, self.device)
            for key, spec in self.specs.items()
        }
        return SequenceState(0, 0, streams)

    def _with(self, sequences: list[SequenceState]) -> "Cache":
        """A cache of the same settings with these sequences."""
        if not sequences:
            raise CacheError("a cache holds at least one sequence, not 0")
        cache = object.__new__(Cache)
        cache.__dict__.update(self.__dict__, sequences=sequences, _step_open=False)
        return cache

    def __repr__(self) -> str:
        return f"Cache(lengths={self.lengths}, nbytes={self.nbytes}, max_rewind={self.max_rewind})"


def _same_origin(first: Origin | None, second: Origin | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.is_same(second)
