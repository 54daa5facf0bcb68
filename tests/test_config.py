"""A model's description: what is refused and in which words, what survives JSON, and what the released ones hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FULL, GEMMA4, LAGUNA, SLIDING, yarn
from pydantic import ValidationError

import kvell
from kvell.cache import streams_nbytes
from kvell.families import builtin_names

BF16 = torch.bfloat16
CONTEXT = 131072  # 128K

ROTARY = {"kind": "default", "theta": 10000.0}
ATTENTION = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary": ROTARY}
DENSE = {"kind": "gated_mlp", "intermediate_size": 24}
MIXTURE = {
    "kind": "mixture_of_experts",
    "num_experts": 4,
    "top_k": 2,
    "intermediate_size": 8,
    "router": {"kind": "sigmoid"},
}
YARN = {"kind": "yarn", "theta": 10000.0, "factor": 4.0, "original_positions": 64, "attention_factor": 1.2}


def described(*attentions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A config's JSON: a layer for each attention, in what it differs from ATTENTION."""
    layers = [{"attention": ATTENTION | attention, "feed_forward": DENSE} for attention in attentions]
    return {"vocab_size": 50, "hidden_size": 16, "max_positions": 128, "layers": layers} | fields


MIXED = described(
    {"sliding_window": 8},
    {"rotary": YARN, "output_gate": "per_element", "bias": True, "scale": 0.5},
    {"kv_source": 0, "sliding_window": 4, "num_heads": 2},
    {"rotary": None, "value_norm": True, "value_from_key": True, "query_norm": False},
    per_layer_embedding={"width": 4},
    embedding_scale=4.0,
    logit_softcap=20.0,
    tied_head=True,
    eos_token_ids=[1, 7],
)
MIXED["layers"][1] |= {"feed_forward": MIXTURE, "layer_scalar": True, "attention_norm": "sandwich"}
MIXED["layers"][3] |= {
    "feed_forward": {"kind": "dense_beside_experts", "dense": DENSE, "mixture": MIXTURE},
    "feed_forward_norm": "post",
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gemma-4-e2b", 4_628_569_344),
        ("gemma-4-e4b", 7_463_013_376),
        ("laguna-xs.2", 33_442_617_088),
    ],
)
def test_released_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """Of the text decoder: Gemma 4's model cards without the towers, Laguna's as published (33.44 B)."""
    with torch.device("meta"):
        model = kvell.Decoder(kvell.ModelConfig.from_pretrained(name))
    assert model.num_parameters() == parameters


@pytest.mark.parametrize(("name", "table"), [("gemma-4-e2b", 2_348_810_240), ("gemma-4-e4b", 2_818_572_288)])
def test_most_of_a_small_gemma_may_stay_on_disk(name: str, table: int) -> None:
    config = kvell.ModelConfig.from_pretrained(name)
    assert config.vocab_size * config.num_layers * config.per_layer_embedding.width == table


def test_laguna_xs_21_differs_in_positions_and_rotary_settings_only() -> None:
    xs2, xs21 = (kvell.ModelConfig.from_pretrained(name) for name in ("laguna-xs.2", "laguna-xs-2.1"))
    assert xs21.max_positions == 262144
    assert xs21.layers[0].attention.rotary.original_positions == 8192
    assert xs21.layers[0].attention.rotary.attention_factor == 1.3465735902799727
    assert xs21.layers[1] == xs2.layers[1]
    assert xs21.layers[0].feed_forward == xs2.layers[0].feed_forward


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_config_survives_json(name: str) -> None:
    config = kvell.ModelConfig.from_pretrained(name)
    assert kvell.ModelConfig.from_dict(json.loads(config.to_json())) == config


def test_a_config_survives_json_and_a_file(tmp_path: Path) -> None:
    config = kvell.ModelConfig.from_dict(MIXED)
    assert kvell.ModelConfig.from_dict(json.loads(config.to_json())) == config
    assert json.loads(config.to_json())["model_type"] == "kvell"
    (tmp_path / "config.json").write_text(config.to_json())
    assert kvell.ModelConfig.from_pretrained(tmp_path) == config
    assert kvell.ModelConfig.from_pretrained(tmp_path / "config.json") == config
    (tmp_path / "mine.json").write_text(config.to_json())
    assert kvell.ModelConfig.from_pretrained(tmp_path / "mine.json") == config


