"""A plan for people: tables that fit 80 columns."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvell.cli.sizes import bytes_text, flops_text, seconds_text, tokens_text

if TYPE_CHECKING:
    from rich.table import Table

    from kvell.planning import Plan
    from kvell.planning.what_if import Changed, Waterfall


# Of a column: longer words about a layer go on in a second line.
WIDEST = 44


def title(plan: "Plan") -> str:
    sequences = "1 sequence" if plan.batch_size == 1 else f"{plan.batch_size} sequences"
    return f"{plan.model}: {sequences} of {tokens_text(plan.context)} tokens, {plan.dtype}"


def weights_table(plan: "Plan") -> "Table":
    rows = [
        (part.part, f"{part.numbers:,}", bytes_text(part.nbytes), "mapped" if part.mapped else "resident")
        for part in plan.weights
    ]
    resident = f"{bytes_text(plan.resident_weight_bytes)} resident"
    return grid(
        ("weights", "numbers", "bytes", ""),
        [*rows, ("all", f"{plan.parameters:,}", bytes_text(plan.weight_bytes), resident)],
    )


def cache_table(plan: "Plan") -> "Table":
    """By stream, then by group of layers, for one sequence; then the whole batch."""
    rows = []
    for stream in plan.streams:
        kept = "all" if stream.past is None else f"last {stream.past}"
        kept += "" if stream.stride == 1 else f", 1 in {stream.stride}"
        rows.append((stream.name, kept, _layers(stream.layers), bytes_text(stream.nbytes)))
    return grid(("stream, one sequence", "rows kept", "layers", "bytes"), rows)


def groups_table(plan: "Plan") -> "Table":
    rows = [
        (group.attention, str(len(group.layers)), bytes_text(group.bytes_per_token), bytes_text(group.nbytes))
        for group in plan.layer_groups
    ]
    return grid(("layers alike", "layers", "a token adds", "bytes"), rows)


def totals_table(plan: "Plan") -> "Table":
    rows = [
        ("cache held", bytes_text(plan.cache_bytes)),
        ("  a token adds", f"{plan.bytes_per_token:,.2f} B".replace(".00 B", " B")),
        ("  does not grow", f"{bytes_text(plan.constant_bytes)} a sequence"),
        ("  reserved for it", bytes_text(plan.reserved_bytes)),
        ("prefill's peak, with weights", f"{bytes_text(plan.peak_bytes)} (estimate){_too_large(plan)}"),
        ("a decoding step reads", bytes_text(plan.read_bytes)),
        ("  FLOPs a byte", f"{plan.intensity:.2f}"),
        (f"time to first token on {plan.device.name}", f"at least {seconds_text(plan.seconds_to_first_token)}"),
        (f"time per token on {plan.device.name}", f"at least {seconds_text(plan.seconds_per_token)}"),
    ]
    return grid(("", ""), rows, header=False)


def _too_large(plan: "Plan") -> str:
    device = plan.device
    return f"; {device.name} has {bytes_text(device.memory_bytes)}" if plan.peak_bytes > device.memory_bytes else ""


def flops_table(plan: "Plan") -> "Table":
    parts = list(dict.fromkeys([*plan.prefill_flops, *plan.decode_flops]))
    rows = [
        (part, flops_text(plan.decode_flops.get(part, 0)), flops_text(plan.prefill_flops.get(part, 0)))
        for part in parts
    ]
    whole = sum(plan.prefill_flops.values())
    rows += [
        ("all", flops_text(plan.flops_per_token), flops_text(whole)),
        ("with all logits", "", flops_text(plan.prefill_flops_all_logits)),
    ]
    return grid(("FLOPs, one sequence", "decoded token", "prefill"), rows)


def comparison_table(plans: Sequence["Plan"]) -> "Table":
    """Several models at one context."""
    rows = [
        (
            plan.model,
            bytes_text(plan.cache_bytes),
            bytes_text(plan.bytes_per_token),
            bytes_text(plan.weight_bytes),
            flops_text(plan.flops_per_token),
            seconds_text(plan.seconds_per_token),
        )
        for plan in plans
    ]
    first = plans[0]
    head = f"{tokens_text(first.context)} tokens, batch {first.batch_size}"
    return grid((head, "cache", "a token adds", "weights", "FLOPs/token", "a token"), rows)


def range_table(plans: Sequence["Plan"], what: str) -> "Table":
    """Contexts down, models across: `what` is "cache" or "FLOPs"."""
    models = list(dict.fromkeys(plan.model for plan in plans))
    contexts = list(dict.fromkeys(plan.context for plan in plans))
    found = {(plan.model, plan.context): plan for plan in plans}
    rows = []
    for context in contexts:
        own = [found[model, context] for model in models]
        cells = [
            bytes_text(plan.cache_bytes) if what == "cache" else flops_text(plan.flops_per_token) for plan in own
        ]
        rows.append((tokens_text(context), *cells))
    return grid(("cache" if what == "cache" else "FLOPs of a token", *models), rows)


def against_table(plan: "Plan", other: "Plan") -> "Table":
    """A plan beside a reference's, in percent of it."""
    grown = [one.bytes_per_token * one.context * one.batch_size for one in (plan, other)]
    rows = [
        ("cache that grows", *map(bytes_text, grown), _percent(*grown)),
        ("cache", *_pair(bytes_text, plan.cache_bytes, other.cache_bytes)),
        ("FLOPs of a token", *_pair(flops_text, plan.flops_per_token, other.flops_per_token)),
        (
            "  equivalent FP8",
            *_pair(flops_text, plan.equivalent_fp8_flops_per_token, other.equivalent_fp8_flops_per_token),
        ),
        ("weights", *_pair(bytes_text, plan.weight_bytes, other.weight_bytes)),
    ]
    return grid(("", plan.model, other.model, "of it"), rows)


