"""Gemma 4's text decoder (E2B, E4B and their relatives): released config and tensor names, both ways.

Released files are multimodal (`model_type` gemma4, the decoder under `text_config`); text-only ones say gemma4_text.
Of the towers' tensors nothing is read.
"""

import re
from collections.abc import Mapping
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
from kvell.layers.experts import DenseBesideExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery

DEFAULT_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    text = Released("gemma4", values.get("text_config") or values)
    text.refuse("use_bidirectional_attention", (None, False, "vision"), "only causal attention is built")
    layers = text.integer("num_hidden_layers")
    types = text.per_layer(
        "layer_types", ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    )
    types[-1] = "full_attention"  # always, whatever the file says
    full = [text.choice("layer_types", name, KINDS) == "full" for name in types]
    first_shared = layers - text.integer("num_kv_shared_layers", 0, minimum=0)
    sources = _sources(types, first_shared)
    activation = text.choice(
        "hidden_activation", text.get("hidden_activation", "gelu_pytorch_tanh"), ACTIVATION_NAMES
    )
    hidden, vocab_size = text.integer("hidden_size"), text.integer("vocab_size")
    beside = text.flag("enable_moe_block", False)
    return ModelConfig.from_dict(
        {
            "family": "gemma4",
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "max_positions": text.get("max_position_embeddings", 131072),
            "norm_eps": text.get("rms_norm_eps", 1e-6),
            "embedding_scale": hidden**0.5,
            "per_layer_embedding": _read_per_layer_embedding(text, activation, vocab_size),
            "tied_head": Released("gemma4", values).flag("tie_word_embeddings", True),
            "logit_softcap": text.get("final_logit_softcapping", None),
            "initializer_range": text.get("initializer_range", 0.02),
            "bos_token_id": text.get("bos_token_id", values.get("bos_token_id")),
            "eos_token_ids": token_ids(values.get("eos_token_id") or text.get("eos_token_id", None)),
            "pad_token_id": text.get("pad_token_id", values.get("pad_token_id")),
            "layers": [
                {
                    "attention": _read_attention(text, index, types[index], full[index], sources[index]),
                    "feed_forward": _read_feed_forward(text, activation, beside, shared=index >= first_shared),
                    "attention_norm": "sandwich",
                    "feed_forward_norm": "post" if beside else "sandwich",
                    "layer_scalar": True,
                }
                for index in range(layers)
            ],
        },
        "gemma4 config",
    )


def _sources(types: list[str], first_shared: int) -> list[int | None]:
    """For each layer whose keys it reads: a sharing layer reads the last layer of its type that has its own."""
    if first_shared < 0:
        raise ConfigError("gemma4 config: num_kv_shared_layers is more than num_hidden_layers")
    last = {name: index for index, name in enumerate(types[:first_shared])}
    for index, name in enumerate(types):
        if index >= first_shared and name not in last:
            raise ConfigError(
                f"gemma4 config: layer {index} shares the keys of a {name} layer, but none of the first"
                f" {first_shared} layers is one"
            )
    return [None if index < first_shared else last[name] for index, name in enumerate(types)]


def _read_per_layer_embedding(text: Released, activation: str, vocab_size: int) -> dict[str, Any] | None:
    width = text.values.get("hidden_size_per_layer_input", 256)
    if not width:
        return None
    if text.get("vocab_size_per_layer_input", vocab_size) != vocab_size:
        raise ConfigError("gemma4 config: vocab_size_per_layer_input differs from vocab_size")
    return {"width": width, "activation": activation}