def test_configs_are_values() -> None:
    one, two = kvell.ModelConfig.from_dict(MIXED), kvell.ModelConfig.from_dict(MIXED)
    assert one == two
    assert hash(one) == hash(two)
    assert one.digest() == two.digest()
    assert one.digest() != one.model_copy(update={"logit_softcap": 19.0}).digest()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config, "vocab_size", 3),
        lambda config: setattr(config.layers[0].attention, "head_dim", 4),
        lambda config: setattr(config.layers[1].feed_forward.router, "logit_softcap", 1.0),
        lambda config: setattr(config.layers[1].attention.rotary, "theta", 1.0),
    ],
)
def test_no_part_of_a_config_can_be_changed(change: Callable[[kvell.ModelConfig], None]) -> None:
    config = kvell.ModelConfig.from_dict(MIXED)
    with pytest.raises(ValidationError, match="frozen"):
        change(config)
    assert config == kvell.ModelConfig.from_dict(MIXED)


UNBUILDABLE = {
    "an unknown field": (described({}, banana=1), ["banana"]),
    "an unknown field of a part": (described({}, {"window": 5}), ["layers.1.attention", "window"]),
    "an unknown kind": (
        described({}, {"rotary": {"kind": "spiral", "theta": 1.0}}),
        ["layers.1.attention.rotary", "spiral"],
    ),
    "a missing field": ({**described({}), "layers": [{"attention": ATTENTION}]}, ["layers.0.feed_forward"]),
    "no layers": (described(), ["layers", "at least one"]),
    "a negative size": (described({}, hidden_size=-16), ["hidden_size"]),
    "heads that do not divide": (
        described({}, {"num_heads": 5}),
        ["layers.1.attention", "num_heads 5", "num_kv_heads 2"],
    ),
    "an odd head width": (described({"head_dim": 7}), ["layers.0.attention.head_dim"]),
    "more experts chosen than there are": (
        {**described({}), "layers": [{"attention": ATTENTION, "feed_forward": MIXTURE | {"top_k": 5}}]},
        ["layers.0.feed_forward", "top_k 5", "num_experts 4"],
    ),
    "keys of a later layer": (
        described({}, {"kv_source": 2}, {}),
        ["layers.1.attention.kv_source", "2 is not an earlier layer"],
    ),
    "its own keys": (described({}, {"kv_source": 1}), ["layers.1.attention.kv_source", "not an earlier layer"]),
    "keys of a layer that has none": (
        described({}, {"kv_source": 0}, {"kv_source": 1}),
        ["layers.2.attention.kv_source", "layer 1", "reads layer 0"],
    ),
    "keys of another head width": (
        described({"head_dim": 16}, {"kv_source": 0}),
        ["layers.1.attention.kv_source", "layer 0", "head_dim", "16, not 8"],
    ),
    "keys of another number of heads": (
        described({"num_kv_heads": 1}, {"kv_source": 0}),
        ["layers.1.attention.kv_source", "layer 0", "num_kv_heads", "1, not 2"],
    ),
    "keys turned otherwise": (
        described({"rotary": ROTARY | {"theta": 500.0}}, {"kv_source": 0}),
        ["layers.1.attention.kv_source", "layer 0", "rotary", "500.0"],
    ),
    "keys of a shorter window": (
        described({"sliding_window": 4}, {"kv_source": 0, "sliding_window": 5}),
        ["layers.1.attention.kv_source", "layer 0", "window of 4", "5"],
    ),
    "keys of a window for a full layer": (
        described({"sliding_window": 4}, {"kv_source": 0}),
        ["layers.1.attention.kv_source", "layer 0", "window of 4"],
    ),
}


@pytest.mark.parametrize("problem", UNBUILDABLE)
def test_a_config_that_cannot_be_built_is_refused_in_one_line_that_says_where_and_what(problem: str) -> None:
    values, words = UNBUILDABLE[problem]
    with pytest.raises(kvell.ConfigError) as refusal:
        kvell.ModelConfig.from_dict(values)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    with pytest.raises(kvell.ConfigError):
        kvell.ModelConfig(**values)


