"""Every key of a released config is used, known to be harmless, or refused by name.

What a key means is what transformers makes of it: `resolved` is what its config class spells out for a file, with all
defaults, and Kvell must read the file and that alike.
"""

import copy
import json
import re
import tracemalloc
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from oracle import DEEPSEEK_V4, FULL, GEMMA4, LAGUNA, SLIDING, ZAYA, yarn
from transformers import (
    DeepseekV4Config,
    Gemma4Config,
    Gemma4TextConfig,
    LagunaConfig,
    PreTrainedConfig,
    ZayaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import kvell
from kvell.families import FAMILIES, builtin_names, parse_config
from kvell.families.family import Family
from kvell.families.keys import Keys, keys_of

Values = dict[str, Any]
Path = tuple[str, ...]

CLASSES = {
    "gemma4": Gemma4Config,
    "gemma4_text": Gemma4TextConfig,
    "laguna": LagunaConfig,
    "zaya": ZayaConfig,
    "deepseek_v4": DeepseekV4Config,
}
LAYERS = 6

# What published files say besides what the built-in ones do.
PUBLISHED: dict[str, Values] = {
    "gemma4": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": {"model_type": "gemma4_audio", "hidden_size": 1024},
        "audio_token_id": 258881,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "dtype": "bfloat16",
        "eoa_token_id": 258883,
        "eoa_token_index": 258883,
        "eoi_token_id": 258882,
        "image_token_id": 258880,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0.dev0",
        "video_token_id": 258884,
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 768},
        "vision_soft_tokens_per_image": 280,
    },
    "laguna": {
        "architectures": ["LagunaForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_laguna.LagunaConfig"},
        "decoder_sparse_step": 1,
        "gating_types": ["per_head"] * LAYERS,
        "mlp_only_layers": [0],
        "moe_apply_router_weight_on_input": False,
        "moe_router_logit_softcapping": 0.0,
        "moe_router_use_sigmoid": True,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "partial_rotary_factor": 0.5,
        "qkv_bias": False,
        "router_aux_loss_coef": 0.0,
        "swa_attention_sink_enabled": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
    "zaya": {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "output_router_logits": False,
        "sliding_window": None,
        "transformers_version": "5.9.0",
        "use_cache": True,
    },
    "deepseek_v4": {
        "attention_dropout": 0.0,
        "topk_method": "noaux_tc",
        "transformers_version": "4.57.1",
        "use_cache": True,
    },
}
PUBLISHED_TEXT = {
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "initializer_range": 0.02,
    "moe_intermediate_size": None,
    "num_experts": None,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
}

# The same keys with small numbers, and few layers.
SMALL: Values = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 16,
    "n_routed_experts": 16,
    "vocab_size": 300,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "q_lora_rank": 12,
    "o_lora_rank": 6,
}


def builtin(name: str) -> Values:
    return json.loads((resources.files("kvell.families") / "configs" / f"{name}.json").read_text())


def as_published(name: str) -> Values:
    values = builtin(name)
    values |= {key: value for key, value in PUBLISHED[values["model_type"]].items() if key not in values}
    if "text_config" in values:
        values["text_config"] = PUBLISHED_TEXT | values["text_config"]
    if "gating_types" in values:
        values["gating_types"] = ["per_head"] * values["num_hidden_layers"]
    return values


def shrunk(values: Values, layers: int | None = None) -> Values:
    """The same keys, one size smaller in every way."""
    layers = layers or values.get("num_hidden_layers")
    small = {}
    for key, value in values.items():
        if isinstance(value, dict) and key == "text_config":
            value = shrunk(value)
        elif key in SMALL and value is not None:
            value = SMALL[key]
        elif isinstance(value, list) and layers and len(value) >= layers:
            value = value[-LAYERS - (len(value) - layers) :]
        small[key] = value
    if "mlp_layer_types" in small:
        small["mlp_layer_types"][0] = "dense"
    if "num_kv_shared_layers" in small:
        small["layer_types"] = [SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL]
    return small