def what_if_table(plan: "Plan", changes: Sequence["Changed"]) -> "Table":
    rows = [
        (
            one.change,
            bytes_text(one.cache_bytes),
            f"{one.cache_bytes * plan.batch_size / plan.cache_bytes:.2f}x",
            flops_text(one.flops_per_token),
        )
        for one in changes
    ]
    return grid(("what if, one sequence", "cache", "of the plan's", "FLOPs/token"), rows)


def waterfall_table(fall: "Waterfall") -> "Table":
    rows = [("every token's keys, each layer its own", bytes_text(fall.plain_bytes), "")]
    rows += [
        (f"  {one.technique}", f"- {bytes_text(one.saved_bytes)}", f"- {bytes_text(one.saved_alone_bytes)}")
        for one in fall.savings
    ]
    rows.append(("the model", bytes_text(fall.cache_bytes), ""))
    return grid(("what saves, one sequence", "in turn", "alone"), rows)


def engine_table(plan: "Plan", steps: Sequence[tuple[str, int]]) -> "Table":
    rows = [("needed", bytes_text(plan.cache_bytes), "1.00x")]
    rows += [(f"+ {name}", bytes_text(nbytes), f"{nbytes / plan.cache_bytes:.2f}x") for name, nbytes in steps]
    return grid(("an engine with", "reserves", ""), rows)


def _pair(text: Callable[[float], str], one: float, other: float) -> tuple[str, str, str]:
    return text(one), text(other), _percent(one, other)


def _percent(one: float, other: float) -> str:
    return "-" if other == 0 else f"{100 * one / other:.2f} %"


def _layers(layers: Sequence[int]) -> str:
    """0 1 2 3 as 0-3."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(text) <= 24 else f"{len(layers)} layers"


def grid(head: Sequence[str], rows: Sequence[tuple[str, ...]], *, header: bool = True) -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=header, pad_edge=False, header_style="bold")
    for place, column in enumerate(head):
        left = place == 0 or (column in ("rows kept", "layers") and head[0].startswith("stream")) or (not header)
        table.add_column(column, justify="left" if left else "right", overflow="fold", max_width=WIDEST)
    for row in rows:
        table.add_row(*row)
    return table
