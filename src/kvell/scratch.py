"""Scratch folders for files that are not finished yet, and how those that a killed process left are recognised.

    .kvell-saving-x1y2/lock     names the host of the process that writes here; it holds a lock on the file until done
    .kvell-saving-x1y2/files/   what is being written

The system lets go of a lock however its process ends, so a lock that can be taken is one that nobody needs. That
holds for processes of one host. Some shared file systems keep the locks of each host apart, and some have none: a
folder of another host, or one whose lock says nothing, counts as left behind when it has not been changed for a day.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

PREFIX = ".kvell-saving-"
LOCK, FILES = "lock", "files"
LONG_UNCHANGED = 24 * 3600.0


class Lock(Enum):
    """What came of an attempt to lock a file."""

    TAKEN = "taken"
    ANOTHERS = "held by someone else"
    UNKNOWN = "no locks here"


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder to write in, inside `folder`, so that renaming out of it is atomic; gone afterwards in any case, and
    with it those that killed processes left there. OSError where it cannot be made."""
    remove_abandoned(folder)
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    try:
        # It gets its name once it is locked: under this name it is never found unlocked while it is needed.
        with open(scratch / f"{LOCK}.new", "w") as file:
            take(file)
            file.write(platform.node())
            file.flush()
            os.replace(file.name, scratch / LOCK)
            (scratch / FILES).mkdir()
            yield scratch / FILES
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Removes the scratch folders that nobody writes in any more."""
    for scratch in folder.glob(f"{PREFIX}*"):
        try:
            with open(scratch / LOCK, "r+") as file:
                lock = take(file)
                left = lock is Lock.TAKEN and file.read() == platform.node()
                if left or (lock is not Lock.ANOTHERS and _is_long_unchanged(scratch)):
                    shutil.rmtree(scratch, ignore_errors=True)
        except FileNotFoundError:  # its writer was about to lock it, now or when it was killed
            if _is_long_unchanged(scratch):
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError:  # another user's, who will remove it
            continue


def take(file: IO[Any]) -> Lock:
    """Locks a file for as long as it is open, if nobody else has."""
    if fcntl is None:
        return Lock.UNKNOWN
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.ANOTHERS
    except OSError:  # a file system without locks
        return Lock.UNKNOWN
    return Lock.TAKEN


def _is_long_unchanged(scratch: Path) -> bool:
    try:
        changed = max(path.lstat().st_mtime for path in [scratch, *scratch.rglob("*")])
    except FileNotFoundError:  # someone is at work there
        return False
    return time.time() - changed > LONG_UNCHANGED