def hf_config(values: Values) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {key: value for key, value in copy.deepcopy(values).items() if key != "model_type"}
        return CLASSES[values["model_type"]](**given)


def resolved(values: Values) -> Values:
    """What transformers makes of a file, every key spelled out."""
    spelled: Values = json.loads(hf_config(values).to_json_string(use_diff=False))
    return spelled


def paths(values: Mapping[str, Any], keys: Keys, above: Path = ()) -> Iterator[tuple[Path, Keys]]:
    """Every key, and what is known of the object that it stands in."""
    for name, value in values.items():
        yield (*above, name), keys
        if isinstance(value, dict) and name in keys.objects:
            yield from paths(value, keys_of(keys.objects[name], value), (*above, name))


def changed(values: Values, path: Path, how: str) -> Values:
    """A copy with a key dropped, nulled or renamed, or its value changed."""
    result = copy.deepcopy(values)
    owner = result
    for name in path[:-1]:
        owner = owner[name]
    name = path[-1]
    value = owner.pop(name)
    if how == "nulled":
        owner[name] = None
    elif how == "renamed":
        owner[f"{name}_x"] = value
    elif how == "doubled":
        owner[name] = another(value)
    return result


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or type(value)(1)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[1:]
    return {} if value else 1


def family_of(values: Mapping[str, Any]) -> Family:
    return next(family for family in FAMILIES.values() if values["model_type"] in family.model_types)


def without_draft(config: kvell.ModelConfig) -> kvell.ModelConfig:
    """transformers does not keep what tells of it."""
    return config.model_copy(update={"draft": None})


def kinds() -> dict[frozenset[Path], str]:
    """A built-in name for every set of keys that there is."""
    return {
        frozenset(path for path, _ in paths(values, family_of(values).keys(values))): name
        for name in builtin_names()
        for values in [as_published(name)]
    }


# Read here, where transformers refuses it: null for none of what a number would say, and a number of experts.
MORE_THAN_TRANSFORMERS = {
    ("deepseek_v4", "swiglu_limit", "nulled"),
    ("laguna", "sliding_window", "nulled"),
    ("laguna", "moe_router_logit_softcapping", "nulled"),
    ("gemma4", "hidden_size_per_layer_input", "nulled"),
    ("zaya", "num_experts_per_tok", "doubled"),
}
# Keys on which nothing depends beside what else these files say; else a changed value changes the model.
WITHOUT_EFFECT = {
    "quantization_config": "an empty one says nothing of FP8, and the tensors do",
    "num_experts": "gemma4: enable_moe_block is false",
    "top_k_experts": "gemma4: enable_moe_block is false",
    "moe_intermediate_size": "gemma4: enable_moe_block is false",
    "num_global_key_value_heads": "attention_k_eq_v is false",
    "tie_word_embeddings": "that of the outer config counts",
    "num_attention_heads": "num_attention_heads_per_layer has all of them",
    "mlp_only_layers": "mlp_layer_types has all of them",
    "decoder_sparse_step": "mlp_layer_types has all of them",
    "partial_rotary_factor": "every set has its own, or there are no layers of the type",
    "hybrid_sliding": "there are no such layers",
    "rope_type": "there are no such layers",
    "rope_theta": "there are no such layers",
    "sliding_window": "there are no such layers",
}


@pytest.mark.parametrize("name", builtin_names())
def test_a_released_config_loads_as_published(name: str) -> None:
    values = as_published(name)
    config = parse_config(values)
    assert config == kvell.ModelConfig.from_pretrained(name)
    assert without_draft(config) == without_draft(parse_config(resolved(values)))


