"""Where the last tokens of a text occurred before, in a few bytes a token."""

from array import array

EMPTY = -1


class NgramIndex:
    """Where each n-gram of `size` tokens of a text ended last.

    A hash table of positions with open addressing: an n-gram is known by where it stands in the text, and not kept a
    second time. It takes 6 to 12 bytes for every different n-gram, and a look-up does not grow with the text.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._slots = array("i", [EMPTY]) * 64

    def add(self, text: "array[int]", end: int) -> None:
        """Takes the n-gram text[end - size : end] in; what stood there of an earlier occurrence is replaced."""
        if 3 * self._used >= 2 * len(self._slots):
            self._grow(text)
        slot = self._slot(self._slots, text, end)
        self._used += self._slots[slot] == EMPTY
        self._slots[slot] = end

    def find(self, text: "array[int]", end: int) -> int | None:
        """Where the n-gram text[end - size : end] ended last, of those taken in; None if it is not among them."""
        found = self._slots[self._slot(self._slots, text, end)]
        return None if found == EMPTY else found

    def _slot(self, slots: "array[int]", text: "array[int]", end: int) -> int:
        """Where an n-gram stands, or where it would."""
        ngram = text[end - self._size : end]
        last = len(slots) - 1  # as many slots as a power of two
        slot = hash(ngram.tobytes()) & last
        while (held := slots[slot]) != EMPTY and text[held - self._size : held] != ngram:
            slot = (slot + 1) & last
        return slot

    def _grow(self, text: "array[int]") -> None:
        slots = array("i", [EMPTY]) * (2 * len(self._slots))
        for end in self._slots:
            if end != EMPTY:
                slots[self._slot(slots, text, end)] = end
        self._slots = slots
