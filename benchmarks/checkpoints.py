"""The four families at 14 to 22 million parameters, as transformers builds and saves them.

Weights are random but not fresh: a fresh model's norms, scales and biases would hide what one side leaves out.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {"vocab_size": 4096, "hidden_size": 256, "max_position_embeddings": 1 << 20}

SMALL: dict[str, dict[str, Any]] = {
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 10,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 2,
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "sliding_window": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 128,
        "intermediate_size": 1024,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 4096,
    },
    "laguna": {
        "model_type": "laguna",
        "num_hidden_layers": 8,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 2,
        "sliding_window": 128,
        "num_attention_heads": 4,
        "num_attention_heads_per_layer": [4, 8, 8, 8] * 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "gating": True,
        "intermediate_size": 1024,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "mlp_layer_types": ["dense"] + ["sparse"] * 7,
        "rope_parameters": {
            FULL: {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 64.0,
                "beta_slow": 1.0,
                "partial_rotary_factor": 0.5,
                "attention_factor": 1.0,
            },
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "zaya": {
        "model_type": "zaya",
        "num_hidden_layers": 8,
        "layer_types": ["hybrid"] * 8,
        "sliding_window": None,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "cca_time0": 2,
        "cca_time1": 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
            for kind in ("hybrid", "hybrid_sliding")
        },
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 256,
        "router_hidden_size": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "deepseek_v4": {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 6,
        "compress_ratios": [0, 0, 4, 128, 4, 128],
        "sliding_window": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 64,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "num_hash_layers": 2,
        "hc_mult": 4,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def write_small(family: str, folder: Path, **changes: Any) -> Path:
    """Builds a family's small model in transformers, weights from a fixed seed, and saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(json.dumps(COMMON | SMALL[family] | changes))
    models: Any = AutoModelForCausalLM
    model = models.from_config(AutoConfig.for_model(**settings))
    randomise(model)
    model.save_pretrained(folder)
    if family == "zaya":
        # transformers computes zero where a token chooses to skip; released models were trained otherwise.
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"skip_expert": "zero"}))
    return folder


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> None:
    """Matrices keep the size of what they multiply, scales lie around one and biases around zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)

    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():  # the table of each token's experts, all different
            order = torch.rand(len(tensor), model.config.n_routed_experts, generator=generator).argsort(1)
            tensor.copy_(order[:, : tensor.shape[1]])
        elif name.endswith("balancing_biases"):
            # transformers 5.23 sets the last one to -1 whenever it loads a model.
            normal(tensor, 0.1)
            tensor.add_(-1 - tensor[-1])
        elif name.endswith(("bias", "sinks", "base")):
            normal(tensor, 0.1)
        elif tensor.dim() == 1:
            # Gemma 4 does not divide its scores by sqrt(head width); ZAYA1 starts with a temperature of zero.
            middle = 0.3 if name.endswith("q_norm.weight") and "gemma4" in model.config.model_type else 1.0
            tensor.copy_(middle * (0.8 + 0.4 * torch.rand(tensor.shape, generator=generator)))
        else:
            normal(tensor, tensor[0].numel() ** -0.5 if "embed" not in name else 0.05)
