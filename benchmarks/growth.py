"""Goal 4: what each technique costs as the context grows, and goal 1's claims about decoding in a long one.

    python -m benchmarks.growth                  1K ... 1M tokens
    python -m benchmarks.growth --quick          one technique up to 8K
    python -m benchmarks.growth --techniques windows csa --longest 131072 --budget 120

Four layers of the same width, with one technique each, beside plain grouped-query attention and all techniques
together, compiled. One sequence grows: prefill time at n tokens is the sum of the pieces up to n, decode the median
of the tokens after it. Prompts grow as far as the time budget lets each technique go; beyond that tokens are decoded
behind random rows. The fitted exponent k says that a figure grows as n^k, by least squares over the longer half. What
the planner says of FLOPs and bytes stands beside what was measured.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kvell
from benchmarks import machine
from benchmarks.processes import WorkerError, workers
from benchmarks.reporting import Goal, Section, flops, mebibytes, median, seconds, table, write_results

SHORTEST, LONGEST, QUICK_LONGEST = 1024, 1 << 20, 8192
BUDGET, QUICK_BUDGET = 30.0, 4.0
DECODED, SKIPPED = 18, 2
# Goal 1 compares decoding at these two lengths.
NEAR, FAR = 4096, 131072
FLATNESS = {"windows": 1.1, "hca": 1.5, "csa": 1.5}

ROTARY = {"kind": "default", "theta": 10000.0}
FEED_FORWARD = {"kind": "gated_mlp", "intermediate_size": 768}
PLAIN = {"kind": "grouped_query", "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "rotary": ROTARY}
CCA = PLAIN | {"kind": "convolutional"}
HCA = {
    "kind": "compressed",
    "num_heads": 8,
    "head_dim": 32,
    "sliding_window": 128,
    "rotary": ROTARY,
    "rotary_width": 16,
    "query_rank": 128,
    "output_groups": 2,
    "output_rank": 64,
    "compressor": {"ratio": 128},
}
CSA = HCA | {
    "compressor": {"ratio": 4, "overlap": True},
    "indexer": {"num_heads": 4, "head_dim": 32, "top_k": 64},
}
WINDOW = PLAIN | {"sliding_window": 128}
HYPER, PER_LAYER = {"connection": {"kind": "hyper", "streams": 4}}, {"per_layer_embedding": {"width": 16}}
NARROW = CCA | {"num_heads": 12, "sliding_window": 128}
BUDGETED = [PLAIN | {"num_heads": 12, "sliding_window": 128}] * 3 + [PLAIN | {"num_heads": 4}]

# A technique's attention, layer by layer, and what its config has besides.
TECHNIQUES: dict[str, tuple[Sequence[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([PLAIN] * 4, {}),
    "windows": ([WINDOW] * 4, {}),
    "shared KV": ([PLAIN] * 2 + [PLAIN | {"kv_source": 0}, PLAIN | {"kv_source": 1}], {}),
    "cca": ([CCA] * 4, {}),
    "hca": ([HCA] * 4, {}),
    "csa": ([CSA] * 4, {}),
    "hyper-connections": ([PLAIN] * 4, HYPER),
    "per-layer embeddings": ([PLAIN] * 4, PER_LAYER),
    "head budgets": (BUDGETED, {}),
    "all together": ([NARROW, HCA, CSA, HCA | {"kv_source": 1}], HYPER | PER_LAYER),
}

QUICK_TECHNIQUES = ("csa",)


def config_of(technique: str) -> dict[str, Any]:
    layers, besides = TECHNIQUES[technique]
    return {
        "model_type": "kvell",
        "vocab_size": 4096,
        "hidden_size": 256,
        "max_positions": 1 << 21,
        "tied_head": True,
        "layers": [{"attention": attention, "feed_forward": FEED_FORWARD} for attention in layers],
        **besides,
    }


def lengths(longest: int) -> list[int]:
    return [SHORTEST << power for power in range(int(math.log2(longest / SHORTEST)) + 1)]


def measure(technique: str, longest: int, budget: float, threads: int) -> dict[str, dict[str, float]]:
    """Figures by context; those of prompts up to the last one that the budget, in seconds, allows."""
    with tempfile.TemporaryDirectory() as folder, workers([("fresh kvell", "default")], threads) as sides:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config_of(technique)))
        worker = sides["fresh kvell", "default"]
        worker.call("load", folder=str(path))
        found: dict[str, dict[str, float]] = {}
        spent, pieces, reading = 0.0, [0.0], True
        for length in lengths(longest):
            growth = min(max(pieces[-1] / pieces[-2], 2.0), 4.0) if len(pieces) > 3 else 4.0
            reading = reading and spent + pieces[-1] * growth <= budget
            if reading:
                figures = worker.call("extend", tokens=length)
                spent += figures["seconds"]
                pieces.append(figures["seconds"])
                of_prompt = {"prefill": spent, "peak_bytes": figures["peak_bytes"]}
            else:
                of_prompt = {}
                figures = worker.call("remember", tokens=length)
            decoded = median(worker.call("decode", tokens=DECODED)[SKIPPED:])
            found[str(length)] = of_prompt | {"decode": decoded, "cache_bytes": figures["cache_bytes"]}
        return found


def planned(technique: str, longest: int) -> dict[str, dict[str, float]]:
    """What the planner says of the same lengths."""
    found = {}
    for length in lengths(longest):
        plan = kvell.plan(kvell.ModelConfig.from_dict(config_of(technique)), length, dtype="float32")
        found[str(length)] = {
            "prefill_flops": float(sum(plan.prefill_flops.values())),
            "decode_flops": float(plan.flops_per_token),
            "read_bytes": float(plan.read_bytes),
            "cache_bytes": float(plan.cache_bytes),
        }
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The k of y ~ n^k by least squares over the logarithms of the longer half of the points; None below two."""
    kept = sorted((math.log(n), math.log(y)) for n, y in points if n > 0 and y > 0)
    kept = kept[-max(2, math.ceil(len(kept) / 2)) :]
    if len(kept) < 2:
        return None
    middle_x, middle_y = (sum(values) / len(kept) for values in zip(*kept, strict=True))
    across = sum((x - middle_x) ** 2 for x, _ in kept)
    return sum((x - middle_x) * (y - middle_y) for x, y in kept) / across


