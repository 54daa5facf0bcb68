"""What fits into a memory: the longest context at a batch size, the largest batch at a context."""

from collections.abc import Callable

from kvell.cache.stream import BLOCK_ROWS
from kvell.errors import InputError

LARGEST_BATCH = 1 << 40


def longest_context(nbytes: Callable[[int, int], int], memory: int, batch_size: int, most: int) -> int:
    """The longest context of at most `most` tokens of which `nbytes(context, batch_size)` fits: `most` itself, or
    whole blocks of as many tokens as a cache has rows in a block. InputError where none does."""
    if nbytes(most, batch_size) <= memory:
        return most
    blocks = _largest(lambda count: nbytes(count * BLOCK_ROWS, batch_size) <= memory, most // BLOCK_ROWS)
    if blocks == 0:
        least = min(BLOCK_ROWS, most)
        short = nbytes(least, batch_size) - memory
        raise InputError(f"a context of {least} tokens does not fit: {short:,} bytes are missing")
    return blocks * BLOCK_ROWS


def largest_batch(nbytes: Callable[[int, int], int], memory: int, context: int) -> int:
    """The largest batch at a context. InputError where not even one sequence fits."""
    batch = _largest(lambda count: nbytes(context, count) <= memory, LARGEST_BATCH)
    if batch == 0:
        short = nbytes(context, 1) - memory
        raise InputError(f"a context of {context:,} tokens does not fit once: {short:,} bytes are missing")
    return batch


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest count that fits, where all below it do; `limit` at most, 0 where none does."""
    if limit < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, limit)
