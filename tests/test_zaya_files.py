"""ZAYA1's files and cache: the original layout, what is refused, what a context costs, and what others got wrong."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import ZAYA, logits_without_cache, prompt, write, zaya, zaya_choices, zaya_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from shape_checks import unchecked
from torch import Tensor
from transformers import ZayaConfig, ZayaForCausalLM

import kvell
from kvell.checkpoint.loading import build_empty
from kvell.families import parse_config

HYBRID, SLIDING = "hybrid", "hybrid_sliding"
EXPERTS = ZAYA["num_experts"]

CASES: dict[str, dict[str, Any]] = {
    "full layers": {},
    "sliding and full layers, kernels of 3 and 2, an untied head": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, HYBRID, SLIDING],
        "sliding_window": 5,
        "cca_time0": 3,
        "tie_word_embeddings": False,
    },
    "one layer": {"num_hidden_layers": 1, "layer_types": [HYBRID], "num_attention_heads": 2, "rms_norm_eps": 1e-2},
}
FULL, MIXED, SINGLE = CASES
each_case = pytest.mark.parametrize("case", CASES)
Load = Callable[[str], kvell.Decoder]


def current_config(case: str) -> dict[str, Any]:
    return ZAYA | CASES[case]


@cache
def reference(case: str) -> ZayaForCausalLM:
    return zaya(current_config(case), seed=2)


@torch.no_grad()
def wanted(case: str, tokens: Tensor) -> Tensor:
    """The logits (T, V) that transformers computes for tokens (T,) alone, in one go."""
    with zaya_choices(reference(case)):
        return logits_without_cache(reference(case), tokens[None])[0]


def assert_same(logits: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(logits, right, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Kvell's model of a case's files in the current layout."""

    @cache
    def load(case: str) -> kvell.Decoder:
        return kvell.from_pretrained(
            write(tmp_path_factory.mktemp("zaya"), current_config(case), zaya_tensors(reference(case)))
        )

    return load


# How names within a layer begin in the current layout -> in the original one, and in which half-layer they stand: 0
# is the layer's attention, 1 its mixture, 2 the attention of the next. What merges the output of one half-layer into
# the residual stands with the half-layer behind it.
ORIGINAL_NAMES = {
    "input_layernorm.": ("input_norm.", 0),
    "self_attn.qkv_proj.q_proj.": ("self_attn.qkv.linear_q.", 0),
    "self_attn.qkv_proj.k_proj.": ("self_attn.qkv.linear_k.", 0),
    "self_attn.qkv_proj.v_proj_current.": ("self_attn.qkv.val_proj1.", 0),
    "self_attn.qkv_proj.v_proj_delayed.": ("self_attn.qkv.val_proj2.", 0),
    "self_attn.qkv_proj.conv_qk_depthwise.": ("self_attn.qkv.conv_qk.0.", 0),
    "self_attn.qkv_proj.conv_qk_grouped.": ("self_attn.qkv.conv_qk.1.", 0),
    "self_attn.qk_norm.temp": ("self_attn.qkv.temp", 0),
    "self_attn.o_proj.": ("self_attn.o_proj.", 0),
    "post_attention_layernorm.": ("input_norm.", 1),
    "mlp.gate.router_mlp.norm.": ("zaya_block.router.rmsnorm_eda.", 1),
    "mlp.gate.router_mlp.fc1.": ("zaya_block.router.router_mlp.0.", 1),
    "mlp.gate.router_mlp.fc2.": ("zaya_block.router.router_mlp.2.", 1),
    "mlp.gate.router_mlp.out_proj.": ("zaya_block.router.router_mlp.4.", 1),
    "mlp.gate.": ("zaya_block.router.", 1),
    "mlp.experts.gate_up_proj": ("linear_fc1", 1),
    "mlp.experts.down_proj": ("linear_fc2", 1),
    "post_attention_residual_scale.": ("res_scale.", 1),
    "post_mlp_residual_scale.": ("res_scale.", 2),
}


