"""Which version of a kernel runs: the one place where that is decided.

Every kernel is a reference in plain torch, written to be read, and a fast version with the same arguments.
`use("reference")` runs the references in a block of code:

    with kernels.use("reference"):
        logits = model(tokens)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Version = Literal["fast", "reference"]

_version: ContextVar[Version] = ContextVar("kvell_kernel_version", default="fast")


@contextmanager
def use(version: Version) -> Iterator[None]:
    """Runs every kernel called in this block in the given version."""
    if version not in ("fast", "reference"):
        raise ValueError(f'kernel version {version!r} is not "fast" or "reference"')
    token = _version.set(version)
    try:
        yield
    finally:
        _version.reset(token)


def reference_wanted() -> bool:
    return _version.get() == "reference"
