"""A released model's real size with random weights: load time, resident memory, tokens a second.

    python benchmarks/real_size.py --folder /tmp/e2b            writes the checkpoint (9.3 GB) unless it is there
    python benchmarks/real_size.py --folder /tmp/e2b --json

The checkpoint is written shard by shard in the released layout, so this needs disk, not memory. Loading and
generating run in a process of their own, whose peak resident size is what the operating system counted. The
machine's read bandwidth is measured in the same run: a decoded token cannot take less time than reading its weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import kvell
from kvell.checkpoint import build_empty
from kvell.checkpoint.loading import TABLE
from kvell.checkpoint.reading import INDEX
from kvell.families import FAMILIES
from kvell.files import save_to

SHARD_BYTES = 1 << 30
POOL = 1 << 24

CHILD = """
import json, resource, sys, time
import torch, kvell
folder, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
start = time.perf_counter()
model = kvell.from_pretrained(folder)
loaded = time.perf_counter() - start
ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
stamps = [time.perf_counter()]
cache = model.make_cache()
for piece in kvell.generate(model, ids, max_new_tokens=new, cache=cache):
    stamps.append(time.perf_counter())
print(json.dumps({
    "load_seconds": loaded,
    "first_token_seconds": stamps[1] - stamps[0],
    "token_seconds": [b - a for a, b in zip(stamps[1:], stamps[2:])],
    "cache_bytes": cache.nbytes,
    "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "threads": torch.get_num_threads(),
}))
"""


def write_random_checkpoint(name: str, folder: Path) -> None:
    """A sharded bf16 checkpoint of a built-in model's shapes, config first, index last."""
    config = kvell.ModelConfig.from_pretrained(name)
    family = FAMILIES[config.family or ""]
    shapes = dict(build_empty(config, torch.bfloat16).named_tensors())
    pool = (torch.randn(POOL + 1, generator=torch.Generator().manual_seed(0)) * config.initializer_range).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.write_config(config), indent=2))
    shards: list[list[str]] = [[]]
    size = 0
    places = family.placements(config)
    for theirs, place in places.items():
        nbytes = place.of(shapes[place.parameter]).numel() * 2
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(theirs)
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for theirs in names:
            shape = places[theirs].of(shapes[places[theirs].parameter]).shape
            plain = theirs.endswith(("norm.weight", "layer_scalar"))
            count = shape.numel()
            values = pool[:POOL].repeat(-(-count // POOL))[:count].view(shape)
            tensors[theirs] = torch.ones(shape, dtype=torch.bfloat16) if plain else values
        save_to(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_bandwidth() -> float:
    """Bytes a second of summing 2 GiB, the median of five."""
    values = torch.ones(1 << 29)
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        values.sum()
        rates.append(values.nbytes / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def measure(name: str, folder: Path, prompt: int, new: int) -> dict[str, Any]:
    model = build_empty(kvell.ModelConfig.from_pretrained(name), torch.bfloat16)
    sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    weights = sum(sizes.values()) - sizes.get(TABLE, 0)
    bandwidth = read_bandwidth()
    child = [sys.executable, "-c", CHILD, str(folder), str(prompt), str(new)]
    result: dict[str, Any] = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
    seconds = statistics.median(result.pop("token_seconds"))
    return result | {
        "model": name,
        "prompt_tokens": prompt,
        "weight_bytes_without_per_layer_table": weights,
        "peak_over_weights": result["peak_resident_bytes"] / weights,
        "read_bandwidth": bandwidth,
        "decode_tokens_per_second": 1 / seconds,
        "bound_tokens_per_second": bandwidth / weights,
        "prefill_tokens_per_second": prompt / result["first_token_seconds"],
    }


def to_table(figures: dict[str, Any]) -> str:
    rows = {
        "model": figures["model"],
        "weights without the per-layer table": f"{figures['weight_bytes_without_per_layer_table'] / 1e9:.2f} GB",
        "peak resident": f"{figures['peak_resident_bytes'] / 1e9:.2f} GB ({figures['peak_over_weights']:.2f} x)",
        "load": f"{figures['load_seconds']:.1f} s",
        f"prefill of {figures['prompt_tokens']} tokens": f"{figures['prefill_tokens_per_second']:.1f} tokens/s",
        "decode": f"{figures['decode_tokens_per_second']:.2f} tokens/s",
        "read bandwidth of the machine": f"{figures['read_bandwidth'] / 1e9:.1f} GB/s",
        "decode bound (bandwidth / weights)": f"{figures['bound_tokens_per_second']:.2f} tokens/s",
        "threads": str(figures["threads"]),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be written")
    parser.add_argument("--model", default="gemma-4-e2b", help="a built-in config's name")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if not (options.folder / INDEX).is_file():
        write_random_checkpoint(options.model, options.folder)
    figures = measure(options.model, options.folder, options.prompt_tokens, options.new_tokens)
    print(json.dumps(figures, indent=2) if options.json else to_table(figures))


if __name__ == "__main__":
    main()
