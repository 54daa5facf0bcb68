"""DeepSeek V4 (Flash and Pro): released config and tensor names, both ways.

The official config gives a compression ratio per layer, one more for every draft block behind them; transformers
re-saves it with layer types, rates by type and rotary settings by name. Tensors are met in the official layout, FP8
and FP4 with their scales, and under transformers' names.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from kvell.config import LayerConfig, ModelConfig
from kvell.errors import ConfigError
from kvell.families.family import (
    Family,
    Placement,
    Placements,
    all_of_kind,
    released_ids,
)
from kvell.families.keys import COMMON_HARMLESS, COMMON_UNSUPPORTED, TRAINING, Keys, because, named
from kvell.families.released import Released
from kvell.families.rotary import read_rotary, rotary_keys
from kvell.layers.compressed import Compressed
from kvell.layers.contract import RotaryPart
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.hyper_connections import MOST_ITERATIONS, MOST_LANES, HyperConnections
from kvell.layers.rotary import DefaultRotary, YarnRotary
from kvell.layers.routers import HashRouter

WINDOW, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
TYPES = {WINDOW: WINDOW, CSA: CSA, HCA: HCA}
RATIOS = {0: WINDOW, 4: CSA, 128: HCA}
RATES = {CSA: 4, HCA: 128}
SCORES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
RELEASED_SCORES = {ours: theirs for theirs, ours in SCORES.items()}
SETS = ("main", "compress")


def rotary_object_keys(values: Mapping[str, Any]) -> Keys:
    """The keys of rope_parameters and rope_scaling: two named sets, or one set for the layers that compress."""
    if set(SETS) <= set(values):
        stray = dict.fromkeys(set(values) & rotary_keys({"rope_type": "yarn"}).names(), "transformers drops it too")
        return Keys(harmless=stray, objects=dict.fromkeys(SETS, rotary_keys))
    keys = rotary_keys(values)
    outside = because("those at the top count", "rope_theta partial_rotary_factor")
    return replace(keys, used=keys.used - outside.keys(), harmless={**keys.harmless, **outside})


QUANTISED = Keys(
    harmless=because(
        "every tensor is stored with its own dtype, beside its scales or without",
        "scale_fmt expert_dtype modules_to_not_convert modules_to_convert ignored_layers",
    )
    | because(
        "weights are unpacked as they are read, and activations are not quantised", "activation_scheme dequantize"
    ),
    unsupported={
        "quant_method": (("fp8",), "known are DeepSeek's FP8, and FP4 for experts"),
        "fmt": (("e4m3", None), "known is e4m3"),
        "weight_block_size": (([128, 128],), "known are blocks of 128 x 128 with a scale each"),
    },
)
KEYS = Keys(
    used=named("""
        model_type vocab_size hidden_size num_hidden_layers max_position_embeddings rms_norm_eps layer_types
        compress_ratios compress_rates compress_rate_csa compress_rate_hca num_attention_heads head_dim
        qk_rope_head_dim partial_rotary_factor q_lora_rank o_groups o_lora_rank sliding_window index_n_heads
        index_head_dim index_topk rope_theta compress_rope_theta rope_scaling rope_parameters mlp_layer_types
        num_hash_layers n_routed_experts num_experts_per_tok moe_intermediate_size routed_scaling_factor scoring_func
        swiglu_limit hc_mult hc_sinkhorn_iters hc_eps num_nextn_predict_layers tie_word_embeddings initializer_range
        bos_token_id eos_token_id pad_token_id
        """),
    harmless=COMMON_HARMLESS
    | because(TRAINING, "aux_loss_alpha seq_aux")
    | {"expert_dtype": "every tensor is stored with its own dtype"}
    | because(
        "of DSpark, a drafter that is left out with a warning",
        """
        dspark_block_size dspark_noise_token_id dspark_target_layer_ids dspark_markov_rank dspark_n_routed_experts
        dspark_num_experts_per_tok
        """,
    ),
    unsupported=COMMON_UNSUPPORTED
    | {
        "norm_topk_prob": ((True, None), "routing weights are always normalised"),
        "attention_bias": ((False, None), "projections with biases are not built"),
        "mlp_bias": ((False, None), "projections with biases are not built"),
        "num_key_value_heads": ((1, None), "all heads share one vector of keys and values"),
        "hidden_act": (("silu", None), "the experts' gates are silu"),
        "n_shared_experts": ((1, None), "there is one shared expert"),
        "topk_method": (("noaux_tc", None), "experts are chosen by score and bias"),
        "n_group": ((1, None), "experts are chosen among all, not by groups"),
        "topk_group": ((1, None), "experts are chosen among all, not by groups"),
        "first_k_dense_replace": ((0, None), "every layer has experts"),
        "moe_layer_freq": ((1, None), "every layer has experts"),
    },
    objects={
        "rope_scaling": rotary_object_keys,
        "rope_parameters": rotary_object_keys,
        "compress_rates": Keys(used=frozenset(RATES)),
        "quantization_config": QUANTISED,
    },
)
# What the keys are called in a ModelConfig.
NAMES = {
    "num_heads": "num_attention_heads",
    "output_groups": "o_groups",
    "rotary_width": "qk_rope_head_dim",
    "indexer.head_dim": "index_head_dim",
    "top_k": "num_experts_per_tok",
    "num_experts": "n_routed_experts",
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    text = Released("deepseek_v4", values)
    layers = text.layers(default=43)
    types = _layer_types(text, layers)
    rates = _rates(text)
    hashed = _hashed(text, layers)
    main, compress, rotary_width = _rotaries(text)
    score = text.choice("scoring_func", "sqrtsoftplus", SCORES)

    def attention(kind: str) -> dict[str, Any]:
        compressor = None if kind == WINDOW else {"ratio": rates[kind], "overlap": kind == CSA}
        indexer = {
            "num_heads": text.integer("index_n_heads", 64),
            "head_dim": text.integer("index_head_dim", 128),
            "top_k": text.integer("index_topk", 512),
        }
        return {
            "kind": "compressed",
            "num_heads": text.integer("num_attention_heads", 64),
            "head_dim": text.integer("head_dim", 512),
            "sliding_window": text.integer("sliding_window", 128),
            "rotary": main if kind == WINDOW else compress,
            "rotary_width": rotary_width,
            "query_rank": text.integer("q_lora_rank", 1024),
            "output_groups": text.integer("o_groups", 8),
            "output_rank": text.integer("o_lora_rank", 1024),
            "compressor": compressor,
            "indexer": indexer if kind == CSA else None,
        }

    def feed_forward(by_hash: bool) -> dict[str, Any]:
        width = text.integer("moe_intermediate_size", 2048)
        return {
            "kind": "mixture_of_experts",
            "num_experts": text.experts("n_routed_experts", 256),
            "top_k": text.integer("num_experts_per_tok", 6),
            "intermediate_size": width,
            "shared_intermediate_size": width,
            "router": {"kind": "hash", "score": score} if by_hash else {"kind": score},
            "routed_scale": text.number("routed_scaling_factor", 1.5, above=None),
            # Null is no limit, though the class has one where nothing is said.
            "limit": text.number("swiglu_limit", 10.0, null=None),
        }

    def layer(kind: str, by_hash: bool) -> dict[str, Any]:
        return {"attention": attention(kind), "feed_forward": feed_forward(by_hash)}

    return text.build(
        {
            "family": "deepseek_v4",
            "vocab_size": text.tokens("vocab_size", 129280),
            "hidden_size": text.integer("hidden_size", 4096),
            "max_positions": text.tokens("max_position_embeddings", 1048576),
            "norm_eps": text.number("rms_norm_eps", 1e-6),
            "connection": {
                "kind": "hyper",
                "streams": text.integer("hc_mult", 4, most=MOST_LANES),
                "iterations": text.integer("hc_sinkhorn_iters", 20, most=MOST_ITERATIONS),
                "eps": text.number("hc_eps", 1e-6),
            },
            "tied_head": text.flag("tie_word_embeddings", False),
            "initializer_range": text.number("initializer_range", 0.02),
            "bos_token_id": text.token_id("bos_token_id", 0),
            "eos_token_ids": text.token_ids("eos_token_id", 1),
            "pad_token_id": text.token_id("pad_token_id", None),
            "layers": [layer(kind, by_hash) for kind, by_hash in zip(types, hashed, strict=True)],
            "draft": {"layer": layer(WINDOW, False)} if _predicts_multiple(text, layers) else None,
        },
        NAMES,
    )


def _layer_types(text: Released, layers: int) -> list[str]:
    """Stated by name, or as compression ratios (those of draft blocks come last); Pro's pattern where neither is."""
    ratios = text.values.get("compress_ratios")
    if ratios is None:
        pro = [HCA, HCA, *([HCA, CSA] * layers)]
        return [
            text.meaning("layer_types", kind, TYPES) for kind in text.per_layer("layer_types", layers, pro[:layers])
        ]
    if not isinstance(ratios, list):
        raise text.wrong("compress_ratios", ratios, "a list")
    if len(ratios) < layers:
        raise text.error(f"compress_ratios has {len(ratios)} entries for {layers} layers (num_hidden_layers)")
    by_ratio = [text.meaning("compress_ratios", ratio, RATIOS) for ratio in ratios[:layers]]
    by_name = [text.meaning("layer_types", kind, TYPES) for kind in text.per_layer("layer_types", layers, by_ratio)]
    if by_name != by_ratio:
        raise text.error("layer_types and compress_ratios say different things")
    return by_name