def original_tensors(model: ZayaForCausalLM) -> dict[str, Tensor]:
    """A model's tensors in the original layout: half-layers, experts one by one."""
    halves = 2 * model.config.num_hidden_layers
    tensors = {}
    for name, tensor in zaya_tensors(model).items():
        if not name.startswith("model.layers."):
            name = name.replace("model.norm.", "model.final_norm.")
            tensors[name.replace("model.input_hidden_states", "model.layers.0.res_scale.hidden_states")] = tensor
            continue
        index, inner = name.removeprefix("model.layers.").split(".", 1)
        begins = next(begins for begins in ORIGINAL_NAMES if inner.startswith(begins))
        original, half = ORIGINAL_NAMES[begins]
        half += 2 * int(index)
        prefix = "model." if half == halves else f"model.layers.{half}."
        if original.startswith("linear_fc"):
            owner = f"{prefix}zaya_block.experts.local_experts"
            tensors |= {f"{owner}.{expert}.{original}.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            tensors[prefix + original + inner.removeprefix(begins)] = tensor
    return tensors


def original_config(case: str) -> dict[str, Any]:
    """A case's config in the original layout's words."""
    current = current_config(case)
    layers = current["num_hidden_layers"]

    def by_half(attention: Any, mixture: Any) -> list[Any]:
        return [attention, mixture] * layers

    alike = ("model_type", "vocab_size", "hidden_size", "cca_time0", "cca_time1", "max_position_embeddings")
    more = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "skip_expert")
    rope = current["rope_parameters"]
    config = {name: current[name] for name in (*alike, *more)} | {
        "architectures": ["ZayaForCausalLM"],
        "num_hidden_layers": 2 * layers,
        "zaya_layers": by_half("a", current["num_experts"]),
        # 16 in some released files, and 8 heads: the list tells the truth.
        "num_attention_heads": 2 * current["num_attention_heads"],
        "cca_num_q_heads": by_half(current["num_attention_heads"], 0),
        "num_query_groups_list": by_half(current["num_key_value_heads"], 0),
        "kv_channels": current["head_dim"],
        # Gate and up together.
        "ffn_hidden_size_list": by_half(0, 2 * current["moe_intermediate_size"]),
        "zaya_mlp_expansion": by_half(0, current["router_hidden_size"]),
        "moe_router_topk": current["num_experts_per_tok"],
        "norm_epsilon": current.get("rms_norm_eps", 1e-5),
        "rope_theta": rope[HYBRID]["rope_theta"],
        "partial_rotary_factor": rope[HYBRID]["partial_rotary_factor"],
        "rope_scaling": False,
        "activation_func": "swiglu",
        "attention_bias": False,
        "lm_head_bias": False,
        "clamp_temp": False,
        "cca": True,
        "zaya_use_mod": True,
        "zaya_use_eda": True,
        "scale_residual_merge": True,
        "residual_in_fp32": True,
        "gated_linear_unit": True,
    }
    if SLIDING in current["layer_types"]:
        # A window that does not count the token itself; 0 is full attention.
        windows = [current["sliding_window"] - 1 if kind == SLIDING else 0 for kind in current["layer_types"]]
        config["swa_layers"] = [entry for window in windows for entry in (window, 0)]
        config["swa_rotary_base"] = rope[SLIDING]["rope_theta"]
    return config


def write_original(folder: Path, case: str, **fields: Any) -> Path:
    return write(folder, original_config(case) | fields, original_tensors(reference(case)))


LISTS = ("zaya_layers", "cca_num_q_heads", "num_query_groups_list", "ffn_hidden_size_list")


def single_numbers(case: str) -> dict[str, Any]:
    """The fields with which some files say what others say by lists; null is as good as absent."""
    current = current_config(case)
    return dict.fromkeys(LISTS) | {
        "num_experts": current["num_experts"],
        "num_attention_heads": current["num_attention_heads"],
        "num_query_groups": current["num_key_value_heads"],
        "ffn_hidden_size": 2 * current["moe_intermediate_size"],
        "zaya_mlp_expansion": current["router_hidden_size"],
    }


def a_window_per_layer(case: str) -> dict[str, Any]:
    windows = original_config(case).get("swa_layers")
    return {"swa_layers": windows[::2] if windows else None}


def longer_lists(case: str) -> dict[str, Any]:
    return {"ffn_hidden_size_list": original_config(case)["ffn_hidden_size_list"] * 2}


