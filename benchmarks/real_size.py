"""Goal 2: Gemma 4 E2B's shape with random bf16 weights, against what the machine allows and beside transformers.

    python -m benchmarks.real_size --folder /tmp/e2b           writes the checkpoint (9.3 GB) unless it is there
    python -m benchmarks.real_size --quick                     ten of the 35 layers, in a temporary folder
    python -m benchmarks.real_size --llama-cpp                 llama.cpp too, where llama-cpp-python is installed

The sides take turns, each in a new process, as two such models do not fit into memory together. Read bandwidth and
the fp32 matrix product's peak are measured before every turn. A decoded token cannot take less time than reading the
weights and the cache; a prefill cannot be faster than its multiplications at the peak. Only those that the last
token's logits need are counted: behind the last layer with keys and values of its own, one token's.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import kvell
from benchmarks import llama_cpp, machine
from benchmarks.processes import WorkerError, workers
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.reporting import Goal, Section, median, ratio, seconds, table, write_results
from kvell.checkpoint import build_empty
from kvell.checkpoint.loading import TABLE

MODEL, QUICK_LAYERS = "gemma-4-e2b", 10
PROMPTS = (64, 512)
# Of each prompt's prefills the first is not counted: a kernel's first call for a shape makes it.
ROUNDS, PREFILLS, DECODED = 2, 4, 12
OF_BANDWIDTH, OF_PEAK = 0.85, 0.60
DECODE_GAIN, PREFILL_GAIN, LLAMA_DECODE = 1.2, 3.0, 0.97
# Random weights in bf16: two orders of adding up move logits, but not where they point.
LEAST_COSINE = 0.99


def work_of(config: kvell.ModelConfig) -> dict[str, int]:
    """Bytes of weights a token reads, and a prompt's multiplications: `each` token's, and those of the last alone."""
    sizes = {name: tensor for name, tensor in build_empty(config, torch.bfloat16).named_parameters() if name != TABLE}
    last_writer = max(layer for layer, _ in config.streams())
    each = 0
    for name, tensor in sizes.items():
        part, _, rest = name.partition(".")
        if part == "layers":
            index, _, inner = rest.partition(".")
            makes_rows = inner in ("attention.k_proj.weight", "attention.v_proj.weight")
            counted = int(index) < last_writer or (int(index) == last_writer and makes_rows)
        else:
            counted = part == "per_layer_inputs"
        each += tensor.numel() if counted and tensor.dim() == 2 else 0
    whole = sum(tensor.numel() for tensor in sizes.values() if tensor.dim() == 2)
    return {
        "weight_bytes": sum(tensor.nbytes for tensor in sizes.values()),
        "each": each,
        "last": whole - each,
    }


def floating_point_operations(work: dict[str, int], tokens: int) -> int:
    return 2 * (tokens * work["each"] + work["last"])


def measure_side(side: str, folder: Path, threads: int) -> dict[str, Any]:
    """One turn of a side, in a process of its own."""
    with workers([(side, "default")], threads) as sides:
        worker = sides[side, "default"]
        loaded = worker.call("load", folder=str(folder))
        found: dict[str, Any] = {
            "load": loaded["seconds"],
            "compile": loaded["compile_seconds"],
            "resident_bytes": loaded["resident_bytes"],
            "logits": worker.call("logits", prompt=16, decoded=1)[0],
            "prefill": {},
        }
        for tokens in PROMPTS:
            turns = [worker.call("prefill", tokens=tokens) for _ in range(PREFILLS)]
            found["prefill"][str(tokens)] = [turn["seconds"] for turn in turns[1:]]
        found["peak_bytes"] = turns[-1]["peak_bytes"] + loaded["resident_bytes"]
        found["cache_bytes"] = turns[-1]["cache_bytes"]
        found["decode"] = worker.call("decode", tokens=DECODED)[2:]
        return found


def measure(folder: Path, sides: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """The sides' turns put together: medians, and the machine's bounds measured between them."""
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    bandwidths, peaks = [], []
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            bandwidths.append(machine.read_bandwidth())
            peaks.append(machine.matmul_peak())
            turns[side].append(measure_side(side, folder, threads))
            print(f"{side}: decode {seconds(median(turns[side][-1]['decode']))} a token", file=sys.stderr, flush=True)
    found: dict[str, Any] = {
        "bandwidth": median(bandwidths),
        "matmul_peak": median(peaks),
        "row_bandwidth": machine.row_bandwidth(),
        "bf16_peak": machine.matmul_peak(dtype=torch.bfloat16),
        "sides": {},
    }
    for side, measured in turns.items():
        found["sides"][side] = {
            "load": median(turn["load"] for turn in measured),
            "compile": [turn["compile"] for turn in measured],
            "peak_bytes": max(turn["peak_bytes"] for turn in measured),
            "cache_bytes": measured[0]["cache_bytes"],
            "decode": median(second for turn in measured for second in turn["decode"]),
            "prefill": {
                str(tokens): median(second for turn in measured for second in turn["prefill"][str(tokens)])
                for tokens in PROMPTS
            },
        }
    found["cosine"] = cosine([measured[0]["logits"] for measured in turns.values()])
    if found["cosine"] < LEAST_COSINE:
        raise WorkerError(f"the sides' logits point elsewhere: cosine {found['cosine']:.3f} < {LEAST_COSINE}")
    return found


def cosine(rows: Sequence[Sequence[float]]) -> float:
    first, *others = (torch.tensor(row) for row in rows)
    return min((float(torch.cosine_similarity(first, other, dim=0)) for other in others), default=1.0)


def goals_of(found: dict[str, Any], work: dict[str, int], llama: dict[str, Any] | None, why_not: str) -> list[Goal]:
    ours, theirs = found["sides"]["kvell"], found["sides"].get("transformers")
    bound = (work["weight_bytes"] + ours["cache_bytes"]) / found["bandwidth"]
    longest = str(PROMPTS[-1])
    reached = floating_point_operations(work, PROMPTS[-1]) / ours["prefill"][longest] / found["matmul_peak"]
    absent = "transformers was not measured"
    rows = f"torch's product with one row reads at {found['row_bandwidth'] / found['bandwidth']:.2f} of it"
    times = found["bf16_peak"] / found["matmul_peak"]
    in_bf16 = f"both multiply in bf16, {times:.1f} times as fast as in fp32: leaving products out saves less"
    goals = [
        Goal(2, "decode, of the bandwidth bound", bound / ours["decode"], "at least", OF_BANDWIDTH, "", rows),
        Goal(2, f"prefill of {longest}, of the matmul peak", reached, "at least", OF_PEAK, ""),
    ]
    for name, figure, limit in (
        ("decode beside transformers", theirs["decode"] / ours["decode"] if theirs else None, DECODE_GAIN),
        *(
            (
                f"prefill of {tokens} beside transformers",
                theirs["prefill"][str(tokens)] / ours["prefill"][str(tokens)] if theirs else None,
                PREFILL_GAIN,
            )
            for tokens in PROMPTS
        ),
    ):
        why = in_bf16 if name.startswith("prefill") and times > 1.5 else ""
        goals.append(Goal(2, name, figure, "at least", limit, reason=why if theirs else absent))
    decode = llama["decode"] / ours["decode"] if llama else None
    prefill = llama["prefill"][longest] / ours["prefill"][longest] if llama else None
    why = rows if llama else why_not
    goals.append(Goal(2, "decode beside llama.cpp in bf16", decode, "at least", LLAMA_DECODE, reason=why))
    goals.append(Goal(2, "prefill beside llama.cpp in bf16", prefill, "at least", 1.0, reason=why_not))
    return goals


def table_of(found: dict[str, Any], work: dict[str, int], llama: dict[str, Any] | None) -> str:
    sides = found["sides"] | ({"llama.cpp": llama} if llama else {})
    ours = sides["kvell"]
    header = ["", *(f"prefill of {tokens}" for tokens in PROMPTS), "", "decode", "", "peak resident", "load"]
    rows = []
    for name, figures in sides.items():
        rates = [f"{tokens / figures['prefill'][str(tokens)]:.1f} tokens/s" for tokens in PROMPTS]
        longest = str(PROMPTS[-1])
        quotients = [figures["prefill"][longest] / ours["prefill"][longest], figures["decode"] / ours["decode"]]
        decode = f"{1 / figures['decode']:.2f} tokens/s"
        peak = f"{figures['peak_bytes'] / 1e9:.2f} GB"
        rows.append([name, *rates, ratio(quotients[0]), decode, ratio(quotients[1]), peak, seconds(figures["load"])])
    bounds = [found["matmul_peak"] * tokens / floating_point_operations(work, tokens) for tokens in PROMPTS]
    decode = found["bandwidth"] / (work["weight_bytes"] + ours["cache_bytes"])
    shown = [f"{bound:.1f} tokens/s" for bound in bounds]
    rows.append(["the machine's bound", *shown, "", f"{decode:.2f} tokens/s", "", "", ""])
    return table(header, rows)


def run(
    folder: Path | None,
    *,
    model: str = MODEL,
    layers: int | None = None,
    sides: Sequence[str] = ("transformers", "kvell"),
    rounds: int = ROUNDS,
    threads: int = 2,
    with_llama: bool = False,
) -> Section:
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_random_checkpoint(model, place, layers)
        work = work_of(kvell.ModelConfig.from_pretrained(place))
        title = f"Real size: {model}'s shape{f', {layers} layers of it' if layers else ''}, random bf16 weights"
        try:
            found = measure(place, sides, rounds, threads)
        except WorkerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = Goal(2, "real size", float("nan"), "at least", 1, reason=str(error))
            return Section(title, [], [failed], {}, [f"Failed: {error}"])
        why_not = llama_cpp.why_not() if with_llama else "not asked for: --llama-cpp"
        llama = None
        if not why_not:
            try:
                llama = llama_cpp.measure(work["weight_bytes"], PROMPTS, DECODED, place, threads)
            except WorkerError as error:
                why_not = str(error)
    goals = goals_of(found, work, llama, why_not)
    if layers:
        cut = f"only {layers} layers were measured"
        goals = [Goal(g.number, f"{g.name}, {cut}", g.figure, g.bound, g.limit, g.unit, g.reason) for g in goals]
    notes = [
        f"Weights read for a token: {work['weight_bytes'] / 1e9:.2f} GB. Read bandwidth: "
        f"{found['bandwidth'] / 1e9:.1f} GB/s; fp32 matrix product: {found['matmul_peak'] / 1e9:.0f} GFLOP/s. The "
        f"sides' logits have a cosine of {found['cosine']:.4f}. Kvell's decoding step was compiled in "
        f"{' and '.join(seconds(taken) for taken in found['sides']['kvell']['compile'])}, in the first turn from "
        "nothing unless an earlier run had left it."
    ]
    figures = found | {"work": work, "llama.cpp": llama, "model": model, "layers": layers}
    return Section(title, [table_of(found, work, llama)], goals, figures, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be kept; else a temporary one")
    parser.add_argument("--model", default=MODEL, choices=("gemma-4-e2b", "gemma-4-e4b"))
    parser.add_argument("--layers", type=int, help="only so many of the model's layers")
    parser.add_argument("--sides", nargs="+", choices=("transformers", "kvell"), default=["transformers", "kvell"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", action="store_true", help="measure llama.cpp on a file of the same size")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    section = run(
        options.folder,
        model=options.model,
        layers=options.layers or (QUICK_LAYERS if options.quick else None),
        sides=options.sides,
        rounds=1 if options.quick else options.rounds,
        threads=options.threads,
        with_llama=options.llama_cpp,
    )
    write_results(options.results, "real_size", [section], machine.describe(options.threads))
    print(section.markdown())


if __name__ == "__main__":
    main()