def _rates(text: Released) -> dict[str, Any]:
    """Tokens per entry, by layer type; older files give each its own key."""
    rates = text.within("compress_rates", text.mapping("compress_rates", {}, null={}))
    given = {kind: rates.integer(kind, rate, least=2) for kind, rate in RATES.items()}
    older = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}
    return {kind: text.integer(older[kind], rate, least=2, null=rate) for kind, rate in given.items()}


def _predicts_multiple(text: Released, layers: int) -> bool:
    """Whether the file has the preview releases' one block of multi-token prediction. Where there are more blocks,
    they are another drafter's (DSpark's, in Flash-0731)."""
    ratios = text.values.get("compress_ratios")
    blocks = len(ratios) - layers if isinstance(ratios, list) else 1
    return text.integer("num_nextn_predict_layers", 1, least=0) == 1 and blocks == 1


def _hashed(text: Released, layers: int) -> list[bool]:
    """Which layers' experts are chosen by token id."""
    if text.has("mlp_layer_types"):
        types = text.per_layer("mlp_layer_types", layers, [])
        return [text.meaning("mlp_layer_types", kind, {"hash_moe": True, "moe": False}) for kind in types]
    first = text.integer("num_hash_layers", 3, least=0, null=3)
    return [index < first for index in range(layers)]


