"""The table of kernels: every computation that has more than one version, and the one function that chooses.

A version says what it is made of (`made_in`), and which calls it does not take (`refuses`): a function of the
kernel's arguments that returns the reason, or None. Of the versions that take a call the first one listed runs, among
those that `kernels.use` allows (choice.py):

    nothing, "fast"   Triton on a CUDA device, then plain torch; the reference where there is nothing else
    "cpp"             the same, with C++ before plain torch
    "reference"       the reference; plain torch for kernels that have none
    "triton"          Triton, on the CPU in its interpreter; plain torch for calls that it does not take

How versions are compared: tests/test_kernel_table.py runs every version of every kernel that takes a call against the
reference, or the last version of one that has none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from kvell.errors import InputError
from kvell.kernels.choice import chosen, interpreted, triton_installed

MadeIn = Literal["torch", "reference", "cpp", "triton"]
CPP, TRITON = "kvell.kernels.cpp", "kvell.kernels.triton"  # packages whose versions are imported when first called


class KernelVersion:
    """One version of a kernel.

    run        the function that computes
    refuses    a function of the kernel's arguments: why this version does not take the call, or None where it does;
               None in its place for a version that takes every call
    traceable  whether torch.export may trace it; torch.compile always traces plain torch

    Both functions may be given as "module:name", to be imported when they are first needed.
    """

    def __init__(
        self,
        name: str,
        made_in: MadeIn,
        run: Callable[..., Any] | str,
        refuses: Callable[..., str | None] | str | None = None,
        *,
        traceable: bool = False,
    ) -> None:
        self.name, self.made_in, self.traceable = name, made_in, traceable
        self.run = _imported_later(run)
        self.refuses = None if refuses is None else _imported_later(refuses)

    def why_not(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> str | None:
        """Why it does not take these arguments, by what it is made of and by itself."""
        problem = None
        if self.made_in == "triton":
            problem = _no_triton(arguments[0])
        elif self.made_in == "cpp":
            problem = _no_cpp(arguments[0], self.traceable)
        if problem is None and self.refuses is not None:
            problem = self.refuses(*arguments, **named)
        return problem


@dataclass(frozen=True)
class NotedChoice:
    """A choice that was made: which version of which kernel runs, and why none of the others does."""

    kernel: str
    taken: str
    others: dict[str, str]


class Kernel:
    """A kernel by name: called, it runs the version that is chosen for the call."""

    def __init__(self, name: str, *versions: KernelVersion) -> None:
        self.name, self.versions = name, versions
        KERNELS[name] = self
        plain = tuple(one for one in versions if one.made_in == "torch")
        references = tuple(one for one in versions if one.made_in == "reference")
        fast = (*(one for one in versions if one.made_in in ("triton", "torch")), *references)
        self._order = {
            "fast": fast,
            "triton": fast,
            "cpp": (*(one for one in versions if one.made_in != "reference"), *references),
            "reference": references or plain,
        }
        self._of_torch = (*plain, *references)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # A decoded token of a small model calls hundreds of kernels, so the usual case takes the shortest way.
        if _noting or arguments[0].is_cuda or chosen() != "fast":
            return self.choose(arguments, named).run(*arguments, **named)
        for version in self._of_torch:
            if version.refuses is None or version.refuses(*arguments, **named) is None:
                return version.run(*arguments, **named)
        raise AssertionError(f"{self.name}: the last version takes every call")

    def choose(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> KernelVersion:
        """The first version that takes the call."""
        for version in self._order[chosen()]:
            if version.why_not(arguments, named) is None:
                for choices in _noting:
                    choices.append(NotedChoice(self.name, version.name, self._others(version, arguments, named)))
                return version
        raise AssertionError(f"{self.name}: the last version takes every call")

    def _others(self, taken: KernelVersion, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, str]:
        """Why none of the other versions runs."""
        order = self._order[chosen()]
        asked_for = {"cpp": "only in a step that is compiled", "triton": "only where Triton is wanted"}
        others: dict[str, str] = {}
        for version in self.versions:
            if version is taken:
                continue
            if version in order:
                others[version.name] = version.why_not(arguments, named) or f"{taken.name} comes first"
            else:
                others[version.name] = asked_for.get(version.made_in, "only where references are wanted")
        return others

    def __repr__(self) -> str:
        return f"Kernel({self.name}: {', '.join(version.name for version in self.versions)})"


KERNELS: dict[str, Kernel] = {}
_noting: list[list[NotedChoice]] = []  # where choices are noted at present


@contextmanager
def noted_choices() -> Iterator[list[NotedChoice]]:
    """The choices that are made in this block, in their order."""
    choices: list[NotedChoice] = []
    _noting.append(choices)
    try:
        yield choices
    finally:
        _noting[:] = [one for one in _noting if one is not choices]


def _imported_later(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function at "module:name", which is imported when it is first called."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")

    def imported(*arguments: Any, **named: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **named)

    return imported


def _no_triton(first: Tensor) -> str | None:
    """Why no kernel in Triton runs on this tensor. InputError where `use("triton")` demands what cannot be."""
    # torch's compiler makes kernels of its own from the torch version.
    if torch.compiler.is_compiling():
        return "it is traced"
    if chosen() != "triton":
        if not first.is_cuda:
            return "not on a CUDA device"
        if first.dtype is torch.float64:
            return "float64"
        return None if triton_installed() else "Triton is not installed"
    if first.dtype is torch.float64:
        raise InputError('kernel version "triton" computes in float32: it does not take float64')
    if not first.is_cuda and not (first.device.type == "cpu" and interpreted()):
        raise InputError(
            f'kernel version "triton" needs a CUDA device, not "{first.device.type}" '
            "(on the CPU: TRITON_INTERPRET=1, set before Triton is imported)"
        )
    return None


def _no_cpp(first: Tensor, traceable: bool) -> str | None:
    """Why no kernel in C++ runs on this tensor."""
    if first.device.type != "cpu":
        return "not on the CPU"
    if torch.compiler.is_compiling() and not (traceable and torch.compiler.is_exporting()):
        return "it is traced"
    return None
