"""ZAYA1 (8B and its relatives): released config and tensor names, both ways.

Two layouts are met. In the current one a layer is attention and mixture; in the original one (ZAYA1-base, the
"-legacy" repositories) these are two half-layers, attention at even numbers and mixture at odd ones, settings stand
in lists by half-layer, and what merges a half-layer's output into the residual is stored with the half-layer behind
it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvell.config import LayerConfig, ModelConfig
from kvell.errors import ConfigError
from kvell.families.family import (
    ACTIVATION_NAMES,
    RELEASED_ACTIVATIONS,
    Family,
    Placement,
    Placements,
    Released,
    all_of_kind,
    released_ids,
    token_ids,
)
from kvell.families.rotary import read_rotary, write_rotary
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.routers import MLPRouter

DEFAULT_ROPE = {
    "hybrid": {"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5},
    "hybrid_sliding": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
}
SLIDING = {"hybrid": False, "hybrid_sliding": True}
# What the original layout may say or leave unsaid, but only so.
ORIGINAL_FLAGS = (
    "cca",
    "zaya_use_mod",
    "zaya_use_eda",
    "scale_residual_merge",
    "residual_in_fp32",
    "gated_linear_unit",
)


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    text = Released("zaya", values)
    if "zaya_layers" in values or "cca" in values:
        text = Released("zaya", _from_original(text))
    text.refuse("lm_head_bias", (None, False), "a head with a bias is not built")
    layers = text.integer("num_hidden_layers")
    types = text.per_layer("layer_types", ["hybrid"] * layers)
    rope = text.mapping("rope_parameters", DEFAULT_ROPE)
    activation = text.choice("hidden_act", text.get("hidden_act", "silu"), ACTIVATION_NAMES)
    # Kvell's own: the released weights were trained with the identity, transformers computes zero.
    skip = text.choice("skip_expert", text.get("skip_expert", "identity"), {"identity": "identity", "zero": "zero"})

    def attention(index: int) -> dict[str, Any]:
        sliding = text.choice("layer_types", types[index], SLIDING)
        own_rope = rope.get(types[index])
        if own_rope is None:
            raise ConfigError(f"zaya config: rope_parameters has no {types[index]}")
        return {
            "kind": "convolutional",
            "num_heads": text.get("num_attention_heads", 8),
            "num_kv_heads": text.get("num_key_value_heads", 2),
            "head_dim": text.get("head_dim", 128),
            "sliding_window": text.get("sliding_window") if sliding else None,
            "rotary": read_rotary(own_rope, f"zaya config: rope_parameters.{types[index]}"),
            "depthwise_kernel": text.get("cca_time0", 2),
            "grouped_kernel": text.get("cca_time1", 2),
            "bias": text.flag("attention_bias", False),
        }

    def feed_forward(index: int) -> dict[str, Any]:
        return {
            "kind": "mixture_of_experts",
            "num_experts": text.get("num_experts", 16),
            "top_k": text.get("num_experts_per_tok", 1),
            "intermediate_size": text.get("moe_intermediate_size", 2048),
            "activation": activation,
            "router": {
                "kind": "mlp",
                "hidden_size": text.get("router_hidden_size", 256),
                "state_source": index - 1 if index else None,
                "skip_expert": skip,
            },
        }

    return ModelConfig.from_dict(
        {
            "family": "zaya",
            "vocab_size": text.get("vocab_size", 262272),
            "hidden_size": text.get("hidden_size", 2048),
            "max_positions": text.get("max_position_embeddings", 131072),
            "norm_eps": text.get("rms_norm_eps", 1e-5),
            "connection": {"kind": "scaled"},
            "tied_head": text.flag("tie_word_embeddings", True),
            "initializer_range": text.get("initializer_range", 0.02),
            "bos_token_id": text.get("bos_token_id", None),
            "eos_token_ids": token_ids(text.get("eos_token_id", None)),
            "pad_token_id": text.get("pad_token_id", None),
            "layers": [{"attention": attention(i), "feed_forward": feed_forward(i)} for i in range(layers)],
        },
        "zaya config",
    )


def _from_original(text: Released) -> dict[str, Any]:
    """The original layout's config in the current one's words.

    Where a list by half-layer and a single number both speak, the list is right: num_attention_heads is 16 in some
    files for what are 8 heads.
    """
    for name in ORIGINAL_FLAGS:
        text.refuse(name, (None, True), "only the released architecture is built")
    text.refuse("rope_scaling", (None, False), "scaled rotary embeddings are not known here")
    text.refuse("clamp_temp", (None, False), "a clamped temperature is not built")
    text.refuse("activation_func", (None, "swiglu"), "only swiglu is known")
    kinds = text.get("zaya_layers", None)
    halves = len(kinds) if isinstance(kinds, list) else text.integer("num_hidden_layers")
    alternate = not isinstance(kinds, list) or all((kind == "a") == (i % 2 == 0) for i, kind in enumerate(kinds))
    if not halves or halves % 2 or not alternate:
        raise ConfigError("zaya config: zaya_layers must alternate attention ('a') and mixture (its experts)")
    layers = halves // 2

    def listed(name: str, half: int, alternative: str, default: Any) -> Any:
        """The one value that all the half-layers of a kind have: attention, half 0, or mixture, half 1."""
        value = text.get(name, None)
        if not isinstance(value, list):
            return value if value is not None else text.get(alternative, default)
        own = value[half:halves:2]  # some lists go on behind the last half-layer
        found = sorted({str(entry) for entry in own})
        if len(own) != layers or len(found) != 1 or own[0] is None:
            raise ConfigError(
                f"zaya config: {name} has {len(own)} entries for {layers} half-layers, the values {found}: wanted is"
                " one value for all"
            )
        return own[0]

    windows = text.get("swa_layers", [0] * layers)
    if not isinstance(windows, list) or len(windows) not in (layers, halves):
        raise ConfigError(f"zaya config: swa_layers is {windows!r}, wanted is a list of {layers} or {halves} entries")
    windows = [window or 0 for window in (windows[::2] if len(windows) == halves else windows)]
    if any(not isinstance(window, int) for window in windows) or len(set(windows) - {0}) > 1:
        raise ConfigError(f"zaya config: swa_layers is {windows!r}, wanted is one window, and 0 for full attention")
    ffn = listed("ffn_hidden_size_list", 1, "ffn_hidden_size", 4096)
    if not isinstance(ffn, int) or ffn % 2:
        raise ConfigError(f"zaya config: ffn_hidden_size is {ffn!r}, wanted is an even number: gate and up together")
    fraction = text.get("partial_rotary_factor", 0.5)

    def rope(theta: str, default: float) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": text.get(theta, default), "partial_rotary_factor": fraction}

    # Kept of the rest is what both layouts spell alike.
    return {
        **{name: value for name, value in text.values.items() if name not in ("rope_parameters", "rope_scaling")},
        "num_hidden_layers": layers,
        "num_attention_heads": listed("cca_num_q_heads", 0, "num_attention_heads", 8),
        "num_key_value_heads": listed("num_query_groups_list", 0, "num_query_groups", 2),
        "head_dim": text.get("kv_channels", text.get("head_dim", 128)),
        "num_experts": listed("zaya_layers", 1, "num_experts", 16),
        "num_experts_per_tok": text.get("moe_router_topk", 1),
        "moe_intermediate_size": ffn // 2,
        "router_hidden_size": listed("zaya_mlp_expansion", 1, "router_hidden_size", 256),
        "rms_norm_eps": text.get("norm_epsilon", 1e-5),
        "layer_types": ["hybrid_sliding" if window else "hybrid" for window in windows],
        # The original window does not count the token itself.
        "sliding_window": max(windows) + 1 if any(windows) else None,
        "rope_parameters": {"hybrid": rope("rope_theta", 1e6), "hybrid_sliding": rope("swa_rotary_base", 1e4)},
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
    if layer.feed_forward.state_source is not None:
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
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    alternatives=lambda config: [original_experts(config)],
    spelling=spelling,
)
