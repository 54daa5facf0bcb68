"""What is written aside: gone when its writer is, however that ended, and never taken from a writer at work."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_models import MIXED

import kvell
from kvell import scratch
from kvell.files import beside, write_safetensors

DAY = 24 * 3600

# Saves one tensor into the folder named, and stops where all of it is written and nothing has its name yet.
SAVING = """
import os, sys, time, torch
from pathlib import Path
from kvell import files

def wait(_):
    print("written", flush=True)
    time.sleep(600)

os.fsync = wait
files.write_safetensors(Path(sys.argv[1]) / "killed", {"a": torch.zeros(5)})
"""


@contextmanager
def saver(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of saving to a folder, which SIGKILL ends at the latest afterwards."""
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(folder)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_model(folder: Path) -> None:
    kvell.Decoder(MIXED).save_pretrained(folder)


def save_cache(folder: Path) -> None:
    kvell.Decoder(MIXED).make_cache().save(folder / "prompt.cache")


SAVES = {save_model: ["config.json", "model.safetensors"], save_cache: ["prompt.cache"]}


@pytest.mark.parametrize("save", SAVES)
def test_the_next_save_removes_what_a_killed_one_had_written(save: Callable[[Path], None], tmp_path: Path) -> None:
    with saver(tmp_path):
        (aside,) = tmp_path.iterdir()
        assert (aside / "files" / "killed").stat().st_size > 5 * 4
    assert list(tmp_path.iterdir()) == [aside]
    save(tmp_path)
    assert names(tmp_path) == SAVES[save]


def test_a_save_leaves_alone_what_another_process_is_writing(tmp_path: Path) -> None:
    with saver(tmp_path) as process:
        (aside,) = tmp_path.iterdir()
        save_cache(tmp_path)
        assert names(tmp_path) == [aside.name, "prompt.cache"]
        assert names(aside / "files") == ["killed"]
        assert process.poll() is None


def test_a_save_leaves_alone_what_another_thread_is_writing(tmp_path: Path) -> None:
    with beside(tmp_path) as mine:
        write_safetensors(tmp_path / "other", {"a": torch.zeros(3)})
        assert mine.is_dir()
    assert names(tmp_path) == ["other"]


def age(folder: Path, seconds: float) -> None:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (time.time() - seconds,) * 2)


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("reason", ["of another host", "on a file system without locks", "not locked yet"])
def test_where_no_lock_tells_what_is_a_day_old_counts_as_left_behind(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver(tmp_path):
        (aside,) = tmp_path.iterdir()
    if reason == "of another host":
        (aside / "lock").write_text("elsewhere")
    elif reason == "not locked yet":
        (aside / "lock").unlink()
    else:
        monkeypatch.setattr(scratch.fcntl, "flock", no_locks)
    for seconds, stays in ((0.9 * DAY, True), (1.1 * DAY, False)):
        age(aside, seconds)
        save_cache(tmp_path)
        assert names(tmp_path) == ([aside.name] if stays else []) + ["prompt.cache"]


def test_what_is_locked_is_at_work_however_old_it_is(tmp_path: Path) -> None:
    with beside(tmp_path) as mine:
        (mine / "large").touch()
        age(mine.parent, 9 * DAY)
        save_cache(tmp_path)
        assert names(mine) == ["large"]


def test_folders_that_others_named_stay(tmp_path: Path) -> None:
    (tmp_path / ".saving-x").mkdir()
    age(tmp_path / ".saving-x", 9 * DAY)
    save_cache(tmp_path)
    assert names(tmp_path) == [".saving-x", "prompt.cache"]


@pytest.mark.parametrize("name", ["a\0b", "a\0b/c", "\udc00\ud800"])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(kvell.CheckpointError, match=r"^could not save to '.*': no file can have this name$"):
        write_safetensors(tmp_path / name, {"a": torch.zeros(3)})
    with pytest.raises(kvell.CheckpointError, match="no file can have this name"), beside(tmp_path / name):
        raise AssertionError("there is no such folder to write in")
    assert names(tmp_path) == []


def test_a_fault_while_saving_is_not_renamed(tmp_path: Path) -> None:
    def fault() -> None:
        raise ValueError("in the code that writes")

    with pytest.raises(ValueError, match=r"^in the code that writes$"), beside(tmp_path):
        fault()
    assert names(tmp_path) == []
