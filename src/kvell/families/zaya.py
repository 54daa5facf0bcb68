"""ZAYA1 (8B and its relatives): released config and tensor names, both ways.

Two layouts are met. In the current one a layer is attention and mixture; in the original one (ZAYA1-base, the
"-legacy" repositories) these are two half-layers, attention at even numbers and mixture at odd ones, settings stand
in lists by half-layer, and what merges a half-layer's output into the residual is stored with the half-layer behind
it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvell.config import MOST_LAYERS, LayerConfig, ModelConfig
from kvell.families.family import (
    ACTIVATION_NAMES,
    RELEASED_ACTIVATIONS,
    Family,
    Placement,
    Placements,
    all_of_kind,
    released_ids,
)
from kvell.families.keys import COMMON_HARMLESS, COMMON_UNSUPPORTED, Keys, because, named
from kvell.families.released import Released
from kvell.families.rotary import read_rotary, rotary_sets, write_rotary
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.routers import MLPRouter

DEFAULT_ROPE = {
    "hybrid": {"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5},
    "hybrid_sliding": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
}
SLIDING = {"hybrid": False, "hybrid_sliding": True}
# Kvell's own: the released weights were trained with the identity, transformers computes zero.
SKIP_EXPERTS = {"identity": "identity", "zero": "zero"}

ALIKE = named("""
    model_type vocab_size hidden_size num_hidden_layers head_dim num_attention_heads num_key_value_heads
    attention_bias cca_time0 cca_time1 num_experts router_hidden_size skip_expert max_position_embeddings
    tie_word_embeddings initializer_range bos_token_id eos_token_id pad_token_id
    """)
UNSUPPORTED = COMMON_UNSUPPORTED | {
    "lm_head_bias": ((False, None), "a head with a bias is not built"),
    "quantization_config": ((None,), "quantised ZAYA1 files cannot be read"),
}
KEYS = Keys(
    used=ALIKE
    | named("""
        hidden_act layer_types sliding_window rope_parameters num_experts_per_tok moe_intermediate_size rms_norm_eps
        """),
    harmless=COMMON_HARMLESS
    | because(
        "every layer type's set has its own, and transformers sees no other", "rope_theta partial_rotary_factor"
    ),
    unsupported=UNSUPPORTED | {"rope_scaling": ((None,), "rope_parameters, by layer type, are wanted instead")},
    objects={"rope_parameters": rotary_sets(*SLIDING)},
)
ONLY_RELEASED = ((True, None), "only the released architecture is built")
ORIGINAL_KEYS = Keys(
    used=ALIKE
    | named("""
        zaya_layers cca_num_q_heads num_query_groups num_query_groups_list kv_channels moe_router_topk
        ffn_hidden_size ffn_hidden_size_list zaya_mlp_expansion norm_epsilon swa_layers swa_rotary_base rope_theta
        rotary_base partial_rotary_factor rope_pct
        """),
    harmless=COMMON_HARMLESS
    | because(
        "says how the original code computes, and to how many digits",
        """
        fused_add_norm apply_rope_fusion bias_activation_fusion activation_func_fp8_input_store zaya_high_prec
        mamba_cache_dtype
        """,
    ),
    unsupported=UNSUPPORTED
    | {
        "cca": ONLY_RELEASED,
        "zaya_use_mod": ONLY_RELEASED,
        "zaya_use_eda": ONLY_RELEASED,
        "scale_residual_merge": ONLY_RELEASED,
        "residual_in_fp32": ONLY_RELEASED,
        "gated_linear_unit": ONLY_RELEASED,
        "add_bias_linear": ((False, None), "experts with biases are not built"),
        "activation_func": (("swiglu", None), "only swiglu is known"),
        "normalization": (("RMSNorm", None), "only RMSNorm is known"),
        "clamp_temp": ((False, None), "a clamped temperature is not built"),
        "sliding_window": ((None,), "swa_layers says which layers have a window"),
        "rope_scaling": ((None, False), "scaled rotary embeddings are not known here"),
        "rope_parameters": ((None,), "the original layout has rope_theta and swa_rotary_base instead"),
    },
)
# What only the original layout's files have.
ORIGINAL = ("zaya_layers", "cca", "zaya_mlp_expansion", "ffn_hidden_size", "moe_router_topk", "norm_epsilon")
# What the keys are called in a ModelConfig.
NAMES = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "num_experts_per_tok",
    "rotary.fraction": "partial_rotary_factor",
}
ORIGINAL_NAMES = {
    "num_heads": "cca_num_q_heads",
    "num_kv_heads": "num_query_groups",
    "top_k": "moe_router_topk",
    "rotary.fraction": "partial_rotary_factor",
}


def is_original(values: Mapping[str, Any]) -> bool:
    return any(name in values for name in ORIGINAL)


def keys(values: Mapping[str, Any]) -> Keys:
    return ORIGINAL_KEYS if is_original(values) else KEYS


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    text = Released("zaya", values)
    original = is_original(values)
    if original:
        text = Released("zaya", _from_original(text))
    layers = text.layers(default=40)
    types = text.per_layer("layer_types", layers, ["hybrid"] * layers)
    sliding = [text.meaning("layer_types", name, SLIDING) for name in types]
    window = text.integer("sliding_window", None, null=None)
    if any(sliding) and window is None:
        raise text.error("sliding_window is missing, and there are hybrid_sliding layers")
    sets = text.within("rope_parameters", text.mapping("rope_parameters", DEFAULT_ROPE, null=DEFAULT_ROPE))
    rotary = {name: read_rotary(sets.within(name)) for name in set(types)}
    head_dim = text.even("head_dim", 128)
    activation = text.choice("hidden_act", "silu", ACTIVATION_NAMES)
    skip = text.choice("skip_expert", "identity", SKIP_EXPERTS)

    def attention(index: int) -> dict[str, Any]:
        return {
            "kind": "convolutional",
            "num_heads": text.integer("num_attention_heads", 8),
            "num_kv_heads": text.integer("num_key_value_heads", 2),
            "head_dim": head_dim,
            "sliding_window": window if sliding[index] else None,
            "rotary": rotary[types[index]],
            "depthwise_kernel": text.integer("cca_time0", 2),
            "grouped_kernel": text.integer("cca_time1", 2),
            "bias": text.flag("attention_bias", False),
        }

    def feed_forward(index: int) -> dict[str, Any]:
        return {
            "kind": "mixture_of_experts",
            "num_experts": text.experts("num_experts", 16),
            "top_k": text.integer("num_experts_per_tok", 1),
            "intermediate_size": text.integer("moe_intermediate_size", 2048),
            "activation": activation,
            "router": {
                "kind": "mlp",
                "hidden_size": text.integer("router_hidden_size", 256),
                "state_source": index - 1 if index else None,
                "skip_expert": skip,
            },
        }

    return text.build(
        {
            "family": "zaya",
            "vocab_size": text.tokens("vocab_size", 262272),
            "hidden_size": text.integer("hidden_size", 2048),
            "max_positions": text.tokens("max_position_embeddings", 131072),
            "norm_eps": text.number("rms_norm_eps", 1e-5),
            "connection": {"kind": "scaled"},
            "tied_head": text.flag("tie_word_embeddings", True),
            "initializer_range": text.number("initializer_range", 0.02),
            "bos_token_id": text.token_id("bos_token_id", 2),
            "eos_token_ids": text.token_ids("eos_token_id", 106),
            "pad_token_id": text.token_id("pad_token_id", 0),
            "layers": [{"attention": attention(i), "feed_forward": feed_forward(i)} for i in range(layers)],
        },
        ORIGINAL_NAMES if original else NAMES,
    )


def _from_original(text: Released) -> dict[str, Any]:
    """The original layout's config in the current one's words.

    Where a list by half-layer and a single number both speak, the list is right: num_attention_heads is 16 in some
    files for what are 8 heads.
    """
    kinds = text.values.get("zaya_layers")
    halves = len(kinds) if isinstance(kinds, list) else text.integer("num_hidden_layers", 80, most=2 * MOST_LAYERS)
    alternate = not isinstance(kinds, list) or all((kind == "a") == (i % 2 == 0) for i, kind in enumerate(kinds))
    if not halves or halves % 2 or not alternate:
        raise text.error("zaya_layers must alternate attention ('a') and mixture (its experts)")
    layers = halves // 2

    def listed(name: str, half: int, alternative: str, default: int) -> int:
        """The one value that all the half-layers of a kind have: attention, half 0, or mixture, half 1."""
        value = text.values.get(name)
        if not isinstance(value, list):
            return int(text.integer(name) if value is not None else text.integer(alternative, default))
        own = value[half:halves:2]  # some lists go on behind the last half-layer
        found = sorted({str(entry) for entry in own})
        if len(own) != layers or len(found) != 1 or own[0] is None:
            raise text.error(
                f"{name} has {len(own)} entries for {layers} half-layers, the values {found}: wanted is one value for"
                " all"
            )
        return text.checked_integer(name, own[0])

    def either(name: str, older: str, default: float, **bounds: Any) -> float:
        """A number under one of two names, or the same under both."""
        value = text.number(name, text.number(older, default, **bounds), **bounds)
        if text.has(older) and text.values[older] != value:
            raise text.error(f"{name} is {value}, and {older} is {text.values[older]}")
        return value

    windows = text.values.get("swa_layers")
    windows = [0] * layers if windows is None else windows
    if not isinstance(windows, list) or len(windows) not in (layers, halves):
        raise text.wrong("swa_layers", windows, f"a list of {layers} or {halves} entries")
    windows = [window or 0 for window in (windows[::2] if len(windows) == halves else windows)]
    if any(not isinstance(window, int) for window in windows) or len(set(windows) - {0}) > 1:
        raise text.wrong("swa_layers", windows, "one window, and 0 for full attention")
    window = text.checked_integer("swa_layers", max(windows), 0)
    ffn = listed("ffn_hidden_size_list", 1, "ffn_hidden_size", 4096)
    if ffn % 2:
        raise text.wrong("ffn_hidden_size", ffn, "an even number: gate and up together")
    fraction = either("partial_rotary_factor", "rope_pct", 0.5, most=1)
    theta = either("rope_theta", "rotary_base", 1e6, above=1)
    sliding_theta = text.number("swa_rotary_base", 1e4, above=1, null=1e4)
    per_group = text.integer("num_query_groups", text.integer("num_key_value_heads", 2))

    def rope(theta: float) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction}

    # Kept of the rest is what both layouts spell alike.
    return {
        **{name: text.values[name] for name in ALIKE if name in text.values},
        "num_hidden_layers": layers,
        "num_attention_heads": listed("cca_num_q_heads", 0, "num_attention_heads", 8),
        "num_key_value_heads": listed("num_query_groups_list", 0, "num_query_groups", per_group),
        "head_dim": text.integer("kv_channels", text.integer("head_dim", 128)),
        "num_experts": listed("zaya_layers", 1, "num_experts", 16),
        "num_experts_per_tok": text.integer("moe_router_topk", 1),
        "moe_intermediate_size": ffn // 2,
        "router_hidden_size": listed("zaya_mlp_expansion", 1, "router_hidden_size", 256),
        "rms_norm_eps": text.number("norm_epsilon", 1e-5),
        "layer_types": ["hybrid_sliding" if window else "hybrid" for window in windows],
        # The original window does not count the token itself.
        "sliding_window": window + 1 if window else None,
        "rope_parameters": {"hybrid": rope(theta), "hybrid_sliding": rope(sliding_theta)},
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = all_of_kind([layer.attention for layer in config.layers], Convolutional, "zaya")
    mixtures = all_of_kind([layer.feed_forward for layer in config.layers], MixtureOfExperts, "zaya")
    (router,) = all_of_kind([mixtures[0].router], MLPRouter, "zaya")
    attention, feed_forward = attentions[0], mixtures[0]
    types = ["hybrid" if one.sliding_window is None else "hybrid_sliding" for one in attentions]
    window = next((one.sliding_window for one in attentions if one.sliding_window is not None), None)
    values = {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "hidden_act": RELEASED_ACTIVATIONS[feed_forward.activation],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "cca_time0": attention.depthwise_kernel,
        "cca_time1": attention.grouped_kernel,
        "layer_types": types,
        "sliding_window": window,
        "rope_parameters": {
            name: write_rotary(one.rotary)
            for name, one in zip(types, attentions, strict=True)
            if one.rotary is not None
        },
        "num_experts": feed_forward.num_experts,
        "num_experts_per_tok": feed_forward.top_k,
        "moe_intermediate_size": feed_forward.intermediate_size,
        "router_hidden_size": router.hidden_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": released_ids(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    return values if router.skip_expert == "identity" else values | {"skip_expert": router.skip_expert}


ATTENTION = {
    "qkv_proj.q_proj": "q_proj",
    "qkv_proj.k_proj": "k_proj",
    "qkv_proj.v_proj_current": "v_proj_current",
    "qkv_proj.v_proj_delayed": "v_proj_delayed",
    "o_proj": "o_proj",
}
CONVOLUTIONS = {"qkv_proj.conv_qk_depthwise": "conv_depthwise", "qkv_proj.conv_qk_grouped": "conv_grouped"}
ROUTER = {
    "down_proj.weight": "down_proj.weight",
    "down_proj.bias": "down_proj.bias",
    "router_mlp.norm.weight": "norm.weight",
    "router_mlp.fc1.weight": "fc1.weight",
    "router_mlp.fc1.bias": "fc1.bias",
    "router_mlp.fc2.weight": "fc2.weight",
    "router_mlp.fc2.bias": "fc2.bias",
    "router_mlp.out_proj.weight": "out_proj.weight",
    "balancing_biases": "selection_bias",
}
RESIDUAL = {
    "hidden_states_scale": "output_scale",
    "hidden_states_bias": "output_bias",
    "residual_scale": "residual_scale",
    "residual_bias": "residual_bias",
}


def placements(config: ModelConfig) -> Placements:
    names = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "model.input_hidden_states_scale": "ends.scale",
        "model.input_hidden_states_bias": "ends.bias",
    }
    if not config.tied_head:
        names["lm_head.weight"] = "head.weight"
    for index, layer in enumerate(config.layers):
        for theirs, ours in _layer_names(layer).items():
            names[f"model.layers.{index}.{theirs}"] = f"layers.{index}.{ours}"
    return {theirs: Placement(ours) for theirs, ours in names.items()}


def _layer_names(layer: LayerConfig) -> dict[str, str]:
    names = {
        "input_layernorm.weight": "attention_frame.input_norm.weight",
        "post_attention_layernorm.weight": "feed_forward_frame.input_norm.weight",
        "self_attn.qk_norm.temp": "attention.temperature",
        "mlp.experts.gate_up_proj": "feed_forward.gate_up_proj",
        "mlp.experts.down_proj": "feed_forward.down_proj",
    }
    for theirs, ours in ATTENTION.items():
        names[f"self_attn.{theirs}.weight"] = f"attention.{ours}.weight"
        if isinstance(layer.attention, Convolutional) and layer.attention.bias:
            names[f"self_attn.{theirs}.bias"] = f"attention.{ours}.bias"
    for theirs, ours in CONVOLUTIONS.items():
        names |= {f"self_attn.{theirs}.{leaf}": f"attention.{ours}.{leaf}" for leaf in ("weight", "bias")}
    names |= {f"mlp.gate.{theirs}": f"feed_forward.router.{ours}" for theirs, ours in ROUTER.items()}
    if any(layer.feed_forward.layer_sources()):
        names["mlp.gate.router_states_scale"] = "feed_forward.router.state_scale"
    for theirs, ours in RESIDUAL.items():
        names[f"post_attention_residual_scale.{theirs}"] = f"attention_frame.connection.{ours}"
        names[f"post_mlp_residual_scale.{theirs}"] = f"feed_forward_frame.connection.{ours}"
    return names


def original_experts(config: ModelConfig) -> Placements:
    """The original layout's experts, one tensor each: fc1 holds gate rows, then up rows."""
    return {
        f"model.layers.{2 * index + 1}.zaya_block.experts.local_experts.{expert}.{theirs}.weight": Placement(
            f"layers.{index}.feed_forward.{ours}", expert
        )
        for index, layer in enumerate(config.layers)
        if isinstance(layer.feed_forward, MixtureOfExperts)
        for expert in range(layer.feed_forward.num_experts)
        for theirs, ours in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj"))
    }


