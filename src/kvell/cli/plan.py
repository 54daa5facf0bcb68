"""`kvell plan`: what a context costs, before anything is loaded."""

import csv
import json
import sys
import warnings
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvell.cli import console, plan_tables, sizes
from kvell.errors import InputError, whole_number

if TYPE_CHECKING:
    from kvell.config import ModelConfig
    from kvell.planning import Plan


class PlotOf(StrEnum):
    CACHE = "cache"
    DECODE = "decode"
    WATERFALL = "waterfall"


class Method(StrEnum):
    STREAMS = "streams"
    ARTICLE = "article"


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
            help="Directories, config.json or YAML files, built-in names, or references.", metavar="MODEL..."
        ),
    ],
    context: Annotated[str | None, typer.Option(help="Tokens: 131072, 128K, or a range such as 4K..1M.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of that context.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, float16, fp8 or released.")] = "bfloat16",
    max_rewind: Annotated[int, typer.Option(help="Newest tokens that can be taken back.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(help="24GiB or 24GB: the longest context that fits; with --context the largest batch."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="One table for all models.")] = False,
    against: Annotated[str | None, typer.Option(help="A model to measure the first one by, in percent.")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="no-sharing, no-windows, no-compression, mha, gqa, all-full, plain, or all of them: all."),
    ] = None,
    method: Annotated[Method, typer.Option(help="article adds the article's simplified formula.")] = Method.STREAMS,
    block_tokens: Annotated[int, typer.Option(help="An engine's paged blocks, in tokens.")] = 1,
    window_rows: Annotated[str | None, typer.Option(help="An engine's rows per windowed layer, or full.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share the KV heads.")] = 1,
    device: Annotated[str, typer.Option(help="The device whose bounds are shown.")] = "h100",
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine instead.")] = False,
    plot: Annotated[str | None, typer.Option(help="Draw to this file, .png or .svg.")] = None,
    plot_of: Annotated[PlotOf, typer.Option(help="What to draw.")] = PlotOf.CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")] = False,
) -> None:
    """Show what a context costs: weights, cache, FLOPs, bytes read, bounds on time. Nothing is loaded or built."""
    from kvell.planning import plan as make_plan
    from kvell.planning.engine import Engine
    from kvell.planning.references import known_config
    from kvell.planning.roofline import known_device, measured_device

    engine = Engine(block_tokens, _window_rows(window_rows), tensor_parallel)
    configs = {name: known_config(name) for name in models}
    chosen = measured_device() if measure else known_device(device)
    lengths, batch_size = _fitting(configs, context, batch, memory, dtype, max_rewind)
    plans = [
        make_plan(config, length, batch_size, dtype, max_rewind=max_rewind, device=chosen, name=name)
        for name, config in configs.items()
        for length in lengths[name]
    ]
    for one in {one.model: one for one in plans}.values():  # of a model's contexts the last, which is the longest
        for warning in one.warnings:
            warnings.warn(f"{one.model}: {warning}", stacklevel=1)
    other = None
    if against is not None:
        other = make_plan(against, plans[0].context, batch_size, dtype, max_rewind=max_rewind, device=chosen)
    if plot is not None:
        _draw(plot, plot_of, configs, plans, batch_size, dtype)
    if as_json:
        described = [one.to_dict() for one in [*plans, *([other] if other else [])]]
        print(json.dumps(described[0] if len(described) == 1 else described, indent=2))
    elif as_csv:
        _print_csv([*plans, *([other] if other else [])])
    else:
        _print_tables(configs, plans, other, compare, what_if or [], method, engine)


def _fitting(
    configs: "dict[str, ModelConfig]",
    context: str | None,
    batch: int,
    memory: str | None,
    dtype: str,
    max_rewind: int,
) -> tuple[dict[str, list[int]], int]:
    """Each model's contexts, and the batch: with a memory the one of them that was not given is the largest."""
    from kvell.planning import batch_that_fits, context_that_fits

    whole_number("batch", batch)
    if memory is None:
        given = None if context is None else sizes.contexts(context)
        return {name: given or [config.max_positions] for name, config in configs.items()}, batch
    room = sizes.memory(memory)
    if context is None:
        longest = {
            name: context_that_fits(config, room, batch, dtype, max_rewind) for name, config in configs.items()
        }
        for name, length in longest.items():
            print(f"{name}: {memory} hold {length:,} tokens for a batch of {batch}", file=sys.stderr)
        return {name: [length] for name, length in longest.items()}, batch
    lengths = sizes.contexts(context)
    if len(configs) > 1 or len(lengths) > 1:
        raise InputError("memory and context together ask for one model's largest batch at one context")
    (name, config), length = next(iter(configs.items())), lengths[0]
    largest = batch_that_fits(config, room, length, dtype, max_rewind)
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
        from kvell.planning.what_if import CHANGES, waterfall
        from kvell.planning.what_if import what_if as count

        changes = [*CHANGES, "gqa"] if what_if == ["all"] else what_if
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
