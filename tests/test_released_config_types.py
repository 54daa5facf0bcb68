"""A released config.json with a value of the wrong type: one line that names the field, never a wrong model."""

from typing import Any

import pytest
from oracle import FULL, GEMMA4, LAGUNA

import kvell
from kvell.families import parse_config


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(kvell.ConfigError) as error:
        parse_config(values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intermediate_size", "48"),
        ("intermediate_size", -1),
        ("num_hidden_layers", "6"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 6.0),
        ("hidden_size", "32"),
        ("num_kv_shared_layers", -3),
        ("use_double_wide_mlp", "false"),
        ("layer_types", 5),
        ("hidden_activation", ["x"]),
        ("rope_parameters", {"sliding_attention": None, FULL: None}),
        ("rope_parameters", {}),
        ("per_layer_config", [1]),
        ("per_layer_config", {"1": {"num_attention_heads": 2}}),
        ("hidden_size_per_layer_input", "x"),
        ("use_bidirectional_attention", "all"),
        ("rms_norm_eps", float("inf")),
    ],
)
def test_gemma4(field: str, value: object) -> None:
    wrong = GEMMA4 | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True} | {field: value}
    assert refused(wrong).startswith("gemma4 config: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads_per_layer", 5),
        ("mlp_layer_types", ["dense"]),
        ("gating", ["x"]),
        ("gating", "sigmoid"),
        ("rope_parameters", []),
        ("rope_parameters", {FULL: {"rope_type": ["x"]}}),
        ("rope_parameters", {FULL: {"rope_type": "default", "rope_theta": "abc"}}),
        ("num_experts_per_tok", 1000),
        ("moe_apply_router_weight_on_input", True),
    ],
)
def test_laguna(field: str, value: object) -> None:
    assert refused(LAGUNA | {field: value}).startswith("laguna config: ")


@pytest.mark.parametrize("text_config", [[1], "x"])
def test_a_text_config_that_is_no_object(text_config: object) -> None:
    assert "text_config is " in refused({"model_type": "gemma4", "text_config": text_config})


def test_older_rope_fields_are_not_passed_over() -> None:
    older = {name: value for name, value in LAGUNA.items() if name != "rope_parameters"} | {"rope_theta": 1e6}
    assert "rope_parameters, by layer type, are wanted instead" in refused(older)
