"""Goal 1: the four families at 14 to 22 million parameters, Kvell beside transformers.

    python -m benchmarks.small_models                      all families, both malloc settings, up to 32K tokens
    python -m benchmarks.small_models --quick              prompts of 1K, the default malloc setting
    python -m benchmarks.small_models --families gemma4 --contexts 4096 --malloc default --rounds 3

Both sides read one saved checkpoint, are checked to give the same logits, and take turns: a prefill of each, then the
other's; after the prompt eight decoded tokens of each in turn. Every side runs once with each malloc setting.

Where a goal is not met, what the machine would allow stands beside it: a decoded token has to read the weights and
the cache, at the memory's bandwidth where no cache of the processor holds them, and a prefill has to multiply. The
planner counts both, bandwidth and the product's peak are measured in the same run.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

import kvell
from benchmarks import machine
from benchmarks.checkpoints import SMALL, write_small
from benchmarks.processes import MALLOC_SETTINGS, Worker, WorkerError, at_once, take_turns, workers
from benchmarks.reporting import Goal, Section, mebibytes, median, ratio, seconds, table, write_results

CONTEXTS = (1024, 4096, 16384, 32768)
QUICK_CONTEXTS = (1024,)
ROUNDS = {1024: 3, 4096: 3, 16384: 1, 32768: 1}
VERY_LONG = 131072  # for the family whose alternative cannot reach it
DECODE_ROUNDS, DECODE_TOKENS = 4, 8
CHECKED_PROMPT, CHECKED_TOKENS, TOLERANCE = 700, 4, 1e-3

DECODE_GOALS = {"gemma4": (4.0, 6.0), "laguna": (4.0, 6.0), "zaya": (4.0, 6.0), "deepseek_v4": (4.0, 4.0)}
PREFILL_GOALS = {"gemma4": 3.0, "laguna": 3.0, "zaya": 2.0, "deepseek_v4": 5.0}
PEAK_GOAL = 1 / 3


class Bounds(NamedTuple):
    """What the machine does at best: bytes read a second, and floating-point operations."""

    bandwidth: float
    matmul_peak: float


Say = Callable[[str], None]
Key = tuple[str, str]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure_family(
    family: str,
    contexts: Sequence[int],
    mallocs: Sequence[str],
    at_best: Bounds,
    *,
    threads: int,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Every figure of a family, by "side/malloc" and context. WorkerError where the sides' logits differ."""
    keys = [(side, malloc) for malloc in mallocs for side in ("transformers", "kvell")]
    with tempfile.TemporaryDirectory() as folder, workers(keys, threads) as sides:
        write_small(family, Path(folder))
        at_once(sides.values(), lambda worker: worker.call("load", folder=folder))
        first = sides[keys[0]]
        config = kvell.ModelConfig.from_pretrained(folder)
        found: dict[str, Any] = {
            "bounds": {str(context): bounds_of(config, context, at_best) for context in contexts},
            "parameters": first.call("parameters"),
            "largest_difference": check_logits(family, list(sides.values())),
            "contexts": {},
        }
        for context in contexts:
            times = rounds or ROUNDS.get(context, 1)
            found["contexts"][str(context)] = measure_context(sides, context, times)
            for name, figures in found["contexts"][str(context)].items():
                shown = f"prefill {seconds(figures['prefill'])}, decode {seconds(figures['decode'])} a token"
                say(f"{family} {context:>6} {name:<22} {shown}, peak {mebibytes(figures['peak_bytes'])}")
        return found