@pytest.mark.parametrize(
    "spelling",
    [pytest.param(lambda case: {}, id="lists"), single_numbers, a_window_per_layer, longer_lists],
)
@each_case
@torch.no_grad()
def test_the_original_layout_gives_the_logits_of_the_current_one_in_transformers(
    case: str, spelling: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    model = kvell.from_pretrained(write_original(tmp_path, case, **spelling(case)))
    for length in (1, 2, 40):
        assert_same(model(prompt(length))[0], wanted(case, prompt(length)[0]))


@each_case
def test_every_tensor_of_the_original_layout_finds_its_place(case: str, load: Load, tmp_path: Path) -> None:
    """All residual scales are different: one shifted by a half-layer more or less would be another's."""
    scales = [tensor for name, tensor in original_tensors(reference(case)).items() if "res_scale" in name]
    assert len(scales) == 2 + 4 * 2 * current_config(case)["num_hidden_layers"]
    assert len({tuple(scale.tolist()) for scale in scales}) == len(scales)
    original, current = kvell.from_pretrained(write_original(tmp_path, case)), load(case)
    assert original.config == current.config
    tensors = dict(current.named_tensors())
    assert {name for name, _ in original.named_tensors()} == set(tensors)
    assert [name for name, tensor in original.named_tensors() if not torch.equal(tensor, tensors[name])] == []


@torch.no_grad()
def test_a_model_in_the_original_layout_is_saved_in_the_current_one(tmp_path: Path) -> None:
    kvell.from_pretrained(write_original(tmp_path / "original", MIXED)).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    stored = zaya_tensors(reference(MIXED))
    assert saved.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in saved.items())
    # transformers 5.23 sets the last balancing bias to -1 whatever the file says; the reference's is -1 as well.
    again = ZayaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert_same(logits_without_cache(again, prompt(40))[0], wanted(MIXED, prompt(40)[0]))


def test_a_tied_head_may_be_stored_as_well(tmp_path: Path) -> None:
    tensors = original_tensors(reference(FULL))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = kvell.from_pretrained(write(tmp_path, original_config(FULL), tensors))
    with torch.no_grad():
        assert_same(model(prompt(40))[0], wanted(FULL, prompt(40)[0]))


def test_the_original_window_does_not_count_the_token_itself() -> None:
    config = parse_config(original_config(MIXED) | {"swa_layers": [4096, 0, 0, 0, 4096, 0]})
    assert [layer.attention.sliding_window for layer in config.layers] == [4097, None, 4097]
    assert [layer.attention.rotary.theta for layer in config.layers] == [50.0, 500.0, 50.0]


def test_a_rope_type_astray_among_the_layer_types_is_no_layer_type(tmp_path: Path) -> None:
    """The released config.json has one."""
    config = current_config(MIXED)
    config["rope_parameters"] = config["rope_parameters"] | {"rope_type": "default"}
    model = kvell.from_pretrained(write(tmp_path, config, zaya_tensors(reference(MIXED))))
    with torch.no_grad():
        assert_same(model(prompt(40))[0], wanted(MIXED, prompt(40)[0]))
    model.save_pretrained(tmp_path / "saved")
    assert kvell.ModelConfig.from_pretrained(tmp_path / "saved") == model.config


def test_the_released_model_has_the_published_number_of_parameters() -> None:
    config = kvell.ModelConfig.from_pretrained("zaya1-8b")
    assert build_empty(config, torch.bfloat16).num_parameters() == 8_840_488_784
    with torch.device("meta"):
        theirs = ZayaForCausalLM(ZayaConfig())
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 8_840_488_784


# Of the released shapes, in bf16: keys and values of 2 heads of 128 channels in 40 layers, and per layer two rows of
# the 1280 channels that are convolved, and the delayed half of a value.
KEY_VALUE_BYTES = 40 * 2 * 2 * 128 * 2
STATE_BYTES = 40 * (2 * 1280 + 128) * 2


