"""Released architectures at toy sizes, computed by transformers: the independent implementation to agree with.

Configs are written in the released files' spelling. Files are written here, never by Kvell, so that reading them is
tested against what others write.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shape_checks import unchecked
from torch import Tensor, nn
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LagunaConfig,
    LagunaForCausalLM,
    PreTrainedModel,
    ZayaConfig,
    ZayaForCausalLM,
)
from transformers.models.zaya.modeling_zaya import ZayaRouter

import kvell
from kvell.families import FAMILIES

VOCAB = 97
PROMPT_LENGTH = 24
NEW_TOKENS = 64

SLIDING, FULL = "sliding_attention", "full_attention"
SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"

GEMMA4 = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "sliding_window": 5,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 256,
}

LAGUNA = {
    "model_type": "laguna",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_attention_heads_per_layer": [6, 8, 8, 8],
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": [FULL, SLIDING, SLIDING, SLIDING],
    "sliding_window": 5,
    "gating": True,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "moe_routed_scaling_factor": 2.5,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "max_position_embeddings": 4096,
    "eos_token_id": [2, 24],
    "bos_token_id": 2,
    "pad_token_id": 9,
}

DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 12,
    "o_groups": 2,
    "o_lora_rank": 6,
    # With few heads relu leaves many scores exactly zero, and transformers does not say which of them it picks.
    "index_n_heads": 16,
    "index_head_dim": 8,
    "index_topk": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "swiglu_limit": 1.0,
    "num_hash_layers": 2,
    "sliding_window": 16,
    "compress_ratios": [0, 4, 128, 4, 0],
    "rope_theta": 100.0,
    "compress_rope_theta": 1600.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1024,
    "hc_mult": 4,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# Half as wide in attention as in the residual. `skip_expert` is Kvell's own field: transformers computes zero there.
ZAYA = {
    "model_type": "zaya",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "cca_time0": 2,
    "cca_time1": 2,
    "layer_types": ["hybrid"] * 4,
    "sliding_window": None,
    "rope_parameters": {
        "hybrid": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "hybrid_sliding": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    },
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
    "router_hidden_size": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "skip_expert": "zero",
}


def yarn(**fields: Any) -> dict[str, Any]:
    """`rope_parameters` as Laguna has them: YaRN on full layers, plain on sliding ones."""
    full = {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 64.0,
        "beta_slow": 1.0,
        "partial_rotary_factor": 0.5,
    }
    sliding = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return {FULL: full | fields, SLIDING: sliding}


def gemma4(fields: Mapping[str, Any], seed: int = 0) -> Gemma4ForCausalLM:
    return _randomised(Gemma4ForCausalLM(Gemma4TextConfig(**_settings(fields))), seed)


def laguna(fields: Mapping[str, Any], seed: int = 0) -> LagunaForCausalLM:
    return _randomised(LagunaForCausalLM(LagunaConfig(**_settings(fields))), seed)


def deepseek_v4(fields: Mapping[str, Any], seed: int = 0) -> DeepseekV4ForCausalLM:
    return _randomised(DeepseekV4ForCausalLM(DeepseekV4Config(**_settings(fields))), seed)


def zaya(fields: Mapping[str, Any], seed: int = 0) -> ZayaForCausalLM:
    settings = {name: value for name, value in _settings(fields).items() if name != "skip_expert"}
    return _randomised(ZayaForCausalLM(ZayaConfig(**settings)), seed)


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy (transformers edits the lists it is given) without what is no setting."""
    return json.loads(json.dumps({name: value for name, value in fields.items() if name != "model_type"}))


