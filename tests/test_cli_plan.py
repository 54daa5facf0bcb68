"""`kvell plan`: what it prints and draws, and how it refuses."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvell
from kvell import InputError, ModelConfig
from kvell.cli import main, sizes
from kvell.plan_changes import CHANGES

FOUR = ("gemma-4-e4b", "laguna-xs.2", "zaya1-8b", "deepseek-v4-flash")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_one_model_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 4 E2B at 131,072 tokens: see test_published_numbers.py."""
    code, out, err = run(capsys, "gemma-4-e2b", "--context", "128K", "--device", "desktop-ddr5")
    assert (code, err) == (0, "")
    rows = {line.strip().split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["per-layer table"][2:] == ["2,348,810,240", "4.698", "GB", "mapped"]
    assert rows["cache held"][2:] == ["811.6", "MB"]
    assert rows["a token adds"][3:] == ["6,144", "B"]
    assert len(out.splitlines()) < 55
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        (*FOUR, "--compare", "--context", "4K..128K"),
        (*FOUR, "--compare", "--context", "128K"),
        ("deepseek-v4-pro", "--context", "1M", "--against", "deepseek-v3.2", "--dtype", "released"),
        ("gemma-4-e2b", "--context", "128K", "--what-if", "all", "--method", "article"),
        (
            "laguna-xs.2",
            "--context",
            "128K",
            "--block-tokens",
            "16",
            "--window-rows",
            "full",
            "--tensor-parallel",
            "16",
        ),
    ],
)
def test_tables_fit_a_narrow_terminal(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert max(len(line.rstrip()) for line in out.splitlines() if "article's" not in line) <= 80


def test_a_range_of_contexts_is_compared_model_by_model(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *FOUR, "--context", "4K..128K", "--compare")
    row = next(line for line in out.splitlines() if line.startswith("128K"))
    assert row.split() == ["128K", "2.168", "GB", "5.432", "GB", "5.369", "GB", "913.3", "MB"]


def test_against_a_reference_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "deepseek-v4-pro", "--context", "1M", "--against", "deepseek-v3.2", "--dtype", "released")
    assert "cache that grows         5.276 GB       50.40 GB   10.47 %" in out
    assert "26.70 %" in out


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "zaya1-8b", "--context", "1000", "--batch", "3", "--json")
    assert json.loads(out) == json.loads(kvell.plan("zaya1-8b", 1000, 3).to_json())
    _, out, _ = run(capsys, "zaya1-8b", "laguna-xs.2", "--context", "1K..4K", "--json")
    assert [(one["model"], one["context"]) for one in json.loads(out)] == [
        (model, context) for model in ("zaya1-8b", "laguna-xs.2") for context in (1024, 2048, 4096)
    ]


def test_csv_has_a_line_for_each_model_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "zaya1-8b", "gemma-4-e2b", "--context", "1K..2K", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["model"], row["context"]) for row in rows] == [
        ("zaya1-8b", "1024"),
        ("zaya1-8b", "2048"),
        ("gemma-4-e2b", "1024"),
        ("gemma-4-e2b", "2048"),
    ]
    assert int(rows[1]["cache_bytes"]) == kvell.plan("zaya1-8b", 2048).cache_bytes