def test_a_released_context_of_128k_takes_5_37_gb_beside_a_constant_state() -> None:
    assert KEY_VALUE_BYTES == 40_960
    assert STATE_BYTES == 40 * 5_376
    config = kvell.ModelConfig.from_pretrained("zaya1-8b")
    reserved = kvell.Cache(config.streams(), max_length=131_072, dtype=torch.bfloat16)
    by_name: dict[str, int] = {}
    for (_, name), stream in reserved.sequences[0].streams.items():
        by_name[name] = by_name.get(name, 0) + stream.allocated_nbytes
    assert by_name.pop("key") + by_name.pop("value") == 5_368_709_120
    assert sum(by_name.values()) == STATE_BYTES
    planned = kvell.plan(config, 131_072)
    assert reserved.allocated_nbytes == planned.reserved_bytes == planned.cache_bytes == 5_368_709_120 + STATE_BYTES
    for length in (2, 3, 1000, 131_072):
        assert kvell.plan(config, length).cache_bytes == length * KEY_VALUE_BYTES + STATE_BYTES


@torch.no_grad()
def test_the_state_beside_keys_and_values_does_not_grow(load: Load) -> None:
    """Per layer, in fp32: two rows of 6 heads of 8 channels, and a delayed half of 2 x 8 channels."""
    model = load(FULL)
    cache = model.make_cache()
    for count in (2, 1, 1, 30, 1):
        model(prompt(count), cache=cache)
        assert cache.nbytes - cache.lengths[0] * 4 * (2 * 2 * 8) * 4 == 4 * (2 * 48 + 8) * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": [HYBRID, "full_attention"] * 2}, "layer_types is 'full_attention', known are hybrid, "),
        ({"layer_types": [HYBRID] * 3}, "layer_types has 3 entries for 4 layers"),
        ({"layer_types": [HYBRID, SLIDING] * 2}, "sliding_window is missing"),
        (
            {"layer_types": [SLIDING] * 4, "sliding_window": 0},
            "sliding_window is 0, wanted is a whole number",
        ),
        (
            {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1e4}}},
            "rope_parameters.hybrid is missing",
        ),
        ({"lm_head_bias": True}, "lm_head_bias is true: a head with a bias"),
        ({"skip_expert": "none"}, "skip_expert is 'none', known are identity, zero"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_key_value_heads": 3}, "layer 0: num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": None}, "num_hidden_layers is null"),
        ({"head_dim": 2}, "turns 1 channels of a head"),
        ({"cca_time1": 0}, "cca_time1 is 0"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_in_a_line_that_names_the_field(
    fields: dict[str, Any], message: str
) -> None:
    assert_refused(ZAYA | fields, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zaya_layers": ["a", EXPERTS, EXPERTS, "a"] * 2}, "zaya_layers must alternate"),
        ({"zaya_layers": [EXPERTS, "a"] * 4}, "zaya_layers must alternate"),
        ({"zaya_layers": ["a", EXPERTS, "a"]}, "zaya_layers must alternate"),
        ({"zaya_layers": []}, "zaya_layers must alternate"),
        ({"zaya_layers": ["a", 4, "a", 5] * 2}, r"zaya_layers .* the values \['4', '5'\]: wanted is one"),
        ({"zaya_layers": ["a", "b"] * 4}, "zaya_layers is 'b'"),
        ({"zaya_layers": ["a", None] * 4}, "zaya_layers has 4 entries"),
        ({"zaya_layers": None, "num_hidden_layers": 7}, "must alternate"),
        ({"cca_num_q_heads": [4, 0, 2, 0] * 2}, r"cca_num_q_heads .* the values \['2', '4'\]: wanted is one"),
        ({"cca_num_q_heads": [4, 0]}, "cca_num_q_heads has 1 entries for 4 half-layers"),
        ({"cca_num_q_heads": [0, 4] * 4}, "cca_num_q_heads is 0"),
        ({"cca_num_q_heads": [[4], 0] * 4}, r"cca_num_q_heads is \[4\]"),
        ({"num_query_groups_list": [2, 0, 1, 0] * 2}, "num_query_groups_list"),
        ({"ffn_hidden_size_list": [0, 48, 0, 50] * 2}, "ffn_hidden_size_list"),
        ({"ffn_hidden_size_list": [0, 47] * 4}, "ffn_hidden_size is 47, wanted is an even number"),
        ({"zaya_mlp_expansion": [0, 8, 0, 9] * 2}, "zaya_mlp_expansion"),
        ({"swa_layers": [4] * 3}, "swa_layers is .*, wanted is a list of 4 or 8 entries"),
        ({"swa_layers": 4}, "swa_layers is 4, wanted is a list of 4 or 8 entries"),
        ({"swa_layers": [4, 0, 8, 0] * 2}, r"swa_layers is \[4, 8, 4, 8\], wanted is one window"),
        ({"swa_layers": ["4", 0] * 4}, "swa_layers is .*, wanted is one window"),
        ({"lm_head_bias": True}, "lm_head_bias is true"),
        ({"clamp_temp": True}, "clamp_temp is true"),
        ({"zaya_use_eda": False}, "zaya_use_eda is false"),
        ({"activation_func": "gelu"}, "activation_func is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is .*: scaled rotary embeddings"),
    ],
)
def test_an_original_config_that_cannot_be_built_is_refused_in_a_line_that_names_the_field(
    fields: dict[str, Any], message: str
) -> None:
    assert_refused(original_config(FULL) | fields, message)


def assert_refused(config: Mapping[str, Any], message: str) -> None:
    with pytest.raises(kvell.ConfigError, match=f"^zaya config: .*{message}") as caught:
        parse_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("model.layers.3.zaya_block.experts.local_experts.2.linear_fc1.weight", None),
        ("model.layers.5.zaya_block.experts.local_experts.0.linear_fc2.weight", None),
        # These are named as the current layout has them.
        ("model.layers.0.res_scale.hidden_states_bias", "model.input_hidden_states_bias"),
        (
            "model.layers.3.res_scale.residual_scale",
            "model.layers.1.post_attention_residual_scale.residual_scale",
        ),
        ("model.layers.4.res_scale.residual_bias", "model.layers.1.post_mlp_residual_scale.residual_bias"),
        ("model.res_scale.hidden_states_scale", "model.layers.2.post_mlp_residual_scale.hidden_states_scale"),
        ("model.layers.2.self_attn.qkv.temp", "model.layers.1.self_attn.qk_norm.temp"),
        ("model.layers.3.zaya_block.router.balancing_biases", "model.layers.1.mlp.gate.balancing_biases"),
    ],
)
def test_a_tensor_missing_from_the_original_layout_is_named(missing: str, named: str | None, tmp_path: Path) -> None:
    tensors = original_tensors(reference(MIXED))
    del tensors[missing]
    with pytest.raises(kvell.CheckpointError) as caught:
        kvell.from_pretrained(write(tmp_path, original_config(MIXED), tensors))
    assert str(caught.value) == f"{tmp_path}: missing tensor {named or missing}"


