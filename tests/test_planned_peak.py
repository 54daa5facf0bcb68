"""The estimate of a prefill's memory against what a fresh process really needs for it.

The estimate (planning/peak.py) is about Kvell's own kernels on a CPU: when they change it must be calibrated again.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

SLIDING, FULL = "sliding_attention", "full_attention"

# Small models of each family's shape: every kind of layer, some 15 to 40 M parameters.
SMALL: dict[str, dict[str, Any]] = {
    "gemma4": {
        "model_type": "gemma4_text",
        "vocab_size": 8192,
        "vocab_size_per_layer_input": 8192,
        "hidden_size": 512,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 128,
        "num_kv_shared_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    "laguna": {
        "model_type": "laguna",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_attention_heads_per_layer": [6, 8, 8, 8],
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING],
        "sliding_window": 512,
        "gating": True,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "moe_routed_scaling_factor": 2.5,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "max_position_embeddings": 32768,
    },
    "zaya": {
        "model_type": "zaya",
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "cca_time0": 2,
        "cca_time1": 2,
        "layer_types": ["hybrid"] * 4,
        "rope_parameters": {
            "hybrid": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "hybrid_sliding": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 512,
        "router_hidden_size": 64,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "deepseek_v4": {
        "model_type": "deepseek_v4",
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 128,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 64,
        "index_n_heads": 8,
        "index_head_dim": 64,
        "index_topk": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "compress_ratios": [0, 4, 128, 4],
        "num_hash_layers": 2,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 32768,
    },
}

# What the process has before there is a model is no part of the plan: libraries, and what they keep after first use.
MEASURE = """
import ctypes, json, sys, torch, kvell
from kvell.families import parse_config
torch.set_num_threads(1)
released, length, batch_size = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def resident(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))

def prefill(config, length, batch_size):
    model = kvell.Decoder(config).eval()
    with torch.no_grad():
        tokens = torch.randint(0, config.vocab_size, (batch_size, length))
        model(tokens, cache=model.make_cache(batch_size, max_length=length), last_only=True)

tiny = {"vocab_size": 64, "hidden_size": 64}
if "vocab_size_per_layer_input" in released:
    tiny["vocab_size_per_layer_input"] = 64
prefill(parse_config(released | tiny), 300, 1)
ctypes.CDLL(None).malloc_trim(0)  # what the tiny model left free would be counted as there and used again
base = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
config = parse_config(released)
prefill(config, length, batch_size)
print(resident("VmHWM") - base, kvell.plan(config, length, batch_size, "float32").peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("family", "length", "batch_size"),
    [(family, *shape) for family in SMALL for shape in ((4096, 1), (16384, 1), (4096, 4))]
    + [("deepseek_v4", 4096, 16)],  # whose attention makes most of what it sees
)
def test_a_prefill_needs_what_was_planned(family: str, length: int, batch_size: int) -> None:
    arguments = [sys.executable, "-c", MEASURE, json.dumps(SMALL[family]), str(length), str(batch_size)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    measured, planned = (int(number) for number in done.stdout.split())
    assert planned == pytest.approx(measured, rel=0.15)