def test_a_config_of_ones_own_in_a_memory(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(Path(__file__).parent.parent / "examples" / "models" / "gqa.yaml")
    code, out, err = run(capsys, path, "--memory", "1GiB", "--batch", "8", "--json")
    context = json.loads(out)["context"]
    assert code == 0
    assert f"1GiB hold {context:,} tokens for a batch of 8" in err
    _, out, err = run(capsys, path, "--memory", "1GiB", "--context", str(context), "--json")
    assert json.loads(out)["batch_size"] >= 8


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("what", ["cache", "decode", "waterfall"])
def test_plots_are_written(what: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot{suffix}"
    code, _, err = run(capsys, "gemma-4-e2b", "--context", "4K..16K", "--plot", str(path), "--plot-of", what)
    assert (code, err) == (0, "")
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")


def test_without_matplotlib_the_plot_alone_is_refused_and_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(capsys, "gemma-4-e2b", "--context", "4K..8K", "--plot", str(tmp_path / "plot.png"))
    assert (code, err) == (1, "error: plots need matplotlib: pip install kvell[plot]\n")
    _, alone, _ = run(capsys, "gemma-4-e2b", "--context", "4K..8K")
    assert out == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemma-4-e2b", "--context", "0"), "context must be at least 1, not 0"),
        (("gemma-4-e2b", "--context", "-4K"), "context must be at least 1, not -4K"),
        (("gemma-4-e2b", "--context", "many"), "context 'many' is no size: write 4096, 128K or 1M"),
        (("gemma-4-e2b", "--context", "1M..4K"), "context 1M..4K: the range ends before it begins"),
        (("gemma-4-e2b", "--context", "4K", "--batch", "0"), "batch must be at least 1, not 0"),
        (("gemma-4-e2b", "--context", "4K", "--dtype", "int3"), "dtype int3 is unknown: use one of float32, "),
        (("gemma-4-e2b", "--context", "4K", "--device", "abacus"), "device abacus is unknown: use one of h100, "),
        (("gemma-4-e2b", "--context", "4K", "--what-if", "magic"), "what-if magic is unknown: use one of no-sharing"),
        (("gemma-4-e2b", "--context", "4K", "--block-tokens", "0"), "block_tokens must be at least 1, not 0"),
        (("gemma-4-e2b", "--context", "4K", "--plot", "kv.pdf"), "kv.pdf: a plot is written as .png or .svg"),
        (
            ("gemma-4-e2b", "--memory", "24 potatoes"),
            "memory '24 potatoes' is no size: write 24GiB, 24GB or a number",
        ),
        (("gemma-4-e2b", "--memory", "24"), "memory 24 would be 24 bytes: write 24GB or 24GiB"),
        (
            ("gemma-4-e2b", "--memory", "1GB", "--device", "desktop-ddr5"),
            "the weights take 4,559,518,278 bytes, 3,559,518,278 more than the",
        ),
        (("deepseek-v4-pro", "--context", "4K", "--method", "article"), "method article: its formula has no figure"),
        (("nowhere",), "nowhere is neither a directory nor a file nor a built-in config"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_an_unknown_name_is_refused_with_the_references_too(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "nowhere")
    assert err.endswith("; references to compare with are deepseek-v3.2, llama-3.1-8b, llama-2-7b\n")


def test_an_unknown_model_type_is_refused_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    code, _, err = run(capsys, str(tmp_path), "--context", "4K")
    assert code == 1
    assert err.startswith(f"error: {tmp_path / 'config.json'}: unknown model_type 'abacus', known are kvell, gemma4")


def test_a_context_beyond_the_positions_is_planned_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "gemma-4-e2b", "--context", "64K..1M")
    assert code == 0
    assert "1M" in out
    assert err == "warning: gemma-4-e2b: 1048576 tokens, and the model has 131072 positions: it extrapolates\n"


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("128K", 131_072), ("1M", 1 << 20), ("1.5k", 1536), (" 2m ", 2 << 20)]
)
def test_tokens_are_counted_in_powers_of_two(text: str, count: int) -> None:
    assert sizes.tokens(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("1.5 T", 15 * 10**11),
        ("25769803776", 24 << 30),
        ("1048576", 1 << 20),
        ("0.5MiB", 1 << 19),
        ("1000 B", 1000),
    ],
)
def test_memory_is_counted_as_written(text: str, count: int) -> None:
    assert sizes.memory(text) == count


@pytest.mark.parametrize("text", ["24", "1048575", "8.5"])
def test_a_memory_of_a_few_bytes_means_another_unit(text: str) -> None:
    with pytest.raises(InputError, match=f"write {text}GB or {text}GiB"):
        sizes.memory(text)


