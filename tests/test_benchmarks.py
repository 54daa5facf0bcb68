"""The benchmarks measure the same model on both sides, say truly what is met, and fail in one line. Nothing here
looks at how long anything takes."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FULL, GEMMA4, SLIDING

import kvell
from benchmarks import gpu, growth, llama_cpp, machine, processes, random_checkpoint, real_size, small_models, startup
from benchmarks.checkpoints import SMALL, write_small
from benchmarks.processes import Worker, WorkerError, at_once, take_turns, workers
from benchmarks.reporting import Goal, Section, table, write_results
from benchmarks.sides import KvellSide, Side, TransformersSide, filled_cache
from kvell.cli import main
from kvell.cli.bench import parse_context


class Direct:
    """Stands in for a worker: its side lives in this process."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.side = side
        self.side.load(str(folder))

    def call(self, method: str, **arguments: Any) -> Any:
        return json.loads(json.dumps(getattr(self.side, method)(**arguments)))


@pytest.mark.parametrize(
    ("figure", "bound", "met"),
    [
        (4.0, "at least", True),
        (3.9, "at least", False),
        (4.1, "at most", False),
        (4.0, "at most", True),
        (math.nan, "at least", False),
        (math.nan, "at most", False),
        (None, "at least", None),
    ],
)
def test_a_goal_is_met_at_its_limit_and_open_without_a_figure(
    figure: float | None, bound: Any, met: bool | None
) -> None:
    assert Goal(1, "decode", figure, bound, 4.0).met is met


def test_a_missed_goal_says_its_figure_and_by_how_much() -> None:
    line = Goal(1, "decode at 1K", 3.0, "at least", 4.0, reason="two cores").line()
    assert line == "goal 1, decode at 1K: not met (3x, 25% below at least 4x; two cores)"
    assert "50% above at most 0.5 s" in Goal(5, "help", 0.75, "at most", 0.5, "s").line()
    assert "open" in Goal(3, "on a GPU", None, "at least", 1.0, reason="no device").line()


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_fitted_exponent_of_a_power_is_that_power(power: float) -> None:
    fitted = growth.exponent([(n, 3 * n**power) for n in (1024, 2048, 4096, 8192)])
    assert fitted == pytest.approx(power, abs=1e-9)


def test_one_point_has_no_exponent() -> None:
    assert growth.exponent([(1024, 1.0)]) is None


def test_gain_compares_each_side_at_its_better_malloc_setting() -> None:
    figures = {
        "kvell/default": {"decode": 2.0},
        "kvell/tuned": {"decode": 3.0},
        "transformers/default": {"decode": 12.0},
        "transformers/tuned": {"decode": 8.0},
    }
    assert small_models.gain(figures, "decode") == 4.0


def test_goals_at_contexts_that_were_not_measured_stay_open() -> None:
    at_1k = {"kvell/default": {"decode": 1.0}, "transformers/default": {"decode": 5.0}}
    found = {"contexts": {"1024": at_1k}, "bounds": {"1024": {"decode": 0.5}}}
    goals = small_models.goals_of("deepseek_v4", found)
    assert [goal.met for goal in goals] == [True, None, None, None, None]


def test_a_goal_that_is_not_met_says_what_the_machine_allows() -> None:
    at_1k = {"kvell/default": {"decode": 2.0}, "transformers/default": {"decode": 5.0}}
    found = {"contexts": {"1024": at_1k}, "bounds": {"1024": {"decode": 1.6}}}
    line = small_models.goals_of("gemma4", found)[0].line()
    assert line.endswith(
        "not met (2.5x, 38% below at least 4x; reading weights and cache at the memory's bandwidth would allow 3.12x)"
    )


def test_sides_take_turns_in_changing_order() -> None:
    asked: list[str] = []
    answers = take_turns({"a": "a", "b": "b"}, 3, lambda side: asked.append(side) or len(asked))  # type: ignore[dict-item]
    assert asked == ["a", "b", "b", "a", "a", "b"]
    assert answers == {"a": [1, 4, 5], "b": [2, 3, 6]}