def exponents(found: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Of every figure that was found."""
    whats = next(iter(found.values()), {})
    return {
        what: exponent([(int(n), figures[what]) for n, figures in found.items() if what in figures]) for what in whats
    }


def flatness_goals(
    results: dict[str, dict[str, dict[str, float]]], plans: dict[str, dict[str, dict[str, float]]]
) -> list[Goal]:
    goals = []
    for technique, limit in FLATNESS.items():
        near, far = (results.get(technique, {}).get(str(length)) for length in (NEAR, FAR))
        name = f"decode of {technique} layers, 128K over 4K"
        if near is None or far is None:
            goals.append(Goal(1, name, None, "at most", limit, reason="128K was not measured"))
            continue
        read = [plans[technique][str(length)]["read_bytes"] for length in (NEAR, FAR)]
        why = f"the bytes it reads grow {read[1] / read[0]:.2f} x"
        goals.append(Goal(1, name, far["decode"] / near["decode"], "at most", limit, reason=why))
    return goals


def tables_of(
    results: dict[str, dict[str, dict[str, float]]], plans: dict[str, dict[str, dict[str, float]]]
) -> list[str]:
    """A table for each figure, measured and planned; the last column is the fitted exponent."""
    shown: list[tuple[str, str, Callable[[float], str], dict[str, dict[str, dict[str, float]]]]] = [
        ("Prefill time", "prefill", seconds, results),
        ("Planned FLOPs of a prefill", "prefill_flops", flops, plans),
        ("Decode time of a token", "decode", seconds, results),
        ("Planned FLOPs of a decoded token", "decode_flops", flops, plans),
        ("Planned bytes read for a decoded token", "read_bytes", mebibytes, plans),
        ("Cache", "cache_bytes", mebibytes, results),
        ("Planned cache", "cache_bytes", mebibytes, plans),
        ("Peak memory above the weights", "peak_bytes", mebibytes, results),
    ]
    return [f"{title}:\n\n{_table_of(what, write, figures)}" for title, what, write, figures in shown]


def _table_of(what: str, write: Callable[[float], str], by_technique: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = sorted({int(n) for found in by_technique.values() for n, figures in found.items() if what in figures})
    rows = []
    for technique, found in by_technique.items():
        cells = [write(found[str(n)][what]) if what in found.get(str(n), {}) else "" for n in columns]
        fitted = exponents(found)[what]
        rows.append([technique, *cells, "-" if fitted is None else f"{fitted:.2f}"])
    header = ["", *(f"{n // 1024}K" if n < 1 << 20 else "1M" for n in columns), "exponent"]
    return table(header, rows)


def cache_goal(
    results: dict[str, dict[str, dict[str, float]]], plans: dict[str, dict[str, dict[str, float]]]
) -> Goal:
    """How many caches of prompts hold just what was planned."""
    held = [
        (figures["cache_bytes"], plans[name][n]["cache_bytes"])
        for name, found in results.items()
        for n, figures in found.items()
        if "prefill" in figures
    ]
    right = sum(measured == said for measured, said in held)
    return Goal(4, "caches as planned to the byte", right, "at least", len(held), f"of {len(held)}")


def run(techniques: Sequence[str], *, longest: int, budget: float, threads: int = 2) -> Section:
    results: dict[str, dict[str, dict[str, float]]] = {}
    notes = ["Tokens are decoded behind prompts for which there is a prefill time, else behind random rows."]
    for technique in techniques:
        try:
            results[technique] = measure(technique, longest, budget, threads)
        except WorkerError as error:
            notes.append(f"{technique} failed: {error}")
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        read = [n for n, figures in results[technique].items() if "prefill" in figures]
        print(f"{technique}: a prompt of up to {read[-1]} tokens", file=sys.stderr, flush=True)
    plans = {technique: planned(technique, longest) for technique in results}
    goals = flatness_goals(results, plans)
    goals.append(Goal(4, "techniques measured", len(results), "at least", len(techniques), "techniques"))
    goals.append(cache_goal(results, plans))
    figures = {
        name: {"contexts": found, "exponents": exponents(found), "planned": plans[name]}
        for name, found in results.items()
    }
    return Section("Cost by growth", tables_of(results, plans), goals, figures, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--budget", type=float, help="seconds of prefill a technique")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    section = run(
        options.techniques or (QUICK_TECHNIQUES if options.quick else list(TECHNIQUES)),
        longest=options.longest or (QUICK_LONGEST if options.quick else LONGEST),
        budget=(QUICK_BUDGET if options.quick else BUDGET) if options.budget is None else options.budget,
        threads=options.threads,
    )
    write_results(options.results, "growth", [section], machine.describe(options.threads))
    print(section.markdown())


if __name__ == "__main__":
    main()
