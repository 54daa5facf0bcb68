"""Gemma 4's text decoder (E2B, E4B and their relatives): released config and tensor names, both ways.

Released files are multimodal (`model_type` gemma4, the decoder under `text_config`); text-only ones say gemma4_text.
Of the towers' tensors nothing is read. The 12B calls itself gemma4_unified: its decoder is the same, without
per-layer embeddings and experts.
"""

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
from kvell.families.keys import COMMON_HARMLESS, COMMON_UNSUPPORTED, Keys, because, named
from kvell.families.released import Released
from kvell.families.rotary import read_rotary, read_rotary_sets, rotary_keys, rotary_sets, write_rotary
from kvell.layers.experts import DenseBesideExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery

DEFAULT_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

UNIFIED = ("gemma4_unified", "gemma4_unified_text")
OTHER_MODALITIES = "of images and sound, for which no towers are built"


def text_rotary_keys(values: Mapping[str, Any]) -> Keys:
    """The keys of one set. A set of type default always turns whole heads."""
    keys = rotary_keys(values)
    if values.get("rope_type", values.get("type", "default")) != "default":
        return keys
    whole = {"partial_rotary_factor": ((1,), "with the rope_type default all of a head turns")}
    return replace(keys, used=keys.used - whole.keys(), unsupported={**keys.unsupported, **whole})


def layer_keys(values: Mapping[str, Any]) -> Keys:
    """Of `per_layer_config`: what differs in a layer, by the layer's number."""
    alike = dict.fromkeys(TEXT - OWN, ((), "it cannot differ by layer"))
    return Keys(objects=dict.fromkeys(values, Keys(used=OWN, unsupported=alike)))


OWN = frozenset({"head_dim", "num_key_value_heads"})
TEXT = named("""
    model_type vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings rms_norm_eps
    layer_types num_attention_heads num_key_value_heads head_dim global_head_dim num_global_key_value_heads
    per_layer_config attention_k_eq_v attention_bias sliding_window num_kv_shared_layers rope_parameters rope_theta
    partial_rotary_factor hidden_activation use_double_wide_mlp enable_moe_block num_experts top_k_experts
    moe_intermediate_size hidden_size_per_layer_input vocab_size_per_layer_input final_logit_softcapping
    tie_word_embeddings initializer_range bos_token_id eos_token_id pad_token_id
    """)
TEXT_KEYS = Keys(
    used=TEXT,
    harmless=COMMON_HARMLESS
    | {"sliding_window_pattern": "layer_types names the type of every layer, and by default every sixth is full"},
    unsupported=COMMON_UNSUPPORTED
    | {
        "use_bidirectional_attention": ((None, False, "vision"), "only causal attention is built"),
        "attn_logit_softcapping": ((None,), "scores of attention are not capped"),
        "rope_scaling": ((None,), "rope_parameters, by layer type, are wanted instead"),
        "quantization_config": ((None,), "quantised Gemma 4 files cannot be read"),
    },
    objects={
        "rope_parameters": rotary_sets("sliding_attention", "full_attention", set_keys=text_rotary_keys),
        "per_layer_config": layer_keys,
    },
)
OUTER_KEYS = Keys(
    used=named("model_type tie_word_embeddings bos_token_id eos_token_id pad_token_id"),
    harmless=COMMON_HARMLESS
    | because(
        OTHER_MODALITIES,
        """
        vision_config audio_config image_token_id video_token_id audio_token_id boi_token_id eoi_token_id boa_token_id
        eoa_token_id eoa_token_index vision_soft_tokens_per_image audio_soft_tokens_per_image audio_ms_per_token
        """,
    )
    | {"initializer_range": "of the decoder it stands in text_config"},
    unsupported=COMMON_UNSUPPORTED | {"quantization_config": TEXT_KEYS.unsupported["quantization_config"]},
    objects={"text_config": TEXT_KEYS},
)
# What the keys are called in a ModelConfig.
NAMES = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "top_k_experts",
    "rotary.fraction": "partial_rotary_factor",
}