def _read_attention(text: Released, index: int, name: str, full: bool, source: int | None) -> dict[str, Any]:
    one_projection = text.flag("attention_k_eq_v", False) and full
    kv_heads, head_dim = text.get("num_key_value_heads"), text.get("head_dim")
    if text.get("per_layer_config", None) is not None:
        own = _own_config(text, index)
        if unknown := set(own) - {"head_dim", "num_key_value_heads"}:
            raise ConfigError(f"gemma4 config: per_layer_config.{index}: {min(unknown)} cannot differ by layer")
        head_dim, kv_heads = own.get("head_dim", head_dim), own.get("num_key_value_heads", kv_heads)
    elif full:
        head_dim = text.get("global_head_dim", 512)
        kv_heads = text.get("num_global_key_value_heads", kv_heads) if one_projection else kv_heads
    rope = text.rope_parameters(DEFAULT_ROPE)
    if name not in rope:
        raise ConfigError(f"gemma4 config: rope_parameters has no {name}")
    return {
        "kind": "grouped_query",
        "num_heads": text.get("num_attention_heads"),
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "sliding_window": None if full else text.get("sliding_window"),
        "rotary": read_rotary(rope[name], f"gemma4 config: rope_parameters.{name}"),
        "kv_source": source,
        "value_norm": True,
        "value_from_key": one_projection,
        "bias": text.flag("attention_bias", False),
        "scale": 1.0,
    }