def compile_ahead(families: Sequence[str], threads: int) -> None:
    """Has the families' decoding steps compiled two at a time, and kept for those that are measured: a compiler takes
    one core. What fails here fails again where it is measured, and is told there."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as compilers:
        folders = [write_small(name, Path(stack.enter_context(tempfile.TemporaryDirectory()))) for name in families]

        def compiled(folder: Path) -> None:
            with suppress(WorkerError), workers([("kvell", "default")], threads) as sides:
                sides["kvell", "default"].call("load", folder=str(folder))

        list(compilers.map(compiled, folders))


def bounds_of(config: kvell.ModelConfig, context: int, at_best: Bounds) -> dict[str, float]:
    """Seconds of a prefill's products and of reading what a decoded token reads, and bytes, the cache's."""
    plan = kvell.plan(config, context, dtype="float32")
    return {
        "prefill": sum(plan.prefill_flops.values()) / at_best.matmul_peak,
        "decode": plan.read_bytes / at_best.bandwidth,
        "peak_bytes": plan.cache_bytes,
    }


def check_logits(family: str, sides: Sequence[Worker]) -> float:
    """The largest difference between the first side's logits and any other's."""
    rows = [torch.tensor(side.call("logits", prompt=CHECKED_PROMPT, decoded=CHECKED_TOKENS)) for side in sides]
    difference = max(float((row - rows[0]).abs().max()) for row in rows)
    if not difference <= TOLERANCE:
        raise WorkerError(f"{family}: the sides' logits differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    return difference


def measure_context(sides: dict[Key, Worker], context: int, rounds: int) -> dict[str, Any]:
    """Prefill in turns, then decoding in turns after the last of the prompts."""
    prefills = take_turns(sides, rounds, lambda worker: worker.call("prefill", tokens=context))
    for worker in sides.values():
        worker.call("decode", tokens=2)
    decodes = take_turns(sides, DECODE_ROUNDS, lambda worker: worker.call("decode", tokens=DECODE_TOKENS))
    found = {}
    for key in sides:
        found["/".join(key)] = {
            "prefill": median(prefill["seconds"] for prefill in prefills[key]),
            "prefill_samples": [prefill["seconds"] for prefill in prefills[key]],
            "peak_bytes": max(prefill["peak_bytes"] for prefill in prefills[key]),
            "cache_bytes": prefills[key][-1]["cache_bytes"],
            "decode": median(second for seconds_taken in decodes[key] for second in seconds_taken),
        }
    for worker in sides.values():
        worker.call("drop")
    return found


def measure_very_long(family: str, context: int, malloc: str, threads: int) -> dict[str, Any]:
    """Kvell alone at a half and the whole of a very long context: whether its memory stays linear in it."""
    with tempfile.TemporaryDirectory() as folder, workers([("kvell", malloc)], threads) as sides:
        write_small(family, Path(folder))
        worker = sides["kvell", malloc]
        worker.call("load", folder=folder)
        found = {}
        for tokens in (context // 2, context):
            figures = worker.call("prefill", tokens=tokens)
            figures["decode"] = median(worker.call("decode", tokens=16)[2:])
            found[str(tokens)] = figures
        return found


def best(figures: dict[str, Any], side: str, what: str) -> float:
    """A side's smallest figure of all malloc settings."""
    return float(min(values[what] for name, values in figures.items() if name.startswith(f"{side}/")))


def gain(figures: dict[str, Any], what: str) -> float:
    """How many times Kvell's figure goes into transformers', each at its better malloc setting."""
    return best(figures, "transformers", what) / best(figures, "kvell", what)


def goals_of(family: str, found: dict[str, Any], very_long: dict[str, Any] | None = None) -> list[Goal]:
    """The family's goals; those at contexts that were not measured stay open."""
    contexts = found["contexts"]
    at_short, at_long = DECODE_GOALS[family]

    def faster(name: str, context: int, what: str, limit: float) -> Goal:
        figures = contexts.get(str(context))
        name = f"{family} {name}"
        if not figures:
            return Goal(1, name, None, "at least", limit, reason=f"{context // 1024}K tokens were not measured")
        allowed = best(figures, "transformers", what) / found["bounds"][str(context)][what]
        alone = "reading weights and cache at the memory's bandwidth" if what == "decode" else "the products alone"
        reason = f"{alone} would allow {allowed:.3g}x"
        return Goal(1, name, gain(figures, what), "at least", limit, reason=reason)

    def smaller(name: str, context: int) -> Goal:
        figures = contexts.get(str(context))
        name = f"{family} {name}"
        if not figures:
            return Goal(1, name, None, "at most", PEAK_GOAL, reason=f"{context // 1024}K tokens were not measured")
        theirs = best(figures, "transformers", "peak_bytes")
        reason = f"the cache alone is {found['bounds'][str(context)]['peak_bytes'] / theirs:.3g}x"
        return Goal(1, name, best(figures, "kvell", "peak_bytes") / theirs, "at most", PEAK_GOAL, reason=reason)

    goals = [
        faster("decode at 1K", 1024, "decode", at_short),
        faster("decode at 32K", 32768, "decode", at_long),
        faster("prefill at 32K", 32768, "prefill", PREFILL_GOALS[family]),
        smaller("peak at 32K", 32768),
    ]
    if family == "deepseek_v4":
        growth = None
        if very_long:
            half, whole = (figures["peak_bytes"] for figures in very_long.values())
            growth = whole / half
        name = "deepseek_v4 memory at 128K over 64K"
        goals.append(Goal(1, name, growth, "at most", 2.1, reason="" if very_long else "128K was not measured"))
    return goals


