"""What fits into a memory: the longest context at a batch size, the largest batch at a context."""

from collections.abc import Callable

from kvell.cache.stream import BLOCK_ROWS
from kvell.errors import InputError

# Contexts are named in whole blocks of as many tokens as a cache has rows in a block.
LONGEST = 1 << 40


def longest_context(nbytes: Callable[[int, int], int], memory: int, batch_size: int) -> int:
    """The longest context, in blocks, of which `nbytes(context, batch_size)` fits. InputError where none does."""
    blocks = _largest(lambda count: nbytes(count * BLOCK_ROWS, batch_size) <= memory, LONGEST // BLOCK_ROWS)
    if blocks == 0:
        short = nbytes(BLOCK_ROWS, batch_size) - memory
        raise InputError(f"a context of {BLOCK_ROWS} tokens does not fit: {short:,} bytes are missing")
    return blocks * BLOCK_ROWS


def largest_batch(nbytes: Callable[[int, int], int], memory: int, context: int) -> int:
    """The largest batch at a context. InputError where not even one sequence fits."""
    batch = _largest(lambda count: nbytes(context, count) <= memory, LONGEST)
    if batch == 0:
        short = nbytes(context, 1) - memory
        raise InputError(f"a context of {context:,} tokens does not fit once: {short:,} bytes are missing")
    return batch


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest count that fits, where all below it do; `limit` at most, 0 where none does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, limit)
