"""Goal 3: kernels and decoding on one CUDA device; without one its goals stay open.

    python -m benchmarks.gpu

Bounds are measured in the same run: copying memory, and a bf16 matrix product. Beside Kvell run its references, the
references compiled by torch, and transformers on the same checkpoint. Kernels and training steps are timed by the
device, prompts and decoded tokens by the host, which waits for each. A part that fails says so in one line and leaves
its goals open; the others run.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import kvell
from benchmarks import machine
from benchmarks.checkpoints import write_small
from benchmarks.growth import config_of
from benchmarks.reporting import Goal, Section, mebibytes, seconds, table, write_results
from benchmarks.sides import filled_cache, sequence
from kvell import kernels
from kvell.kernels import choice

TITLE = "On a GPU"
HIDDEN, STREAMS, ROWS = 4096, 4, 8192
OF_COPY, OVERHEAD = 0.70, 0.067
PREFILLED, DECODED_AT, BESIDE_TRANSFORMERS = 131072, 1 << 20, 8192
# deepseek_v4 of `checkpoints` at 1.2 billion parameters, its heads as DeepSeek V4's are.
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 18,
    "compress_ratios": [0, 0, *([4, 128] * 8)],
    "num_attention_heads": 16,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 512,
    "o_groups": 4,
    "o_lora_rank": 256,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 16,
    "moe_intermediate_size": 1024,
}

Figures = dict[str, float]


def measured(work: Callable[[], Any], times: int = 20) -> float:
    """Median seconds by the device's own clock."""
    for _ in range(3):
        work()
    # Writing so much before each run takes what the last one left out of the caches, and lets the host get ahead of
    # the device, so that launching is not measured.
    scratch = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for begun, ended in events:
        scratch.zero_()
        begun.record()
        work()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(begun.elapsed_time(ended) for begun, ended in events) / 1000


def waited_for(work: Callable[[], Any], times: int = 30) -> float:
    """Median seconds from asking to having it, by the host's clock."""
    taken = []
    for _ in range(3 + times):
        torch.cuda.synchronize()
        start = perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(perf_counter() - start)
    return statistics.median(taken[3:])


def measure_copying() -> Figures:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {"GB/s": 2 * source.nbytes / measured(lambda: target.copy_(source)) / 1e9}


def measure_products(size: int = 8192) -> Figures:
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return {"TFLOP/s": 2 * size**3 / measured(lambda: left @ left) / 1e12}


def wide(technique: str) -> kvell.Decoder:
    """Two layers at a training width, plain or hyper-connected."""
    attention = {"kind": "grouped_query", "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    rotary = {"rotary": {"kind": "default", "theta": 10000.0}}
    layer = {"attention": attention | rotary, "feed_forward": {"kind": "gated_mlp", "intermediate_size": 4 * HIDDEN}}
    config = config_of(technique) | {"hidden_size": HIDDEN, "layers": [layer] * 2}
    return kvell.Decoder(kvell.ModelConfig(**config)).to("cuda", torch.bfloat16)


def measure_connection(version: Literal["fast", "reference"], compiled: bool = False) -> Figures:
    """Seconds of a hyper-connection's read and write, one after the other."""
    layer: Any = wide("hyper-connections").layers[0]
    connection = layer.attention_frame.connection
    h = torch.randn(ROWS, STREAMS, HIDDEN, device="cuda", dtype=torch.bfloat16)

    @torch.no_grad()
    def both() -> Tensor:
        x, reading = connection.read(h)
        return connection.write(h, x, reading)

    if compiled:
        # What is compiled keeps the kernels' version that is chosen here: torch does not compile asking for it.
        torch.compiler.assume_constant_result(choice.chosen)
    with kernels.use(version):
        return {"read and write": measured(torch.compile(both) if compiled else both)}


def measure_training(technique: str) -> Figures:
    """Seconds of a training step's forward and backward."""
    model = wide(technique)
    tokens = sequence(0, 4096, model.config.vocab_size).cuda()

    def step() -> None:
        logits = model(tokens)
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).backward()
        model.zero_grad()

    return {"step": measured(step)}


@torch.inference_mode()
def measure_prompt(model: kvell.Decoder, length: int) -> Figures:
    """Prefill, the first time and once all kernels that it takes are compiled, and decoded tokens after it."""
    ids = sequence(0, length, model.config.vocab_size).cuda()
    found: Figures = {}
    for what in ("first prefill", "prefill"):
        kept = model.make_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = perf_counter()
        model(ids, cache=kept, last_only=True)
        torch.cuda.synchronize()
        found[what] = perf_counter() - start
        found["peak bytes"] = float(torch.cuda.max_memory_allocated())
    return found | decoded(model, kept, ids[:, -1:])


def decoded(model: kvell.Decoder, kept: kvell.Cache, token: Tensor) -> Figures:
    """A decoded token by recorded graphs, and operator by operator, which `kernels.use` asks for."""
    found = {"decode": waited_for(lambda: model(token, cache=kept, last_only=True))}
    with kernels.use("triton"):
        found["decode without graphs"] = waited_for(lambda: model(token, cache=kept, last_only=True))
    return found


@torch.inference_mode()
def measure_decoding(model: kvell.Decoder, length: int) -> Figures:
    kept, ids = filled_cache(model, length), sequence(0, 1, model.config.vocab_size).cuda()
    return decoded(model, kept, ids)