def _rotaries(text: Released) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The settings of layers with a window only, and of those that compress; and how many channels of a head turn.

    YaRN's attention factor is 1 unless stated: the paper's default is not applied.
    """
    scaling = "rope_scaling" if text.has("rope_scaling") else "rope_parameters"
    given = text.within(scaling, text.mapping(scaling, {}, null={}))
    if scaling == "rope_scaling" and set(SETS) & set(text.values.get("rope_parameters") or {}):
        raise text.error("rope_scaling and rope_parameters both say how the layers that compress turn")
    if set(SETS) <= set(given.values):
        both = [given.within(name) for name in SETS]
        stated = [one for one in both if one.has("partial_rotary_factor")]
        width = _rotary_width(text, {one.path: one.number("partial_rotary_factor", most=1) for one in stated})
        thetas: list[dict[str, Any]] = [{}, {}]
    else:
        both = [Released(text.family, {}, given.path), given]
        width = _rotary_width(text, {})
        names = {"rope_theta": 10000.0, "compress_rope_theta": 160000.0}
        thetas = [{"theta": text.number(name, theta, above=1)} for name, theta in names.items()]
    # How many channels turn is said by the width alone.
    main, compress = (
        read_rotary(one, attention_factor=1.0, **theta) | {"fraction": 1.0} | theta
        for one, theta in zip(both, thetas, strict=True)
    )
    for one, rotary in zip(both, (main, compress), strict=True):
        if rotary["kind"] == "proportional":
            raise one.error(f"{one.path}rope_type is 'proportional', known are default, yarn")
    return main, compress, width


def _rotary_width(text: Released, fractions: Mapping[str, float]) -> int:
    """As stated in channels, or as a share of the head; `fractions` are those within the sets, which must agree."""
    head_dim = text.integer("head_dim", 512)
    name = "qk_rope_head_dim" if text.has("qk_rope_head_dim") else "partial_rotary_factor"
    if text.has("qk_rope_head_dim"):
        width = int(text.integer(name))
    else:
        inner = next(iter(fractions.values()), 64 / 512)
        width = int(head_dim * text.number(name, inner, most=1, null=inner))
    if width < 2 or width % 2:
        raise text.error(f"{name} turns {width} channels of a head: not pairs")
    for path, fraction in fractions.items():
        if int(head_dim * fraction) != width:
            raise text.error(f"{path}partial_rotary_factor turns {int(head_dim * fraction)} channels, {name} {width}")
    return width


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = all_of_kind([layer.attention for layer in config.layers], Compressed, "deepseek_v4")
    mixtures = all_of_kind([layer.feed_forward for layer in config.layers], MixtureOfExperts, "deepseek_v4")
    (connection,) = all_of_kind([config.connection], HyperConnections, "deepseek_v4")
    first, mixture = attentions[0], mixtures[0]
    types, rates, rotaries = [], dict(RATES), {}
    indexer = None
    for attention in attentions:
        kind = WINDOW if attention.compressor is None else CSA if attention.compressor.overlap else HCA
        types.append(kind)
        rotaries["main" if kind == WINDOW else "compress"] = attention.rotary
        if attention.compressor is not None:
            rates[kind] = attention.compressor.ratio
        indexer = indexer or attention.indexer
    if config.draft is not None and isinstance(config.draft.layer.attention, Compressed):
        rotaries.setdefault("main", config.draft.layer.attention.rotary)
    routers = [one.router for one in mixtures]
    score = next(router.score if isinstance(router, HashRouter) else router.kind for router in routers)
    values: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": 1,
        "head_dim": first.head_dim,
        "partial_rotary_factor": first.rotary_width / first.head_dim,
        "q_lora_rank": first.query_rank,
        "o_groups": first.output_groups,
        "o_lora_rank": first.output_rank,
        "sliding_window": first.sliding_window,
        "layer_types": types,
        "compress_rates": rates,
        "rope_parameters": {
            name: _write_rotary(rotaries.get(name, first.rotary), first) for name in ("main", "compress")
        },
        "mlp_layer_types": ["hash_moe" if isinstance(router, HashRouter) else "moe" for router in routers],
        "n_routed_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "n_shared_experts": 1,
        "moe_intermediate_size": mixture.intermediate_size,
        "routed_scaling_factor": mixture.routed_scale,
        "swiglu_limit": mixture.limit,
        "scoring_func": RELEASED_SCORES.get(score),
        "norm_topk_prob": True,
        "hc_mult": connection.streams,
        "hc_sinkhorn_iters": connection.iterations,
        "hc_eps": connection.eps,
        "num_nextn_predict_layers": 0 if config.draft is None else 1,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": released_ids(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    if indexer is not None:
        values |= {
            "index_n_heads": indexer.num_heads,
            "index_head_dim": indexer.head_dim,
            "index_topk": indexer.top_k,
        }
    return values


def _write_rotary(rotary: RotaryPart, attention: Compressed) -> dict[str, Any]:
    if not isinstance(rotary, DefaultRotary | YarnRotary):
        raise ConfigError(f"deepseek_v4 has no {rotary.kind} rotary embeddings")
    values: dict[str, Any] = {
        "rope_type": rotary.kind,
        "rope_theta": rotary.theta,
        "partial_rotary_factor": attention.rotary_width / attention.head_dim,
    }
    if isinstance(rotary, YarnRotary):
        values |= {
            "factor": rotary.factor,
            "original_max_position_embeddings": rotary.original_positions,
            "beta_fast": rotary.beta_fast,
            "beta_slow": rotary.beta_slow,
            "attention_factor": rotary.scale(),
        }
    return values


ATTENTION = {
    "q_a_proj.weight": "q_a_proj.weight",
    "q_a_norm.weight": "q_a_norm.weight",
    "q_b_proj.weight": "q_b_proj.weight",
    "kv_proj.weight": "kv_proj.weight",
    "kv_norm.weight": "kv_norm.weight",
    "o_a_proj.weight": "o_a_proj.weight",
    "o_b_proj.weight": "o_b_proj.weight",
    "sinks": "sink",
}
COMPRESSOR = {
    "kv_proj.weight": "kv_proj.weight",
    "gate_proj.weight": "gate_proj.weight",
    "position_bias": "position_bias",
    "kv_norm.weight": "norm.weight",
}
INDEXER = {"q_b_proj.weight": "q_proj.weight", "scorer.weights_proj.weight": "weights_proj.weight"}
CONNECTION = {"fn": "weight", "base": "base", "scale": "scale"}
SHARED = ("gate_proj", "up_proj", "down_proj")


def placements(config: ModelConfig) -> Placements:
    """Under transformers' names, which `save_pretrained` writes; the draft block's are those of the official layout,
    as transformers has none."""
    names = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    if not config.tied_head:
        names["lm_head.weight"] = "head.weight"
    names |= {f"model.hc_head.hc_{theirs}": f"ends.{ours}" for theirs, ours in CONNECTION.items()}
    for index, layer in enumerate(config.layers):
        names |= _layer_names(layer, f"model.layers.{index}.", f"layers.{index}.")
    if config.draft is not None:
        names |= _layer_names(config.draft.layer, "mtp.0.", "draft_block.layer.")
        for theirs, ours in (
            ("enorm", "embedding_norm"),
            ("hnorm", "residual_norm"),
            ("e_proj", "embedding_proj"),
            ("h_proj", "residual_proj"),
            ("norm", "norm"),
        ):
            names[f"mtp.0.{theirs}.weight"] = f"draft_block.{ours}.weight"
        names |= {f"mtp.0.hc_head.hc_{theirs}": f"draft_block.ends.{ours}" for theirs, ours in CONNECTION.items()}
    return {theirs: Placement(ours) for theirs, ours in names.items()}


def _layer_names(layer: LayerConfig, theirs: str, ours: str) -> dict[str, str]:
    names = {
        "input_layernorm.weight": "attention_frame.input_norm.weight",
        "post_attention_layernorm.weight": "feed_forward_frame.input_norm.weight",
        "mlp.gate.weight": "feed_forward.router.proj.weight",
        "mlp.experts.gate_up_proj": "feed_forward.gate_up_proj",
        "mlp.experts.down_proj": "feed_forward.down_proj",
    }
    names |= {f"self_attn.{name}": f"attention.{own}" for name, own in ATTENTION.items()}
    attention, mixture = layer.attention, layer.feed_forward
    if isinstance(attention, Compressed) and attention.compressor is not None:
        names |= {f"self_attn.compressor.{name}": f"attention.compressor.{own}" for name, own in COMPRESSOR.items()}
        if attention.indexer is not None:
            indexer = {name: f"compressor.{own}" for name, own in COMPRESSOR.items()} | INDEXER
            names |= {
                f"self_attn.compressor.indexer.{name}": f"attention.indexer.{own}" for name, own in indexer.items()
            }
    hashed = isinstance(mixture, MixtureOfExperts) and isinstance(mixture.router, HashRouter)
    router = ("tid2eid", "table") if hashed else ("e_score_correction_bias", "selection_bias")
    names[f"mlp.gate.{router[0]}"] = f"feed_forward.router.{router[1]}"
    for name in SHARED:
        names[f"mlp.shared_experts.{name}.weight"] = f"feed_forward.shared_expert.{name}.weight"
    for block, frame in (("attn_hc", "attention_frame"), ("ffn_hc", "feed_forward_frame")):
        names |= {f"{block}.{name}": f"{frame}.connection.{own}" for name, own in CONNECTION.items()}
    return {theirs + name: ours + own for name, own in names.items()}


def single_experts(config: ModelConfig) -> Placements:
    """The official layout's experts, three tensors each: w1 is the gate, w3 up, w2 down."""
    layers = [(f"model.layers.{i}.", f"layers.{i}.", layer) for i, layer in enumerate(config.layers)]
    if config.draft is not None:
        layers.append(("mtp.0.", "draft_block.layer.", config.draft.layer))
    placed = {}
    for theirs, ours, layer in layers:
        if not isinstance(layer.feed_forward, MixtureOfExperts):
            continue
        width = layer.feed_forward.intermediate_size
        gate_up, down = f"{ours}feed_forward.gate_up_proj", f"{ours}feed_forward.down_proj"
        for expert in range(layer.feed_forward.num_experts):
            name = f"{theirs}mlp.experts.{expert}"
            placed[f"{name}.w1.weight"] = Placement(gate_up, expert, (0, width))
            placed[f"{name}.w3.weight"] = Placement(gate_up, expert, (width, 2 * width))
            placed[f"{name}.w2.weight"] = Placement(down, expert)
    return placed


