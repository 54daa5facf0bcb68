"""Released architectures at toy sizes, computed by transformers: the independent implementation to agree with.

Configs are written in the released files' spelling. Files are written here, never by Kvell, so that reading them is
tested against what others write.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shape_checks import unchecked
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, LagunaConfig, LagunaForCausalLM, PreTrainedModel

import kvell

VOCAB = 97
PROMPT_LENGTH = 24
NEW_TOKENS = 64

SLIDING, FULL = "sliding_attention", "full_attention"

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
        if name.endswith("e_score_correction_bias"):
            normal(tensor, 0.2)
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


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_gradients_agree(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str]) -> None:
    """The named parameters' gradients (ours: theirs) differ by at most 1e-4 of the larger one's norm."""
    our_parameters, their_parameters = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for our_name, their_name in names.items():
        mine, other = our_parameters[our_name].grad, their_parameters[their_name].grad
        assert mine is not None, f"{our_name} has no gradient"
        assert other is not None, f"{their_name} has no gradient"
        assert other.norm() > 1e-5, f"{their_name}: a zero gradient proves nothing"
        assert (mine - other).norm() <= 1e-4 * other.norm(), our_name