@torch.no_grad()
def _randomised(model: Any, seed: int) -> Any:
    """Every weight random, norms, scales and biases included: fresh ones and zeros would hide what is left out.

    Matrices keep the size of what they multiply, and the last norm raises the logits to between 1 and 10. Embeddings
    stay small beside what the layers add: a tied head would otherwise only repeat the last token.
    """
    generator = torch.Generator().manual_seed(seed)
    sharp = model.config.model_type == "gemma4_text"  # its attention does not divide scores by sqrt(head width)

    def normal(tensor: Tensor, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)

    def around(tensor: Tensor, middle: float) -> None:
        tensor.copy_(middle * (0.6 + 0.8 * torch.rand(tensor.shape, generator=generator)))

    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():  # a table of each token id's experts, all different
            order = torch.rand(len(tensor), model.config.n_routed_experts, generator=generator).argsort(1)
            tensor.copy_(order[:, : tensor.shape[1]])
        elif name.endswith("e_score_correction_bias"):
            normal(tensor, 0.2)
        elif name.endswith("balancing_biases"):
            # transformers 5.23 sets the last one, the skip expert's, to -1 whenever it loads a model: so it is -1
            # here. The others are near -1 too, or no token would ever choose to skip.
            normal(tensor, 0.1)
            tensor.add_(-1 - tensor[-1])
        elif name.endswith("qk_norm.temp"):
            around(tensor, 3.0)
        elif "conv_qk" in name and name.endswith("weight"):
            normal(tensor, tensor[0].numel() ** -0.5)
        elif name.endswith("router_mlp.out_proj.weight"):
            normal(tensor, 4.0 * tensor.shape[-1] ** -0.5)
        elif name.endswith(("hidden_states_bias", "residual_bias")):
            normal(tensor, 0.2 * model.config.hidden_size**-0.5)
        elif name.endswith(("sinks", "position_bias", "base")):
            normal(tensor, 0.5)
        elif name.endswith(".bias"):
            normal(tensor, 0.3)
        elif tensor.dim() == 1:
            around(tensor, 3.0 if name == "model.norm.weight" else 0.3 if sharp and "q_norm" in name else 1.0)
        elif name == "model.embed_tokens.weight":
            normal(tensor, 0.4 * model.config.hidden_size**-0.5)
        elif name == "lm_head.weight":
            normal(tensor, 0.7 * model.config.hidden_size**-0.5)
        elif name == "model.embed_tokens_per_layer.weight":
            normal(tensor, model.config.hidden_size_per_layer_input**-0.5)
        else:
            normal(tensor, tensor.shape[-1] ** -0.5)
    return model.eval()


def prompt(length: int = PROMPT_LENGTH, seed: int = 0) -> Tensor:
    """(1, length); without token 0, whose embedding transformers does not train where it means padding."""
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: PreTrainedModel, tokens: Tensor, **arguments: Any) -> Any:
    # Asking for hidden states turns off a shortcut of transformers that fails where layers share keys and there
    # are no per-layer embeddings.
    return model(tokens, output_hidden_states=True, **arguments)


def logits_without_cache(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(1, T, V)"""
    return logits_of(model, tokens, use_cache=False).logits


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: Tensor, new_tokens: int = NEW_TOKENS) -> tuple[list[int], Tensor]:
    """The most probable tokens one by one with transformers' cache, and the logits (new, V) they came from."""
    outputs = logits_of(model, tokens, use_cache=True)
    chosen, logits = [], []
    while True:
        logits.append(outputs.logits[0, -1])
        chosen.append(int(logits[-1].argmax()))
        if len(chosen) == new_tokens:
            return chosen, torch.stack(logits)
        step = torch.tensor([chosen[-1:]])
        outputs = logits_of(model, step, use_cache=True, past_key_values=outputs.past_key_values)


@torch.no_grad()
def greedy_without_cache(
    model: PreTrainedModel, tokens: Tensor, new_tokens: int = NEW_TOKENS
) -> tuple[list[int], Tensor]:
    """The same with the whole sequence computed anew for every token."""
    logits = []
    for _ in range(new_tokens):
        logits.append(logits_without_cache(model, tokens)[0, -1])
        tokens = torch.cat([tokens, logits[-1].argmax()[None, None]], dim=1)
    return tokens[0, -new_tokens:].tolist(), torch.stack(logits)


@unchecked()
def greedy_with_kvell(model: kvell.Decoder, tokens: Tensor, new_tokens: int = NEW_TOKENS) -> tuple[list[int], Tensor]:
    """The same with Kvell's model and cache."""
    cache = model.make_cache()
    last = model(tokens, cache=cache, last_only=True)[0, -1]
    chosen, logits = [], []
    while True:
        logits.append(last)
        chosen.append(int(last.argmax()))
        if len(chosen) == new_tokens:
            return chosen, torch.stack(logits)
        last = model(torch.tensor([chosen[-1:]]), cache=cache)[0, -1]


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def gemma4_tensors(model: Gemma4ForCausalLM, prefix: str = "model.") -> dict[str, Tensor]:
    """The decoder's tensors under a prefix; the head only where it is not tied."""
    tensors = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.")
    }
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.state_dict()["lm_head.weight"]
    return tensors


