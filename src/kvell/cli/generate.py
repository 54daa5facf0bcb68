"""`kvell generate`: continue a prompt."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvell.cli import console
from kvell.cli.generation_report import GenerationReport
from kvell.cli.options import LENIENT
from kvell.cli.prompt import read_prompt
from kvell.errors import InputError
from kvell.hardware import set_threads

if TYPE_CHECKING:
    from kvell.generation import Piece


def generate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model's directory or Hugging Face name; without one, the bundled model.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Argument(metavar="-", help="Read the prompt from stdin.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.", metavar="TEXT")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A file that holds the prompt; - is stdin.", metavar="FILE")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate at most.")] = 64,
    parse_special_tokens: Annotated[
        bool,
        typer.Option("--parse-special-tokens", help="Take special tokens that the prompt spells for what they are."),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 always takes the most probable token. What generation_config.json says, without it; so also for "
            "the three below."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens that have this probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least this share as probable as the best.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal tokens.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text. May be repeated.", metavar="TEXT")
    ] = None,
    speculate: Annotated[
        Literal["off", "lookup", "mtp"],
        typer.Option(
            help="Guess tokens ahead, for the same text in less time: by what followed the last tokens before, "
            "or by the model's own draft block."
        ),
    ] = "off",
    drafts: Annotated[
        int | None, typer.Option(help="How many tokens to guess a step at most: 8 by lookup, 3 by mtp without it.")
    ] = None,
    released_rounding: Annotated[
        bool, typer.Option("--released-rounding", help="Round what is cached as the released inference code does.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float32 or float16; as stored without it.")] = None,
    device: Annotated[str, typer.Option(help="The device to run on.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads to compute with.")] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the decoding step first, for two to five times the speed of a small model: on a CPU up "
            "to a minute the first time, seconds later.",
        ),
    ] = False,
    lenient: Annotated[bool, LENIENT] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")
    ] = False,
) -> None:
    """Continue a prompt.

    The text goes to stdout as it comes; how long it took and what the cache holds goes to stderr.
    """
    model, from_stdin = _split_arguments(model, source)
    text = read_prompt(prompt, prompt_file, from_stdin)

    import kvell
    from kvell.bundled import bundled_model_path
    from kvell.checkpoint.loading import available_device, known_dtype, model_folder
    from kvell.decoding import check_device
    from kvell.generation import SamplingSettings, SpeculationSettings, Tokenizer, accepted_length
    from kvell.generation import generate as continue_prompt
    from kvell.planning import full_attention_nbytes

    # What is wrong with the settings is found before the weights are read, which may take minutes.
    flags = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    SamplingSettings(**given)
    speculation = SpeculationSettings(speculate, drafts)
    torch_device, torch_dtype = available_device(device), known_dtype(dtype)
    set_threads(threads)
    if compiled:
        check_device(torch_device)
        if speculate == "mtp":
            raise InputError(
                "--compile with --speculate mtp: a model that drafts decodes in steps that are not compiled"
            )
    directory = model_folder(model or bundled_model_path())
    tokenizer = Tokenizer.from_pretrained(directory)
    prompt_ids = tokenizer.encode(text, parse_special_tokens=parse_special_tokens)
    sampling = SamplingSettings(**kvell.GenerationDefaults.from_pretrained(directory).sampling() | given)

    decoder = kvell.from_pretrained(
        directory,
        dtype=torch_dtype,
        device=torch_device,
        released_rounding=released_rounding,
        strict=not lenient,
    )
    if compiled:
        with console.waiting("compiling the decoding step"):
            decoder.compile_decoding()
    cache = decoder.make_cache(max_rewind=speculation.max_drafts)
    with console.progress("prompt", len(prompt_ids)) as on_prefill:
        started = perf_counter()
        pieces = continue_prompt(
            decoder,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            **asdict(sampling),
            stop=stop or (),
            tokenizer=tokenizer,
            cache=cache,
            on_prefill=on_prefill,
            speculate=speculate,
            num_drafts=drafts,
        )
        first = next(pieces)
        prefilled = perf_counter()
    generated = list(_show(chain([first], pieces), silent=as_json))
    decode_seconds = perf_counter() - prefilled

    report = GenerationReport(
        prompt_tokens=len(prompt_ids),
        tokens=len(generated),
        token_ids=[int(piece) for piece in generated],
        text="".join(piece.text for piece in generated),
        finish_reason=generated[-1].finish_reason or "",
        seconds_to_first_token=prefilled - started,
        prefill_tokens_per_second=len(prompt_ids) / (prefilled - started),
        decode_tokens_per_second=(len(generated) - 1) / decode_seconds if len(generated) > 1 else None,
        sampling=asdict(sampling),
        suppress_tokens=list(decoder.config.suppress_tokens),
        speculate=speculate,
        accepted_length=None if speculate == "off" else accepted_length(generated),
        cache_bytes=cache.nbytes,
        full_attention_bytes=full_attention_nbytes(decoder.config, cache.lengths[0], decoder.dtype),
    )
    if as_json:
        print(report.to_json())
    else:
        console.stderr().print(report.to_table())


def _split_arguments(model: str | None, source: str | None) -> tuple[str | None, bool]:
    """The model, and whether a lone "-" asks for stdin; "-" may also stand where the model would."""
    if model == "-" and source is None:
        return None, True
    if source not in (None, "-"):
        raise InputError(f"argument {source} is not understood: a prompt is given by --prompt TEXT")
    return model, source == "-"


def _show(pieces: "Iterator[Piece]", silent: bool) -> "Iterator[Piece]":
    """Passes pieces through, writing each one's text to stdout as it comes."""
    for piece in pieces:
        if not silent:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        yield piece
    if not silent:
        print(flush=True)
