"""`kvell bench`: how fast a model is on this machine."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvell.cli import console
from kvell.cli.options import LENIENT
from kvell.errors import InputError, whole_number
from kvell.hardware import peak_resident_bytes, set_threads

if TYPE_CHECKING:
    from rich.table import Table

    from kvell.model import Decoder

CONTEXTS = (1024, 4096)
WARM_UP = 16


@dataclass(frozen=True)
class Measurement:
    """One context's figures. The first token's time is the prefill and choosing it. `peak_bytes` is the most that the
    whole program has held so far, model included; on a GPU, the most allocated there."""

    context: int
    seconds_to_first_token: float
    prefill_tokens_per_second: float
    seconds_per_token: float
    decode_tokens_per_second: float
    cache_bytes: int
    peak_bytes: int


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A model's directory or Hugging Face name; without one, the bundled model."
        ),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of the prompt, as 4096 or 4K. May be repeated; 1K and 4K without it.", metavar="N"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="How often each prompt is fed; the median counts.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float32 or float16; as stored without it.")] = None,
    device: Annotated[str, typer.Option(help="The device to run on.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads to compute with.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the decoding step first.")] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Measure nothing: show which version of every kernel runs here, and why."),
    ] = False,
    lenient: Annotated[bool, LENIENT] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a model's prefill and decoding on this machine, its cache and its memory. The prompts are random."""
    import kvell
    from kvell.bundled import bundled_model_path
    from kvell.checkpoint.loading import available_device, known_dtype, model_folder
    from kvell.decoding import check_device

    contexts = sorted({parse_context(text) for text in context} if context else CONTEXTS)
    for name, number in (("new-tokens", new_tokens), ("repeats", repeats)):
        whole_number(name, number)
    torch_device, torch_dtype = available_device(device), known_dtype(dtype)
    set_threads(threads)
    if compiled:
        check_device(torch_device)
    directory = model_folder(model or bundled_model_path())
    start = perf_counter()
    decoder = kvell.from_pretrained(directory, dtype=torch_dtype, device=torch_device, strict=not lenient)
    report: dict[str, Any] = {
        "model": str(model or "the bundled model"),
        "parameters": decoder.num_parameters(),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "load_seconds": perf_counter() - start,
    }
    if kernels:
        choices = kernels_of(decoder)
        if as_json:
            print(json.dumps(report | {"kernels": [asdict(choice) for choice in choices]}, indent=2))
        else:
            console.stdout().print(_kernel_table(choices))
        return
    if compiled:
        start = perf_counter()
        with console.waiting("compiling the decoding step"):
            decoder.compile_decoding()
        report["compile_seconds"] = perf_counter() - start
    with console.progress("tokens", repeats * sum(contexts)) as on_tokens:
        measurements = measure(decoder, contexts, new_tokens, repeats, on_tokens)
    if as_json:
        print(json.dumps(report | {"contexts": [asdict(measurement) for measurement in measurements]}, indent=2))
        return
    output = console.stdout()
    said = f"{report['model']}, {report['parameters']:,} parameters, {report['dtype']}, {report['device']}"
    output.print(said + (f", decoding compiled in {report['compile_seconds']:.1f} s" if compiled else ""))
    output.print(_table(measurements))


@dataclass(frozen=True)
class KernelChoice:
    """Which version of a kernel runs in a step, in how many calls, and why the others do not."""

    kernel: str
    where: str
    version: str
    calls: int
    others: dict[str, str]