@torch.inference_mode()
def measure_transformers(folder: Path, length: int) -> Figures:
    from transformers import AutoModelForCausalLM, DynamicCache

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).cuda().eval()
    ids = sequence(0, length, model.config.vocab_size).cuda()
    found: Figures = {}
    for what in ("first prefill", "prefill"):
        kept: Any = DynamicCache(config=model.config)
        torch.cuda.synchronize()
        start = perf_counter()
        for piece in ids.split(1024, dim=1):
            model(piece, past_key_values=kept, logits_to_keep=1)
        torch.cuda.synchronize()
        found[what] = perf_counter() - start
    return found | {"decode": waited_for(lambda: model(ids[:, -1:], past_key_values=kept, logits_to_keep=1))}


COPYING, PRODUCTS = "copying", "bf16 products"
CONNECTION, REFERENCE, COMPILED = "connection", "connection, reference", "connection, reference compiled"
PLAIN_STEP, HYPER_STEP = "training, plain", "training, hyper-connections"
KVELL, TRANSFORMERS = f"kvell at {BESIDE_TRANSFORMERS}", f"transformers at {BESIDE_TRANSFORMERS}"
# Bytes that a hyper-connection's read and write must move: the streams read twice and written once, and the block's
# input and output.
MOVED = (3 * STREAMS + 2) * ROWS * HIDDEN * 2


class Aim(NamedTuple):
    """A goal, the parts whose figures it needs, and how it is made of them."""

    name: str
    bound: Literal["at least", "at most"]
    limit: float
    unit: str
    parts: tuple[str, ...]
    of: Callable[..., float]
    why: str = ""


def quotient(what: str) -> Callable[[Figures, Figures], float]:
    """How many times the first figure goes into the second."""
    return lambda own, theirs: theirs[what] / own[what]


AIMS = (
    Aim(
        "hyper-connection read and write, of copy bandwidth",
        "at least",
        OF_COPY,
        "",
        (CONNECTION, COPYING),
        lambda own, copying: MOVED / own["read and write"] / (copying["GB/s"] * 1e9),
        "the streams are read twice, for the projection and for the collapse",
    ),
    Aim(
        "hyper-connections' share of a training step",
        "at most",
        OVERHEAD,
        "",
        (HYPER_STEP, PLAIN_STEP),
        lambda hyper, plain: hyper["step"] / plain["step"] - 1,
        "of two layers, beside which opening and closing the streams weigh much; their backward reads most twice",
    ),
    Aim(
        "hyper-connection beside the compiled reference",
        "at least",
        1.0,
        "x",
        (CONNECTION, COMPILED),
        quotient("read and write"),
    ),
    Aim("V4-shaped decode beside transformers", "at least", 1.0, "x", (KVELL, TRANSFORMERS), quotient("decode")),
    Aim("V4-shaped prefill beside transformers", "at least", 1.0, "x", (KVELL, TRANSFORMERS), quotient("prefill")),
)


def goals_of(found: Mapping[str, Figures], failed: Mapping[str, str], otherwise: str = "not measured") -> list[Goal]:
    """Open where a part failed, which says why, or was not run."""
    goals = []
    for aim in AIMS:
        missing = [part for part in aim.parts if part not in found]
        figure = None if missing else aim.of(*(found[part] for part in aim.parts))
        reasons = [f"{part}: {failed[part]}" if part in failed else otherwise for part in missing]
        said = "; ".join(dict.fromkeys(reasons)) or aim.why
        goals.append(Goal(3, aim.name, figure, aim.bound, aim.limit, aim.unit, said))
    return goals


def section_of(device: str, parts: Mapping[str, Callable[[], Figures]]) -> Section:
    """Runs every part, whatever becomes of the others."""
    found: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    for part, run_it in parts.items():
        try:
            found[part] = run_it()
            print(f"{part}: {found[part]}", file=sys.stderr, flush=True)
        except Exception as error:
            said = str(error).strip().splitlines()
            failed[part] = f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__
            print(f"{part} failed: {failed[part]}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    rows = [
        [
            f"{part}: {what}",
            f"{value:.0f} {what}" if "/s" in what else mebibytes(value) if "bytes" in what else seconds(value),
        ]
        for part, figures in found.items()
        for what, value in figures.items()
    ]
    rows += [[part, "failed"] for part in failed]
    notes = [f"{part} failed: {why}" for part, why in failed.items()]
    return Section(TITLE, [table(["", device], rows)], goals_of(found, failed), {"device": device} | found, notes)


def run() -> Section:
    if not torch.cuda.is_available():
        return Section(
            TITLE,
            [],
            goals_of({}, {}, "this machine has no CUDA device"),
            {},
            ["Not measured: this machine has no CUDA device."],
        )
    with tempfile.TemporaryDirectory() as name:
        folder = cache(lambda: write_small("deepseek_v4", Path(name), **LARGE))
        model = cache(lambda: kvell.from_pretrained(folder(), dtype=torch.bfloat16, device="cuda").compile_decoding())
        parts: dict[str, Callable[[], Figures]] = {
            COPYING: measure_copying,
            PRODUCTS: measure_products,
            CONNECTION: lambda: measure_connection("fast"),
            KVELL: lambda: measure_prompt(model(), BESIDE_TRANSFORMERS),
            f"kvell at {PREFILLED}": lambda: measure_prompt(model(), PREFILLED),
            f"kvell at {DECODED_AT}, from a cache of random rows": lambda: measure_decoding(model(), DECODED_AT),
            TRANSFORMERS: lambda: measure_transformers(folder(), BESIDE_TRANSFORMERS),
            PLAIN_STEP: lambda: measure_training("plain"),
            HYPER_STEP: lambda: measure_training("hyper-connections"),
            REFERENCE: lambda: measure_connection("reference"),
            COMPILED: lambda: measure_connection("reference", compiled=True),
        }
        return section_of(torch.cuda.get_device_name(), parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    section = run()
    write_results(options.results, "gpu", [section], machine.describe(torch.get_num_threads()))
    print(section.markdown())


if __name__ == "__main__":
    main()