def test_a_window_may_be_shared_by_a_layer_that_sees_less() -> None:
    kvell.ModelConfig.from_dict(described({"sliding_window": 4}, {"kv_source": 0, "sliding_window": 4}))
    kvell.ModelConfig.from_dict(described({}, {"kv_source": 0, "sliding_window": 4}, {"kv_source": 0}))


LAGUNA_YARN = LAGUNA | {"rope_parameters": yarn()}
UNREADABLE = {
    "a shared type without a producer": (
        GEMMA4 | {"num_kv_shared_layers": 4},
        ["gemma4", "layer 2", FULL, "first 2 layers"],
    ),
    "more shared layers than layers": (GEMMA4 | {"num_kv_shared_layers": 7}, ["gemma4", "num_kv_shared_layers"]),
    "too few layer types": (GEMMA4 | {"num_hidden_layers": 7}, ["gemma4", "layer_types", "6", "7 layers"]),
    "an unknown layer type": (
        GEMMA4 | {"layer_types": [SLIDING, "linear_attention"] * 2 + [SLIDING, FULL]},
        ["gemma4", "layer_types", "linear_attention", FULL, SLIDING],
    ),
    "Gemma heads that do not divide": (
        GEMMA4 | {"num_key_value_heads": 3},
        ["gemma4", "layer 0: num_attention_heads 4", "num_key_value_heads 3"],
    ),
    "another activation": (GEMMA4 | {"hidden_activation": "relu"}, ["gemma4", "hidden_activation", "relu"]),
    "a Gemma field that is null": (GEMMA4 | {"hidden_size": None}, ["gemma4", "hidden_size is null"]),
    "attention both ways": (
        GEMMA4 | {"use_bidirectional_attention": "all"},
        ["gemma4", "use_bidirectional_attention"],
    ),
    "a vocabulary of nothing": (GEMMA4 | {"vocab_size": 0}, ["gemma4 config: vocab_size is 0"]),
    "a vocabulary that is no number": (GEMMA4 | {"vocab_size": "x"}, ["gemma4 config: vocab_size is 'x'"]),
    "rotary settings for one type only": (
        LAGUNA | {"rope_parameters": {FULL: yarn()[FULL]}},
        ["laguna", "rope_parameters", SLIDING],
    ),
    "an unknown rotary type": (
        LAGUNA | {"rope_parameters": yarn() | {FULL: {"rope_type": "longrope", "rope_theta": 1.0}}},
        ["laguna", f"rope_parameters.{FULL}", "longrope", "yarn"],
    ),
    "an unknown rotary setting": (
        LAGUNA | {"rope_parameters": yarn(scale=1.0)},
        ["laguna", f"rope_parameters.{FULL}.scale"],
    ),
    "YaRN without its factor": (
        LAGUNA | {"rope_parameters": yarn(factor=None)},
        ["laguna", f"rope_parameters.{FULL}.factor is null"],
    ),
    "too few head counts": (
        LAGUNA_YARN | {"num_attention_heads_per_layer": [6, 8]},
        ["laguna", "num_attention_heads_per_layer", "2", "4 layers"],
    ),
    "too many feed-forward types": (
        LAGUNA_YARN | {"mlp_layer_types": ["dense"] * 5},
        ["laguna", "mlp_layer_types", "5", "4 layers"],
    ),
    "Laguna heads that do not divide": (
        LAGUNA_YARN | {"num_attention_heads_per_layer": [6, 8, 7, 8]},
        ["laguna", "layer 2: num_attention_heads 7", "num_key_value_heads 2"],
    ),
    "an unknown gate": (LAGUNA_YARN | {"gating": "per-token"}, ["laguna", "gating", "per-token"]),
    "routing weights that are not normalised": (
        LAGUNA_YARN | {"norm_topk_prob": False},
        ["laguna", "norm_topk_prob"],
    ),
    "quantised weights": (
        LAGUNA_YARN | {"quantization_config": {"quant_method": "fp8"}},
        ["laguna", "quantization_config"],
    ),
    "an unknown model": (
        {"model_type": "mamba"},
        ["mamba", "kvell", "gemma4", "gemma4_text", "laguna"],
    ),
    "no model at all": ({"hidden_size": 3}, ["model_type is missing", "laguna"]),
}


