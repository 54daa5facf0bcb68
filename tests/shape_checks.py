"""Checks, while the tests run, that every array has the shape its function's signature says."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

# What uses jaxtyping states shapes. Kernels in Triton state them in comments: they are no Python, and see addresses.
USE = re.compile(r"^ *from jaxtyping import ", re.MULTILINE)
# They refuse what a user may get wrong themselves, with errors that tests ask for.
OWN_CHECKS = {"Decoder.forward"}


def modules_with_shapes() -> list[str]:
    """All modules of kvell whose signatures state the shapes of arrays, by name; none of them is imported."""
    spec = find_spec("kvell")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    files = (file for file in root.rglob("*.py") if USE.search(file.read_text("utf-8")))
    return sorted(".".join(["kvell", *file.relative_to(root).with_suffix("").parts]) for file in files)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked, if its signature speaks of arrays."""
    hints = inspect.get_annotations(function).values()
    if function.__qualname__ in OWN_CHECKS or not any(_speaks_of_arrays(hint) for hint in hints):
        return function
    return beartype(function)


@contextmanager
def unchecked() -> Iterator[None]:
    """No checks within: for long repetitions of a step, which they make four times as slow."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _speaks_of_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_speaks_of_arrays(part) for part in get_args(hint))