@pytest.mark.parametrize(
    "unexpected",
    [
        "model.layers.6.input_norm.weight",
        "model.layers.1.zaya_block.experts.local_experts.4.linear_fc1.weight",
        "model.layers.0.res_scale.residual_scale",
        "model.layers.1.zaya_block.router.router_states_scale",
        "model.layers.0.mlp.gate.router_mlp.5.weight",
    ],
)
def test_a_tensor_that_the_original_layout_has_no_place_for_is_named(unexpected: str, tmp_path: Path) -> None:
    """Among them what merges the input with a residual that is not there yet, and a scale for a router state that no
    layer before has left."""
    tensors = original_tensors(reference(MIXED)) | {unexpected: torch.ones(64)}
    with pytest.raises(kvell.CheckpointError, match=f": unexpected tensor {unexpected}: "):
        kvell.from_pretrained(write(tmp_path, original_config(MIXED), tensors))


# What follows are failures that others met with this architecture.

each_kind = pytest.mark.parametrize("case", [FULL, MIXED])
TOKENS = prompt(41, seed=3)[0]


@torch.no_grad()
def feed(model: kvell.Decoder, cache: kvell.Cache, tokens: Tensor, *sizes: int) -> Tensor:
    """The logits (T, V) of tokens (T,) fed to a cache of one sequence in chunks of these sizes, or all at once."""
    with unchecked():
        return torch.cat([model(part[None], cache=cache)[0] for part in tokens.split(sizes or (len(tokens),))])


@pytest.mark.parametrize(
    "sizes",
    [[1] * 41, [2] * 20 + [1], [1, 2] * 13 + [2], [2, 1, 1] * 10 + [1], [3, 1, 2, 7, 1, 1, 20, 2, 2, 2], [38, 1, 2]],
    ids=lambda sizes: "-".join(map(str, sizes[:6])),
)
@each_kind
def test_short_chunks_of_a_prefill_shift_the_convolutions_state_and_do_not_replace_it(
    case: str, sizes: list[int], load: Load
) -> None:
    model = load(case)
    assert_same(feed(model, model.make_cache(), TOKENS, *sizes), wanted(case, TOKENS))


