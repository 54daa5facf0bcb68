"""Which versions of kernels are asked for; table.py chooses among them.

Every kernel is a reference in plain torch, written to be read, and a fast version with the same arguments. Some have
a third in Triton, which the fast version is on a CUDA device where Triton is installed, or in C++. `use("reference")`
runs the references in a block of code:

    with kernels.use("reference"):
        logits = model(tokens)

`use("cpp")` takes kernels in C++ where there are some for the CPU, which are compiled for the shapes they meet
(kernels/cpp/); a decoding step that is compiled takes them by itself.

`use("triton")` demands Triton where a kernel has such a version: on a CUDA device, or on the CPU in Triton's
interpreter (TRITON_INTERPRET=1, set before Triton is first imported). Kernels without one run their fast version.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from kvell.errors import InputError
from kvell.hardware import user_code_folder

Version = Literal["fast", "reference", "triton", "cpp"]

_TRITON_INSTALLED = find_spec("triton") is not None

_version: ContextVar[Version | None] = ContextVar("kvell_kernel_version", default=None)
_folder: ContextVar[Path | None] = ContextVar("kvell_code_folder", default=None)


@contextmanager
def use(version: Version, folder: str | Path | None = None) -> Iterator[None]:
    """Runs every kernel called in this block in the given version. InputError for "triton" without Triton.

    `folder` is where what is compiled for "cpp" is kept, None the user's folder for such things.
    """
    if version not in get_args(Version):
        *most, last = (f'"{known}"' for known in get_args(Version))
        raise ValueError(f"kernel version {version!r} is not {', '.join(most)} or {last}")
    if version == "triton" and not triton_installed():
        raise InputError('kernel version "triton" needs the package triton, which is not installed')
    if folder is not None and not (isinstance(folder, Path) and folder.is_absolute()):
        folder = Path(folder).absolute()  # the same object each time is found faster among compiled kernels
    tokens = _version.set(version), _folder.set(folder)
    try:
        yield
    finally:
        _version.reset(tokens[0])
        _folder.reset(tokens[1])


class Choice:
    """The choice of kernels at the time when this is made, to be restored later or in another thread: `with choice:`,
    as often as needed."""

    def __init__(self) -> None:
        self._stood = _version.get(), _folder.get()
        self._tokens: list[tuple[Token[Version | None], Token[Path | None]]] = []

    def __enter__(self) -> None:
        self._tokens.append((_version.set(self._stood[0]), _folder.set(self._stood[1])))

    def __exit__(self, *_: object) -> None:
        version, folder = self._tokens.pop()
        _version.reset(version)
        _folder.reset(folder)


def code_folder() -> Path:
    """Where code compiled in this block is kept."""
    return _folder.get() or user_code_folder()


def chosen() -> Version:
    return _version.get() or "fast"


def left_open() -> bool:
    """Whether nobody asked for a version."""
    return _version.get() is None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    from kvell.kernels.triton import INTERPRETED

    return INTERPRETED