@pytest.mark.parametrize("family", SMALL)
def test_both_sides_compute_the_same_small_model(family: str, tmp_path: Path) -> None:
    write_small(family, tmp_path)
    theirs, ours = Direct(TransformersSide(), tmp_path), Direct(KvellSide(), tmp_path)
    assert small_models.check_logits(family, [theirs, ours]) < small_models.TOLERANCE  # type: ignore[list-item]
    assert 14e6 < ours.call("parameters") < 22e6

    for side in (theirs, ours):
        figures = side.call("prefill", tokens=200)
        assert figures["cache_bytes"] > 0
        assert len(side.call("decode", tokens=3)) == 3

    with torch.no_grad():
        ours.side.model.norm.weight.mul_(1.1)  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match=f"{family}: the sides' logits differ"):
        small_models.check_logits(family, [theirs, ours])  # type: ignore[list-item]


def test_small_models_are_measured_through_workers_with_either_malloc_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_models, "DECODE_ROUNDS", 1)
    section = small_models.run(["gemma4"], [64], ["tuned"], threads=1, rounds=1)
    assert not [note for note in section.notes if "failed" in note]
    found = section.figures["families"]["gemma4"]["contexts"]["64"]
    assert set(found) == {"kvell/tuned", "transformers/tuned"}
    fields = {"prefill", "prefill_samples", "peak_bytes", "cache_bytes", "decode"}
    assert all(set(figures) == fields for figures in found.values())

    write_results(tmp_path, "quick", [section], machine.describe(1))
    report = json.loads((tmp_path / "quick.json").read_text())
    assert set(report) == {"machine", "sections"}
    assert {goal["name"] for goal in report["sections"][0]["goals"]} >= {"gemma4 decode at 1K"}
    assert "| gemma4 0K" in (tmp_path / "quick.md").read_text()


def test_a_family_that_fails_is_told_of_in_one_line_and_counts_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise WorkerError("kvell (default malloc) failed in load: no such folder")

    monkeypatch.setattr(small_models, "measure_family", fail)
    section = small_models.run(["zaya"], [64], ["default"])
    assert section.notes[-1] == "zaya failed: kvell (default malloc) failed in load: no such folder"
    assert [goal.met for goal in section.goals] == [False]


def test_a_worker_that_fails_or_dies_says_so_in_one_line() -> None:
    with workers([("kvell", "default")], threads=1) as sides:
        worker = sides["kvell", "default"]
        with pytest.raises(WorkerError, match=r"^kvell \(default malloc\) failed in load: CheckpointError: [^\n]*$"):
            worker.call("load", folder="/nowhere/at/all")
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"^kvell \(default malloc\) ended during decode: killed by SIGKILL$"):
            worker.call("decode", tokens=1)


def test_a_worker_that_cannot_start_says_why() -> None:
    worker = Worker("nobody", threads=1)
    try:
        with pytest.raises(WorkerError, match="KeyError: 'nobody'"):
            worker.call("load", folder="")
    finally:
        worker.close()