def keys(values: Mapping[str, Any]) -> Keys:
    return OUTER_KEYS if is_multimodal(values) else TEXT_KEYS


def is_multimodal(values: Mapping[str, Any]) -> bool:
    """Whether the decoder's config stands within the file's; some files have it at the top, and no towers."""
    text_alone = str(values.get("model_type")).endswith("_text") or "num_hidden_layers" in values
    return "text_config" in values or not text_alone


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    outer = Released("gemma4", values)
    text = outer.within("text_config", outer.mapping("text_config", null={})) if is_multimodal(values) else outer
    unified = values.get("model_type") in UNIFIED
    layers = text.layers(default=30)
    types = text.per_layer(
        "layer_types", layers, ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    )
    types[-1] = "full_attention"  # always, whatever the file says
    full = [text.meaning("layer_types", name, KINDS) == "full" for name in types]
    first_shared = layers - text.integer("num_kv_shared_layers", 0, least=0)
    sources = _sources(types, first_shared)
    rotaries = {name: _read_rotary(text, name) for name in set(types)}
    owns = _own_configs(text, layers)
    activation = text.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATION_NAMES)
    hidden, vocab_size = text.integer("hidden_size", 2304), text.tokens("vocab_size", 262144)
    beside = text.flag("enable_moe_block", False)

    def found(name: str) -> Released:
        """The config that states a token id: the decoder's own, else the outer one."""
        return outer if name in values and name not in text.values else text

    def layer(index: int) -> dict[str, Any]:
        attention = _read_attention(text, owns[index] if owns else None, full[index], 1024 if unified else 512)
        return {
            "attention": attention | {"rotary": rotaries[types[index]], "kv_source": sources[index]},
            "feed_forward": _read_feed_forward(text, activation, beside, shared=index >= first_shared),
            "attention_norm": "sandwich",
            "feed_forward_norm": "post" if beside else "sandwich",
            "layer_scalar": True,
        }

    ends = outer if outer.has("eos_token_id") else text
    return text.build(
        {
            "family": "gemma4",
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "max_positions": text.tokens("max_position_embeddings", 262144 if unified else 131072),
            "norm_eps": text.number("rms_norm_eps", 1e-6),
            "embedding_scale": hidden**0.5,
            "per_layer_embedding": _read_per_layer_embedding(text, activation, vocab_size, 0 if unified else 256),
            "tied_head": _tied_head(outer, text),
            "logit_softcap": text.number("final_logit_softcapping", None, null=None),
            "initializer_range": text.number("initializer_range", 0.02),
            "bos_token_id": found("bos_token_id").token_id("bos_token_id", 2),
            "eos_token_ids": ends.token_ids("eos_token_id", 1),
            "pad_token_id": found("pad_token_id").token_id("pad_token_id", 0),
            "layers": [layer(index) for index in range(layers)],
        },
        NAMES,
    )


def _tied_head(outer: Released, text: Released) -> bool:
    """The outer config decides, as its model has the head. The decoder's own value is only checked to be a flag."""
    text.flag("tie_word_embeddings", True)
    return outer.flag("tie_word_embeddings", True)


def _sources(types: list[str], first_shared: int) -> list[int | None]:
    """For each layer whose keys it reads: a sharing layer reads the last layer of its type that has its own."""
    if first_shared < 0:
        raise ConfigError("gemma4 config: num_kv_shared_layers is more than num_hidden_layers")
    last = {name: index for index, name in enumerate(types[:first_shared])}
    for index, name in enumerate(types):
        if index >= first_shared and name not in last:
            raise ConfigError(
                f"gemma4 config: num_kv_shared_layers and layer_types: layer {index} shares the keys of a {name}"
                f" layer, but none of the first {first_shared} layers is one"
            )
    return [None if index < first_shared else last[name] for index, name in enumerate(types)]


