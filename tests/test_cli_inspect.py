"""`kvell inspect`: what it says of a model, and how it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvell.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_gemma_4_e2b_is_resolved_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes and rules: Gemma 4's released config."""
    code, out, _ = run(capsys, "gemma-4-e2b", "--json")
    model = json.loads(out)
    layers = model["layers"]
    assert code == 0
    assert model["parameters"] == 4_628_569_344
    assert len(layers) == 35
    full = [layer["layer"] for layer in layers if layer["sliding_window"] is None]
    assert full == [4, 9, 14, 19, 24, 29, 34]
    assert {layer["head_dim"] for layer in layers if layer["layer"] in full} == {512}
    assert {layer["head_dim"] for layer in layers if layer["layer"] not in full} == {256}
    assert [layer["kv_source"] for layer in layers[:15]] == [None] * 15
    assert [layer["kv_source"] for layer in layers[15:]] == [13, 13, 13, 13, 14] * 4
    assert [layer["feed_forward"] for layer in layers] == ["gated 6144"] * 15 + ["gated 12288"] * 20
    assert {(s["layer"], s["past_rows"]) for s in model["streams"]} == {
        (index, None if index in full else 511) for index in range(15)
    }


def test_laguna_is_resolved_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes and rules: Laguna XS.2's released config."""
    _, out, _ = run(capsys, "laguna-xs.2", "--json")
    layers = json.loads(out)["layers"]
    assert [layer["num_heads"] for layer in layers] == [48, 64, 64, 64] * 10
    assert [layer["sliding_window"] for layer in layers] == [None, 512, 512, 512] * 10
    assert {layer["num_kv_heads"] for layer in layers} == {8}
    assert layers[0]["feed_forward"] == "gated 8192"
    assert layers[1]["feed_forward"] == "8 of 256 experts of 512 + shared 512 (sigmoid)"


def test_the_table_shows_what_the_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "gemma-4-e2b")
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if line.split()[:1] == ["19"])
    assert "8         1         512  full    none         layer 14" in row
    assert "4,628,569,344" in out
    assert "last 511" in out


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "holds no JSON object"),
        (
            '{"model_type": "llama"}',
            "unknown model_type 'llama', known are kvell, gemma4, gemma4_text, ",
        ),
        ('{"model_type": "laguna", "num_hidden_layers": null}', "num_hidden_layers is null"),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, contents: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(contents)
    code, out, err = run(capsys, str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_keys_that_are_unknown_are_left_out_where_that_is_asked_for(
    command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zaya", "num_hidden_layers": 2, "new_key": 1}')
    arguments = [command, str(tmp_path), "--json"]
    assert main(arguments) == 1
    assert "new_key: unknown" in capfd.readouterr().err
    assert main([*arguments, "--lenient"]) == 0
    assert capfd.readouterr().err == "warning: zaya config: unknown keys are left out: new_key\n"


def test_an_unknown_name_lists_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "gemma-5")
    assert code == 1
    assert "gemma-4-e2b, gemma-4-e4b, laguna-xs-2.1, laguna-xs.2" in err


def test_deepseek_v4_is_resolved_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """The released pattern: two windows, then CSA and HCA in turn; expert choice by hash in the first three."""
    code, out, err = run(capsys, "deepseek-v4-flash", "--json")
    assert (code, err) == (0, "")
    description = json.loads(out)
    layers = description["layers"]
    csa, hca = "1 entry per 4 overlapping, top 512", "1 entry per 128"
    assert [layer["compression"] for layer in layers] == [None, None, *[csa, hca] * 20, csa]
    assert [index for index, layer in enumerate(layers) if layer["feed_forward"].endswith("(hash)")] == [0, 1, 2]
    assert layers[0]["rotary"] == "default 10000 of the last 64"
    assert layers[2]["rotary"] == "yarn 160000 x16 of the last 64"
    assert description["connection"] == "4 hyper-connected streams"
    assert description["draft"]["compression"] is None
    assert description["parameters_by_part"]["draft_block"] == description["draft"]["parameters"]
    strides = {(stream["name"], stream["stride"]) for stream in description["streams"]}
    assert {("entry", 4), ("entry", 128), ("index", 4)} <= strides


def test_zaya_is_resolved_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "zaya1-8b", "--json")
    assert (code, err) == (0, "")
    description = json.loads(out)
    assert {layer["attention"] for layer in description["layers"]} == {"convolutional"}
    assert {layer["num_heads"] for layer in description["layers"]} == {8}
    assert description["draft"] is None
    kept = {stream["name"]: (stream["width"], stream["past_rows"]) for stream in description["streams"]}
    assert kept == {
        "key": (256, None),
        "value": (256, None),
        "query_key": (1280, 2),
        "delayed_value": (128, 1),
    }


@pytest.mark.parametrize("arguments", [["gemma-4-e2b"], ["gemma-4-e2b", "--json"], ["--help"]])
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvell", "inspect", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert re.fullmatch(rb"error: the output cannot be written: [^\n]*No space left on device\n", done.stderr)
