"""What a run learns from: what cannot be read is said, and a run is held to the texts that it began with; and where
its metrics go."""

import hashlib
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_training import MIXED, config_file, metrics, texts
from test_training_stops import signal_at, small, small_values

import kvell
from kvell import cli
from kvell.training import loop
from kvell.training.corpus import Document, read_corpus
from kvell.training.ends import BOS, EOS
from kvell.training.settings import Data, NewTokenizer, TextFiles, TrainingConfig, ignored_settings
from kvell.training.tokens import read_tokenizer, tokenise, train_tokenizer

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
    with pytest.raises(kvell.CheckpointError, match="a training run that has no model yet: the same `kvell train`"):
        kvell.from_pretrained(tmp_path / "run")
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


def test_a_document_that_spells_the_special_tokens_holds_none_but_its_own(tmp_path: Path) -> None:
    text = f'BOS, EOS = "{BOS}", "{EOS}"'
    made = train_tokenizer(NewTokenizer(vocab_size=320), [text])
    made.save(str(tmp_path / "tokenizer.json"))
    bos, eos = made.token_to_id(BOS), made.token_to_id(EOS)
    for tokenizer in (made, read_tokenizer(str(tmp_path))):
        (document,) = tokenise(tokenizer, [Document("tokens.py", text)], 320, eos)
        first, *inside, last = document.ids.tolist()
        assert (first, last) == (bos, eos)
        assert not {bos, eos} & set(inside)
        assert tokenizer.decode(inside) == text


def test_documents_are_whole_whatever_truncation_and_padding_the_tokenizer_was_saved_with(tmp_path: Path) -> None:
    made = train_tokenizer(NewTokenizer(vocab_size=320), ["one two three"])
    documents = [Document("long", "one two three " * 9), Document("short", "one")]
    whole = [document.ids.tolist() for document in tokenise(made, documents, 320, None)]
    made.enable_truncation(max_length=4)
    made.enable_padding()
    made.save(str(tmp_path / "tokenizer.json"))
    read = tokenise(read_tokenizer(str(tmp_path)), documents, 320, None)
    assert [document.ids.tolist() for document in read] == whole


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


def data_of(*paths: Path, held_out: float = 0.05) -> Data:
    return Data(sources=(TextFiles(paths=tuple(map(str, paths))),), held_out=held_out)


USUAL = (
    *("tinyshakespeare", "shakespeare", "input", "data", "train", "corpus", "text", "books", "book", "pile", "novel"),
    *("clean", "wiki", "wikitext", "enwik8", "text8", "openwebtext", "c4", "dataset", "all", "full", "merged", "raw"),
    *("output", "sample", "samples", "stories", "tinystories", "bible", "poems", "lyrics", "code", "source", "names"),
    *("words", "dump", "articles", "news", "reviews", "chat", "dialogue", "conversations", "my_data", "mydata"),
    *("training", "train_data", "alice", "moby_dick", "war_and_peace", "file", "document"),
)


def test_a_corpus_of_one_file_has_text_on_both_sides_whatever_its_name(tmp_path: Path) -> None:
    """The end of it, from a line boundary, is held out; nothing is lost and nothing is on both sides."""
    text = "To be, or not to be, that is the question:\n" * 2000
    assert len(set(USUAL)) == 51
    for name in USUAL:
        file = tmp_path / f"{name}.txt"
        file.write_text(text)
        corpus = read_corpus(data_of(file))
        (training,), (held_out,) = corpus.training, corpus.held_out
        assert training.text + held_out.text == text
        assert held_out.text.startswith("To be")
        assert len(held_out.text) / len(text) == pytest.approx(0.05, abs=0.01)
        assert list(corpus.digests()) == [training.name, held_out.name]
        assert (training.name, held_out.name) == (f"{name}.txt", f"{name}.txt (end)")


def test_a_few_files_each_give_their_end_where_no_name_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"line {number}\n" * 300)
    corpus = read_corpus(data_of(folder))
    assert len(corpus.training) == len(corpus.held_out) == 6


