"""What a plan can count a model without (`kvell plan --what-if`), by name and in words.

It imports nothing that imports torch: the command line's help shows it, and help comes at once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvell.errors import InputError

if TYPE_CHECKING:
    from kvell.layers.cost import Technique


class Change(NamedTuple):
    """The techniques that are left out (none for `gqa`, which replaces every attention), and the change in words."""

    techniques: "tuple[Technique, ...]"
    words: str


# The heads of a usual grouped-query layer, as DeepSeek's report (arXiv 2606.19348) compares with.
GQA_HEADS, GQA_WIDTH = 8, 128
CHANGES = {
    "no-sharing": Change(("sharing",), "every layer keeps keys and values of its own"),
    "no-windows": Change(("windows",), "layers with a window keep every token"),
    "no-compression": Change(("compression",), "compressed layers keep every token"),
    "mha": Change(("compression", "grouping"), "as no-compression, and every query head has a KV head of its own"),
    "gqa": Change((), f"every layer keeps {GQA_HEADS} KV heads of {GQA_WIDTH} for every token"),
    "all-full": Change(("compression", "windows"), "no compression and no windows"),
    "plain": Change(("compression", "windows", "sharing"), "no compression, no windows and no sharing"),
}
EVERY_CHANGE = "all"


def check_changes(names: Sequence[str]) -> None:
    """InputError, with the known ones, for a change that is unknown, and for all of them beside others."""
    for name in names:
        if name not in CHANGES and (name != EVERY_CHANGE or len(names) > 1):
            raise InputError(f"what-if {name} is unknown: use one of {', '.join(CHANGES)}, or {EVERY_CHANGE} alone")
