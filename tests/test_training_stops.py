"""How training runs end and go on: killed at their end, stopped by signals, on inputs that changed meanwhile."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_training import ADAMW, config_file, in_processes, losses, metrics, run_values, texts
from tokenizer_kinds import of_bytes, write
from tokenizers import Regex, pre_tokenizers

import kvell
from kvell import cli
from kvell.training import loop
from kvell.training.corpus import read_corpus
from kvell.training.run import Run, held
from kvell.training.settings import TrainingConfig
from kvell.training.stopping import StoppedError, interruptibly

__all__ = ["texts"]

HCA = {
    "kind": "compressed",
    "num_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "rotary": {"kind": "default", "theta": 100.0},
    "rotary_width": 4,
    "query_rank": 8,
    "output_rank": 8,
    "compressor": {"ratio": 64},
}
SMALL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "max_positions": 512,
    "tied_head": True,
    "layers": [{"attention": HCA, "feed_forward": {"kind": "gated_mlp", "intermediate_size": 24}}],
}
PASSKEY = {"task": {"kind": "passkey"}, "share": 0.3, "shortest": 100}


def small_values(texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Six steps of a layer, evaluated at the end."""
    values = {
        "model": SMALL,
        "stages": [{"steps": 6, "length": 128, "tokens": 256, "micro_batches": 2}],
        "evaluation": {"tasks": [{"kind": "passkey"}], "cases": 2, "lengths": [128]},
        "checkpoints": {"every": 4},
        "optimizer": ADAMW,
        "losses": {},
    }
    return run_values(texts, out, **{**values, **changes})