def _read_per_layer_embedding(
    text: Released, activation: str, vocab_size: int, default: int
) -> dict[str, Any] | None:
    width = text.integer("hidden_size_per_layer_input", default, least=0, null=0)
    if not width:
        return None
    rows = text.tokens("vocab_size_per_layer_input", 262144)
    table = {} if rows == vocab_size else {"vocab_size": rows}
    return {"width": width, "activation": activation, **table}


def _read_rotary(text: Released, name: str) -> dict[str, Any]:
    """The rotary embedding of a layer type: its own set, completed by the keys at the top of the config. One of type
    default turns whole heads."""
    sets, defaults = read_rotary_sets(text, DEFAULT_ROPE)
    rotary = read_rotary(sets.within(name), **defaults)
    return rotary | {"fraction": 1.0} if rotary["kind"] == "default" else rotary


def _read_attention(text: Released, own: Released | None, full: bool, window: int) -> dict[str, Any]:
    """An attention's fields except `rotary` and `kv_source`. `own` is the layer's own config, where it has one;
    `window` is the default sliding window."""
    one_projection = text.flag("attention_k_eq_v", False) and full
    kv_heads, head_dim = text.integer("num_key_value_heads", 4), text.even("head_dim", 256)
    if own is not None:
        head_dim = own.even("head_dim", head_dim)
        kv_heads = own.integer("num_key_value_heads", kv_heads)
    elif full:
        head_dim = text.even("global_head_dim", 512)
        of_full = text.integer("num_global_key_value_heads", kv_heads, null=kv_heads)
        kv_heads = of_full if one_projection else kv_heads
    sliding = text.integer("sliding_window", window)
    return {
        "kind": "grouped_query",
        "num_heads": text.integer("num_attention_heads", 8),
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "sliding_window": None if full else sliding,
        "value_norm": True,
        "value_from_key": one_projection,
        "bias": text.flag("attention_bias", False),
        "scale": 1.0,
    }


def _own_configs(text: Released, layers: int) -> list[Released] | None:
    """What differs in each layer, where a file says so. Re-saved files pad the layers' numbers with zeros: "05"."""
    if not text.has("per_layer_config"):
        return None
    given = text.within("per_layer_config")
    by_layer = {name.lstrip("0") or "0": given.within(name) for name in given.values}
    if unknown := by_layer.keys() - {str(number) for number in range(layers)}:
        raise text.error(f"per_layer_config has a layer {min(unknown)}, which there is not")
    return [by_layer.get(str(index)) or given.within(str(index), {}) for index in range(layers)]


def _read_feed_forward(text: Released, activation: str, beside: bool, *, shared: bool) -> dict[str, Any]:
    wide = text.flag("use_double_wide_mlp", False) and shared
    width = text.integer("intermediate_size", 9216) * (2 if wide else 1)
    dense = {"kind": "gated_mlp", "intermediate_size": width, "activation": activation}
    if not beside:
        return dense
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if not text.has(name):
            raise text.error(f"{name} is missing or null, and enable_moe_block is true")
    mixture = {
        "num_experts": text.experts("num_experts"),
        "top_k": text.integer("top_k_experts"),
        "intermediate_size": text.integer("moe_intermediate_size"),
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
        "vocab_size_per_layer_input": (ple and ple.vocab_size) or config.vocab_size,
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
    return bool(
        re.match(
            r"^(model\.)?(vision_tower|audio_tower|vision_embedder|audio_embedder|embed_vision|embed_audio)\.", name
        )
    )


def _dead_keys(name: str, config: ModelConfig) -> bool:
    match = re.match(r"^model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.", canonical(name))
    if match is None or int(match[1]) >= config.num_layers:
        return False
    return any(config.layers[int(match[1])].attention.layer_sources())


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text", *UNIFIED),
    keys=keys,
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    spelling=lambda names, config: canonical,
    skip_rules={
        "towers of other modalities": _tower,
        "keys and values of layers that share another's": _dead_keys,
    },
)
