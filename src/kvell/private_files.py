"""Folders that code is loaded from: nobody but the program's user and root may write there.

Compiled code is found by its name. Whoever can write to a file of that name, to its folder or to one above that can
put other code in its place. So all of them must belong to the user or to root, and be writable by their owners alone.
A parent folder with the sticky bit, such as /tmp, is accepted: everyone can add files there, but not replace those of
others. Links are followed, and the folders that they lead through are checked in the same way.
"""

import os
import stat
from pathlib import Path

from kvell.errors import InputError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# As many links as Linux follows.
MOST_LINKS = 40
# Windows has other means than owners and modes, and its users' folders are their own.
CHECKED = hasattr(os, "geteuid")


def make_private(folder: Path, otherwise: str) -> None:
    """Makes a folder that only its user can use, or sees that nobody else can write to the one that is there.

    OSError where it cannot be made. InputError, in one line that ends with what to do `otherwise`, where another user
    could change what is in it.
    """
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    if reason := _writable_by_others(folder):
        raise InputError(f"compiled code is not taken from {folder}: {reason}; {otherwise}")


def is_kept(file: Path) -> bool:
    """Whether there is such a file. InputError where another user could have written it."""
    if not file.exists():
        return False
    if reason := _writable_by_others(file):
        raise InputError(f"compiled code is not taken from {file}: {reason}; delete it, and it is made anew")
    return True


def keep(made: Path, file: Path) -> None:
    """Puts a file that was made aside into its place, writable by its owner alone."""
    made.chmod(made.stat().st_mode & ~OTHERS_WRITE)
    os.replace(made, file)


def _writable_by_others(path: Path) -> str | None:
    """Who else than the program's user and root could put something in the place of a file or folder, or in it."""
    if not CHECKED:
        return None
    place, ahead, links = Path(path.anchor), list(path.parts[1:]), 0
    while True:
        found = place.lstat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user, of the id {found.st_uid}"
        if stat.S_ISLNK(found.st_mode):
            target, links = Path(os.readlink(place)), links + 1
            if links > MOST_LINKS:
                return f"{path} is a circle of links"
            ahead = [*(target.parts[1:] if target.is_absolute() else target.parts), *ahead]
            place = Path(target.anchor) if target.is_absolute() else place.parent
            continue
        passed_by = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and ahead
        if found.st_mode & OTHERS_WRITE and not passed_by:
            return f"others can write to {place} (its mode is {stat.S_IMODE(found.st_mode):o}; chmod go-w ends that)"
        if not ahead:
            return None
        name, *ahead = ahead
        place = place.parent if name == ".." else place / name