def test_a_name_does_not_hold_out_nearly_all_of_the_text(tmp_path: Path) -> None:
    """tinyshakespeare.txt is drawn by its name, and the rest is a note."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "note.txt").write_text("a note\n" * 9)
    drawn = next(name for name in (f"{number}.txt" for number in range(999)) if _drawn(f"data/{name}"))
    (folder / drawn).write_text("a long text\n" * 9000)
    corpus = read_corpus(data_of(folder))
    sizes = [sum(len(document.text) for document in part) for part in (corpus.training, corpus.held_out)]
    assert sizes[1] / sum(sizes) == pytest.approx(0.05, abs=0.01)


def _drawn(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < 0.05 * 2**32


def test_many_documents_are_held_out_whole_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"text {number}\n" * 20)
    corpus = read_corpus(data_of(folder))
    names = {document.name for document in [*corpus.training, *corpus.held_out]}
    assert len(names) == 200
    assert {document.name for document in corpus.held_out} == {name for name in names if _drawn(name)}


@pytest.mark.parametrize("text", ["x" * 10_000, "word " * 2000, "\n".join("ab" * 2000 for _ in range(3))])
def test_text_without_near_line_boundaries_is_cut_where_the_share_says(text: str, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(text)
    corpus = read_corpus(data_of(tmp_path / "input.txt", held_out=0.1))
    assert len(corpus.held_out[0].text) == round(0.1 * len(text))


def test_patience_serves_a_corpus_of_one_file(texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "tinyshakespeare.txt"
    file.write_bytes((texts / "cmd.txt").read_bytes())
    changes = {"data": {"sources": [{"kind": "files", "paths": [str(file)]}]}}
    outcome = loop.train(small(texts, tmp_path / "run", **changes, evaluation={"every": 2, "patience": 9}))
    assert outcome.evaluation["held_out"]["bytes"] > 100
    assert sum("held_out" in line for line in metrics(tmp_path / "run")) >= 2


def said_in(config: TrainingConfig) -> list[str]:
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(config)
    return [str(warning.message) for warning in caught]


def test_a_corpus_too_short_to_hold_anything_out_says_so(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("some text")
    data = {"sources": [{"kind": "files", "paths": [str(tmp_path / "input.txt")]}], "held_out": 0.01}
    said = said_in(small(texts, tmp_path / "run", data=data, evaluation={}))
    assert [line for line in said if line.startswith("no document is held out, so nothing says how well")]
    data["held_out"] = 0
    said = said_in(small(texts, tmp_path / "other" / "run", data=data, evaluation={}))
    assert not [line for line in said if "held out" in line]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"schedule": {"warmup": 40}},
            [
                "schedule.warmup: 40 steps are not over when the run ends after 6: the learning rate gets no higher "
                "than 0.15 of what is asked"
            ],
        ),
        (
            {"optimizer": {"kind": "adamw", "matrix_learning_rate": 5.0, "matrix_weight_decay": 0.3}},
            ["optimizer.matrix_learning_rate and optimizer.matrix_weight_decay: without effect with kind: adamw"],
        ),
        (
            {"schedule": {"kind": "constant", "warmup": 0, "floor": 0.1, "decay": 0.2}},
            ["schedule.floor and schedule.decay: without effect with kind: constant"],
        ),
        (
            {"schedule": {"kind": "cosine", "warmup": 0, "decay": 0.2}},
            ["schedule.decay: without effect with kind: cosine"],
        ),
        ({"losses": {"draft": 0.5}}, ["losses.draft: without effect with a model without a draft block"]),
        ({"losses": {"balance": 0.01}}, ["losses.balance: without effect with a model without experts"]),
        ({"losses": {"index": 0.5}}, ["losses.index: without effect with a model without an indexer"]),
        ({"evaluation": {"lengths": [128]}}, ["evaluation.lengths: without effect with no evaluation.tasks"]),
        ({"schedule": {"warmup": 5}}, []),
        ({"optimizer": {"kind": "muon", "matrix_weight_decay": 0.3}}, []),
        ({"model": MIXED, "losses": {"balance": 0.1, "index": 0.5, "draft": 0.5}}, []),
    ],
)
def test_what_a_config_says_without_effect_is_said_once(
    changes: dict[str, Any], said: list[str], texts: Path, tmp_path: Path
) -> None:
    plain = {"schedule": {"warmup": 0}, "losses": {}, "evaluation": {}}
    assert ignored_settings(small(texts, tmp_path / "run", **{**plain, **changes})) == said


def test_a_run_warns_of_each_setting_without_effect_once(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tmp_path, small_values(texts, tmp_path / "run", schedule={"warmup": 40}, evaluation={}))
    assert cli.main(["train", str(file)]) == 0
    assert capfd.readouterr().err.count("warning: schedule.warmup: 40 steps are not over when the run ends") == 1


def test_no_recipe_of_ours_says_anything_without_effect() -> None:
    examples = Path(__file__).parent.parent / "examples"
    for name in ("mini.yaml", "mini-gqa.yaml"):
        assert ignored_settings(TrainingConfig.read(examples / name)) == []