@pytest.mark.parametrize("how", ["dropped", "nulled", "doubled"])
@pytest.mark.parametrize("name", kinds().values())
def test_a_key_means_what_transformers_makes_of_it_or_is_refused_by_name(name: str, how: str) -> None:
    values = shrunk(as_published(name))
    original, family = parse_config(values), family_of(values)
    for path, keys in paths(values, family.keys(values)):
        key, case = path[-1], f"{'.'.join(path)} {how}"
        if key == "model_type":
            continue
        other = changed(values, path, how)
        config, refusal = read(other)
        if config is None:
            assert key in refusal, f"{case}: {refusal}"
            assert not re.search(r"\n|\blayers\.|\battention\.", refusal), f"{case}: {refusal}"
            assert key not in keys.harmless, f"{case}: {refusal}"
        elif key in keys.harmless or key in keys.unsupported:
            assert config == original, case
        elif (family.name, key, how) in MORE_THAN_TRANSFORMERS:
            with pytest.raises(StrictDataclassError):
                resolved(other)
        else:
            assert without_draft(config) == without_draft(parse_config(resolved(other))), case
            assert how != "doubled" or config != original or key in WITHOUT_EFFECT, case


def read(values: Values) -> tuple[kvell.ModelConfig | None, str]:
    """The config, or why it is refused."""
    try:
        return parse_config(values), ""
    except kvell.ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("name", builtin_names())
def test_a_key_that_is_misspelt_is_refused_by_its_path(name: str) -> None:
    values = shrunk(as_published(name))
    for path, _ in paths(values, family_of(values).keys(values)):
        if path[-1] in (*family_of(values).model_types, "model_type", "text_config", "full_attention", "hybrid"):
            continue
        with pytest.raises(kvell.ConfigError, match="unknown") as caught:
            parse_config(changed(values, path, "renamed"))
        assert ".".join(path) + "_x" in str(caught.value)


class Recorded(Mapping[str, Any]):
    """A config that notes which of its keys are asked for, by their paths; in text_config as if that stood alone."""

    def __init__(self, values: Mapping[str, Any], reads: set[Path], path: Path = ()) -> None:
        self.values_, self.reads, self.path = values, reads, path

    def __getitem__(self, name: str) -> Any:
        path = () if name == "text_config" else (*self.path, "a layer" if name.isdigit() else name)
        self.reads.add(path)
        value = self.values_[name]
        return Recorded(value, self.reads, path) if isinstance(value, dict) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


ORIGINAL_ZAYA = {
    "model_type": "zaya",
    "zaya_layers": ["a", 4] * 2,
    "cca_num_q_heads": [4, 0] * 2,
    "num_query_groups": 2,
    "kv_channels": 8,
    "moe_router_topk": 1,
    "ffn_hidden_size": 48,
    "zaya_mlp_expansion": 12,
    "norm_epsilon": 1e-5,
    "swa_layers": [0, 0, 8, 0],
}
SLIDING_ZAYA = ["hybrid", "hybrid_sliding"] * 2
TOP_ROTARY = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
HALF = yarn()[SLIDING] | {"partial_rotary_factor": 0.5}
MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
# Configs in which, together, every key says something.
TELLING = {
    "gemma4": [
        *(as_published(name) for name in builtin_names() if name.startswith("gemma")),
        GEMMA4 | MOE | {"rope_parameters": {SLIDING: {"rope_type": "yarn", **yarn()[FULL]}, FULL: {}}} | TOP_ROTARY,
        GEMMA4 | {"per_layer_config": {"2": {"head_dim": 4, "num_key_value_heads": 4}}},
        GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 4},
    ],
    "laguna": [
        *(as_published(name) for name in builtin_names() if name.startswith("laguna")),
        LAGUNA | {"rope_parameters": {FULL: yarn(mscale=1.0, mscale_all_dim=0.5)[FULL], SLIDING: {}}} | TOP_ROTARY,
        {key: value for key, value in LAGUNA.items() if key != "mlp_layer_types"} | {"mlp_only_layers": [1]},
    ],
    "zaya": [as_published("zaya1-8b"), ZAYA | {"layer_types": SLIDING_ZAYA, "sliding_window": 8}, ORIGINAL_ZAYA],
    "deepseek_v4": [
        as_published("deepseek-v4-flash"),
        {key: value for key, value in DEEPSEEK_V4.items() if key != "qk_rope_head_dim"},
        DEEPSEEK_V4 | {"rope_scaling": None, "rope_parameters": {"main": HALF, "compress": yarn()[FULL]}},
    ],
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_key_is_called_used_if_and_only_if_it_is_read(family: Family) -> None:
    reads: set[Path] = set()
    known: dict[Path, set[str]] = {}
    used: set[Path] = set()

    def gather(values: Mapping[str, Any], keys: Keys, above: Path) -> None:
        known.setdefault(above, set()).update(keys.names())
        used.update((*above, name) for name in keys.used)
        for name, below in keys.objects.items():
            if isinstance(values.get(name), dict):
                inner = (*above, "a layer" if name.isdigit() else name)
                gather(values[name], keys_of(below, values[name]), () if name == "text_config" else inner)

    for values in TELLING[family.name]:
        gather(values, family.keys(values), ())
        family.read_config(Recorded(values, reads))
    # That of the whole file is read where the family is found by it, and "type" where there is no rope_type.
    expected = {path for path in used if path[-1] not in ("model_type", "type")}
    assert expected <= reads
    anywhere = set.union(*known.values())
    assert {path for path in reads if path and path[-1] not in anywhere | {"a layer"}} == set()