def laguna_tensors(
    model: LagunaForCausalLM,
    *,
    fused_experts: bool = False,
    shared_expert: str = "shared_expert",
    bias_owner: str = "experts",
) -> dict[str, Tensor]:
    """The tensors as released files have them; the arguments choose among the spellings that are met."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = name.replace(".mlp.shared_experts.", f".mlp.{shared_expert}.")
        name = name.replace(".mlp.gate.e_score_correction_bias", f".mlp.{bias_owner}.e_score_correction_bias")
        parts = {name: tensor}
        if not fused_experts and name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            owner, _, kind = name.rpartition(".")
            parts = {}
            for expert, matrix in enumerate(tensor):
                if kind == "down_proj":
                    parts[f"{owner}.{expert}.down_proj.weight"] = matrix
                else:
                    gate, up = matrix.chunk(2)
                    parts |= {f"{owner}.{expert}.gate_proj.weight": gate, f"{owner}.{expert}.up_proj.weight": up}
        tensors |= parts
    return tensors


def deepseek_v4_tensors(model: DeepseekV4ForCausalLM) -> dict[str, Tensor]:
    """The tensors under transformers' own names; the head only where it is not tied."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


# transformers' names within a layer -> those of the released files.
OFFICIAL_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"{block}_hc.{part}": f"hc_{block}_{part}" for block in ("attn", "ffn") for part in ("fn", "base", "scale")},
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}


def official_layer(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A DeepseekV4DecoderLayer's tensors under a prefix, as released files name them: experts one by one."""
    tensors = {}
    for name, tensor in layer.state_dict().items():
        if name == "mlp.experts.gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                tensors[f"{prefix}ffn.experts.{expert}.w1.weight"] = gate
                tensors[f"{prefix}ffn.experts.{expert}.w3.weight"] = up
        elif name == "mlp.experts.down_proj":
            tensors |= {f"{prefix}ffn.experts.{expert}.w2.weight": down for expert, down in enumerate(tensor)}
        else:
            tensors[prefix + OFFICIAL_NAMES[name]] = tensor
    return tensors


# transformers' names within a layer -> Kvell's.
OUR_NAMES = {
    "input_layernorm.weight": "attention_frame.input_norm.weight",
    "post_attention_layernorm.weight": "feed_forward_frame.input_norm.weight",
    **{
        f"{block}_hc.{theirs}": f"{frame}_frame.connection.{ours}"
        for block, frame in (("attn", "attention"), ("ffn", "feed_forward"))
        for theirs, ours in (("fn", "weight"), ("base", "base"), ("scale", "scale"))
    },
    **{
        f"self_attn.{part}.weight": f"attention.{part}.weight"
        for part in ("q_a_proj", "q_a_norm", "q_b_proj", "kv_proj", "kv_norm", "o_a_proj", "o_b_proj")
    },
    "self_attn.sinks": "attention.sink",
    **{
        f"self_attn.compressor.{theirs}{part}": f"attention.{ours}{own}"
        for theirs, ours in (("", "compressor."), ("indexer.", "indexer.compressor."))
        for part, own in (
            ("kv_proj.weight", "kv_proj.weight"),
            ("gate_proj.weight", "gate_proj.weight"),
            ("position_bias", "position_bias"),
            ("kv_norm.weight", "norm.weight"),
        )
    },
    "self_attn.compressor.indexer.q_b_proj.weight": "attention.indexer.q_proj.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attention.indexer.weights_proj.weight",
    "mlp.gate.weight": "feed_forward.router.proj.weight",
    "mlp.gate.tid2eid": "feed_forward.router.table",
    "mlp.gate.e_score_correction_bias": "feed_forward.router.selection_bias",
    "mlp.experts.gate_up_proj": "feed_forward.gate_up_proj",
    "mlp.experts.down_proj": "feed_forward.down_proj",
    **{
        f"mlp.shared_experts.{part}.weight": f"feed_forward.shared_expert.{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj")
    },
}


def our_deepseek_v4_names(model: DeepseekV4ForCausalLM) -> dict[str, str]:
    """Kvell's names of all the model's tensors: transformers'."""
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not model.config.tie_word_embeddings:
        names["head.weight"] = "lm_head.weight"
    for ours, theirs in (("weight", "fn"), ("base", "base"), ("scale", "scale")):
        names[f"ends.{ours}"] = f"model.hc_head.hc_{theirs}"
    for index, layer in enumerate(model.model.layers):
        for name in layer.state_dict():
            names[f"layers.{index}.{OUR_NAMES[name]}"] = f"model.layers.{index}.{name}"
    return names


