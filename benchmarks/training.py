"""What each technique costs in training: speed beside a plain model of as many parameters, and a step's memory.

    python benchmarks/training.py                        a Markdown table
    python benchmarks/training.py --json figures.json    the figures as well

Every model has the plain one's parameters to within 2 %: the feed-forward's width is computed so. A step is forward,
backward, clipping and AdamW, over the same random tokens. Speeds: after a warm-up every model takes turns with the
plain one, and a ratio is the median of its pairs', so what else the machine does weighs on both sides. Memory: a
process of its own per model takes two steps, and counts how far its resident size rose above what it was before them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kvell
from kvell.checkpoint import build_empty
from kvell.config_file import resolve
from kvell.training.batches import MicroBatch, Piece
from kvell.training.compiling import compile_parts
from kvell.training.initialisation import quiet_start
from kvell.training.losses import Totals, step_loss
from kvell.training.optimizers import optimizers
from kvell.training.parallel import clip
from kvell.training.settings import Losses, Optimizer

Values = dict[str, Any]

VOCABULARY, HIDDEN = 2048, 128
ROTARY = {"kind": "default", "theta": 10000.0}
GQA = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rotary": ROTARY}
CCA = GQA | {"kind": "convolutional"}
HCA = {
    "kind": "compressed",
    "num_heads": 4,
    "head_dim": 32,
    "sliding_window": 64,
    "rotary": ROTARY,
    "rotary_width": 16,
    "query_rank": 64,
    "output_groups": 2,
    "output_rank": 32,
    "compressor": {"ratio": 64},
}
CSA = HCA | {
    "compressor": {"ratio": 4, "overlap": True},
    "indexer": {"num_heads": 2, "head_dim": 32, "top_k": 64},
}
NEAR, HALF = {"sliding_window": 128}, {"kv_source": -3}
PLAIN_WIDTH = 475


def of(attentions: list[Values], width: int, **others: Any) -> Values:
    """A model of these attentions, layer by layer, all with a feed-forward of this width."""
    feed_forward = others.pop("feed_forward", {"kind": "gated_mlp"}) | {"intermediate_size": width}
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "max_positions": 32768,
        "tied_head": True,
        "layers": [{"attention": attention, "feed_forward": feed_forward} for attention in attentions],
        **others,
    }


def everything(width: int) -> Values:
    """kvell-mini's mix (examples/mini.yaml)."""
    near = CCA | {"num_heads": 6, "num_kv_heads": 1} | NEAR
    far = CCA | {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "rotary": None}
    first = [near, HCA, far]
    return of(
        first + [attention | HALF for attention in first],
        width,
        connection={"kind": "hyper", "streams": 2, "iterations": 8},
        per_layer_embedding={"width": 16},
    )


MIXTURE = {"kind": "mixture_of_experts", "num_experts": 8, "top_k": 2, "router": {"kind": "sigmoid"}}
HYPER = {"kind": "hyper", "streams": 4}
PLAIN = "plain GQA"
TECHNIQUES: dict[str, Callable[[int], Values]] = {
    PLAIN: lambda width: of([GQA] * 6, width),
    "windows of 128 in four of six layers": lambda width: of([GQA | NEAR, GQA | NEAR, GQA] * 2, width),
    "shared KV in the later half": lambda width: of([GQA] * 3 + [GQA | HALF] * 3, width),
    "head budgets: 6 in windows, 2 in full": lambda width: of(
        [GQA | NEAR | {"num_heads": 6}, GQA | NEAR | {"num_heads": 6}, GQA | {"num_heads": 2}] * 2, width
    ),
    "per-layer embeddings": lambda width: of([GQA] * 6, width, per_layer_embedding={"width": 16}),
    "CCA": lambda width: of([CCA] * 6, width),
    "CCA, shared KV in the later half": lambda width: of([CCA] * 3 + [CCA | HALF] * 3, width),
    "HCA": lambda width: of([HCA] * 6, width),
    "CSA": lambda width: of([CSA] * 6, width),
    "hyper-connections, 4 streams": lambda width: of([GQA] * 6, width, connection=HYPER),
    "scaled residual": lambda width: of([GQA] * 6, width, connection={"kind": "scaled"}),
    "mixture of experts, 2 of 8": lambda width: of([GQA] * 6, width, feed_forward=MIXTURE),
    "everything (kvell-mini's mix)": everything,
}
COMPILED = ("hyper-connections, 4 streams", "everything (kvell-mini's mix)")


def config_of(name: str, width: int) -> kvell.ModelConfig:
    return resolve(TECHNIQUES[name](width), name)


