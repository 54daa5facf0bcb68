"""All goals that this machine can measure: `python -m benchmarks [--quick]`.

Prints each benchmark's tables as it ends, then every goal's line, and writes both as JSON and Markdown.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from benchmarks import gpu, growth, machine, real_size, small_models, startup
from benchmarks.checkpoints import SMALL
from benchmarks.processes import MALLOC_SETTINGS
from benchmarks.reporting import Section, write_results


def benchmarks(options: argparse.Namespace) -> dict[str, Callable[[], Section]]:
    quick, threads = options.quick, options.threads
    return {
        "small_models": lambda: small_models.run(
            list(SMALL),
            small_models.QUICK_CONTEXTS if quick else small_models.CONTEXTS,
            ["default"] if quick else list(MALLOC_SETTINGS),
            threads=threads,
            very_long=None if quick else small_models.VERY_LONG,
        ),
        "real_size": lambda: real_size.run(
            options.folder,
            layers=real_size.QUICK_LAYERS if quick else None,
            rounds=1 if quick else real_size.ROUNDS,
            threads=threads,
            with_llama=not quick,
        ),
        "growth": lambda: growth.run(
            growth.QUICK_TECHNIQUES if quick else list(growth.TECHNIQUES),
            longest=growth.QUICK_LONGEST if quick else growth.LONGEST,
            budget=growth.QUICK_BUDGET if quick else growth.BUDGET,
            threads=threads,
        ),
        "startup": lambda: startup.run(rounds=startup.QUICK_ROUNDS if quick else startup.ROUNDS, threads=threads),
        "gpu": gpu.run,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short contexts, a cut model: four to five minutes")
    parser.add_argument("--only", nargs="+", choices=("small_models", "real_size", "growth", "startup", "gpu"))
    parser.add_argument("--folder", type=Path, help="where the real-size checkpoint is, or is to be kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    described = machine.describe(options.threads)
    name = "quick" if options.quick else "full"
    start = perf_counter()
    sections: list[Section] = []
    for part, run in benchmarks(options).items():
        if options.only and part not in options.only:
            continue
        print(f"{part}, after {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        sections.append(run())
        print(sections[-1].markdown() + "\n", flush=True)
        write_results(options.results, name, sections, described)
    goals = [goal for section in sections for goal in section.goals]
    counts = {said: sum(goal.met is value for goal in goals) for said, value in (("met", True), ("not met", False))}
    left = len(goals) - sum(counts.values())
    print("\n".join(goal.line() for goal in sorted(goals, key=lambda goal: goal.number)))
    print(f"{counts['met']} met, {counts['not met']} not met, {left} open; {perf_counter() - start:.0f} s")
    print(f"written to {options.results}/{name}.json and {name}.md", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
