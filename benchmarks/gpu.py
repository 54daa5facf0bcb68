"""Goal 3: kernels and decoding on one CUDA device; without one its goals stay open.

    python -m benchmarks.gpu

Bounds are measured in the same run: copying memory, and a bf16 matrix product. Beside Kvell run its references, the
references compiled by torch, and transformers on the same checkpoint.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import kvell
from benchmarks import machine
from benchmarks.checkpoints import write_small
from benchmarks.growth import config_of
from benchmarks.reporting import Goal, Section, seconds, table, write_results
from benchmarks.sides import sequence
from kvell import kernels

HIDDEN, STREAMS, ROWS = 4096, 4, 8192
OF_COPY, OVERHEAD = 0.70, 0.067
PREFILLED, DECODED_AT, BESIDE_TRANSFORMERS = 131072, 1 << 20, 8192
# deepseek_v4 of `checkpoints` at about 1.1 billion parameters.
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 18,
    "compress_ratios": [0, 0, *([4, 128] * 8)],
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "o_groups": 4,
    "o_lora_rank": 256,
    "index_topk": 512,
    "n_routed_experts": 16,
    "moe_intermediate_size": 1024,
}


def measured(work: Callable[[], Any], times: int = 10) -> float:
    """Median seconds, each time waiting for the device."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(perf_counter() - start)
    return statistics.median(taken)


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / measured(lambda: target.copy_(source))


def matmul_peak(size: int = 8192) -> float:
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / measured(lambda: left @ left)


def wide(technique: str) -> kvell.Decoder:
    """Two layers at a training width, plain or hyper-connected."""
    attention = {"kind": "grouped_query", "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    rotary = {"rotary": {"kind": "default", "theta": 10000.0}}
    layer = {"attention": attention | rotary, "feed_forward": {"kind": "gated_mlp", "intermediate_size": 4 * HIDDEN}}
    config = config_of(technique) | {"hidden_size": HIDDEN, "layers": [layer] * 2}
    return kvell.Decoder(kvell.ModelConfig(**config)).to("cuda", torch.bfloat16)


def measure_connection() -> dict[str, float]:
    """Seconds of a hyper-connection's read and write together, by version, and the bytes that must move."""
    layer: Any = wide("hyper-connections").layers[0]
    connection = layer.attention_frame.connection
    h = torch.randn(ROWS, STREAMS, HIDDEN, device="cuda", dtype=torch.bfloat16)

    @torch.no_grad()
    def both() -> Tensor:
        x, reading = connection.read(h)
        return connection.write(h, x, reading)

    found = {"bytes": float((3 * STREAMS + 2) * ROWS * HIDDEN * 2), "kvell": measured(both)}
    with kernels.use("reference"):
        found["reference"] = measured(both)
        found["reference, compiled"] = measured(torch.compile(both))
    return found


def measure_training() -> dict[str, float]:
    """Seconds of a training step's forward and backward, plain and hyper-connected."""
    found = {}
    for technique in ("plain", "hyper-connections"):
        model = wide(technique)
        tokens = sequence(0, 4096, model.config.vocab_size).cuda()

        def step(model: kvell.Decoder = model, tokens: Tensor = tokens) -> None:
            logits = model(tokens)
            torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).backward()
            model.zero_grad()

        found[technique] = measured(step)
        del model
    return found


@torch.inference_mode()
def measure_kvell(folder: Path) -> dict[str, float]:
    model = kvell.from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    found: dict[str, float] = {}
    for length in (BESIDE_TRANSFORMERS, PREFILLED, DECODED_AT):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cache, ids = model.make_cache(), sequence(0, length, model.config.vocab_size).cuda()
        start = perf_counter()
        model(ids, cache=cache, last_only=True)
        torch.cuda.synchronize()
        found[f"prefill at {length}"] = perf_counter() - start
        found[f"peak bytes at {length}"] = torch.cuda.max_memory_allocated()
        found[f"decode at {length}"] = measured(lambda c=cache, i=ids: model(i[:, -1:], cache=c, last_only=True), 30)  # type: ignore[misc]
    return found


@torch.inference_mode()
def measure_transformers(folder: Path) -> dict[str, float]:
    from transformers import AutoModelForCausalLM, DynamicCache

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).cuda().eval()
    cache: Any = DynamicCache(config=model.config)
    ids = sequence(0, BESIDE_TRANSFORMERS, model.config.vocab_size).cuda()
    start = perf_counter()
    for piece in ids.split(1024, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    prefill = perf_counter() - start
    decode = measured(lambda: model(ids[:, -1:], past_key_values=cache, logits_to_keep=1), 30)
    return {f"prefill at {BESIDE_TRANSFORMERS}": prefill, f"decode at {BESIDE_TRANSFORMERS}": decode}


def goals_of(found: dict[str, Any] | None) -> list[Goal]:
    reason = "" if found else "this machine has no CUDA device"
    of_copy = overhead = decode = prefill = compiled = None
    if found:
        connection, training = found["connection"], found["training"]
        of_copy = connection["bytes"] / connection["kvell"] / found["copy_bandwidth"]
        compiled = connection["reference, compiled"] / connection["kvell"]
        overhead = training["hyper-connections"] / training["plain"] - 1
        ours, theirs = found["kvell"], found["transformers"]
        decode, prefill = (
            theirs[f"{what} at {BESIDE_TRANSFORMERS}"] / ours[f"{what} at {BESIDE_TRANSFORMERS}"]
            for what in ("decode", "prefill")
        )
    return [
        Goal(3, "hyper-connection read and write, of copy bandwidth", of_copy, "at least", OF_COPY, "", reason),
        Goal(3, "hyper-connections' share of a training step", overhead, "at most", OVERHEAD, "", reason),
        Goal(3, "hyper-connection beside the compiled reference", compiled, "at least", 1.0, reason=reason),
        Goal(3, "V4-shaped decode beside transformers", decode, "at least", 1.0, reason=reason),
        Goal(3, "V4-shaped prefill beside transformers", prefill, "at least", 1.0, reason=reason),
    ]


def run() -> Section:
    title = "On a GPU"
    if not torch.cuda.is_available():
        return Section(title, [], goals_of(None), {}, ["Not measured: this machine has no CUDA device."])
    with tempfile.TemporaryDirectory() as name:
        folder = write_small("deepseek_v4", Path(name), **LARGE)
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "copy_bandwidth": copy_bandwidth(),
            "matmul_peak": matmul_peak(),
            "connection": measure_connection(),
            "training": measure_training(),
            "kvell": measure_kvell(folder),
            "transformers": measure_transformers(folder),
        }
    rows = [
        [f"{part}, {what}", f"{value / 1e9:.3g} GB" if "bytes" in what else seconds(value)]
        for part in ("connection", "training", "kvell", "transformers")
        for what, value in found[part].items()
    ]
    copying, products = found["copy_bandwidth"] / 1e9, found["matmul_peak"] / 1e12
    bounds = f"Copying {copying:.0f} GB/s, bf16 products {products:.0f} TFLOP/s."
    return Section(title, [table(["", found["device"]], rows)], goals_of(found), found, [bounds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    section = run()
    write_results(options.results, "gpu", [section], machine.describe(torch.get_num_threads()))
    print(section.markdown())


if __name__ == "__main__":
    main()