def tables_of(results: dict[str, Any]) -> list[str]:
    """One table a malloc setting, families by contexts."""
    measured = [name for found in results.values() for at in found["contexts"].values() for name in at]
    mallocs = sorted({name.split("/")[1] for name in measured})
    header = ["", "prefill", "transformers", "", "decode", "transformers", "", "peak", "transformers", ""]
    header += ["cache", "transformers"]
    tables = []
    for malloc in mallocs:
        rows = []
        for family, found in results.items():
            for context, figures in found["contexts"].items():
                ours, theirs = figures[f"kvell/{malloc}"], figures[f"transformers/{malloc}"]
                row = [f"{family} {int(context) // 1024}K"]
                for what, write in (("prefill", seconds), ("decode", seconds), ("peak_bytes", mebibytes)):
                    quotient = theirs[what] / ours[what] if ours[what] else None
                    row += [write(ours[what]), write(theirs[what]), ratio(quotient)]
                rows.append([*row, mebibytes(ours["cache_bytes"]), mebibytes(theirs["cache_bytes"])])
        tables.append(f"With {malloc} malloc settings:\n\n{table(header, rows)}")
    return tables


def run(
    families: Sequence[str],
    contexts: Sequence[int],
    mallocs: Sequence[str],
    *,
    threads: int = 2,
    rounds: int | None = None,
    very_long: int | None = None,
) -> Section:
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    notes = []
    beyond: dict[str, Any] = {}
    start = perf_counter()
    torch.set_num_threads(threads)
    at_best = Bounds(machine.read_bandwidth(), machine.matmul_peak())
    said = f"{at_best.bandwidth / 1e9:.1f} GB/s read, {at_best.matmul_peak / 1e9:.0f} GFLOP/s of an fp32 product"
    notes.append(f"The machine at best: {said}.")
    if len(families) > 1:
        compile_ahead(families, threads)
    for family in families:
        try:
            results[family] = measure_family(family, contexts, mallocs, at_best, threads=threads, rounds=rounds)
            if family == "deepseek_v4" and very_long:
                beyond = measure_very_long(family, very_long, mallocs[-1], threads)
                for tokens, figures in beyond.items():
                    shown = f"prefill {seconds(figures['seconds'])}, decode {seconds(figures['decode'])} a token"
                    shown += f", peak {mebibytes(figures['peak_bytes'])}"
                    notes.append(f"Kvell, {family}, {tokens} tokens: {shown}.")
            goals += goals_of(family, results[family], beyond if family == "deepseek_v4" else None)
        except WorkerError as error:
            notes.append(f"{family} failed: {error}")
            say(f"error: {error}")
            goals += [Goal(1, family, float("nan"), "at least", 1, reason=str(error))]
    measured = {name: found for name, found in results.items() if found["contexts"]}
    figures = {
        "at_best": at_best._asdict(),
        "families": results,
        "very_long": beyond,
        "seconds": perf_counter() - start,
    }
    return Section("Small models, beside transformers", tables_of(measured), goals, figures, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--contexts", nargs="+", type=int, help="prompt lengths, rising")
    parser.add_argument("--malloc", nargs="+", choices=MALLOC_SETTINGS, help="malloc settings")
    parser.add_argument("--rounds", type=int, help="prefills of each side at each length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    contexts = options.contexts or (QUICK_CONTEXTS if options.quick else CONTEXTS)
    mallocs = options.malloc or (["default"] if options.quick else list(MALLOC_SETTINGS))
    very_long = VERY_LONG if contexts is CONTEXTS else None
    section = run(
        options.families, contexts, mallocs, threads=options.threads, rounds=options.rounds, very_long=very_long
    )
    write_results(options.results, "small_models", [section], machine.describe(options.threads))
    print(section.markdown())


if __name__ == "__main__":
    main()
