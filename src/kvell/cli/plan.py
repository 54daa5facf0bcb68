"""`kvell plan`: what a context costs, before anything is loaded.

Tables are printed first, then warnings; the plot is drawn last, so that nothing else is lost where drawing fails.
"""

import csv
import json
import sys
import warnings
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvell.cli import console, plan_tables, sizes
from kvell.cli.options import LENIENT
from kvell.errors import InputError, whole_number
from kvell.plan_changes import CHANGES, EVERY_CHANGE, check_changes

if TYPE_CHECKING:
    from kvell.config import ModelConfig
    from kvell.planning import Plan
    from kvell.planning.roofline import Device


class PlotOf(StrEnum):
    CACHE = "cache"
    DECODE = "decode"
    WATERFALL = "waterfall"


class Method(StrEnum):
    STREAMS = "streams"
    ARTICLE = "article"


# Below the options, as it stands.
EPILOG = "\b\n--what-if counts the model changed:\n" + "\n".join(
    f"  {name:<15} {words}"
    for name, words in [
        *((name, change.words) for name, change in CHANGES.items()),
        (EVERY_CHANGE, "each of these in turn"),
    ]
)

COLUMNS = (
    "model",
    "context",
    "batch_size",
    "dtype",
    "cache_bytes",
    "reserved_bytes",
    "bytes_per_token",
    "constant_bytes",
    "parameters",
    "weight_bytes",
    "resident_weight_bytes",
    "flops_per_token",
    "equivalent_fp8_flops_per_token",
    "prefill_flops",
    "read_bytes",
    "intensity",
    "peak_bytes",
    "seconds_to_first_token",
    "seconds_per_token",
)


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Each a model's directory, its config.json, a YAML file, a built-in name such as gemma-4-e2b, or a "
            "model to compare with: deepseek-v3.2, llama-3.1-8b, llama-2-7b.",
            metavar="MODEL...",
        ),
    ],
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens: 131072, 128K, or a range such as 4K..1M, each twice the one before. Without it all of a "
            "model's positions."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="How many sequences of that context.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="What weights and cache are stored in: bfloat16, float32, float16, fp8, or released: as in the "
            "family's own files and inference code."
        ),
    ] = "bfloat16",
    max_rewind: Annotated[int, typer.Option(help="How many of the newest tokens the cache can take back.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Find the longest context that fits into it, or with --context the largest batch: 24GB (24G is the "
            "same), 24GiB, or a number of bytes."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One table for all models, also of one model at one context.")
    ] = False,
    against: Annotated[str | None, typer.Option(help="A model that the first one is shown in percent of.")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="Count the model changed as well: see below. May be repeated.", metavar="CHANGE"),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="article: also the simplified formula of an article on these models, which knows no windows."
        ),
    ] = Method.STREAMS,
    block_tokens: Annotated[
        int, typer.Option(help="Add what an engine reserves that keeps its cache in blocks of so many tokens.")
    ] = 1,
    window_rows: Annotated[
        str | None, typer.Option(help="The same for an engine that gives windowed layers so many rows, or all: full.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="The same where so many devices share the KV heads.")] = 1,
    device: Annotated[
        str,
        typer.Option(
            help="The device that the model runs on: it bounds the times, and a CPU leaves a large per-layer table "
            "on disk. An unknown name lists the known ones."
        ),
    ] = "h100",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine and take it as the device.")
    ] = False,
    plot: Annotated[str | None, typer.Option(help="Draw to this file, .png or .svg; needs kvell[plot].")] = None,
    plot_of: Annotated[
        PlotOf,
        typer.Option(
            help="Over a range of contexts the cache, or a decoded token's FLOPs; waterfall: what saves how much."
        ),
    ] = PlotOf.CACHE,
    lenient: Annotated[bool, LENIENT] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")] = False,
) -> None:
    """Show what a context costs: weights, cache, FLOPs, bytes read, bounds on time. Nothing is loaded or built."""
    from kvell.planning import plan as make_plan
    from kvell.planning.engine import Engine
    from kvell.planning.references import known_config
    from kvell.planning.roofline import known_device, measured_device

    engine = Engine(block_tokens, _window_rows(window_rows), tensor_parallel)
    check_changes(what_if or [])
    configs = {name: known_config(name, strict=not lenient) for name in models}
    chosen = measured_device() if measure else known_device(device)
    lengths, batch_size = _fitting(configs, context, batch, memory, dtype, max_rewind, chosen)
    plans = [
        make_plan(config, length, batch_size, dtype, max_rewind=max_rewind, device=chosen, name=name)
        for name, config in configs.items()
        for length in lengths[name]
    ]
    other = None
    if against is not None:
        config = known_config(against, strict=not lenient)
        other = make_plan(
            config, plans[0].context, batch_size, dtype, max_rewind=max_rewind, device=chosen, name=against
        )
    if as_json:
        described = [one.to_dict() for one in [*plans, *([other] if other else [])]]
        print(json.dumps(described[0] if len(described) == 1 else described, indent=2))
    elif as_csv:
        _print_csv([*plans, *([other] if other else [])])
    else:
        _print_tables(configs, plans, other, compare, what_if or [], method, engine)
    sys.stdout.flush()
    _warn(plans)
    if plot is not None:
        _draw(plot, plot_of, configs, plans, batch_size, dtype)