@pytest.mark.parametrize("problem", UNREADABLE)
def test_a_released_config_that_cannot_be_read_is_refused_in_one_line(problem: str, tmp_path: Path) -> None:
    values, words = UNREADABLE[problem]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(kvell.ConfigError) as refusal:
        kvell.ModelConfig.from_pretrained(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def gigabytes(config: kvell.ModelConfig, tokens: int = CONTEXT) -> float:
    return streams_nbytes(config.streams(), tokens, 0, BF16) / 1e9


def altered(config: kvell.ModelConfig, **attention: Any) -> kvell.ModelConfig:
    """The config with these fields in every layer's attention."""
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update=attention)})
        for layer in config.layers
    )
    return config.model_copy(update={"layers": layers})


@pytest.mark.parametrize(
    ("name", "shared", "unshared", "saved"),
    [("gemma-4-e2b", 0.812, 1.894, 57.1), ("gemma-4-e4b", 2.168, 3.795, 42.9)],
)
def test_what_gemma_4_holds_at_128k(name: str, shared: float, unshared: float, saved: float) -> None:
    """Real head widths and a window of 512 (511 past rows), 131072 tokens in bf16: derived by hand from the
    released configs, producer by producer."""
    config = kvell.ModelConfig.from_pretrained(name)
    without = gigabytes(altered(config, kv_source=None))
    assert gigabytes(config) == pytest.approx(shared, abs=5e-4)
    assert without == pytest.approx(unshared, abs=5e-4)
    assert 100 * (1 - gigabytes(config) / without) == pytest.approx(saved, abs=0.05)


@pytest.mark.parametrize(
    ("name", "shared", "unshared"), [("gemma-4-e2b", 2.416, 5.637), ("gemma-4-e4b", 7.516, 13.153)]
)
def test_what_gemma_4_would_hold_without_windows(name: str, shared: float, unshared: float) -> None:
    """The same derivation with every layer keeping all its rows."""
    config = altered(kvell.ModelConfig.from_pretrained(name), sliding_window=None)
    assert gigabytes(config) == pytest.approx(shared, abs=5e-4)
    assert gigabytes(altered(config, kv_source=None)) == pytest.approx(unshared, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "head_dim", "shared", "unshared"),
    [("gemma-4-e2b", 256, 2.013, 4.698), ("gemma-4-e4b", 320, 8.05, 14.09)],
)
def test_the_figures_of_the_article_on_long_context_architectures(
    name: str, head_dim: int, shared: float, unshared: float
) -> None:
    """Ahead of AI, 16 May 2026: "2.7 GB" and "about 6 GB" saved. It takes one head width for all layers, and no
    windows."""
    config = altered(kvell.ModelConfig.from_pretrained(name), sliding_window=None, head_dim=head_dim)
    assert gigabytes(config) == pytest.approx(shared, abs=6e-3)
    assert gigabytes(altered(config, kv_source=None)) == pytest.approx(unshared, abs=6e-3)


def test_what_laguna_holds_at_128k() -> None:
    """5.43 GB, and 21.5 GB if every layer were full: derived by hand. Its head counts do not matter."""
    config = kvell.ModelConfig.from_pretrained("laguna-xs.2")
    assert gigabytes(config) == pytest.approx(5.43, abs=5e-3)
    assert gigabytes(altered(config, sliding_window=None)) == pytest.approx(21.5, abs=5e-2)
    assert gigabytes(altered(config, num_heads=64)) == gigabytes(config)


def test_streams_are_what_is_written_down_by_hand() -> None:
    """Layer 0 keeps 7 past rows of its window of 8, layer 2 nothing of its own, the others everything."""
    streams = kvell.ModelConfig.from_dict(MIXED).streams()
    held = {key: (spec.width, spec.rows(100)) for key, spec in streams.items()}
    sliding, full = (16, 7), (16, 100)
    assert held == {
        (0, "key"): sliding,
        (0, "value"): sliding,
        (1, "key"): full,
        (1, "value"): full,
        (3, "key"): full,
        (3, "value"): full,
    }