# The official layout's names, as patterns, for transformers' ones; in this order. Trainers put them behind model.
OFFICIAL = [
    (r"^(?:model\.)?embed\.", "model.embed_tokens."),
    (r"^(?:model\.)?head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^(?:model\.)?hc_head_(\w+)$", r"model.hc_head.hc_\1"),
    (r"^(?:model\.)?mtp\.", "mtp."),
    (r"^mtp\.(\d+)\.hc_head_(\w+)$", r"mtp.\1.hc_head.hc_\2"),
    (r"^layers\.", "model.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(\w+)$", r".\1_hc.\2"),
    (r"\.self_attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    # transformers 5.23 saves the attention's own kv_norm under this name too.
    (r"(\.self_attn\.(?:compressor\.(?:indexer\.)?)?)norm\.", r"\1kv_norm."),
    (r"(\.self_attn\.compressor\.(?:indexer\.)?)ape$", r"\1position_bias"),
    (r"(\.self_attn\.compressor\.(?:indexer\.)?)wgate\.", r"\1gate_proj."),
    (r"\.self_attn\.attn_sink$", ".self_attn.sinks"),
    (r"\.self_attn\.wq_a\.", ".self_attn.q_a_proj."),
    (r"\.self_attn\.wq_b\.", ".self_attn.q_b_proj."),
    (r"\.self_attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"(\.self_attn\.(?:compressor\.(?:indexer\.)?)?)wkv\.", r"\1kv_proj."),
    (r"\.self_attn\.wo_a\.", ".self_attn.o_a_proj."),
    (r"\.self_attn\.wo_b\.", ".self_attn.o_b_proj."),
    (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
]


def spelling(names: Collection[str], config: ModelConfig) -> Callable[[str], str]:
    return canonical


def canonical(name: str) -> str:
    for official, current in OFFICIAL:
        name = re.sub(official, current, name)
    return name


def without_missing(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """transformers keeps the draft block in the config, and not its tensors."""
    if config.draft is None or any(_of_a_drafter(name) for name in names):
        return config
    return ModelConfig.from_dict(config.model_dump() | {"draft": None})


def scale_names(name: str) -> tuple[str, ...]:
    """Where the scales of a quantised weight stand: in the official layout, and in transformers'."""
    return (name.removesuffix("weight") + "scale", f"{name}_scale_inv") if name.endswith(".weight") else ()


def _of_a_drafter(name: str) -> bool:
    return re.match(r"(model\.)?mtp\.", name) is not None


def _drafter(name: str, config: ModelConfig) -> bool:
    """Of a drafter that this model's config does not describe: DSpark's, or a draft block it says it has not."""
    return config.draft is None and _of_a_drafter(name)


DRAFTER = "a drafter that is not multi-token prediction"

FAMILY = Family(
    name="deepseek_v4",
    model_types=("deepseek_v4",),
    keys=lambda values: KEYS,
    read_config=read_config,
    write_config=write_config,
    placements=placements,
    experts="n_routed_experts",
    alternatives=lambda config: [single_experts(config)],
    spelling=spelling,
    adapted=without_missing,
    scale_names=scale_names,
    skip_rules={DRAFTER: _drafter},
    noticed_rules=frozenset({DRAFTER}),
)