def small(texts: Path, out: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig.read(config_file(out.parent, small_values(texts, out, **changes)))


def signal_at(step: int, number: int) -> loop.Watcher:
    return lambda report: os.kill(os.getpid(), number) if report.step == step else None


@pytest.fixture(scope="module")
def small_run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "run"
    loop.train(small(texts, out))
    return out


def evaluation(out: Path) -> Any:
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.parametrize("ending", ["export", "write_evaluation"])
def test_a_run_killed_behind_its_last_step_leaves_its_model_when_it_goes_on(
    ending: str, texts: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Run, ending, die)
        with pytest.raises(SystemExit):
            loop.train(small(texts, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]
    outcome = loop.train(small(texts, tmp_path / "run"))
    assert (outcome.reason, outcome.evaluation) == ("finished", evaluation(small_run))
    assert kvell.from_pretrained(tmp_path / "run").fingerprint() == kvell.from_pretrained(small_run).fingerprint()


def test_a_signal_in_the_last_evaluation_stops_it_and_it_is_done_again(
    texts: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.evaluate_texts

    def interrupted(*given: Any, **named: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate_texts", interrupted)
        outcome = loop.train(small(texts, tmp_path / "run"))
    assert (outcome.reason, outcome.step) == ("stopped", 6)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert loop.train(small(texts, tmp_path / "run")).reason == "finished"
    assert evaluation(tmp_path / "run") == evaluation(small_run)


def test_a_signal_before_the_first_step_stops_a_run_that_then_goes_on(
    texts: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = loop.read_corpus

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*given)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "read_corpus", interrupted)
        outcome = loop.train(small(texts, tmp_path / "run"))
    assert (outcome.reason, outcome.step) == ("stopped", 0)
    loop.train(small(texts, tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(small_run)


def test_ctrl_c_finishes_the_step_saves_and_says_so(
    texts: Path, small_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config_file(tmp_path, small_values(texts, tmp_path / "run"))
    log = loop.Training._log

    def interrupted(training: loop.Training, values: dict[str, Any], trackers: list[Any]) -> None:
        log(training, values, trackers)
        if values["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Training, "_log", interrupted)
        assert cli.main(["train", str(file)]) == 130
    assert "interrupted after step 3 of 6" in capfd.readouterr().err.splitlines()[-1]
    assert len(losses(tmp_path / "run")) == 3
    assert cli.main(["train", str(file)]) == 0
    assert metrics(tmp_path / "run") == metrics(small_run)


def test_a_folder_is_one_run_s_at_a_time(texts: Path, small_run: Path) -> None:
    with held(small_run), pytest.raises(kvell.InputError, match=r"run is in use by another run: .* another --out"):
        loop.train(small(texts, small_run))
    loop.train(small(texts, small_run))


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_read(texts: Path, small_run: Path) -> None:
    config = small(texts, small_run).model_copy(update={"out": str(small_run / "config.json" / "run")})
    with pytest.raises(kvell.CheckpointError, match=r"json/run cannot be written to: Not a directory"):
        loop.train(config)


def test_a_second_ctrl_c_ends_a_run_at_once(texts: Path, tmp_path: Path) -> None:
    def twice(report: loop.StepReport) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(small(texts, tmp_path / "run"), on_step=twice)


def test_a_finished_run_says_again_what_its_model_is_worth(
    texts: Path, small_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = config_file(small_run.parent, small_values(texts, small_run))
    assert cli.main(["train", str(file), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["evaluation"] == evaluation(small_run)


def test_a_run_begins_by_printing_its_config_resolved(
    texts: Path, small_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small(texts, small_run)
    assert cli.main(["train", str(small_run.parent / "run.yaml")]) == 0
    layers, _, others = capfd.readouterr().out.partition("\n\ntokenizer:")
    assert re.search(r"^ +0 +compressed +2 +1 +8 +8 .* own +default.* gated 24 ", layers, re.MULTILINE)
    printed = yaml.safe_load("tokenizer:" + others)
    assert len(others.splitlines()) == len(printed)
    assert TrainingConfig.of({**printed, "model": config.model}, "printed") == config


def test_patience_that_lasts_leaves_the_best_model_too(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, embeddings = iter([3.0, 2.5, 2.6]), []

    def evaluate(model: kvell.Decoder, *_: Any, **named: Any) -> dict[str, Any]:
        embeddings.append(model.embedding.weight.detach().clone())
        return {"bits_per_byte": next(figures, 9.0)}

    monkeypatch.setattr(loop, "evaluate_texts", evaluate)
    outcome = loop.train(small(texts, tmp_path / "run", evaluation={"every": 2, "patience": 2}))
    assert (outcome.reason, outcome.step) == ("finished", 6)
    best = dict(kvell.from_pretrained(tmp_path / "run").named_tensors())["embedding.weight"]
    assert best.equal(embeddings[1])
    assert not best.equal(embeddings[2])


def test_a_run_killed_again_and_again_at_random_moments_ends_as_if_it_had_not_been(
    texts: Path, tmp_path: Path
) -> None:
    """SIGKILL, with a checkpoint after every step: while texts are read, in steps, in checkpoints, at the end. Every
    attempt is forked from a process that has loaded everything."""
    changes = {"stages": [{"steps": 30, "length": 128, "tokens": 256}], "checkpoints": {"every": 1}}
    loop.train(small(texts, tmp_path / "whole" / "run", **changes))
    out = tmp_path / "killed" / "run"
    file = config_file(out.parent, small_values(texts, out, **changes))
    seed = random.randrange(10**9)
    done = subprocess.run([sys.executable, "-c", KILLING, str(file), str(seed)], capture_output=True, timeout=300)
    assert done.returncode == 0, f"seed {seed}: {done.stderr.decode()}"
    assert metrics(out) == metrics(tmp_path / "whole" / "run"), f"seed {seed}"
    assert evaluation(out) == evaluation(tmp_path / "whole" / "run"), f"seed {seed}"
    ours, theirs = (kvell.from_pretrained(folder).fingerprint() for folder in (out, tmp_path / "whole" / "run"))
    assert ours == theirs, f"seed {seed}"


KILLING = """
import os, random, signal, sys, time
from kvell.training import loop
from kvell.training.settings import TrainingConfig
from kvell.training.stopping import StoppedError, interruptibly

config, rng = TrainingConfig.read(sys.argv[1]), random.Random(int(sys.argv[2]))
for attempt in range(13):
    child = os.fork()
    if child == 0:
        loop.train(config)
        os._exit(0)
    if attempt < 12:
        time.sleep(rng.uniform(0.1, 0.35))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


def test_every_generated_task_can_stand_among_the_texts_and_be_evaluated(texts: Path, tmp_path: Path) -> None:
    tasks = [
        {"kind": "associative_recall", "num_pairs": 4},
        {"kind": "induction", "span": 20},
        {"kind": "needle"},
        {"kind": "passkey"},
        {"kind": "needles", "num_needles": 1},
    ]
    data = {
        "sources": [{"kind": "files", "paths": [str(texts)]}],
        "tasks": [{"task": task, "share": 0.15, "shortest": 110} for task in tasks],
    }
    drawn = []

    def note(training: loop.Training, step: list[loop.MicroBatch]) -> dict[str, float]:
        drawn.extend(name for batch in step for name in batch.names)
        return take_step(training, step)

    take_step = loop.Training._step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Training, "_step", note)
        figures = loop.train(
            small(texts, tmp_path / "run", data=data, evaluation={"tasks": tasks, "cases": 2, "lengths": [120]})
        ).evaluation["tasks"]
    assert {f"{task['kind']} task" for task in tasks} <= set(drawn)
    assert list(figures) == [f"{task['kind']} at 120" for task in tasks]
    assert all(figure["cases"] == 2 for figure in figures.values())


def test_processes_with_pieces_too_short_for_any_entry_equal_one(texts: Path, tmp_path: Path) -> None:
    """Some micro-batches complete a compressor's window of 64 tokens and some do not; all parameters are reduced."""
    folder = tmp_path / "texts"
    folder.mkdir()
    source = (texts / "cmd.txt").read_text()
    for number in range(40):
        (folder / f"{number}.txt").write_text(source[60 * number : 60 * number + 60])
    data = {"sources": [{"kind": "files", "paths": [str(folder)]}], "held_out": 0, "tasks": [PASSKEY]}
    runs = {}
    for count in (1, 2):
        out = tmp_path / f"{count}" / "run"
        file = config_file(out.parent, small_values(texts, out, data=data, evaluation={}))
        if count == 1:
            loop.train(TrainingConfig.read(file))
        else:
            in_processes(file, count)
        runs[count] = losses(out)
    assert runs[2] == pytest.approx(runs[1], abs=1e-5)


def slow_to_learn(folder: Path) -> dict[str, Any]:
    """Texts from which a tokenizer is trained for a minute, and what a run says of them."""
    (folder / "texts.txt").write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=4_000_000)))
    return {"tokenizer": {"vocab_size": 60_000}, "model": {**SMALL, "vocab_size": 60_000}}


def slow_to_encode(folder: Path) -> dict[str, Any]:
    """A text that a tokenizer encodes for minutes, in one call: its words' pattern is tried in all ways."""
    (folder / "texts.txt").write_text(("a" * 29 + "bb ") * 2000)
    tokenizer = of_bytes()
    tries = pre_tokenizers.Split(Regex("(?:a|aa)+[^a][0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tries, tokenizer.pre_tokenizer])
    return {"tokenizer": str(write(tokenizer, folder))}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("slow", [slow_to_learn, slow_to_encode])
def test_a_signal_ends_a_run_that_prepares_its_texts(slow: Any, number: int, tmp_path: Path) -> None:
    """Within seconds, though the tokenizer's own code lets no signal through; and nothing is left of it."""
    changes = slow(tmp_path)
    data = {"sources": [{"kind": "files", "paths": [str(tmp_path / "texts.txt")]}], "held_out": 0}
    file = config_file(tmp_path, small_values(tmp_path, tmp_path / "run", data=data, evaluation={}, **changes))
    command = [sys.executable, "-m", "kvell.train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "run.lock").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(2)  # by then the texts are read, and the tokenizer is at work
        assert process.poll() is None
        process.send_signal(number)
        _, said = process.communicate(timeout=15)
    finally:
        process.kill()
    ending = "interrupted" if number == signal.SIGINT else "stopped"
    assert process.returncode == (130 if number == signal.SIGINT else 0), said
    assert said.splitlines()[-1].startswith(f"{ending} after step 0 of 6: ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_reading_can_be_stopped_before_every_file(texts: Path) -> None:
    def check() -> None:
        calls.append(0)
        if len(calls) == 4:
            raise StoppedError

    calls: list[int] = []
    data = TrainingConfig.read(config_file(texts.parent, small_values(texts, texts.parent / "run"))).data
    with pytest.raises(StoppedError):
        read_corpus(data, False, check)


def test_a_run_stopped_while_its_texts_are_read_leaves_what_the_folder_held(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    loop.train(small(texts, out), on_step=signal_at(5, signal.SIGTERM))
    before = {file.relative_to(out) for file in out.rglob("*")}
    read = loop.read_corpus

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*given)

    monkeypatch.setattr(loop, "read_corpus", interrupted)
    outcome = loop.train(small(texts, out), fresh=True)
    assert (outcome.reason, outcome.step) == ("stopped", 5)
    assert {file.relative_to(out) for file in out.rglob("*")} == before


def test_what_is_waited_for_returns_and_raises_as_if_it_were_called() -> None:
    def fail() -> None:
        raise kvell.InputError("so")

    assert interruptibly(lambda: 7, lambda: None) == 7
    with pytest.raises(kvell.InputError, match="so"):
        interruptibly(fail, lambda: None)