def test_every_key_that_any_config_of_transformers_has_is_known() -> None:
    for family in FAMILIES.values():
        base = json.loads(PreTrainedConfig().to_json_string(use_diff=False))
        assert base.keys() - {"model_type"} <= family.keys({"model_type": family.model_types[-1]}).names()


@pytest.mark.parametrize("model_type", CLASSES)
def test_an_absent_key_has_the_default_of_the_released_class(model_type: str) -> None:
    values = {"model_type": model_type} | ({"text_config": {}} if model_type == "gemma4" else {})
    assert parse_config(values) == parse_config(resolved(values))


def test_unknown_keys_are_named_in_one_warning_where_that_is_asked_for() -> None:
    values = LAGUNA | {"rope_parameters": yarn(scale=1.0), "moe_routed_scaling_factr": 2.0}
    with pytest.warns(UserWarning, match="unknown") as warned:
        config = parse_config(values, strict=False)
    assert len(warned) == 1
    for word in (
        "rope_parameters.full_attention.scale",
        "moe_routed_scaling_factr (is it moe_routed_scaling_factor?)",
    ):
        assert word in str(warned[0].message)
    assert config == parse_config(LAGUNA | {"rope_parameters": yarn()})
    with pytest.raises(kvell.ConfigError, match="moe_router_use_sigmoid is false: "):
        parse_config(LAGUNA | {"new": 1, "moe_router_use_sigmoid": False}, strict=False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid is false: "),
        ({"moe_router_score_func": "softmax"}, "moe_router_score_func is 'softmax', known are sigmoid, sqrtsoftplus"),
        ({"swa_attention_sink_enabled": True}, "swa_attention_sink_enabled is true: "),
        ({"qkv_bias": True}, "qkv_bias is true: "),
        ({"qk_norm_type": "per_layer"}, "qk_norm_type is 'per_layer': "),
        (
            {"gating_types": ["per_head", "none", "per_head", "per_head"]},
            "gating_types has 'none', and gating is true",
        ),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is null, wanted is true or false"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is .* rope_parameters"),
        ({"quantization": {"bits": 4}}, "quantization is "),
        (
            {"rope_parameters": yarn(type="default")},
            "rope_parameters.full_attention.type is 'default', and rope_type is 'yarn'",
        ),
        ({"rope_parameters": yarn(truncate=False)}, "rope_parameters.full_attention.truncate is false: "),
    ],
)
def test_what_laguna_is_not_built_with_is_refused_unless_it_is_off(fields: Values, said: str) -> None:
    with pytest.raises(kvell.ConfigError, match=f"^laguna config: {said}"):
        parse_config(LAGUNA | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_router_use_sigmoid": True, "moe_router_score_func": "sigmoid", "norm_topk_prob": True},
        {"swa_attention_sink_enabled": False, "qkv_bias": None, "qk_norm_type": "per_head"},
        {"gating_types": ["per_head"] * 4, "rope_style": "rotate-half", "moe_router_logit_softcapping": None},
    ],
)
def test_what_says_off_changes_nothing(fields: Values) -> None:
    assert parse_config(LAGUNA | fields) == parse_config(LAGUNA)