def test_a_worker_ends_by_itself_and_one_that_does_not_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it deletes what it keeps in temporary files, compiled code say."""
    with workers([("kvell", "default"), ("kvell", "tuned")], threads=1) as sides:
        assert [at_once([worker], lambda worker: worker.call("drop")) for worker in sides.values()] == [[None]] * 2
    assert [worker._process.returncode for worker in sides.values()] == [0, 0]
    with workers([("kvell", "default")], threads=1) as sides:
        worker = sides["kvell", "default"]
        worker.call("drop")
        os.kill(worker._process.pid, signal.SIGSTOP)
        monkeypatch.setattr(processes, "PATIENCE", 0.1)
    assert worker._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("technique", growth.TECHNIQUES)
def test_every_technique_of_the_growth_table_is_a_model_of_the_same_width(technique: str) -> None:
    config = kvell.ModelConfig(**growth.config_of(technique))
    assert (config.hidden_size, config.num_layers) == (256, 4)


def test_beyond_the_budget_nothing_is_read_but_tokens_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SHORTEST", 64)
    section = growth.run(["plain", "windows"], longest=256, budget=0.0, threads=1)
    for figures in section.figures.values():
        contexts = figures["contexts"]
        assert list(contexts) == list(figures["planned"]) == ["64", "128", "256"]
        assert [set(at) for at in contexts.values()] == [
            {"prefill", "decode", "peak_bytes", "cache_bytes"},
            {"decode", "cache_bytes"},
            {"decode", "cache_bytes"},
        ]
        assert figures["exponents"]["prefill"] is None
        assert figures["exponents"]["decode"] is not None
    assert [goal.met for goal in section.goals] == [None, None, None, True, True]
    prefill, decode = (table.split("\n\n")[1] for table in (section.tables[0], section.tables[2]))
    assert prefill.splitlines()[0].count("0K") == 1
    assert decode.splitlines()[0].count("0K") == 3
    assert section.goals[-1].limit == 2  # caches that were made by reading


def test_decoding_that_grows_misses_its_flatness_goal() -> None:
    def at(near: float, far: float) -> Any:
        return {str(growth.NEAR): {"decode": near}, str(growth.FAR): {"decode": far}}

    def reads(near: float, far: float) -> Any:
        return {str(growth.NEAR): {"read_bytes": near}, str(growth.FAR): {"read_bytes": far}}

    measured = {"windows": at(1.0, 1.0), "hca": at(1.0, 1.6)}
    goals = growth.flatness_goals(measured, {"windows": reads(9.0, 9.0), "hca": reads(2.0, 3.0)})
    assert [goal.met for goal in goals] == [True, False, None]
    assert "the bytes it reads grow 1.50 x" in goals[1].line()


def test_a_token_of_e2b_reads_4_56_gigabytes_and_a_prompt_needs_less_than_half_of_the_model() -> None:
    work = real_size.work_of(kvell.ModelConfig.from_pretrained("gemma-4-e2b"))
    assert work["weight_bytes"] == pytest.approx(4.56e9, rel=0.005)
    # One token needs every multiplication once; many tokens need those behind the last own keys and values only once.
    assert 2 * (work["each"] + work["last"]) == pytest.approx(work["weight_bytes"], rel=0.001)
    assert work["each"] < work["last"]


def test_a_cut_model_keeps_windows_full_layers_and_sharing() -> None:
    cut = random_checkpoint.released_config("gemma-4-e2b", 10)
    assert (len(cut["layer_types"]), cut["num_hidden_layers"], cut["num_kv_shared_layers"]) == (10, 10, 5)
    with pytest.raises(ValueError, match="multiples of 10"):
        random_checkpoint.released_config("gemma-4-e2b", 7)


def test_real_size_is_measured_on_both_sides_of_one_written_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = GEMMA4 | {"layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2, "dtype": "bfloat16"}
    monkeypatch.setattr(random_checkpoint, "released_config", lambda name, layers=None: toy)
    monkeypatch.setattr(real_size, "PROMPTS", (8, 16))
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype=torch.float32: 1e9)
    monkeypatch.setattr(machine, "row_bandwidth", lambda: 9e8)
    section = real_size.run(tmp_path, rounds=1, threads=1)
    assert not [note for note in section.notes if "Failed" in note]
    assert set(section.figures["sides"]) == {"kvell", "transformers"}
    assert set(section.figures["sides"]["kvell"]["prefill"]) == {"8", "16"}
    assert section.figures["cosine"] > real_size.LEAST_COSINE
    assert [goal.met for goal in section.goals if "llama.cpp" in goal.name] == [None, None]
    assert "the machine's bound" in section.tables[0]


def test_llama_cpp_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert llama_cpp.why_not() == "llama_cpp and gguf cannot be imported"


def test_a_command_that_fails_is_told_of_in_one_line() -> None:
    with pytest.raises(WorkerError, match=r"ZeroDivisionError: [^\n]*$"):
        startup.time_command(["-c", "1 / 0"])


def test_start_up_is_measured_for_every_command_and_for_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMANDS", {name: ["-c", "pass"] for name in startup.COMMANDS})
    section = startup.run(rounds=1, threads=1, vocabulary=512)
    assert [goal.number for goal in section.goals] == [5, 5, 5]
    assert set(section.figures["commands"]) == {"python", "import torch", "import kvell", "kvell --help"}
    assert section.figures["loading"]["bytes"] > 0


def test_a_section_reads_as_markdown() -> None:
    goals = [Goal(5, "x", 1.0, "at most", 2.0, "s")]
    section = Section("Title", [table(["", "time"], [["a", "1 s"]])], goals, {}, ["Note."])
    assert section.markdown().split("\n\n") == [
        "## Title",
        "|   | time |\n|---|-----:|\n| a |  1 s |",
        "Note.",
        "- goal 5, x: met (1 s, at most 2 s)",
    ]


def test_kvell_bench_measures_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--context", "96", "--context", "64", "--new-tokens", "2", "--repeats", "1", "--threads", "1"]
    assert main(["bench", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [at["context"] for at in report["contexts"]] == [64, 96]
    for at in report["contexts"]:
        assert at["prefill_tokens_per_second"] * at["seconds_to_first_token"] == pytest.approx(at["context"])
        assert 0 < at["cache_bytes"] < at["peak_bytes"]

    assert main(["bench", *arguments]) == 0
    assert "the bundled model" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("4K", 4096), ("2k", 2048), ("1M", 1 << 20)])
def test_a_context_is_written_in_full_or_with_a_letter(text: str, tokens: int) -> None:
    assert parse_context(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1Q", "1.5K", "²"])
def test_a_context_that_is_no_number_is_refused_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"--context={text}"]) == 1
    assert capsys.readouterr().err == f"error: context {text!r} is no number of tokens: write 4096 or 4K\n"


def test_a_part_that_fails_on_a_gpu_leaves_the_others_and_its_goals_say_why() -> None:
    def fails() -> dict[str, float]:
        raise RuntimeError("out of memory\nand much more")

    section = gpu.section_of(
        "a device",
        {
            gpu.COPYING: lambda: {"GB/s": 1000.0},
            gpu.CONNECTION: lambda: {"read and write": gpu.MOVED / 1e12 * 2},
            gpu.COMPILED: fails,
            gpu.KVELL: lambda: {"prefill": 1.0, "decode": 0.5, "peak bytes": float(2**30)},
            gpu.TRANSFORMERS: lambda: {"prefill": 3.0, "decode": 0.25},
        },
    )
    by_name = {goal.name: goal for goal in section.goals}
    figures = {name: goal.figure for name, goal in by_name.items()}
    assert figures == {
        "hyper-connection read and write, of copy bandwidth": 0.5,
        "hyper-connections' share of a training step": None,
        "hyper-connection beside the compiled reference": None,
        "V4-shaped decode beside transformers": 0.5,
        "V4-shaped prefill beside transformers": 3.0,
    }
    why = f"{gpu.COMPILED}: RuntimeError: out of memory"
    assert by_name["hyper-connection beside the compiled reference"].reason == why
    text = section.markdown()
    assert f"{gpu.COMPILED} failed: RuntimeError: out of memory" in text
    assert "much more" not in text
    assert "1000 GB/s" in text
    assert "1024 MiB" in text


def test_without_a_gpu_every_goal_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = gpu.run()
    assert {(goal.met, goal.reason) for goal in section.goals} == {(None, "this machine has no CUDA device")}


def test_a_cache_of_random_rows_holds_what_a_prompt_leaves(tmp_path: Path) -> None:
    """To the byte, and a token is decoded from it."""
    model = kvell.from_pretrained(write_small("deepseek_v4", tmp_path))
    tokens = torch.randint(0, 4096, (1, 301))
    with torch.inference_mode():
        filled, prefilled = filled_cache(model, 300), model.make_cache()
        model(tokens[:, :300], cache=prefilled)
        assert (filled.lengths, filled.nbytes) == (prefilled.lengths, prefilled.nbytes)
        assert all(model(tokens[:, 300:], cache=cache).isfinite().all() for cache in (filled, prefilled))
    assert filled.nbytes == prefilled.nbytes
