"""A stream: the rows of one kind that one sequence remembers, in one buffer.

Appending writes behind the rows held and returns a view of all that may be seen, so no step copies the past. Only
when the buffer is full are rows moved: a growing stream to a buffer an eighth larger, a windowed one to the front of
its own, which also has an eighth to spare. An exactly reserved windowed stream has nothing to spare and joins its
few rows to the new ones instead.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A buffer grows by whole blocks of rows.
BLOCK_ROWS = 64
# Rows [first, last) of a buffer, and where those of them that are kept must be written as well, if that is elsewhere.
Extended = tuple[Tensor, int, int, Tensor | None]


@dataclass(frozen=True)
class StreamSpec:
    """One kind of row that outlives a step: `width` values for every `stride` tokens of a sequence.

    `past` is how many rows the next step looks back on: None for all of them, window - 1 for a sliding
    window. Rewinding by r tokens needs r rows more. `dtype` None means the model's own.
    """

    name: str
    width: int
    past: int | None = None
    stride: int = 1
    dtype: torch.dtype | None = None

    def rows(self, length: int, rewindable: int = 0) -> int:
        """Rows held for a sequence of `length` tokens of which the last `rewindable` can be taken back."""
        total = length // self.stride
        if self.past is None:
            return total
        return min(total, self.past + -(-rewindable // self.stride))

    def reserved_rows(self, length: int, rewindable: int = 0, *, exactly: bool) -> int:
        """Rows that the buffer has room for: so many `exactly`, or what one that grows gets when it is filled."""
        rows = self.rows(length, rewindable)
        return rows if exactly else with_reserve(rows)

    def row_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of a row, `dtype` being the model's."""
        return self.width * (self.dtype or dtype).itemsize

    def nbytes(self, length: int, rewindable: int, dtype: torch.dtype) -> int:
        """Bytes of the rows held."""
        return self.rows(length, rewindable) * self.row_nbytes(dtype)

    def reserved_nbytes(self, length: int, rewindable: int, dtype: torch.dtype, *, exactly: bool) -> int:
        """Bytes of the buffer."""
        return self.reserved_rows(length, rewindable, exactly=exactly) * self.row_nbytes(dtype)


@dataclass
class Stream:
    """Rows [start, start + count) of `buffer` (capacity, width) are held.

    `reserved` is the number of tokens the buffer was made for, None if it grows.
    """

    spec: StreamSpec
    reserved: int | None
    buffer: Tensor
    start: int = 0
    count: int = 0

    @classmethod
    def empty(
        cls, spec: StreamSpec, max_rewind: int, reserved: int | None, dtype: torch.dtype, device: torch.device
    ) -> "Stream":
        rows = 0 if reserved is None else spec.reserved_rows(reserved, max_rewind, exactly=True)
        buffer = torch.empty(rows, spec.width, dtype=spec.dtype or dtype, device=device)
        return cls(spec, reserved, buffer)

    @property
    def held(self) -> Tensor:
        """The rows held, (count, width), as a view."""
        return self.buffer[self.start : self.start + self.count]

    @property
    def nbytes(self) -> int:
        return self.count * self.spec.width * self.buffer.dtype.itemsize

    @property
    def allocated_nbytes(self) -> int:
        return self.buffer.nbytes

    def append(self, rows: Tensor, keep: int) -> Tensor:
        """Adds rows (n, width) and returns all that are visible in this step, (held + n, width).

        Afterwards the last `keep` rows are held. What is returned is valid until the next change.
        """
        # This runs for every stream and token, and a tensor's len() is slow.
        added = rows.shape[0]
        if not added and keep == self.count:
            return self.held
        before = self.count
        buffer, first, last, kept = self.extend(added, keep)
        visible = buffer[first:last]
        visible[before:] = rows
        if kept is not None:
            kept.copy_(rows[added - kept.shape[0] :])
        return visible

    def extend(self, added: int, keep: int) -> Extended:
        """The same for rows yet to be written: where all that are visible lie, of which they are the last."""
        visible, room = self.count + added, self.buffer.shape[0]
        if self.buffer.is_inference() and not torch.is_inference_mode_enabled():
            self._move(self.held, room)  # torch forbids to write on where inference_mode has ended
        if self.start + visible > room:
            capacity = with_reserve(keep) if self.reserved is None else room
            if visible > capacity:
                return self._extend_beside(visible, keep, capacity)
            self._move(self.held, capacity)
        first = self.start
        self.start += visible - keep
        self.count = keep
        return self.buffer, first, first + visible, None

    def _extend_beside(self, visible: int, keep: int, capacity: int) -> Extended:
        """Where the buffer has no room for all that is visible, that lies beside it for this step."""
        held, old = self.count, max(keep - (visible - self.count), 0)
        joined = self.buffer.new_empty(visible, self.spec.width)
        joined[:held] = self.held
        if capacity == self.buffer.shape[0]:  # a new buffer beside `joined` would leave the heap in holes
            self.buffer[:old] = joined[held - old : held]
            self.start = 0
        else:
            self._move(joined[held - old : held], capacity)
        self.count = keep
        return joined, 0, visible, self.buffer[old:keep]

    def reserve(self, rows: int) -> None:
        """Grows at once to the buffer that `rows` rows will get, so that they are not moved on the way there."""
        if self.reserved is None and len(self.buffer) < with_reserve(rows):
            self._move(self.held, with_reserve(rows))

    def truncate(self, count: int) -> None:
        """Forgets all but the first `count` of the rows held, and gives back memory no longer needed."""
        self.count = count
        if self.reserved is None and len(self.buffer) > with_reserve(count):
            self._move(self.held, with_reserve(count))

    def copy(self) -> "Stream":
        """A copy with a buffer of its own."""
        twin = replace(self)
        twin.fill(self.held)
        return twin

    def fill(self, rows: Tensor) -> None:
        """Makes these the rows held, in place of any others."""
        self._move(rows, len(rows) if self.reserved is None else len(self.buffer))

    def _move(self, rows: Tensor, capacity: int) -> None:
        """Puts rows at the front of a new buffer. Views of the old one stay valid for who still reads them."""
        buffer = self.buffer.new_empty(capacity, self.spec.width)
        buffer[: len(rows)] = rows
        self.buffer, self.start, self.count = buffer, 0, len(rows)


def with_reserve(rows: int) -> int:
    """Rows a buffer gets that must hold `rows`: at most an eighth and one block more."""
    return -(-(rows + rows // 8) // BLOCK_ROWS) * BLOCK_ROWS
