"""Training runs end to end: they resume bit-exactly, survive being killed, refuse what cannot go on, and are the same
on two processes as on one. Small runs over a mixed config, on files of the standard library."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pairwise import configs
from torch import Tensor

import kvell
from kvell import cli
from kvell.config_file import resolve
from kvell.training import loop
from kvell.training.corpus import read_corpus
from kvell.training.run import LOCK, held
from kvell.training.settings import Data, TrainingConfig

GATED = {"kind": "gated_mlp", "intermediate_size": 24}
MOE = {
    "kind": "mixture_of_experts",
    "num_experts": 4,
    "top_k": 2,
    "intermediate_size": 8,
    "router": {"kind": "sigmoid"},
}
CCA = {"kind": "convolutional", "num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "rotary": None}
CSA = {
    "kind": "compressed",
    "num_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "rotary": {"kind": "default", "theta": 100.0},
    "rotary_width": 4,
    "query_rank": 8,
    "output_rank": 8,
    "compressor": {"ratio": 4, "overlap": True},
    "indexer": {"num_heads": 2, "head_dim": 4, "top_k": 3},
}
# Everything at once: convolutional and compressed layers, both shared, hyper-connections, per-layer embeddings,
# experts, a draft block.
MIXED = {
    "vocab_size": 320,
    "hidden_size": 16,
    "max_positions": 8192,
    "tied_head": True,
    "connection": {"kind": "hyper", "streams": 2, "iterations": 3},
    "per_layer_embedding": {"width": 4},
    "parts": {
        "cca": {"attention": CCA, "feed_forward": GATED},
        "csa": {"attention": CSA, "feed_forward": MOE},
    },
    "layers": [
        {"pattern": ["cca", "csa"]},
        {"use": "cca", "attention": {"kv_source": -2}},
        {"use": "csa", "attention": {"kv_source": -2, "indexer": None, "source_picks": True}},
    ],
    "draft": {"layer": {"attention": CCA, "feed_forward": MOE}},
}
STEPS = 20


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A name of its own: which files are held out goes by their names, the folder's included.
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("bisect", "cmd", "colorsys", "copy", "fnmatch", "glob", "heapq", "hmac"):
        (folder / f"{name}.txt").write_bytes((library / f"{name}.py").read_bytes())
    return folder


def run_values(texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": MIXED,
        "tokenizer": {"vocab_size": 320},
        "data": {
            "sources": [{"kind": "files", "paths": [str(texts)]}],
            "held_out": 0.2,
            "tasks": [{"task": {"kind": "passkey"}, "share": 0.3, "shortest": 100}],
        },
        "stages": [
            {"steps": 15, "length": 128, "tokens": 512, "micro_batches": 2},
            {"steps": 5, "length": 256, "tokens": 512, "micro_batches": 2},
        ],
        "schedule": {"warmup": 4},
        "losses": {"balance": 0.01},
        "evaluation": {"every": 7, "tokens": 200, "length": 100},
        "checkpoints": {"every": 6},
        "threads": 1,
        "out": str(out),
        **changes,
    }


def config_file(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def settings(texts: Path, out: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig.read(config_file(out.parent, run_values(texts, out, **changes)))


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]


def weights(out: Path) -> dict[str, Tensor]:
    return dict(kvell.from_pretrained(out).named_tensors())


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert loop.train(settings(texts, out)).reason == "finished"
    return out


def test_the_loss_falls_and_every_part_is_recorded(whole: Path) -> None:
    steps = [line for line in metrics(whole) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {"next", "draft", "index", "balance", "gradient_norm", "rate", "tokens"} <= set(steps[0])
    assert steps[-1]["next"] < steps[0]["next"] - 0.3
    assert [line["step"] for line in metrics(whole) if "held_out" in line] == [7, 14]
    assert sum("answers" in line for line in steps) >= 10


def test_what_comes_out_is_a_model_like_any_other(whole: Path) -> None:
    model, tokenizer = kvell.from_pretrained(whole), kvell.Tokenizer.from_pretrained(whole)
    pieces = list(kvell.generate(model, tokenizer.encode("def f"), max_new_tokens=5, tokenizer=tokenizer))
    assert len(pieces) in range(1, 6)
    figures = json.loads((whole / "evaluation.json").read_text())
    assert figures["steps"] == STEPS
    assert 0 < figures["held_out"]["bits_per_byte"] < 8


def test_a_run_stopped_by_sigterm_goes_on_as_if_it_had_not_been(texts: Path, whole: Path, tmp_path: Path) -> None:
    config = settings(texts, tmp_path / "run")

    def stop_at_eleven(report: loop.StepReport) -> None:
        if report.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = loop.train(config, on_step=stop_at_eleven)
    assert (stopped.reason, stopped.step) == ("stopped", 11)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert loop.train(config).reason == "finished"
    assert metrics(tmp_path / "run") == metrics(whole)
    theirs = weights(whole)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_run_killed_at_any_moment_goes_on_from_its_last_checkpoint(
    texts: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL once the first checkpoint stands, wherever the process is by then."""
    out = tmp_path / "run"
    file = config_file(tmp_path, run_values(texts, out))
    process = subprocess.Popen([sys.executable, "-m", "kvell.train", str(file)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert list(out.glob("checkpoints/step-*")), "no checkpoint was written in time"
    assert len(losses(out)) < STEPS
    assert loop.train(TrainingConfig.read(file)).reason == "finished"
    assert metrics(out) == metrics(whole)


def test_a_finished_run_is_left_as_it_is(texts: Path, whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert loop.train(settings(texts, whole)).step == STEPS
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()} == before


def test_a_changed_config_is_refused_and_the_differing_keys_listed(texts: Path, whole: Path) -> None:
    changed = settings(texts, whole, seed=1, schedule={"warmup": 5})
    with pytest.raises(kvell.InputError, match=r"differing in schedule\.warmup: 4 -> 5; seed: 0 -> 1: .*--fresh"):
        loop.train(changed)


def test_gradient_accumulation_of_what_counts_by_tokens_changes_nothing_but_rounding(
    texts: Path, tmp_path: Path
) -> None:
    """The same pieces in one micro-batch or in two: the loss is divided by what the whole step has. The losses that
    even out experts and align indexers are means over micro-batches, and not among them."""
    config = settings(texts, tmp_path / "run", losses={"index": 0, "balance": 0, "bias_rate": 0})
    training = loop.Training(config, loop.Processes.of(torch.device("cpu")), False, False)
    stages = config.stages
    step = next(
        loop.steps_of(stages, training.training, config.data.tasks, training._encode, training.ends.bos, config.seed)
    )
    assert len(step) == 2
    joined = loop.MicroBatch(
        step[0].names + step[1].names,
        step[0].counts + step[1].counts,
        torch.cat([step[0].inputs, step[1].inputs]),
        torch.cat([step[0].targets, step[1].targets]),
        torch.cat([step[0].answers, step[1].answers + len(step[0].inputs)]),
    )
    gradients = []
    for batches in (step, [joined]):
        training.model.zero_grad()
        totals = loop.Totals.of(step)
        for batch in batches:
            loop.step_loss(training.model, batch, totals, config.losses).loss.backward()
        gradients.append([p.grad.clone() for p in training.parameters if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


BRIEF = {
    "stages": [
        {"steps": 4, "length": 128, "tokens": 512, "micro_batches": 2},
        {"steps": 3, "length": 256, "tokens": 512, "micro_batches": 2},
    ],
    "evaluation": {},
}


@pytest.fixture(scope="module")
def brief(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("brief") / "run"
    loop.train(settings(texts, out, **BRIEF))
    return out


def next_losses(out: Path) -> list[float]:
    return [line["next"] for line in metrics(out) if "next" in line]


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"activation_checkpointing": True}])
def test_other_ways_to_compute_learn_alike(texts: Path, brief: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    loop.train(settings(texts, tmp_path / "run", **BRIEF, **changes))
    tolerance = 0.05 if "precision" in changes else 1e-3
    assert next_losses(tmp_path / "run") == pytest.approx(next_losses(brief), abs=tolerance)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = settings(texts, out)
    training = loop.Training(config, loop.Processes.of(torch.device("cpu")), False, False)

    def poison(report: loop.StepReport) -> None:
        if report.step == 8:
            with torch.no_grad():
                training.model.embedding.weight[5] = float("nan")

    with pytest.raises(loop.TrainingError, match=r"step 9: the loss is nan, in the batch of .*\.txt.*step-00000006"):
        training.run(poison)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]
    assert loop.train(config).reason == "finished"


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_says_why_in_one_line(
    texts: Path, tmp_path: Path
) -> None:
    """No file may grow beyond a limit, which a writer meets as it would a full disk."""
    limits, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run"

    def fill_the_disk_at_seven(report: loop.StepReport) -> None:
        if report.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(
            kvell.CheckpointError, match=r"step-00000012: \[Errno 27\] File too large; what was there"
        ):
            loop.train(settings(texts, out), on_step=fill_the_disk_at_seven)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]


def test_patience_ends_a_run_and_keeps_the_best_model(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([3.0, 2.5, 2.6, 2.7, 2.0])
    embeddings = []

    def evaluate(model: kvell.Decoder, *_: Any, **__: Any) -> dict[str, Any]:
        embeddings.append(model.embedding.weight.detach().clone())
        return {"bits_per_byte": next(figures)}

    monkeypatch.setattr(loop, "evaluate_texts", evaluate)
    outcome = loop.train(settings(texts, tmp_path / "run", evaluation={"every": 2, "patience": 2}))
    assert (outcome.reason, outcome.step) == ("patience", 8)
    assert torch.equal(weights(tmp_path / "run")["embedding.weight"], embeddings[1])


@pytest.mark.parametrize("config", configs().values(), ids=[str(number) for number in range(len(configs()))])
def test_any_mix_of_techniques_goes_on_as_if_it_had_not_been_killed(
    config: kvell.ModelConfig, texts: Path, tmp_path: Path
) -> None:
    """Every two techniques stand together in one of these: four steps, and three of which the last is lost."""
    changes = {
        "model": {**json.loads(config.to_json()), "vocab_size": 320},
        "data": {
            "sources": [{"kind": "files", "paths": [str(texts / "bisect.txt"), str(texts / "hmac.txt")]}],
            "held_out": 0,
        },
        "stages": [{"steps": 4, "length": 64, "tokens": 128}],
        "losses": {"index": 0.1, "balance": 0.01, "bias_rate": 0.01, "draft": 0.3},
        "checkpoints": {"every": 2},
    }

    def die_at_three(report: loop.StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    loop.train(settings(texts, tmp_path / "whole" / "run", **changes))
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings(texts, tmp_path / "killed" / "run", **changes), on_step=die_at_three)
    loop.train(settings(texts, tmp_path / "killed" / "run", **changes))
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")
    ours, theirs = (weights(tmp_path / name / "run") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run_by_torchrun(count: int, *program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def torchrun(count: int, *program: str) -> None:
    done = run_by_torchrun(count, *program)
    assert done.returncode == 0, f"exit code {done.returncode}; {done.stderr}"
    assert "FSDP" not in done.stderr, done.stderr


def in_processes(file: Path, count: int) -> None:
    torchrun(count, "-m", "kvell.train", str(file))


# Muon orthogonalises in bf16, where a sharded matrix's other order of summing shows at once.
ADAMW = {"kind": "adamw", "learning_rate": 0.003}


@pytest.fixture(scope="module")
def whole_by_adamw(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    loop.train(settings(texts, out, optimizer=ADAMW))
    return out


@pytest.fixture(scope="module")
def whole_in_two(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    in_processes(config_file(out.parent, run_values(texts, out, optimizer=ADAMW)), 2)
    return out


def test_two_sharded_processes_equal_one(whole_by_adamw: Path, whole_in_two: Path) -> None:
    """FSDP2 over a config that mixes everything, sharing across its units included: 20 steps to 1e-5."""
    assert len(losses(whole_in_two)) == STEPS
    assert losses(whole_in_two) == pytest.approx(losses(whole_by_adamw), abs=1e-5)


def test_two_processes_killed_together_go_on_as_if_they_had_not_been(
    texts: Path, whole_in_two: Path, tmp_path: Path
) -> None:
    """To the last bit: SIGKILL to both in step 9, three steps behind the last checkpoint."""
    out = tmp_path / "run"
    file = config_file(tmp_path, run_values(texts, out, optimizer=ADAMW))
    program = tmp_path / "killed.py"
    program.write_text(
        f"""
import os, signal
from kvell.training import loop
from kvell.training.settings import TrainingConfig

def die_at_nine(report):
    if report.step == 9:
        os.kill(os.getpid(), signal.SIGKILL)

loop.train(TrainingConfig.read({str(file)!r}), on_step=die_at_nine)
"""
    )
    assert run_by_torchrun(2, str(program)).returncode != 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]
    in_processes(file, 2)
    assert metrics(out) == metrics(whole_in_two)
    ours, theirs = weights(out), weights(whole_in_two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_one_process_goes_on_in_two(texts: Path, whole_by_adamw: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = config_file(tmp_path, run_values(texts, out, optimizer=ADAMW))

    def stop_at_nine(report: loop.StepReport) -> None:
        if report.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.train(TrainingConfig.read(file), on_step=stop_at_nine)
    in_processes(file, 2)
    assert losses(out) == pytest.approx(losses(whole_by_adamw), abs=1e-5)


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_saves_it(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = config_file(tmp_path, run_values(texts, out, optimizer=ADAMW))
    program = tmp_path / "stopped.py"
    program.write_text(
        f"""
import os, signal
from kvell.training import loop
from kvell.training.settings import TrainingConfig

def stop_the_second_at_nine(report):
    if report.step == 9 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

outcome = loop.train(TrainingConfig.read({str(file)!r}), on_step=stop_the_second_at_nine)
assert (outcome.reason, outcome.step) == ("stopped", 9), outcome
"""
    )
    torchrun(2, str(program))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000009"]


def test_muon_learns_alike_on_two_processes(texts: Path, brief: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    in_processes(config_file(tmp_path, run_values(texts, out, **BRIEF)), 2)
    ours, theirs = next_losses(out), next_losses(brief)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours == pytest.approx(theirs, abs=0.05)


def test_more_threads_than_the_machine_can_use_are_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(kvell.InputError, match=r"threads must be at most \d+, not 99999999"):
        loop.train(settings(texts, tmp_path / "run", threads=99999999))


def test_a_step_that_cannot_be_divided_over_the_processes_is_refused(texts: Path, tmp_path: Path) -> None:
    processes = loop.Processes(0, 3, torch.device("cpu"), None)
    with pytest.raises(kvell.InputError, match="cannot be divided over 3 processes: use a multiple of 3"):
        loop.Training(settings(texts, tmp_path / "run"), processes, False, False)


# Per-layer embeddings would double what is compiled, in the same way.
COMPILED = {**MIXED, "per_layer_embedding": None}
COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}")


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose compiled kernels are these tests' own."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))}


def program(text: str, environment: dict[str, str]) -> str:
    """What a Python program prints, in a process of its own: these tests' shape checks cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
def test_compiled_parts_give_the_same_losses_and_gradients_whatever_the_lengths(
    tmp_path: Path, compiler_cache: dict[str, str]
) -> None:
    """With and without activation checkpointing, and no other lengths are compiled anew."""
    text = f"""
import json, torch, kvell
from torch._dynamo.utils import counters
from kvell.config_file import resolve
from kvell.training.batches import MicroBatch, Piece
from kvell.training.compiling import compile_parts
from kvell.training.losses import Totals, step_loss
from kvell.training.settings import Losses
torch.set_num_threads(1)

def learnt(compiled, checkpointing, counts):
    torch.manual_seed(0)
    model = kvell.Decoder(resolve({COMPILED!r}, "model"), activation_checkpointing=checkpointing)
    if compiled:
        compile_parts(model, torch.device("cpu"))
        counters.clear()
    batch = MicroBatch.of([Piece("", torch.randint(320, (count + 1,)).tolist()) for count in counts])
    loss = step_loss(model, batch, Totals.of([batch]), Losses(balance=0.01)).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), gradients, counters["stats"]["unique_graphs"]

for checkpointing, counts in ((False, [30, 18]), (True, [30, 18]), (False, [11, 7, 30])):
    mine, plain = (learnt(compiled, checkpointing, counts) for compiled in (True, False))
    steepest = max(float(g.abs().max()) for g in plain[1])
    apart = max(float((a - b).abs().max()) for a, b in zip(mine[1], plain[1], strict=True)) / steepest
    print(json.dumps([abs(mine[0] - plain[0]), apart, mine[2]]))
"""
    lines = [json.loads(line) for line in program(text, compiler_cache).splitlines()]
    assert len(lines) == 3
    assert all(loss < 1e-5 and gradient < 1e-5 for loss, gradient, _ in lines)
    assert [graphs > 0 for *_, graphs in lines] == [True, False, False]


@needs_compiler
def test_a_compiled_run_goes_on_as_if_it_had_not_been_killed_and_follows_the_plain_one(
    texts: Path, tmp_path: Path, compiler_cache: dict[str, str]
) -> None:
    """Killed in its first stage, it goes on with the second, whose micro-batches have another size."""
    stage = {"length": 40, "micro_batches": 2}
    changes = {
        "model": COMPILED,
        "data": {
            "sources": [{"kind": "files", "paths": [str(texts / "bisect.txt"), str(texts / "hmac.txt")]}],
            "held_out": 0,
        },
        "stages": [{"steps": 2, "tokens": 96, **stage}, {"steps": 2, "tokens": 128, **stage}],
        "optimizer": ADAMW,
        "checkpoints": {"every": 2},
    }
    killed, whole, plain = (tmp_path / name / "run" for name in ("killed", "whole", "plain"))
    loop.train(settings(texts, plain, **changes))
    for out in (killed, whole):
        file = config_file(out.parent, run_values(texts, out, compile=True, **changes))
        text = f"""
import sys
from kvell.training import loop
from kvell.training.settings import TrainingConfig

def die_at_three(report):
    if report.step == 3 and {out == killed}:
        sys.exit(0)

loop.train(TrainingConfig.read({str(file)!r}), on_step=die_at_three)
"""
        program(text, compiler_cache)
    assert len(losses(killed)) == 3
    program(text.replace(str(whole.parent), str(killed.parent)), compiler_cache)
    assert losses(whole) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(killed) == losses(whole)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_cannot_be_compiled_is_refused_in_one_line(texts: Path, tmp_path: Path) -> None:
    file = config_file(tmp_path, run_values(texts, tmp_path / "run", compile=True))
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    command = [sys.executable, "-m", "kvell.train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    said = done.stderr.strip()
    assert said.startswith("error: compile: no C++ compiler works here")
    assert len(said.splitlines()) == 1
    assert "or set compile to false" in said


def refused(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], *options: str, **changes: Any) -> str:
    """What `kvell train` says, in one line, of a run that cannot be."""
    file = config_file(tmp_path, run_values(texts, tmp_path / "run", **changes))
    assert cli.main(["train", str(file), *options]) == 1
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    return said


def test_files_that_are_no_text_are_named_counted_and_skipped_only_if_asked(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_bytes((texts / "cmd.txt").read_bytes())
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    (folder / "worse.txt").write_bytes(b"\xff\xfe")
    data = {"sources": [{"kind": "files", "paths": [str(folder)]}], "held_out": 0}
    said = refused(texts, tmp_path, capfd, data=data)
    assert "2 files cannot be read as text" in said
    assert "bad.txt (not UTF-8)" in said
    assert "worse.txt (not UTF-8)" in said
    assert "--skip-bad" in said
    corpus = read_corpus(Data(**data), skip_bad=True)
    assert [Path(document.name).name for document in corpus.training] == ["good.txt"]
    assert len(corpus.unreadable) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"sources": [{"kind": "files", "paths": ["{empty}"]}]}}, "the corpus is empty"),
        ({"data": {"sources": [{"kind": "files", "paths": ["/nowhere/at/all"]}]}}, "there is no /nowhere/at/all"),
        ({"data": {"sources": []}}, "data.sources: there is at least one"),
        ({"stages": []}, "stages: there is at least one"),
        ({"stages": [{"steps": 1, "length": 128, "tokens": 64}]}, "stages.0: length 128 is more than the 64 tokens"),
        ({"tokenizer": {"vocab_size": 400}}, "tokenizer.vocab_size 400 is not the model's 320"),
        ({"tokenizer": "/nowhere"}, "there is no tokenizer.json in /nowhere"),
        ({"optimizer": {"kind": "adam"}}, "optimizer.kind"),
        (
            {"tokenizer": {"vocab_size": 5}},
            "run.yaml: tokenizer.vocab_size: Input should be greater than or equal to 300",
        ),
        (
            {"tokenizer": {"vocab": 320}},
            "run.yaml: tokenizer.vocab: unknown field; allowed are vocab_size; and tokenizer.vocab_size is missing",
        ),
        ({"tokenizer": 320}, "run.yaml: tokenizer: a mapping of names to values, not 320"),
        (
            {"data": {"sources": [{"kind": "files", "paths": "texts"}]}},
            "run.yaml: data.sources.0.paths: a list, not 'texts'",
        ),
        (
            {"stages": [{"steps": 1, "length": 9000, "tokens": 9000}]},
            "stages.0.length: 9000 is more than model.max_pos",
        ),
        (
            {"evaluation": {"lengths": [128, 9000]}},
            "evaluation.lengths.1: 9000 is more than model.max_positions 8192",
        ),
        ({"evaluation": {"tasks": [{"kind": "passkey"}]}}, "evaluation.lengths: there is no length"),
        ({"lr": 0.1}, "lr: unknown field; allowed are model, tokenizer, data, stages, optimizer"),
        ({"trackers": ["trackio"]}, "trackio is not installed"),
        ({"device": "cuda:9"}, "device cuda:9 is not to be had here"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    changes = json.loads(json.dumps(changes).replace("{empty}", str(tmp_path / "empty")))
    assert said in refused(texts, tmp_path, capfd, **changes)


@pytest.mark.parametrize("name", ["gqa.yaml", "config.json"])
def test_a_models_file_in_place_of_a_runs_says_which_file_is_wanted(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parent.parent / "examples" / "models" / name
    if name == "config.json":
        path = tmp_path / name
        path.write_text('{"model_type": "laguna"}')
    code = cli.main(["train", str(path), "--out", str(tmp_path / "run")])
    assert (code, capfd.readouterr().err) == (
        1,
        f"error: {path} describes a model, not a run: a run's file names it, `model: {name}`, beside tokenizer, data "
        "and stages (docs/training.md)\n",
    )


def test_what_a_run_lacks_is_said_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("model: gemma-4-e2b\n")
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    assert capfd.readouterr().err == "error: run.yaml: tokenizer, data, stages are missing\n"


TEXT = {"sources": [{"kind": "files", "paths": ["{texts}"]}], "held_out": 0.2}


def mixed(task: dict[str, Any], shortest: int) -> dict[str, Any]:
    return {"data": {**TEXT, "tasks": [{"task": task, "share": 0.3, "shortest": shortest}]}}


def evaluated(task: dict[str, Any], length: int) -> dict[str, Any]:
    return {"evaluation": {"tasks": [task], "lengths": [128, length]}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            mixed({"kind": "passkey"}, 5),
            "data.tasks.0.shortest: passkey: 6 tokens do not hold what is hidden and asked",
        ),
        (evaluated({"kind": "needles", "num_needles": 1}, 7), "evaluation.lengths.1: needles: 7 tokens do not hold"),
        (
            mixed({"kind": "associative_recall", "num_pairs": 4}, 14),
            "data.tasks.0.shortest: associative_recall: length",
        ),
        (
            evaluated({"kind": "needle", "num_distractors": 9}, 32),
            "needle: length 32 is too small for 10 marked pairs",
        ),
        (
            mixed({"kind": "induction", "vocab_size": 64, "length": 64}, 8),
            "data.tasks.0: induction: vocab_size 64 is too small for",
        ),
        (mixed({"kind": "needle", "vocab_size": 999}, 32), "needle: vocab_size 999 is more than the model's 320"),
        (
            {"data": {**TEXT, "held_out": 0}, "evaluation": {"patience": 1}},
            "evaluation.patience: no document is held",
        ),
    ],
)
def test_what_no_step_could_draw_is_refused_before_the_first_and_an_older_run_stays(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    older = tmp_path / "run" / "metrics.jsonl"
    older.parent.mkdir()
    older.write_text("")
    changes = json.loads(json.dumps(changes).replace("{texts}", str(texts)))
    assert said in refused(texts, tmp_path, capfd, "--fresh", **changes)
    assert older.exists()


def test_a_model_is_described_in_place_by_a_file_beside_the_run_s_or_by_a_built_in_name(
    texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mixed.yaml").write_text(yaml.safe_dump(MIXED))
    for model in (MIXED, "models/mixed.yaml", str(tmp_path / "models" / "mixed.yaml")):
        assert settings(texts, tmp_path / "run", model=model).model == resolve(MIXED, "model")
    config = settings(texts, tmp_path / "run", model="gemma-4-e2b", tokenizer="somewhere")
    assert config.model == kvell.ModelConfig.from_pretrained("gemma-4-e2b")
    with pytest.raises(
        kvell.CheckpointError, match=r"models/none\.yaml is neither a directory nor a file nor a built-in"
    ):
        settings(texts, tmp_path / "run", model="models/none.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.1}, "error: run.yaml: lr: unknown field"),
        ({"tokenizer": "/nowhere"}, "error: there is no tokenizer.json in /nowhere"),
    ],
)
def test_what_is_wrong_for_all_processes_is_said_by_one(
    texts: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Before the processes are connected, and when they work together."""
    file = config_file(tmp_path, run_values(texts, tmp_path / "run", **changes))
    done = run_by_torchrun(2, "-m", "kvell.train", str(file))
    assert done.returncode == 1
    assert done.stderr.count(said) == 1, done.stderr


def test_processes_that_find_the_folder_in_use_all_end_at_once(texts: Path, tmp_path: Path) -> None:
    """The first one looks; the others must not begin to work without it."""
    file = config_file(tmp_path, run_values(texts, tmp_path / "run"))
    with held(tmp_path / "run"):
        done = run_by_torchrun(2, "-m", "kvell.train", str(file))
    assert done.returncode == 1
    assert done.stderr.count("is in use by another run") == 1, done.stderr
    assert "RuntimeError" not in done.stderr, done.stderr
    assert not [path for path in (tmp_path / "run").iterdir() if path.name != LOCK]


def test_the_standard_library_is_there_to_learn_from_with_its_documentation() -> None:
    corpus = read_corpus(Data(sources=({"kind": "standard_library", "docstrings": True},), held_out=0.05))
    names = {document.name for document in corpus.training + corpus.held_out}
    assert {"argparse.py", "json/decoder.py", "json/decoder.py (documentation)"} <= names
    assert not any(name.startswith(("test/", "encodings/")) for name in names)
    held_out = {document.name for document in corpus.held_out}
    assert 0.02 < len(held_out) / len(names) < 0.08
    assert all(f"{name.removesuffix(' (documentation)')}" in held_out for name in held_out)