def test_models_of_which_the_same_is_to_be_said_share_a_warning_after_the_tables() -> None:
    """Three of the four have 131,072 or 262,144 positions; all is written to one place, in the order of writing."""
    arguments = [sys.executable, "-m", "kvell", "plan", *FOUR, "--context", "256K..512K", "--compare"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    lines = done.stdout.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert lines[-len(warned) :] == warned
    positions = {name: ModelConfig.from_pretrained(name).max_positions for name in FOUR}
    short = {count: [name for name in FOUR if positions[name] == count] for count in sorted(set(positions.values()))}
    assert sorted(warned) == sorted(
        f"warning: {', '.join(names)}: 524288 tokens, and the model has {count} positions: it extrapolates"
        for count, names in short.items()
        if count < 524_288
    )
    assert len(warned) < sum(count < 524_288 for count in positions.values())


def test_a_memory_for_more_than_the_positions_says_what_batch_of_them_it_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(Path(__file__).parent.parent / "examples" / "models" / "gqa.yaml")
    positions = ModelConfig.from_pretrained(path).max_positions
    code, out, err = run(capsys, path, "--memory", "24G", "--json")
    planned = json.loads(out)
    shared = planned["resident_weight_bytes"] + planned["working_bytes"]
    batch = (24 * 10**9 - shared) // planned["reserved_bytes"]
    assert (code, planned["context"]) == (0, positions)
    assert err == f"{path}: 24G hold all {positions:,} positions, and at that length a batch of {batch:,}\n"


def test_an_accelerator_holds_the_per_layer_table_as_loading_there_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 4 E4B at 131,072 tokens in 24 GB: the table takes 262,144 x 42 x 256 numbers of two bytes."""
    table = 262_144 * 42 * 256 * 2
    on = {}
    for device in ("rtx-4090", "xeon-8480+"):
        arguments = ("gemma-4-e4b", "--context", "128K", "--memory", "24GB", "--device", device, "--json")
        on[device] = json.loads(run(capsys, *arguments)[1])
    card, processor = on["rtx-4090"], on["xeon-8480+"]
    assert card["resident_weight_bytes"] - processor["resident_weight_bytes"] == table
    each = card["reserved_bytes"] // card["batch_size"]
    shared = card["resident_weight_bytes"] + card["working_bytes"]
    assert card["batch_size"] == (24 * 10**9 - shared) // each
    assert processor["batch_size"] == (24 * 10**9 - shared + table) // each > card["batch_size"]


def test_help_explains_every_change(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    said = {
        line.split()[0]: " ".join(line.split()[1:])
        for line in out.split("counts the model changed:")[1].split("\n")
        if line.strip()
    }
    assert said == {name: change.words for name, change in CHANGES.items()} | {"all": "each of these in turn"}
    _, out, _ = run(capsys, "gemma-4-e2b", "--context", "4K", "--what-if", "all")
    counted = [
        line.split()[0]
        for line in out.split("what if, one sequence")[1].split("what saves")[0].splitlines()[1:]
        if line
    ]
    assert counted == list(CHANGES)


def test_a_range_doubles_up_to_its_end() -> None:
    assert sizes.contexts("4K..20K") == [4096, 8192, 16384, 20480]
    assert sizes.contexts("128K") == [131_072]


def test_a_plan_has_no_memory_for_weights_and_loads_neither_checkpoints_nor_a_compiler() -> None:
    """1.6 T parameters among them."""
    program = (
        "import sys; from kvell.cli import main; from kvell.hardware import peak_resident_bytes; main(sys.argv[1:]); "
        "print(peak_resident_bytes(), {'kvell.checkpoint', 'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    arguments = ["plan", *FOUR, "deepseek-v4-pro", "--context", "4K..128K", "--compare"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, loaded = done.stdout.splitlines()[-1].split(" ", 1)
    assert loaded == "set()"
    assert int(peak) < 600e6