def _warn(plans: "list[Plan]") -> None:
    """Each warning once, with all the models that it applies to."""
    models: dict[str, list[str]] = {}
    for one in {one.model: one for one in plans}.values():  # of a model's contexts the last, which is the longest
        for warning in one.warnings:
            models.setdefault(warning, []).append(one.model)
    for warning, concerned in models.items():
        warnings.warn(f"{', '.join(concerned)}: {warning}", stacklevel=1)


def _fitting(
    configs: "dict[str, ModelConfig]",
    context: str | None,
    batch: int,
    memory: str | None,
    dtype: str,
    max_rewind: int,
    device: "Device",
) -> tuple[dict[str, list[int]], int]:
    """Each model's contexts, and the batch: with a memory the one of them that was not given is the largest."""
    from kvell.planning import batch_that_fits, context_that_fits

    whole_number("batch", batch)
    if memory is None:
        given = None if context is None else sizes.contexts(context)
        return {name: given or [config.max_positions] for name, config in configs.items()}, batch
    room = sizes.memory(memory)
    if context is None:
        longest = {}
        for name, config in configs.items():
            length = context_that_fits(config, room, batch, dtype, max_rewind, device=device)
            said = f"{name}: {memory} hold {length:,} tokens for a batch of {batch}"
            if length == config.max_positions:
                largest = batch_that_fits(config, room, length, dtype, max_rewind, device=device)
                said = f"{name}: {memory} hold all {length:,} positions, and at that length a batch of {largest:,}"
            print(said, file=sys.stderr)
            longest[name] = [length]
        return longest, batch
    lengths = sizes.contexts(context)
    if len(configs) > 1 or len(lengths) > 1:
        raise InputError("memory and context together ask for one model's largest batch at one context")
    (name, config), length = next(iter(configs.items())), lengths[0]
    largest = batch_that_fits(config, room, length, dtype, max_rewind, device=device)
    print(f"{name}: {memory} hold a batch of {largest:,} at {length:,} tokens", file=sys.stderr)
    return {name: lengths}, largest


def _window_rows(text: str | None) -> int | Literal["full"] | None:
    if text is None:
        return None
    if text == "full":
        return "full"
    return sizes.tokens(text, "window-rows")


def _print_tables(
    configs: "dict[str, ModelConfig]",
    plans: "list[Plan]",
    other: "Plan | None",
    compare: bool,
    what_if: list[str],
    method: Method,
    engine: object,
) -> None:
    from kvell.planning.engine import Engine, engine_nbytes
    from kvell.planning.formats import storage_format

    output = console.stdout()
    contexts = {one.context for one in plans}
    if compare or len(plans) > 1:
        if len(contexts) == 1 or len(contexts) == len(plans) == len(configs):
            output.print(plan_tables.comparison_table(plans))
        else:
            output.print(plan_tables.range_table(plans, "cache"), "", plan_tables.range_table(plans, "FLOPs"))
    else:
        only = plans[0]
        output.print(plan_tables.title(only), "")
        for table in (
            plan_tables.weights_table(only),
            plan_tables.cache_table(only),
            plan_tables.groups_table(only),
            plan_tables.flops_table(only),
            plan_tables.totals_table(only),
        ):
            output.print(table, "")
    first, config = plans[0], next(iter(configs.values()))
    form = storage_format(first.dtype, config)
    if other is not None:
        output.print(plan_tables.against_table(first, other), "")
    if what_if:
        from kvell.planning.what_if import waterfall
        from kvell.planning.what_if import what_if as count

        changes = list(CHANGES) if what_if == [EVERY_CHANGE] else what_if
        counted = [count(config, change, first.context, form) for change in changes]
        output.print(plan_tables.what_if_table(first, counted), "")
        output.print(plan_tables.waterfall_table(waterfall(config, first.context, form)), "")
    if isinstance(engine, Engine) and engine.steps:
        reserved = [
            (name, first.batch_size * engine_nbytes(config, form, first.context, step)) for name, step in engine.steps
        ]
        output.print(plan_tables.engine_table(first, reserved), "")
    if method is Method.ARTICLE:
        from kvell.planning.article import article_nbytes

        formula = article_nbytes(config, first.context, batch_size=first.batch_size)
        output.print(
            f"The article's formula, one head width for all layers and no windows: {sizes.bytes_text(formula)};"
            f" the streams hold {sizes.bytes_text(first.cache_bytes)}."
        )


def _print_csv(plans: "list[Plan]") -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS)
    for one in plans:
        values = one.to_dict() | {"prefill_flops": sum(one.prefill_flops.values())}
        writer.writerow([values[column] for column in COLUMNS])


def _draw(
    path: str, what: PlotOf, configs: "dict[str, ModelConfig]", plans: "list[Plan]", batch_size: int, dtype: str
) -> None:
    from kvell.planning import plots
    from kvell.planning.formats import storage_format
    from kvell.planning.what_if import waterfall

    if what is PlotOf.WATERFALL:
        name, config = next(iter(configs.items()))
        form = storage_format(dtype, config)
        plots.draw_waterfall(waterfall(config, plans[0].context, form), plots.title_of(name, plans[0]), path)
    elif what is PlotOf.CACHE:
        plots.draw_cache(plans, path)
    else:
        plots.draw_decode(plans, path)
