"""Texts to learn from: the built-in corpus, files and folders, as named documents."""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvell.errors import InputError
from kvell.training.settings import Data, Source, StandardLibrary
from kvell.training.stopping import nothing

# The standard library's tests are not the code one wants continued; the others are generated tables.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from, and those held out, which may be none. `unreadable` are the files and folders that
    were left out."""

    training: list[Document]
    held_out: list[Document]
    unreadable: list[str]

    def digests(self) -> dict[str, str]:
        """Every document's name, in their order, and a hash of its text; of all its texts, if it is there twice."""
        found: dict[str, str] = {}
        for document in [*self.training, *self.held_out]:
            found[document.name] = digest(found.get(document.name, "") + document.text)
        return found


def read_corpus(data: Data, skip_bad: bool = False, check: Callable[[], None] = nothing) -> Corpus:
    """Every source's documents. InputError, naming and counting them, for files that are no UTF-8 text or cannot be
    read and for folders that cannot be listed, unless they are to be skipped; and for a corpus without a text.
    `check` is called before every file, and may raise to end it."""
    documents: list[Document] = []
    unreadable: list[str] = []
    for source in data.sources:
        for name, file in _files(source, unreadable, check):
            check()
            try:
                if not file.is_file():  # reading a pipe or a device might never end
                    unreadable.append(f"{file} ({'not a file' if file.exists() else 'a broken link'})")
                    continue
                text = file.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
                unreadable.append(f"{file} ({reason})")
                continue
            documents += [document for document in _documents(source, name, text) if document.text.strip()]
    if unreadable and not skip_bad:
        raise InputError(f"{unread(unreadable)}; --skip-bad leaves them out")
    training, held_out = divided(documents, data.held_out)
    if not training:
        raise InputError("the corpus is empty: there is no text to learn from in " + _described(data))
    return Corpus(training, held_out, unreadable)


def divided(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Documents to learn from, and those held out.

    Whole documents are held out, by their names, where that serves: it does not if one side stays empty or far more
    text is held out than was asked for, as happens with few documents. Then the last `share` of every document is
    held out.
    """
    held_out = [document for document in documents if _is_held_out(document, share)]
    training = [document for document in documents if not _is_held_out(document, share)]
    size, size_held_out = (sum(len(document.text) for document in part) for part in (documents, held_out))
    if share == 0 or 0 < size_held_out <= (1 + share) / 2 * size:
        return training, held_out
    pairs = [_parts(document, share) for document in documents]
    return [first for first, _ in pairs], [last for _, last in pairs if last is not None]


def _parts(document: Document, share: float) -> tuple[Document, Document | None]:
    """A document's beginning, and its last `share`; from the line boundary nearest to there, where one is near. All
    of it, and nothing, if a part would have no text."""
    text = document.text
    place = round(len(text) * (1 - share))
    near = (len(text) - place) // 2
    breaks = [text.rfind("\n", place - near, place) + 1, text.find("\n", place, place + near) + 1]
    cut = min((found for found in breaks if found), key=lambda found: abs(found - place), default=place)
    if not text[:cut].strip() or not text[cut:].strip():
        return document, None
    return Document(document.name, text[:cut]), Document(f"{document.name} (end)", text[cut:])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unread(names: Sequence[str]) -> str:
    return f"{len(names)} {'file' if len(names) == 1 else 'files'} cannot be read as text: {shown(names)}"


def shown(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _files(source: Source, unreadable: list[str], check: Callable[[], None]) -> Iterator[tuple[str, Path]]:
    """A source's files, sorted, by the name their documents get. Folders that cannot be listed are added to
    `unreadable`."""
    if isinstance(source, StandardLibrary):
        root = Path(sysconfig.get_path("stdlib"))
        for file in _found(root, "*.py", unreadable, check):
            relative = file.relative_to(root)
            if not LEFT_OUT & set(relative.parts) and not file.name.startswith("_sysconfigdata"):
                yield relative.as_posix(), file
        return
    for path in map(Path, source.paths):
        if not os.path.lexists(path):
            raise InputError(f"data.sources: there is no {path}")
        found = _found(path, source.pattern, unreadable, check) if os.path.isdir(path) else [path]
        # Wherever a folder is kept, its files have the same names, and the same of them are held out.
        yield from ((file.relative_to(path.parent).as_posix(), file) for file in found)


def _found(root: Path, pattern: str, unreadable: list[str], check: Callable[[], None]) -> list[Path]:
    """What a folder holds under names that match, at any depth; links to folders are not followed."""

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename} ({error.strerror})")

    files: list[Path] = []
    for folder, _, names in os.walk(root, onerror=note):
        check()
        files += [Path(folder, name) for name in names]
    return sorted(file for file in files if file.relative_to(root).match(pattern))


def _documents(source: Source, name: str, text: str) -> Iterator[Document]:
    yield Document(name, text)
    if isinstance(source, StandardLibrary) and source.docstrings:
        strings = "\n\n".join(docstrings(text))
        yield Document(f"{name} (documentation)", strings)


def docstrings(source: str) -> list[str]:
    """The documentation strings of a Python source, cleaned of their indentation, in their order."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):  # lib2to3's samples, for one, are Python 2
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in nodes if isinstance(node, owners)]
    return [text for text in found if text]


def _is_held_out(document: Document, share: float) -> bool:
    """By a hash of the file's name: the same in every run, and a file's documentation goes with the file."""
    name = document.name.removesuffix(" (documentation)")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def _described(data: Data) -> str:
    return ", ".join(
        "the standard library"
        if isinstance(source, StandardLibrary)
        else f"{', '.join(source.paths)} ({source.pattern})"
        for source in data.sources
    )