@each_kind
@torch.no_grad()
def test_nothing_that_pads_enters_the_convolution_or_its_state(case: str, load: Load) -> None:
    """Right-padded prefill once was right, and the next decoded token was off by 1.8."""
    model, lengths = load(case), [1, 2, 30, 3, 9]
    prompts = [prompt(length, seed=length)[0] for length in lengths]
    new = [prompt(3, seed=length + 50)[0] for length in lengths]
    cache = model.make_cache(len(lengths))
    prefilled = model(torch.cat(prompts)[None], cache=cache, counts=lengths)[0].split(lengths)
    decoded = [model(torch.stack([tokens[i : i + 1] for tokens in new]), cache=cache)[:, 0] for i in range(3)]
    for number, length in enumerate(lengths):
        right = wanted(case, torch.cat([prompts[number], new[number]]))
        assert_same(prefilled[number], right[:length])
        assert_same(torch.stack([rows[number] for rows in decoded]), right[length:])


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 3, 20])
@each_kind
def test_a_rewind_takes_back_the_convolutions_and_the_delayed_values_state(
    case: str, kept: int, in_steps: bool, load: Load
) -> None:
    """As speculative decoding does with rejected drafts, which must leave no trace in what is decoded next."""
    model, max_rewind = load(case), 6
    right = wanted(case, TOKENS[: kept + 5])
    for back in range(1, max_rewind + 1):
        cache = model.make_cache(max_rewind=max_rewind)
        feed(model, cache, TOKENS[:kept])
        rejected = prompt(back, seed=back + 70)[0]
        feed(model, cache, rejected, *([1] * back if in_steps else []))
        cache.rewind(back)
        assert_same(feed(model, cache, TOKENS[kept : kept + 5], 1, 1, 3), right[kept:])


@pytest.mark.parametrize("back", range(1, 7))
@each_kind
def test_a_rewind_may_end_within_what_was_fed_at_once(case: str, back: int, load: Load) -> None:
    model = load(case)
    for fed in (back, 20):
        cache = model.make_cache(max_rewind=6)
        feed(model, cache, TOKENS[:fed])
        cache.rewind(back)
        other = prompt(4, seed=back + 90)[0]
        right = wanted(case, torch.cat([TOKENS[: fed - back], other]))
        assert_same(feed(model, cache, other, 2, 1, 1), right[fed - back :])


@pytest.mark.parametrize("cut", [1, 2, 3, 20])
@each_kind
def test_a_kept_prefix_has_the_convolutions_and_the_delayed_values_state(
    case: str, cut: int, load: Load, tmp_path: Path
) -> None:
    """A prefix cache of keys and values alone continues with a wrong token, and rights itself only later."""
    model = load(case)
    cache = model.make_cache()
    feed(model, cache, TOKENS[:cut])
    cache.save(tmp_path / "prefix")
    fork = cache.fork()
    feed(model, cache, prompt(5, seed=99)[0])  # what becomes of the first one is nobody else's business
    right = wanted(case, TOKENS)[cut:]
    loaded = kvell.Cache.load(tmp_path / "prefix", model)
    for copy in (fork, loaded):
        first = TOKENS[cut : cut + 1]
        assert_same(feed(model, copy.fork(), first), right[:1])
        assert_same(feed(model, copy, TOKENS[cut:]), right)
    with safe_open(tmp_path / "prefix", "pt") as file:
        assert len(file.keys()) == 4 * current_config(case)["num_hidden_layers"]


@each_kind
@torch.no_grad()
def test_packed_documents_do_not_leak_across_their_boundary(case: str, load: Load) -> None:
    """The convolution and the delayed value look back on tokens before: at a beginning there are none."""
    model, counts = load(case), [5, 1, 2, 1, 20, 3]
    documents = [prompt(count, seed=number + 30)[0] for number, count in enumerate(counts)]
    packed = model(torch.cat(documents)[None], counts=counts)[0]
    for document, rows in zip(documents, packed.split(counts), strict=True):
        assert_same(rows, wanted(case, document))
