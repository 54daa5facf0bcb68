"""Code is loaded from where nobody else can put other code, or not at all."""

import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import MIXED
from strategies import random_model

import kvell
from kvell.hardware import check_compiler
from kvell.private_files import is_kept, keep, make_private

SOMEONE_ELSE = 54321


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(path, SOMEONE_ELSE, -1, follow_symlinks=False)


def open_to_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IWGRP)


def open_to_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IWOTH)


OPENINGS = {
    give_away: f"belongs to another user, of the id {SOMEONE_ELSE}",
    open_to_group: "others can write to .* chmod go-w ends that",
    open_to_all: "others can write to .* chmod go-w ends that",
}
every_opening = pytest.mark.parametrize("opened", OPENINGS)
Opening = Callable[[Path], None]


def refuses(folder: Path, reason: str) -> None:
    with pytest.raises(kvell.InputError, match=rf"^compiled code is not taken from {folder}: .*{reason}.*; do this$"):
        make_private(folder, "do this")


def test_folders_are_made_for_their_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "cache" / "kvell", "")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == {0o700}


@every_opening
@pytest.mark.parametrize("where", ["", "above", "above/folder"])
def test_a_folder_that_others_can_write_to_anywhere_on_its_way_is_refused(
    opened: Opening, where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "above" / "folder"
    make_private(folder, "")
    opened(tmp_path / where)
    refuses(folder, OPENINGS[opened])


def test_a_folder_below_one_where_nobody_touches_what_is_anothers_will_do(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    make_private(tmp_path / "folder", "")
    refuses(tmp_path, "others can write to")


@every_opening
@pytest.mark.parametrize("where", ["aside", "aside/target", "aside/target/folder"])
def test_links_are_followed_and_what_they_lead_through_is_held_to_the_same(
    opened: Opening, where: str, tmp_path: Path
) -> None:
    (tmp_path / "aside" / "target" / "folder").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "aside")
    (tmp_path / "relative").symlink_to("aside/../absolute/target")
    folder = tmp_path / "relative" / "folder"
    make_private(folder, "")
    opened(tmp_path / where)
    refuses(folder, OPENINGS[opened])


def test_anothers_link_and_a_circle_of_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    make_private(link, "")
    give_away(link)
    refuses(link, f"link {OPENINGS[give_away]}")


@every_opening
def test_a_file_that_others_could_have_written_is_refused(opened: Opening, tmp_path: Path) -> None:
    file = tmp_path / "code.so"
    assert not is_kept(file)
    file.write_bytes(b"")
    assert is_kept(file)
    opened(file)
    with pytest.raises(
        kvell.InputError, match=rf"^compiled code is not taken from {file}: .*{OPENINGS[opened]}.*dele"
    ):
        is_kept(file)


def test_what_is_kept_is_its_owners_alone_to_write(tmp_path: Path) -> None:
    made, file = tmp_path / "made", tmp_path / "code.so"
    made.write_bytes(b"code")
    made.chmod(0o777)
    keep(made, file)
    assert (file.read_bytes(), made.exists()) == (b"code", False)
    assert stat.S_IMODE(file.stat().st_mode) == 0o755


def test_a_file_linked_from_elsewhere_is_held_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open" / "code.so").write_bytes(b"")
    link = tmp_path / "code.so"
    link.symlink_to("open/code.so")
    assert is_kept(link)
    open_to_all(tmp_path / "open")
    with pytest.raises(kvell.InputError, match="others can write to"):
        is_kept(link)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a compiled step and its kernels keep."""
    folder = tmp_path_factory.mktemp("code") / "kvell"
    random_model(MIXED).compile_decoding(folder=folder)
    return folder


@pytest.mark.parametrize("kind", [".pt2", ".so"])
@every_opening
def test_models_and_kernels_take_no_code_that_others_could_have_written(
    opened: Opening, kind: str, compiled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kvell"
    shutil.copytree(compiled, folder)
    files = sorted(folder.glob(f"*{kind}"))
    assert files
    for file in files:
        opened(file)
    with pytest.raises(kvell.InputError, match=rf"not taken from {folder}/.*{re.escape(kind)}: .*{OPENINGS[opened]}"):
        random_model(MIXED).compile_decoding(folder=folder)


@every_opening
def test_models_take_no_code_from_a_folder_that_others_can_write_to(
    opened: Opening, compiled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kvell"
    shutil.copytree(compiled, folder)
    opened(folder)
    with pytest.raises(kvell.InputError, match=rf"not taken from {folder}: .*{OPENINGS[opened]}.*XDG_CACHE_HOME"):
        random_model(MIXED).compile_decoding(folder=folder)


@every_opening
@pytest.mark.parametrize("variable", ["TMPDIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_nothing_is_compiled_where_others_can_write_to_torchs_own_folder(
    opened: Opening, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # which remembers the first answer
    opened(tmp_path)
    with pytest.raises(kvell.InputError, match=rf"{OPENINGS[opened]}.*; name a folder .* environment's {variable}$"):
        check_compiler(torch.device("cpu"), "do without")