def kernels_of(decoder: "Decoder", prompt: int = 64) -> list[KernelChoice]:
    """Every kernel that a prompt and a decoded token call. Both are run to find out, and the token once more with
    kernels in C++, as in a compiled step."""
    import torch

    from kvell import kernels
    from kvell.kernels.table import NotedChoice, noted_choices

    cache = decoder.make_cache()
    tokens = torch.zeros(1, prompt, dtype=torch.long, device=decoder.device)
    found: list[KernelChoice] = []

    def note(where: str, choices: list[NotedChoice]) -> None:
        calls: dict[tuple[str, str], list[NotedChoice]] = {}
        for choice in choices:
            calls.setdefault((choice.kernel, choice.taken), []).append(choice)
        found.extend(
            KernelChoice(name, where, version, len(made), made[0].others) for (name, version), made in calls.items()
        )

    with noted_choices() as choices:
        decoder(tokens, cache=cache, last_only=True)
    note("prompt", choices)
    with noted_choices() as choices:
        decoder(tokens[:, :1], cache=cache)
    note("token", choices)
    if decoder.device.type == "cpu":
        try:
            with noted_choices() as choices, kernels.use("cpp"):
                decoder(tokens[:, :1], cache=cache)
        except InputError as error:  # no compiler, say
            warnings.warn(f"no kernel in C++ runs here: {error}", stacklevel=1)
        else:
            note("token, by C++", choices)
    return found


def _kernel_table(choices: Sequence[KernelChoice]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("kernel", "step", "version", "calls", "why not the others"):
        table.add_column(title, justify="right" if title == "calls" else "left")
    for choice in choices:
        others = "; ".join(f"{name}: {reason}" for name, reason in choice.others.items())
        table.add_row(choice.kernel, choice.where, choice.version, str(choice.calls), others)
    return table


def parse_context(text: str) -> int:
    """4096 or 4K; 1M is 1,048,576. InputError for anything else, and for less than 1."""
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise InputError(f"context {text!r} is no number of tokens: write 4096 or 4K")
    return int(digits) * scale


def measure(
    decoder: "Decoder", contexts: Sequence[int], new_tokens: int, repeats: int, on_tokens: Any
) -> list[Measurement]:
    """Rising contexts, so that each one's peak is its own. What touches every weight first does not count."""
    import torch

    from kvell.generation.generate import default_prefill_chunk

    on_device, chunk = decoder.device.type == "cuda", default_prefill_chunk(decoder.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, contexts[-1] + new_tokens), generator=generator)
    ids = ids.to(decoder.device)
    done = 0
    found = []
    with torch.inference_mode():
        cache = decoder.make_cache()
        for piece in ids[:, : WARM_UP + 1].split(WARM_UP, dim=1):
            decoder(piece, cache=cache, last_only=True)
        for context in contexts:
            firsts, steps = [], []
            for _ in range(repeats):
                cache = decoder.make_cache()
                start = perf_counter()
                for piece in ids[:, :context].split(chunk, dim=1):
                    logits = decoder(piece, cache=cache, last_only=True)
                    on_tokens(done + cache.lengths[0])
                logits.argmax().item()
                firsts.append(perf_counter() - start)
                done += context
                for place in range(context, context + new_tokens):
                    start = perf_counter()
                    decoder(ids[:, place : place + 1], cache=cache, last_only=True).argmax().item()
                    steps.append(perf_counter() - start)
            first, step = median(firsts), median(steps)
            found.append(
                Measurement(
                    context=context,
                    seconds_to_first_token=first,
                    prefill_tokens_per_second=context / first,
                    seconds_per_token=step,
                    decode_tokens_per_second=1 / step,
                    cache_bytes=cache.nbytes,
                    peak_bytes=torch.cuda.max_memory_allocated() if on_device else peak_resident_bytes(),
                )
            )
    return found


def _table(measurements: Sequence[Measurement]) -> "Table":
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("context", "to first token", "prefill", "decode", "a token", "cache", "peak memory"):
        table.add_column(title, justify="right")
    for one in measurements:
        table.add_row(
            f"{one.context:,}",
            f"{one.seconds_to_first_token:.3f} s",
            f"{one.prefill_tokens_per_second:,.0f} tokens/s",
            f"{one.decode_tokens_per_second:,.1f} tokens/s",
            f"{1000 * one.seconds_per_token:.2f} ms",
            decimal(one.cache_bytes),
            decimal(one.peak_bytes),
        )
    return table
