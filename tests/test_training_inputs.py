"""What a run learns from: what cannot be read is said, and a run is held to the texts that it began with; and where
its metrics go."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_training import config_file, metrics, texts
from test_training_stops import signal_at, small, small_values

import kvell
from kvell import cli
from kvell.training import loop
from kvell.training.corpus import read_corpus
from kvell.training.settings import Data, NewTokenizer
from kvell.training.tokens import train_tokenizer

__all__ = ["texts"]


def files_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"data": {"sources": [{"kind": "files", "paths": [str(folder)]}], "held_out": 0, **more}}


@pytest.fixture
def own(texts: Path, tmp_path: Path) -> Path:
    """A folder of two texts that a test may change."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("bisect.txt", "hmac.txt"):
        (folder / name).write_bytes((texts / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: (own / "hmac.txt").write_text("other"), r"1 changed \(own/hmac\.txt\)"),
        (lambda own: (own / "hmac.txt").unlink(), r"1 gone \(own/hmac\.txt\)"),
        (lambda own: (own / "new.txt").write_text("new"), r"1 new \(own/new\.txt\)"),
        (lambda own: (own / "hmac.txt").rename(own / "a.txt"), r"1 gone \(own/hmac\.txt\); 1 new \(own/a\.txt\)"),
    ],
)
def test_a_run_goes_on_with_no_other_texts_than_it_began_with(
    change: Any, said: str, own: Path, texts: Path, tmp_path: Path
) -> None:
    config = small(texts, tmp_path / "run", **files_of(own), evaluation={})
    assert loop.train(config, on_step=signal_at(1, signal.SIGTERM)).reason == "stopped"
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    change(own)
    with pytest.raises(kvell.InputError, match=rf"a run on other texts: {said}; bring them back, .* --fresh"):
        loop.train(config)
    for file in own.iterdir():
        file.unlink()
    for name, content in before.items():
        (own / name).write_bytes(content)
    assert loop.train(config).reason == "finished"


def test_a_run_goes_on_with_no_other_tokenizer_than_it_began_with(own: Path, texts: Path, tmp_path: Path) -> None:
    def write_tokenizer(*contents: str) -> None:
        train_tokenizer(NewTokenizer(vocab_size=320), contents).save(str(tmp_path / "tokenizer.json"))

    config = small(texts, tmp_path / "run", **files_of(own), evaluation={}, tokenizer=str(tmp_path))
    write_tokenizer("one two three " * 9)
    loop.train(config, on_step=signal_at(1, signal.SIGTERM))
    write_tokenizer("four five six " * 9)
    with pytest.raises(kvell.InputError, match="run holds a run on other texts: the tokenizer is another"):
        loop.train(config)


def test_skipped_files_are_named_in_a_warning(
    own: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own / "bad.txt").write_bytes(b"caf\xe9")
    file = config_file(tmp_path, small_values(texts, tmp_path / "run", **files_of(own), evaluation={}))
    assert cli.main(["train", str(file), "--skip-bad"]) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: left out")]
    assert warnings == [f"warning: left out: 1 file cannot be read as text: {own / 'bad.txt'} (not UTF-8)"]


def test_broken_links_pipes_and_folders_that_cannot_be_listed_are_said(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "link.txt").symlink_to("nowhere")
    os.mkfifo(own / "pipe.txt")
    (own / "closed").mkdir()
    scandir = os.scandir

    def closed(path: Any) -> Iterator[os.DirEntry[str]]:
        if str(path) == str(own / "closed"):  # who is root may list any folder
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(kvell.InputError) as caught:
        read_corpus(Data(**files_of(own)["data"]))
    said = str(caught.value)
    assert said.startswith("3 files cannot be read as text: ")
    for part in (
        f"{own / 'link.txt'} (a broken link)",
        f"{own / 'pipe.txt'} (not a file)",
        "closed (Permission denied)",
    ):
        assert part in said


def test_tensorboard_gets_every_step_s_metrics(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    loop.train(small(texts, out, trackers=["tensorboard"], evaluation={"every": 4, "tokens": 200, "length": 100}))
    written = EventAccumulator(str(out / "tensorboard")).Reload()
    recorded = {
        name: {line["step"]: line[name] for line in metrics(out) if name in line} for name in ("loss", "rate")
    }
    recorded["held_out_bits_per_byte"] = {
        line["step"]: line["held_out"]["bits_per_byte"] for line in metrics(out) if "held_out" in line
    }
    for name, values in recorded.items():
        assert {event.step: event.value for event in written.Scalars(name)} == pytest.approx(values)