# Within a half-layer, the original layout's names for the current one's.
ORIGINAL_ATTENTION = {
    "input_norm.": "input_layernorm.",
    "self_attn.qkv.linear_q.": "self_attn.qkv_proj.q_proj.",
    "self_attn.qkv.linear_k.": "self_attn.qkv_proj.k_proj.",
    "self_attn.qkv.val_proj1.": "self_attn.qkv_proj.v_proj_current.",
    "self_attn.qkv.val_proj2.": "self_attn.qkv_proj.v_proj_delayed.",
    "self_attn.qkv.conv_qk.0.": "self_attn.qkv_proj.conv_qk_depthwise.",
    "self_attn.qkv.conv_qk.1.": "self_attn.qkv_proj.conv_qk_grouped.",
    "self_attn.qkv.temp": "self_attn.qk_norm.temp",
    "self_attn.o_proj.": "self_attn.o_proj.",
}
ORIGINAL_MIXTURE = {
    "input_norm.": "post_attention_layernorm.",
    "zaya_block.router.rmsnorm_eda.": "mlp.gate.router_mlp.norm.",
    "zaya_block.router.router_mlp.0.": "mlp.gate.router_mlp.fc1.",
    "zaya_block.router.router_mlp.2.": "mlp.gate.router_mlp.fc2.",
    "zaya_block.router.router_mlp.4.": "mlp.gate.router_mlp.out_proj.",
    "zaya_block.router.": "mlp.gate.",
}


