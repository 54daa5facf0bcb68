"""Laguna (XS.2, XS-2.1, S-2.1, M.1): released config and tensor names, both ways."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvell.config import LayerConfig, ModelConfig
from kvell.errors import ConfigError
from kvell.families.family import (
    ACTIVATION_NAMES,
    KINDS,
    RELEASED_ACTIVATIONS,
    Family,
    Placement,
    Placements,
    all_of_kind,
    released_ids,
)
from kvell.families.keys import COMMON_HARMLESS, COMMON_UNSUPPORTED, Keys, named, shown
from kvell.families.released import Released
from kvell.families.rotary import read_rotary, read_rotary_sets, rotary_sets, write_rotary
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.routers import SigmoidRouter, SqrtSoftplusRouter

DEFAULT_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}
GATES = {True: "per_head", "per-head": "per_head", "per-element": "per_element", False: None}
RELEASED_GATES = {"per_head": "per-head", "per_element": "per-element", None: False}
GATE_TYPES = {"per_head": "per_head", "per-head": "per_head", "per_element": "per_element", "none": None}
SCORES = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}

KEYS = Keys(
    used=named("""
        model_type vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings rms_norm_eps
        layer_types num_attention_heads num_attention_heads_per_layer num_key_value_heads head_dim sliding_window
        attention_bias gating gating_types rope_parameters rope_theta partial_rotary_factor
        hidden_act mlp_layer_types mlp_only_layers decoder_sparse_step num_experts num_experts_per_tok
        moe_intermediate_size shared_expert_intermediate_size moe_routed_scaling_factor moe_router_logit_softcapping
        moe_router_score_func tie_word_embeddings initializer_range bos_token_id eos_token_id pad_token_id
        """),
    harmless=COMMON_HARMLESS,
    unsupported=COMMON_UNSUPPORTED
    | {
        "moe_apply_router_weight_on_input": ((False,), "router weights on the input are not built"),
        "moe_router_use_sigmoid": ((True,), "the router's scores are each its own: sigmoid or sqrtsoftplus"),
        "norm_topk_prob": ((True,), "routing weights are always normalised"),
        "qkv_bias": ((False, None), "biases of queries, keys and values alone are not built"),
        "qk_norm_type": (("per_head", None), "queries and keys are normalised head by head"),
        "rope_style": (("rotate-half", None), "the channels of a pair stand half the rotary width apart"),
        "swa_attention_sink_enabled": ((False, None), "attention sinks are not built"),
        "rope_scaling": ((None,), "rope_parameters, by layer type, are wanted instead"),
        "swa_rope_parameters": ((None,), "rope_parameters, by layer type, are wanted instead"),
        "use_bidirectional_attention": ((False, None), "only causal attention is built"),
        "quantization_config": ((None,), "quantised Laguna files cannot be read"),
    },
    objects={"rope_parameters": rotary_sets(*KINDS)},
)
# What the keys are called in a ModelConfig.
NAMES = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "num_experts_per_tok",
    "rotary.fraction": "partial_rotary_factor",
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    text = Released("laguna", values)
    layers = text.layers(default=40)
    types = [
        text.meaning("layer_types", name, KINDS)
        for name in text.per_layer("layer_types", layers, ["full_attention"] * layers)
    ]
    same = [text.integer("num_attention_heads", 48)] * layers
    heads = [
        text.checked_integer("num_attention_heads_per_layer", count)
        for count in text.per_layer("num_attention_heads_per_layer", layers, same)
    ]
    dense = _dense_layers(text, layers)
    rotary = {kind: _read_rotary(text, name) for name, kind in KINDS.items() if kind in types}
    window = None
    if "sliding" in types:
        # Null has no window: the layers see everything, and turn as sliding ones do.
        window = text.integer("sliding_window", 512, null=None)
    activation = text.choice("hidden_act", "silu", ACTIVATION_NAMES)
    gate = _gate(text, layers)

    def attention(index: int) -> dict[str, Any]:
        return {
            "kind": "grouped_query",
            "num_heads": heads[index],
            "num_kv_heads": text.integer("num_key_value_heads", 8),
            "head_dim": text.even("head_dim", 128),
            "sliding_window": window if types[index] == "sliding" else None,
            "rotary": rotary[types[index]],
            "output_gate": gate,
            "bias": text.flag("attention_bias", False),
        }

    def feed_forward(index: int) -> dict[str, Any]:
        if dense[index]:
            size = text.integer("intermediate_size", 8192)
            return {"kind": "gated_mlp", "intermediate_size": size, "activation": activation}
        return {
            "kind": "mixture_of_experts",
            "num_experts": text.experts("num_experts", 256),
            "top_k": text.integer("num_experts_per_tok", 8),
            "intermediate_size": text.integer("moe_intermediate_size", 512),
            "shared_intermediate_size": text.integer("shared_expert_intermediate_size", 512),
            "router": _router(text),
            "routed_scale": text.number("moe_routed_scaling_factor", 1.0, above=None),
            "activation": activation,
        }

    return text.build(
        {
            "family": "laguna",
            "vocab_size": text.tokens("vocab_size", 100352),
            "hidden_size": text.integer("hidden_size", 2048),
            "max_positions": text.tokens("max_position_embeddings", 131072),
            "norm_eps": text.number("rms_norm_eps", 1e-6),
            "tied_head": text.flag("tie_word_embeddings", False),
            "initializer_range": text.number("initializer_range", 0.02),
            "bos_token_id": text.token_id("bos_token_id", None),
            "eos_token_ids": text.token_ids("eos_token_id", None),
            "pad_token_id": text.token_id("pad_token_id", None),
            "layers": [{"attention": attention(i), "feed_forward": feed_forward(i)} for i in range(layers)],
        },
        NAMES,
    )


def _read_rotary(text: Released, name: str) -> dict[str, Any]:
    """The rotary embedding of a layer type: its own set or the one for all types, completed by the keys at the top of
    the config."""
    sets, defaults = read_rotary_sets(text, DEFAULT_ROPE)
    by_type = set(sets.values) & set(KINDS)
    return read_rotary(sets.within(name) if by_type else sets, **defaults)


def _router(text: Released) -> dict[str, Any]:
    score = text.choice("moe_router_score_func", "sigmoid", SCORES)
    softcap = text.number("moe_router_logit_softcapping", 0.0, least=0, null=0.0)
    if score == "sigmoid":
        return {"kind": score, "logit_softcap": softcap}
    if softcap:
        raise text.error(
            f"moe_router_logit_softcapping is {softcap}: only with the moe_router_score_func sigmoid is it built"
        )
    return {"kind": score}


def _gate(text: Released, layers: int) -> str | None:
    """The value of `gating`. `gating_types`, a list by layer, must agree with it."""
    gate = text.choice("gating", True, GATES)
    for name in text.per_layer("gating_types", layers, []) if text.has("gating_types") else []:
        if text.meaning("gating_types", name, GATE_TYPES) != gate:
            raise text.error(f"gating_types has {name!r}, and gating is {shown(text.values.get('gating', True))}")
    return gate


def _dense_layers(text: Released, layers: int) -> list[bool]:
    """Which layers are dense: stated by `mlp_layer_types`; in older files by a list of dense layers and a step
    between sparse ones; else layer 0 alone."""
    if text.has("mlp_layer_types"):
        types = text.per_layer("mlp_layer_types", layers, [])
        return [text.meaning("mlp_layer_types", name, {"dense": True, "sparse": False}) for name in types]
    if not text.has("mlp_only_layers") and not text.has("decoder_sparse_step"):
        return [index == 0 for index in range(layers)]
    dense, step = text.values.get("mlp_only_layers"), text.integer("decoder_sparse_step", 1, null=1)
    if not isinstance(dense, list | None):
        raise text.wrong("mlp_only_layers", dense, "a list")
    listed = {text.checked_integer("mlp_only_layers", index, 0, layers - 1) for index in dense or []}
    return [index in listed or bool((index + 1) % step) for index in range(layers)]


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = all_of_kind([layer.attention for layer in config.layers], GroupedQuery, "laguna")
    types = ["full_attention" if a.sliding_window is None else "sliding_attention" for a in attentions]
    feed_forwards: list[GatedMLP | MixtureOfExperts] = []
    for layer in config.layers:
        if not isinstance(layer.feed_forward, GatedMLP | MixtureOfExperts):
            raise ConfigError(f"laguna config: there is no spelling for {type(layer.feed_forward).__name__}")
        feed_forwards.append(layer.feed_forward)
    dense = next((f for f in feed_forwards if isinstance(f, GatedMLP)), None)
    sparse = next((f for f in feed_forwards if isinstance(f, MixtureOfExperts)), None)
    window = next((a.sliding_window for a in attentions if a.sliding_window is not None), None)
    values: dict[str, Any] = {
        "architectures": ["LagunaForCausalLM"],
        "model_type": "laguna",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "hidden_act": RELEASED_ACTIVATIONS[(dense or feed_forwards[0]).activation],
        "intermediate_size": dense.intermediate_size if dense else config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attentions[0].num_heads,
        "num_attention_heads_per_layer": [a.num_heads for a in attentions],
        "num_key_value_heads": attentions[0].num_kv_heads,
        "head_dim": attentions[0].head_dim,
        "attention_bias": attentions[0].bias,
        "gating": RELEASED_GATES[attentions[0].output_gate],
        "layer_types": types,
        "mlp_layer_types": ["dense" if isinstance(f, GatedMLP) else "sparse" for f in feed_forwards],
        "sliding_window": window or 512,
        "rope_parameters": {
            name: write_rotary(a.rotary) for name, a in zip(types, attentions, strict=True) if a.rotary is not None
        },
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": released_ids(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    if sparse is not None:
        values |= {
            "num_experts": sparse.num_experts,
            "num_experts_per_tok": sparse.top_k,
            "moe_intermediate_size": sparse.intermediate_size,
            "shared_expert_intermediate_size": sparse.shared_intermediate_size,
            "moe_routed_scaling_factor": sparse.routed_scale,
        }
        if isinstance(sparse.router, SigmoidRouter):
            values["moe_router_logit_softcapping"] = sparse.router.logit_softcap
        elif isinstance(sparse.router, SqrtSoftplusRouter):
            values["moe_router_score_func"] = "sqrtsoftplus"
    return values


def placements(config: ModelConfig) -> Placements:
    placed = {
        "model.embed_tokens.weight": Placement("embedding.weight"),
        "model.norm.weight": Placement("norm.weight"),
    }
    if not config.tied_head:
        placed["lm_head.weight"] = Placement("head.weight")
    for index, layer in enumerate(config.layers):
        for theirs, place in _layer_placements(layer).items():
            placed[f"model.layers.{index}.{theirs}"] = replace(place, parameter=f"layers.{index}.{place.parameter}")
    return placed


def _layer_placements(layer: LayerConfig) -> Placements:
    (attention,) = all_of_kind([layer.attention], GroupedQuery, "laguna")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names = {f"self_attn.{name}.weight": f"attention.{name}.weight" for name in [*projections, "q_norm", "k_norm"]}
    if attention.bias:
        names |= {f"self_attn.{name}.bias": f"attention.{name}.bias" for name in projections}
    if attention.output_gate is not None:
        names["self_attn.g_proj.weight"] = "attention.g_proj.weight"
    names["input_layernorm.weight"] = "attention_frame.input_norm.weight"
    names["post_attention_layernorm.weight"] = "feed_forward_frame.input_norm.weight"
    feed_forward = layer.feed_forward
    if not isinstance(feed_forward, MixtureOfExperts):
        names |= {
            f"mlp.{name}.weight": f"feed_forward.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
        }
        return {theirs: Placement(ours) for theirs, ours in names.items()}
    names["mlp.gate.weight"] = "feed_forward.router.proj.weight"
    names["mlp.experts.e_score_correction_bias"] = "feed_forward.router.selection_bias"
    for name in ("gate_proj", "up_proj", "down_proj"):
        names[f"mlp.shared_expert.{name}.weight"] = f"feed_forward.shared_expert.{name}.weight"
    placed = {theirs: Placement(ours) for theirs, ours in names.items()}
    size = feed_forward.intermediate_size
    for expert in range(feed_forward.num_experts):
        gate_up, down = "feed_forward.gate_up_proj", "feed_forward.down_proj"
        placed[f"mlp.experts.{expert}.gate_proj.weight"] = Placement(gate_up, expert, (0, size))
        placed[f"mlp.experts.{expert}.up_proj.weight"] = Placement(gate_up, expert, (size, 2 * size))
        placed[f"mlp.experts.{expert}.down_proj.weight"] = Placement(down, expert)
    return placed


def fused_experts(config: ModelConfig) -> Placements:
    """All experts of a layer in one tensor, gate rows over up rows."""
    return {
        f"model.layers.{index}.mlp.experts.{name}": Placement(f"layers.{index}.feed_forward.{name}")
        for index, layer in enumerate(config.layers)
        if isinstance(layer.feed_forward, MixtureOfExperts)
        for name in ("gate_up_proj", "down_proj")
    }


def stacked_experts(config: ModelConfig) -> Placements:
    """mlx's layout: the projections of all experts of a layer in one tensor each, (experts, width out, width in)."""
    placed = {}
    for index, layer in enumerate(config.layers):
        if isinstance(layer.feed_forward, MixtureOfExperts):
            size, ours = layer.feed_forward.intermediate_size, f"layers.{index}.feed_forward"
            theirs = f"model.layers.{index}.mlp.switch_mlp"
            placed[f"{theirs}.gate_proj.weight"] = Placement(f"{ours}.gate_up_proj", rows=(0, size))
            placed[f"{theirs}.up_proj.weight"] = Placement(f"{ours}.gate_up_proj", rows=(size, 2 * size))
            placed[f"{theirs}.down_proj.weight"] = Placement(f"{ours}.down_proj")
    return placed


def canonical(name: str) -> str:
    """The name in `placements`, whichever way the router's bias and the shared expert are spelled. mlx-vlm puts all
    behind language_model., and the router's matrix into a module of its own."""
    name = name.removeprefix("language_model.")
    name = re.sub(r"\.mlp\.gate\.proj\.weight$", ".mlp.gate.weight", name)
    name = name.replace(".mlp.gate.e_score_correction_bias", ".mlp.experts.e_score_correction_bias")
    return name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")


def _cache_scale(name: str, config: ModelConfig) -> bool:
    return bool(re.search(r"\.self_attn\.(\w+\.)?(k_scale|v_scale)$", name))


FAMILY = Family(
    name="laguna",
    model_types=("laguna",),
    keys=lambda values: KEYS,
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    alternatives=lambda config: [fused_experts(config), stacked_experts(config)],
    spelling=lambda names, config: canonical,
    skip_rules={"scales for a quantised cache": _cache_scale},
)
