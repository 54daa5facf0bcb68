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
    Released,
    all_of_kind,
    released_ids,
    token_ids,
)
from kvell.families.rotary import read_rotary, write_rotary
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.routers import SigmoidRouter

DEFAULT_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GATES = {True: "per_head", "per-head": "per_head", "per-element": "per_element", False: None}
RELEASED_GATES = {"per_head": "per-head", "per_element": "per-element", None: False}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    text = Released("laguna", values)
    text.refuse("moe_apply_router_weight_on_input", (None, False), "router weights on the input are not built")
    text.refuse("quantization_config", (None,), "quantised Laguna files cannot be read")
    layers = text.integer("num_hidden_layers")
    types = text.per_layer("layer_types", ["full_attention"] * layers)
    heads = text.per_layer("num_attention_heads_per_layer", [text.get("num_attention_heads", None)] * layers)
    feed_forwards = text.per_layer("mlp_layer_types", _older_feed_forward_types(text, layers))
    rope = text.rope_parameters(DEFAULT_ROPE)
    activation = text.choice("hidden_act", text.get("hidden_act", "silu"), ACTIVATION_NAMES)
    gate = text.choice("gating", values.get("gating", True), GATES)

    def attention(index: int) -> dict[str, Any]:
        full = text.choice("layer_types", types[index], KINDS) == "full"
        # One set for all layers, or one by layer type with, in released files, a stray number beside them.
        own_rope = rope if "rope_type" in rope else rope.get(types[index])
        if own_rope is None:
            raise ConfigError(f"laguna config: rope_parameters has no {types[index]}")
        return {
            "kind": "grouped_query",
            "num_heads": heads[index],
            "num_kv_heads": text.get("num_key_value_heads"),
            "head_dim": text.get("head_dim", 128),
            "sliding_window": None if full else text.get("sliding_window", 512),
            "rotary": read_rotary(own_rope, f"laguna config: rope_parameters.{types[index]}"),
            "output_gate": gate,
            "bias": text.flag("attention_bias", False),
        }

    def feed_forward(index: int) -> dict[str, Any]:
        if text.choice("mlp_layer_types", feed_forwards[index], {"dense": True, "sparse": False}):
            size = text.get("intermediate_size")
            return {"kind": "gated_mlp", "intermediate_size": size, "activation": activation}
        return {
            "kind": "mixture_of_experts",
            "num_experts": text.get("num_experts"),
            "top_k": text.get("num_experts_per_tok"),
            "intermediate_size": text.get("moe_intermediate_size"),
            "shared_intermediate_size": text.get("shared_expert_intermediate_size"),
            "router": {"kind": "sigmoid", "logit_softcap": text.get("moe_router_logit_softcapping", 0.0)},
            "routed_scale": text.get("moe_routed_scaling_factor", 1.0),
            "activation": activation,
        }

    return ModelConfig.from_dict(
        {
            "family": "laguna",
            "vocab_size": text.get("vocab_size"),
            "hidden_size": text.get("hidden_size"),
            "max_positions": text.get("max_position_embeddings", 131072),
            "norm_eps": text.get("rms_norm_eps", 1e-6),
            "tied_head": text.flag("tie_word_embeddings", False),
            "initializer_range": text.get("initializer_range", 0.02),
            "bos_token_id": text.get("bos_token_id", None),
            "eos_token_ids": token_ids(text.get("eos_token_id", None)),
            "pad_token_id": text.get("pad_token_id", None),
            "layers": [{"attention": attention(i), "feed_forward": feed_forward(i)} for i in range(layers)],
        },
        "laguna config",
    )


def _older_feed_forward_types(text: Released, layers: int) -> list[str]:
    """Before `mlp_layer_types`: a list of dense layers and a step between sparse ones; else only layer 0 is dense."""
    if "norm_topk_prob" in text.values:
        text.refuse("norm_topk_prob", (True,), "routing weights are always normalised")
    if "mlp_only_layers" not in text.values and "decoder_sparse_step" not in text.values:
        return ["dense"] + ["sparse"] * (layers - 1)
    dense, step = text.get("mlp_only_layers", []), text.integer("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        raise ConfigError(f"laguna config: mlp_only_layers is {dense!r}, wanted is a list")
    return ["dense" if i in dense or (i + 1) % step else "sparse" for i in range(layers)]


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = all_of_kind([layer.attention for layer in config.layers], GroupedQuery, "laguna")
    types = ["full_attention" if a.sliding_window is None else "sliding_attention" for a in attentions]
    feed_forwards = [layer.feed_forward for layer in config.layers]
    dense = next((f for f in feed_forwards if isinstance(f, GatedMLP)), None)
    sparse = next((f for f in feed_forwards if isinstance(f, MixtureOfExperts)), None)
    window = next((a.sliding_window for a in attentions if a.sliding_window is not None), None)
    values: dict[str, Any] = {
        "architectures": ["LagunaForCausalLM"],
        "model_type": "laguna",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "hidden_act": RELEASED_ACTIVATIONS[(dense or sparse).activation],  # type: ignore[union-attr]
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
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    alternatives=lambda config: [fused_experts(config), stacked_experts(config)],
    spelling=lambda names, config: canonical,
    skip_rules={"scales for a quantised cache": _cache_scale},
)