def spelling(names: Collection[str], config: ModelConfig) -> Callable[[str], str]:
    """A name alone does not tell its layout (both have an o_proj in "layer 2"): the last norm's does."""
    if "model.final_norm.weight" not in names:
        return str
    return lambda name: _current(name, config.num_layers)


def _current(name: str, layers: int) -> str:
    """The current layout's name for the original's; experts keep theirs, see `original_experts`."""
    if name == "model.final_norm.weight":
        return "model.norm.weight"
    if name.startswith("model.res_scale."):
        return name.replace("model.res_scale.", f"model.layers.{layers - 1}.post_mlp_residual_scale.")
    found = re.match(r"model\.layers\.(\d+)\.(.+)$", name)
    if found is None:
        return name
    half, rest = int(found[1]), found[2]
    if rest.startswith("res_scale."):
        # What merges the output of the half-layer before this one.
        leaf = rest.removeprefix("res_scale.")
        if half == 0:
            return f"model.input_{leaf}"
        place = "post_attention" if half % 2 else "post_mlp"
        return f"model.layers.{(half - 1) // 2}.{place}_residual_scale.{leaf}"
    for original, current in (ORIGINAL_MIXTURE if half % 2 else ORIGINAL_ATTENTION).items():
        if rest.startswith(original):
            return f"model.layers.{half // 2}.{current}{rest.removeprefix(original)}"
    return name


FAMILY = Family(
    name="zaya",
    model_types=("zaya",),
    keys=keys,
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    alternatives=lambda config: [original_experts(config)],
    spelling=spelling,
)