# transformers' names within a layer -> Kvell's, or how both begin.
OUR_ZAYA_NAMES = {
    "input_layernorm.": "attention_frame.input_norm.",
    **{f"self_attn.qkv_proj.{part}.": f"attention.{part}." for part in ("q_proj", "k_proj")},
    **{f"self_attn.qkv_proj.{part}.": f"attention.{part}." for part in ("v_proj_current", "v_proj_delayed")},
    **{f"self_attn.qkv_proj.conv_qk_{part}.": f"attention.conv_{part}." for part in ("depthwise", "grouped")},
    "self_attn.qk_norm.temp": "attention.temperature",
    "self_attn.o_proj.": "attention.o_proj.",
    "post_attention_layernorm.": "feed_forward_frame.input_norm.",
    "mlp.gate.router_mlp.": "feed_forward.router.",
    "mlp.gate.down_proj.": "feed_forward.router.down_proj.",
    "mlp.gate.router_states_scale": "feed_forward.router.state_scale",
    "mlp.gate.balancing_biases": "feed_forward.router.selection_bias",
    "mlp.experts.": "feed_forward.",
    **{
        f"{theirs}_residual_scale.{part}": f"{frame}_frame.connection.{part.replace('hidden_states', 'output')}"
        for theirs, frame in (("post_attention", "attention"), ("post_mlp", "feed_forward"))
        for part in ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")
    },
}


def our_zaya_names(model: ZayaForCausalLM) -> dict[str, str]:
    """Kvell's names of all the model's tensors: transformers'."""
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "ends.scale": "model.input_hidden_states_scale",
        "ends.bias": "model.input_hidden_states_bias",
    }
    if not model.config.tie_word_embeddings:
        names["head.weight"] = "lm_head.weight"
    for index, layer in enumerate(model.model.layers):
        for name in layer.state_dict():
            theirs = next(beginning for beginning in OUR_ZAYA_NAMES if name.startswith(beginning))
            ours = OUR_ZAYA_NAMES[theirs] + name.removeprefix(theirs)
            names[f"layers.{index}.{ours}"] = f"model.layers.{index}.{name}"
    return names


def zaya_tensors(model: ZayaForCausalLM) -> dict[str, Tensor]:
    """The tensors under transformers' names; the head only where it is not tied."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@contextmanager
def zaya_choices(model: ZayaForCausalLM) -> Iterator[dict[int, list[Tensor]]]:
    """The routers' choices, by layer, while the context is open: for each token its class, E being the skip expert.

    AssertionError where two classes are so close that a rounding error could turn the choice: nothing could be
    compared there.
    """
    chosen: dict[int, list[Tensor]] = {}
    gaps: list[float] = []

    def look(router: ZayaRouter, inputs: Any, output: tuple[Tensor, ...]) -> None:
        best = (output[0].detach().softmax(-1) + router.balancing_biases).topk(2)
        gaps.append(float((best.values[:, 0] - best.values[:, 1]).min()))
        chosen.setdefault(router.layer_idx, []).append(best.indices[:, 0])

    hooks = [layer.mlp.gate.register_forward_hook(look) for layer in model.model.layers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
    assert min(gaps) > 2e-6, f"take another seed: classes {min(gaps):.0e} apart"


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def learnt_names(ours: kvell.Decoder, theirs: PreTrainedModel) -> dict[str, str]:
    """Kvell's names of all the parameters that learn: transformers', paired as where the family's files are read."""
    family = FAMILIES[ours.config.family or ""]
    layouts = [family.placements(ours.config), *family.alternatives(ours.config)]
    known = {name: place for layout in layouts for name, place in layout.items()}
    their_names = [name for name, _ in theirs.named_parameters()]
    canonical = family.spelling(their_names, ours.config)
    names = {known[canonical(name)].parameter: name for name in their_names}
    return {name: names[name] for name, parameter in ours.named_parameters() if parameter.requires_grad}


def assert_gradients_agree(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str]) -> None:
    """The named parameters' gradients (ours: theirs) differ by at most 1e-4 of theirs, and 1e-6 of the
    steepest one: a few numbers are sums in which almost all cancels out."""
    our_parameters, their_parameters = dict(ours.named_parameters()), dict(theirs.named_parameters())
    gradients = [their_parameters[name].grad for name in names.values()]
    steepest = max(gradient.norm() for gradient in gradients if gradient is not None)
    for our_name, their_name in names.items():
        mine, other = our_parameters[our_name].grad, their_parameters[their_name].grad
        assert mine is not None, f"{our_name} has no gradient"
        assert other is not None, f"{their_name} has no gradient"
        assert other.norm() > 1e-5, f"{their_name}: a zero gradient proves nothing"
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-6 * steepest, our_name
