"""Configs written by hand: patterns, parts, relative sources; and errors that point at the place in the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kvell
from kvell import cli
from kvell.checkpoint import build_empty
from kvell.config_file import read_config_file, resolve

EXAMPLES = Path(__file__).parent.parent / "examples"
GATED = {"kind": "gated_mlp", "intermediate_size": 24}
GQA = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary": None}
CCA = {"kind": "convolutional", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary": None}
PARTS = {
    "gqa": {"attention": GQA, "feed_forward": GATED},
    "cca": {"attention": CCA, "feed_forward": GATED},
    "narrow": {"use": "gqa", "attention": {"sliding_window": 16}},
}


def described(layers: Any, **more: Any) -> dict[str, Any]:
    return {"vocab_size": 32, "hidden_size": 16, "max_positions": 64, "parts": PARTS, "layers": layers, **more}


def layers_of(layers: Any) -> tuple[Any, ...]:
    return resolve(described(layers), "file").layers


def kinds(layers: Any) -> list[str]:
    return [layer.attention.kind for layer in layers_of(layers)]


def test_a_pattern_is_repeated_in_its_order() -> None:
    assert kinds({"pattern": ["gqa", "cca"], "repeat": 2}) == ["grouped_query", "convolutional"] * 2


def test_patterns_stand_in_lists_and_in_patterns() -> None:
    inner = {"pattern": ["cca"], "repeat": 3}
    assert kinds([{"pattern": ["gqa", inner], "repeat": 2}, "gqa"]) == (
        ["grouped_query", *["convolutional"] * 3] * 2 + ["grouped_query"]
    )


def test_changes_reach_every_depth_and_leave_the_part_as_it_is() -> None:
    first, second, third = layers_of([{"use": "narrow", "attention": {"num_heads": 2}}, "narrow", "gqa"])
    assert (first.attention.num_heads, first.attention.sliding_window, first.attention.head_dim) == (2, 16, 8)
    assert (second.attention.num_heads, second.attention.sliding_window) == (4, 16)
    assert third.attention.sliding_window is None


def test_a_part_of_another_kind_takes_nothing_of_the_old_one() -> None:
    mixture = {"kind": "mixture_of_experts", "num_experts": 4, "top_k": 1, "intermediate_size": 8}
    changed = {"use": "gqa", "feed_forward": {**mixture, "router": {"kind": "sigmoid"}}}
    assert layers_of([changed])[0].feed_forward.kind == "mixture_of_experts"


def test_a_negative_source_counts_back_from_its_layer() -> None:
    layers = layers_of([{"pattern": ["gqa"], "repeat": 3}, {"use": "gqa", "attention": {"kv_source": -2}}])
    assert layers[3].attention.kv_source == 1


def test_yaml_and_json_give_equal_configs(tmp_path: Path) -> None:
    values = described({"pattern": ["gqa", "cca"], "repeat": 2})
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": values, "steps": 5}))
    read = [kvell.ModelConfig.from_pretrained(tmp_path / name) for name in ("a.yaml", "a.json", "run.yaml")]
    assert read[0] == read[1] == read[2]
    assert read[0].num_layers == 4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (described(["gqa", "hca"]), "file: layers.1: no part is named 'hca'; known are gqa, cca, narrow"),
        (described({"pattern": ["gqa"], "repeat": 0}), "file: layers.repeat: 0 is no positive whole number"),
        (described({"pattern": ["gqa"], "times": 2}), "file: layers.times: unknown field; a pattern has pattern"),
        (described([7]), "file: layers.0: a part's name, a layer or a pattern, not 7"),
        (
            described([{"use": "gqa", "attention": {"kv_source": -1}}]),
            "file: layers.0: attention.kv_source: -1 counts back from layer 0 to before the first layer",
        ),
        (
            described({"pattern": ["gqa", {"use": "cca", "attention": {"num_heads": 3}}], "repeat": 2}),
            "file: layers.pattern.1 (layer 1): attention: num_heads 3 is not a multiple of num_kv_heads 2",
        ),
        (
            described(["gqa", {"use": "gqa", "attention": {"headdim": 3}}]),
            "file: layers.1 (layer 1): attention.headdim: unknown field; allowed are kind, num_heads, num_kv_heads",
        ),
        (
            described([{"attention": {**GQA, "kind": "gqa"}, "feed_forward": GATED}]),
            "kind 'gqa' is unknown; known are 'grouped_query', 'convolutional', 'compressed'",
        ),
        (
            described(["cca", {"use": "gqa", "attention": {"kv_source": 0, "head_dim": 4}}]),
            "file: layers.1 (layer 1): attention.kv_source: cannot read layer 0, whose head_dim differs: 8, not 4",
        ),
        (described(["gqa"], hidden=4), "file: hidden: unknown field; allowed are model_type, family, vocab_size"),
        (described(["gqa"], parts=[1]), "file: parts: a mapping of names to layers"),
        (described(["a"], parts={"a": {"use": "b"}, "b": {"use": "a"}}), "uses itself (a -> b -> a)"),
        ({"vocab_size": 5}, "file: layers is missing"),
        (described([{"use": ["gqa"]}]), "file: layers.0: no part is named ['gqa']; known are gqa, cca, narrow"),
        (described(["gqa", {"patern": ["gqa"]}]), "file: layers.1.patern: unknown field; a layer has use, attention"),
        (
            described([{"use": "gqa", "attention": {"kv_source": True}}]),
            "file: layers.0 (layer 0): attention: kv_source cannot be true",
        ),
        (described(["gqa"], eos_token_ids=[2, True]), "file: eos_token_ids cannot be true"),
        (described(["gqa"], eos_token_ids=2), "file: eos_token_ids: a list, not 2"),
        (described(["gqa"], per_layer_embedding=8), "file: per_layer_embedding: a mapping of names to values, not 8"),
        (described(["gqa"], hiden_size=8, hidden_size=None), "file: hiden_size: unknown field"),
        (
            described(["gqa"], hiden_size=8, vocab=9),
            "file: hiden_size, vocab: unknown fields; allowed are model_type, family, vocab_size",
        ),
        (
            {"layers": [{"attention": {"kind": "grouped_query", "num_heads": 2}, "feed_forward": GATED}]},
            "file: layers.0 (layer 0): attention.num_kv_heads, attention.head_dim, attention.rotary are missing",
        ),
        (
            {"hiden_size": 8, "layers": [{"attention": GQA, "feed_forward": GATED}]},
            "; and vocab_size, hidden_size, max_positions are missing",
        ),
    ],
)
def test_an_error_points_at_the_place_in_the_file_and_says_what_is_allowed(values: dict[str, Any], said: str) -> None:
    with pytest.raises(kvell.ConfigError) as caught:
        resolve(values, "file")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


FAULTY = {**PARTS, "cca": {"attention": {**CCA, "num_heads": 3}, "feed_forward": GATED}}
MISSPELT = {"attention": {**GQA, "headdim": 3}, "feed_forward": GATED}


@pytest.mark.parametrize(
    ("parts", "layers", "said"),
    [
        (FAULTY, ["gqa", "cca"], "file: parts.cca (layer 1): attention: num_heads 3 is not a multiple"),
        (FAULTY, [{"use": "cca", "layer_scalar": True}], "file: parts.cca (layer 0): attention: num_heads 3"),
        ({**FAULTY, "like": {"use": "cca"}}, ["like"], "file: parts.cca (layer 0): attention: num_heads 3"),
        ({**PARTS, "unused": MISSPELT}, ["gqa"], "file: parts.unused: attention.headdim: unknown field"),
        ({**PARTS, "like": {"use": "unused"}, "unused": MISSPELT}, ["gqa"], "file: parts.unused: attention.headdim"),
        ({**PARTS, "unused": {"use": "gone"}}, ["gqa"], "file: parts.unused: no part is named 'gone'"),
    ],
)
def test_an_error_in_a_part_points_at_the_part_whether_it_is_used_or_not(
    parts: dict[str, Any], layers: Any, said: str
) -> None:
    with pytest.raises(kvell.ConfigError) as caught:
        resolve(described(layers, parts=parts), "file")
    assert str(caught.value).startswith(said)


def test_a_part_may_leave_to_layers_what_they_must_give() -> None:
    half = {"attention": {"kind": "grouped_query", "num_kv_heads": 2, "head_dim": 8, "rotary": None}}
    last = {"use": "half", "attention": {"num_heads": 2, "kv_source": -1}, "feed_forward": GATED}
    first = {**last, "attention": {"num_heads": 6, "kv_source": None}}
    behind = {**half, "attention": {**half["attention"], "kv_source": -1}}
    config = resolve(described([first, last], parts={"half": behind}), "file")
    assert [layer.attention.num_heads for layer in config.layers] == [6, 2]
    assert [layer.attention.kv_source for layer in config.layers] == [None, 0]


def test_anchors_and_merge_keys_are_yaml_s_own(tmp_path: Path) -> None:
    values = described(["gqa", {**PARTS["gqa"], "layer_scalar": True}])
    text = yaml.safe_dump({**values, "layers": []}).replace("layers: []", "")
    text = text.replace("  gqa:\n", "  gqa: &gqa\n") + "layers: [gqa, {<<: *gqa, layer_scalar: true}]\n"
    assert "&gqa" in text
    (tmp_path / "a.yaml").write_text(text)
    assert read_config_file(tmp_path / "a.yaml") == resolve(values, "file")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "layers: [1, 2", "line 1, column 14"),
        ("a.yaml", "vocab_size: 5\nvocab_size: 6\n", "line 2, column 1: 'vocab_size' stands twice"),
        ("a.json", '{"layers": }', "line 1, column 12"),
        ("a.yaml", "- 1\n", "holds no mapping"),
        ("a.yaml", "layers:\n  ? [1]\n  : 2\n", r"line 2, column 5: \[1\] is no name"),
        ("a.yaml", "1: 2\n", "line 1, column 1: 1 is no name"),
        ("a.yaml", "layers: &a [*a]\n", "line 1, column 9: this holds itself"),
        ("a.yaml", "layers: &a {b: *a}\n", "line 1, column 9: this holds itself"),
        ("a.yaml", "layers: &a {}\nmore: {<<: *a, <<: *a}\n", "line 2, column 16: '<<' stands twice"),
        ("a.yaml", "[" * 5000, "nested too deeply"),
        ("a.json", '{"layers": ' + "[" * 100000, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_well_formed_is_said_to_be_so_with_the_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(kvell.ConfigError, match=said):
        read_config_file(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(kvell.CheckpointError, match=r"none\.yaml cannot be read: No such file"):
        read_config_file(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_builds_is_inspected_and_survives_json(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = kvell.ModelConfig.from_pretrained(file)
    assert build_empty(config, torch.bfloat16).num_parameters() > 0
    assert kvell.ModelConfig.from_dict(json.loads(config.to_json())) == config
    assert cli.main(["inspect", str(file)]) == 0
    assert f"{config.num_layers - 1}" in capfd.readouterr().out


@pytest.mark.parametrize(
    "layers",
    [
        {"pattern": ["gqa"], "repeat": 10**9},
        {"pattern": {"pattern": ["gqa"], "repeat": 10**9}, "repeat": 10**9},
    ],
)
def test_more_layers_than_anyone_has_are_refused_at_once(layers: Any) -> None:
    with pytest.raises(kvell.ConfigError, match="file: layers: these are more than 1,024"):
        resolve(described(layers), "file")


def test_a_pattern_of_nothing_is_nothing_however_often() -> None:
    with pytest.raises(kvell.ConfigError, match="a model has at least one layer"):
        resolve(described({"pattern": [], "repeat": 10**9}), "file")


def test_a_number_too_long_to_read_is_one_line(tmp_path: Path) -> None:
    for name in ("model.json", "model.yaml"):
        (tmp_path / name).write_text('{"layers": ' + "1" * 5000 + "}")
        with pytest.raises(kvell.ConfigError, match=f"{name}: "):
            read_config_file(tmp_path / name)