def _own_config(text: Released, index: int) -> Mapping[str, Any]:
    """What differs in one layer. Re-saved files pad the layers' numbers with zeros: "05"."""
    by_layer = {key.lstrip("0") or "0": value for key, value in text.mapping("per_layer_config").items()}
    if unknown := set(by_layer) - {str(number) for number in range(text.integer("num_hidden_layers"))}:
        raise ConfigError(f"gemma4 config: per_layer_config has a layer {min(unknown)}, which there is not")
    own = by_layer.get(str(index), {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"gemma4 config: per_layer_config.{index} is {own!r}, wanted is an object")
    return own


def _read_feed_forward(text: Released, activation: str, beside: bool, *, shared: bool) -> dict[str, Any]:
    width = text.integer("intermediate_size") * (2 if shared and text.flag("use_double_wide_mlp", False) else 1)
    dense = {"kind": "gated_mlp", "intermediate_size": width, "activation": activation}
    if not beside:
        return dense
    mixture = {
        "num_experts": text.get("num_experts"),
        "top_k": text.get("top_k_experts"),
        "intermediate_size": text.get("moe_intermediate_size"),
        "router": {"kind": "softmax"},
        "activation": activation,
    }
    return {"kind": "dense_beside_experts", "dense": dense, "mixture": mixture}


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = all_of_kind([layer.attention for layer in config.layers], GroupedQuery, "gemma4")
    types = ["full_attention" if a.sliding_window is None else "sliding_attention" for a in attentions]
    base = next((a for a in attentions if a.sliding_window is not None), attentions[0])
    denses = [f.dense if isinstance(f, DenseBesideExperts) else f for f in (la.feed_forward for la in config.layers)]
    feed_forward, dense = config.layers[0].feed_forward, denses[0]
    if not isinstance(dense, GatedMLP):
        raise ConfigError(f"gemma4 config: there is no spelling for a layer's {feed_forward.kind}")
    wide = any(isinstance(one, GatedMLP) and one.intermediate_size > dense.intermediate_size for one in denses)
    own = {
        str(index): {"head_dim": a.head_dim} | ({"num_key_value_heads": a.num_kv_heads} if a.value_from_key else {})
        for index, a in enumerate(attentions)
        if a.sliding_window is None
    }
    ple = config.per_layer_embedding
    values: dict[str, Any] = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": config.vocab_size,
        "vocab_size_per_layer_input": config.vocab_size,
        "hidden_size": config.hidden_size,
        "hidden_size_per_layer_input": ple.width if ple else 0,
        "hidden_activation": RELEASED_ACTIVATIONS[dense.activation],
        "intermediate_size": dense.intermediate_size,
        "use_double_wide_mlp": wide,
        "num_hidden_layers": config.num_layers,
        "num_kv_shared_layers": sum(a.kv_source is not None for a in attentions),
        "num_attention_heads": base.num_heads,
        "num_key_value_heads": base.num_kv_heads,
        "head_dim": base.head_dim,
        "per_layer_config": own,
        "attention_k_eq_v": any(a.value_from_key for a in attentions),
        "attention_bias": base.bias,
        "layer_types": types,
        "sliding_window": base.sliding_window or 512,
        "rope_parameters": DEFAULT_ROPE
        | {name: write_rotary(a.rotary) for name, a in zip(types, attentions, strict=True) if a.rotary is not None},
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "final_logit_softcapping": config.logit_softcap,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": released_ids(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    if isinstance(feed_forward, DenseBesideExperts):
        values |= {
            "enable_moe_block": True,
            "num_experts": feed_forward.mixture.num_experts,
            "top_k_experts": feed_forward.mixture.top_k,
            "moe_intermediate_size": feed_forward.mixture.intermediate_size,
        }
    return values


def placements(config: ModelConfig) -> Placements:
    names = {"embed_tokens.weight": "embedding.weight", "norm.weight": "norm.weight"}
    if config.per_layer_embedding:
        names |= {
            "embed_tokens_per_layer.weight": "per_layer_inputs.table.weight",
            "per_layer_model_projection.weight": "per_layer_inputs.projection.weight",
            "per_layer_projection_norm.weight": "per_layer_inputs.norm.weight",
        }
    for index, layer in enumerate(config.layers):
        for theirs, ours in _layer_names(config, layer).items():
            names[f"layers.{index}.{theirs}"] = f"layers.{index}.{ours}"
    placed = {f"model.{theirs}": Placement(ours) for theirs, ours in names.items()}
    return placed if config.tied_head else placed | {"lm_head.weight": Placement("head.weight")}


def _layer_names(config: ModelConfig, layer: LayerConfig) -> dict[str, str]:
    (attention,) = all_of_kind([layer.attention], GroupedQuery, "gemma4")
    own = ["q_proj", "o_proj"]
    if attention.kv_source is None:
        own += ["k_proj"] if attention.value_from_key else ["k_proj", "v_proj"]
    names = {f"self_attn.{name}.weight": f"attention.{name}.weight" for name in own}
    if attention.bias:
        names |= {f"self_attn.{name}.bias": f"attention.{name}.bias" for name in own}
    for norm in ["q_norm"] if attention.kv_source is not None else ["q_norm", "k_norm"]:
        names[f"self_attn.{norm}.weight"] = f"attention.{norm}.weight"
    names["input_layernorm.weight"] = "attention_frame.input_norm.weight"
    names["post_attention_layernorm.weight"] = "attention_frame.output_norm.weight"
    names["post_feedforward_layernorm.weight"] = "feed_forward_frame.output_norm.weight"
    names["layer_scalar"] = "layer_scalar"
    beside = isinstance(layer.feed_forward, DenseBesideExperts)
    dense = "feed_forward.dense" if beside else "feed_forward"
    names |= {f"mlp.{name}.weight": f"{dense}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    if beside:
        names |= {
            "pre_feedforward_layernorm.weight": "feed_forward.dense_input_norm.weight",
            "post_feedforward_layernorm_1.weight": "feed_forward.dense_output_norm.weight",
            "pre_feedforward_layernorm_2.weight": "feed_forward.mixture_input_norm.weight",
            "post_feedforward_layernorm_2.weight": "feed_forward.mixture_output_norm.weight",
            "router.proj.weight": "feed_forward.mixture.router.proj.weight",
            "router.scale": "feed_forward.mixture.router.scale",
            "router.per_expert_scale": "feed_forward.mixture.router.expert_scale",
            "experts.gate_up_proj": "feed_forward.mixture.gate_up_proj",
            "experts.down_proj": "feed_forward.mixture.down_proj",
        }
    else:
        names["pre_feedforward_layernorm.weight"] = "feed_forward_frame.input_norm.weight"
    if config.per_layer_embedding:
        names |= {
            "per_layer_input_gate.weight": "per_layer_embedding.gate_proj.weight",
            "per_layer_projection.weight": "per_layer_embedding.projection.weight",
            "post_per_layer_input_norm.weight": "per_layer_embedding.norm.weight",
        }
    return names


def canonical(name: str) -> str:
    """Any of the prefixes seen: model.language_model., language_model.model., language_model., model., none."""
    bare = re.sub(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)", "", name)
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def _tower(name: str, config: ModelConfig) -> bool:
    return bool(re.match(r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\.", name))


def _dead_keys(name: str, config: ModelConfig) -> bool:
    match = re.match(r"^model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.", canonical(name))
    if match is None or int(match[1]) >= config.num_layers:
        return False
    return config.layers[int(match[1])].attention.kv_source is not None


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text"),
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    spelling=lambda names, config: canonical,
    skip_rules={
        "towers of other modalities": _tower,
        "keys and values of layers that share another's": _dead_keys,
    },
)