def width_for(name: str, parameters: int) -> int:
    """The feed-forward width that comes closest to so many parameters, which are linear in it."""
    one, two = (build_empty(config_of(name, width), torch.float32).num_parameters() for width in (1, 2))
    return max(round((parameters - one) / (two - one)) + 1, 1)


@dataclass(frozen=True)
class Batch:
    """The tokens of every step: sequences of one length."""

    sequences: int
    length: int

    def draw(self) -> MicroBatch:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(VOCABULARY, (self.sequences, self.length + 1), generator=generator)
        return MicroBatch.of([Piece("random tokens", row.tolist()) for row in rows])


class Learner:
    """A model with its optimizer."""

    def __init__(self, config: kvell.ModelConfig, *, checkpointing: bool = False, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.model = kvell.Decoder(config, activation_checkpointing=checkpointing)
        quiet_start(self.model)
        if compiled:
            compile_parts(self.model, torch.device("cpu"))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizers = optimizers(self.model, Optimizer(kind="adamw"))

    def step(self, batch: MicroBatch) -> float:
        """The seconds a step takes."""
        start = time.perf_counter()
        step_loss(self.model, batch, Totals.of([batch]), Losses()).loss.backward()
        clip(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start


def resident_bytes(what: str) -> int:
    """VmRSS, what the process holds now, or VmHWM, the most it held (Linux). getrusage's would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def memory_of_a_step(name: str, width: int, batch: Batch, *, checkpointing: bool) -> int:
    """How far two steps raise the resident size, in this process, which must be fresh."""
    learner, tokens = Learner(config_of(name, width), checkpointing=checkpointing), batch.draw()
    before = resident_bytes("VmRSS")
    for _ in range(2):
        learner.step(tokens)
    return resident_bytes("VmHWM") - before


def memory_in_a_process(name: str, width: int, batch: Batch, threads: int, *, checkpointing: bool) -> int:
    sizes = [str(batch.sequences), str(batch.length)]
    command = [sys.executable, __file__, "--memory-of", name, str(width), "--batch", *sizes]
    command += ["--threads", str(threads), *(["--checkpointing"] if checkpointing else [])]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(batch: Batch, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row of figures for every technique, the plain model's first."""
    parameters = build_empty(config_of(PLAIN, PLAIN_WIDTH), torch.float32).num_parameters()
    plain, tokens = Learner(config_of(PLAIN, PLAIN_WIDTH)), batch.draw()
    count = batch.sequences * batch.length
    plain.step(tokens)
    rows = []
    for name, compiled in [(name, False) for name in TECHNIQUES] + [(name, True) for name in COMPILED]:
        width = width_for(name, parameters)
        learner = Learner(config_of(name, width), compiled=compiled)
        first = learner.step(tokens)
        pairs = [(plain.step(tokens), learner.step(tokens)) for _ in range(rounds)]
        row: dict[str, Any] = {
            "technique": name,
            "compiled": compiled,
            "feed_forward_width": width,
            "parameters": learner.model.num_parameters(),
            "tokens_per_second": count / statistics.median(mine for _, mine in pairs),
            "ratio": statistics.median(its / mine for its, mine in pairs),
            "first_step_seconds": first,
        }
        if abs(row["parameters"] / parameters - 1) > 0.02:
            raise SystemExit(f"{name}: {row['parameters']} parameters, not the plain model's {parameters}")
        if not compiled:
            for field, checkpointing in (("memory_bytes", False), ("memory_bytes_checkpointing", True)):
                row[field] = memory_in_a_process(name, width, batch, threads, checkpointing=checkpointing)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def to_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | parameters | feed-forward | tokens/s | speed | memory | memory, checkpointing |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["technique"] + (", compiled" if row["compiled"] else "")
        memory = [
            f"{row[field] / 2**20:.0f} MiB" if field in row else ""
            for field in ("memory_bytes", "memory_bytes_checkpointing")
        ]
        cells = [
            name,
            f"{row['parameters'] / 1e6:.3f} M",
            str(row["feed_forward_width"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f} x",
            *memory,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs=2, default=(2, 1024), metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs per model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures are to be written as JSON")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "WIDTH"), help="only this one's memory, in bytes")
    parser.add_argument("--checkpointing", action="store_true", help="with --memory-of: recompute activations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = Batch(*options.batch)
    if options.memory_of:
        name, width = options.memory_of
        print(memory_of_a_step(name, int(width), batch, checkpointing=options.checkpointing))
        return
    rows = measure(batch, options.rounds, options.threads)
    if options.json is not None:
        about = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        figures = {**about, "sequences": batch.sequences, "length": batch.length, "rounds": options.rounds}
        options.json.write_text(json.dumps({**figures, "models": rows}, indent=2) + "\n")
    print(to_table(rows))


if __name__ == "__main__":
    main()