def test_null_is_no_window_no_clamp_and_no_embeddings() -> None:
    windowless = parse_config(LAGUNA | {"sliding_window": None})
    assert {layer.attention.sliding_window for layer in windowless.layers} == {None}
    clamps = [parse_config(DEEPSEEK_V4 | {"swiglu_limit": limit}).layers[0].feed_forward.limit for limit in (None, 3)]
    assert clamps == [None, 3.0]
    assert parse_config(GEMMA4 | {"hidden_size_per_layer_input": None}).per_layer_embedding is None


def test_an_error_has_the_files_own_name_for_what_is_wrong() -> None:
    with pytest.raises(kvell.ConfigError) as caught:
        parse_config(DEEPSEEK_V4 | {"swiglu_limit": 0})
    assert str(caught.value) == "deepseek_v4 config: swiglu_limit is 0, wanted is a positive number or null"


def test_scores_of_experts_are_those_that_the_config_names() -> None:
    router = parse_config(LAGUNA | {"moe_router_score_func": "sqrtsoftplus"}).layers[1].feed_forward.router
    assert router.kind == "sqrt_softplus"
    with pytest.raises(kvell.ConfigError, match="moe_router_logit_softcapping is 5"):
        parse_config(LAGUNA | {"moe_router_score_func": "sqrtsoftplus", "moe_router_logit_softcapping": 5})


@pytest.mark.parametrize("fields", [{}, {"mscale": 1.0}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"truncate": True}])
def test_yarn_is_scaled_as_transformers_scales_it(fields: Values) -> None:
    values = LAGUNA | {"rope_parameters": yarn(type="yarn", **fields)}
    rotary = parse_config(values).layers[0].attention.rotary
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](hf_config(values), layer_type=FULL)
    assert rotary.scale() == pytest.approx(factor)
    torch.testing.assert_close(rotary.inverse_frequencies(LAGUNA["head_dim"]), frequencies)


def test_what_does_not_scale_may_name_a_scale() -> None:
    sets = {SLIDING: {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}}
    sets[FULL] = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "factor": 1.0}
    assert parse_config(GEMMA4 | {"rope_parameters": sets}) == parse_config(GEMMA4)
    with pytest.raises(kvell.ConfigError, match=r"full_attention\.factor is 2\.0: proportional"):
        parse_config(GEMMA4 | {"rope_parameters": sets | {FULL: sets[FULL] | {"factor": 2.0}}})


@pytest.mark.parametrize("key", ["num_hidden_layers", "experts"])
@pytest.mark.parametrize("values", [GEMMA4 | MOE, LAGUNA, ZAYA, DEEPSEEK_V4], ids=FAMILIES)
def test_more_than_anyone_has_is_refused_before_anything_is_made(values: Values, key: str) -> None:
    key = FAMILIES[family_of(values).name].experts if key == "experts" else key
    tracemalloc.start()
    try:
        with pytest.raises(kvell.ConfigError, match=f"{key} is 1000000000, and Kvell builds no more than "):
            parse_config(values | {key: 10**9})
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


# What the released file of the 12B says of its decoder.
GEMMA4_12B = {
    "model_type": "gemma4_unified",
    "text_config": PUBLISHED_TEXT
    | {
        "model_type": "gemma4_unified_text",
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 3840,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 15360,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 8,
        "max_position_embeddings": 262144,
        "num_attention_heads": 16,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
}


def test_the_12b_holds_what_others_measure() -> None:
    """A token more takes 8 full layers' key and value of one head of 512 in bf16."""
    plan = kvell.plan(parse_config(GEMMA4_12B), context=65536)
    assert plan.bytes_per_token == 8 * 2 * 512 * 2
    embedding, layers = 262144 * 3840, 48
    feed_forward, sliding, full = 3 * 3840 * 15360, 2 * 3840 * (16 + 8) * 256, 3840 * (2 * 16 + 1) * 512
    matrices = embedding + layers * feed_forward + 40 * sliding + 8 * full
    assert matrices < plan.parameters < 1.001 * matrices
