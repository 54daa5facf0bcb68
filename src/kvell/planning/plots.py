"""Plots of plans, png or svg: cache or decode cost against context, and the waterfall of what saves.

They are meant for print: lines differ in dash and marker as well as in colour. Needs matplotlib (the extra `plot`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvell.errors import InputError
from kvell.planning.plan import Plan
from kvell.planning.what_if import Waterfall

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
# A palette that the colour-blind can tell apart (Okabe and Ito 2008), dark enough for paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "os^Dv*x"


def draw_cache(plans: Sequence[Plan], path: str | Path) -> None:
    """Bytes held against context, both logarithmic."""
    _draw_lines(plans, path, lambda plan: plan.cache_bytes, f"cache of {_sequences(plans[0])}, bytes", "B")


def draw_decode(plans: Sequence[Plan], path: str | Path) -> None:
    """FLOPs of a decoded token against context, both logarithmic."""
    _draw_lines(plans, path, lambda plan: plan.flops_per_token, "FLOPs of a decoded token", "FLOP")


def draw_waterfall(fall: Waterfall, title: str, path: str | Path) -> None:
    """From every token's keys in every layer down to what the model holds."""
    axes, save = _figure(path)
    names = ["plain", *(saving.technique for saving in fall.savings), "the model"]
    left, drawn = float(fall.plain_bytes), [(0.0, float(fall.plain_bytes))]
    for saving in fall.savings:
        drawn.append((left - saving.saved_bytes, float(saving.saved_bytes)))
        left -= saving.saved_bytes
    drawn.append((0.0, left))
    ends = (0, len(drawn) - 1)
    for place, (bottom, height) in enumerate(drawn):
        total = place in ends
        axes.bar(place, height, bottom=bottom, width=0.6, color=COLOURS[0] if total else "white", edgecolor="black")
        if not total:
            axes.bar(place, height, bottom=bottom, width=0.6, color="none", edgecolor="0.4", hatch="///")
        label = ("" if total else "- ") + _amount(height, "B")
        axes.text(place, bottom + height + fall.plain_bytes / 80, label, ha="center", va="bottom", fontsize=9)
        if place:
            level = drawn[place - 1][0] if place - 1 not in ends else drawn[place - 1][1]
            axes.plot((place - 0.7, place - 0.3), (level, level), color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, fall.plain_bytes * 1.1)
    axes.set_ylabel("cache of one sequence")
    axes.set_title(title, fontsize=10)
    axes.yaxis.set_major_formatter(lambda value, _: _amount(value, "B"))
    save()


def title_of(model: str, plan: Plan) -> str:
    return f"{model}, {plan.context:,} tokens, {plan.dtype}"


def _draw_lines(plans: Sequence[Plan], path: str | Path, value: Callable[[Plan], int], label: str, unit: str) -> None:
    axes, save = _figure(path)
    if len({plan.context for plan in plans}) < 2:
        raise InputError("a plot against context needs a range of contexts, such as 4K..1M")
    for place, model in enumerate(dict.fromkeys(plan.model for plan in plans)):
        own = [plan for plan in plans if plan.model == model]
        axes.plot(
            [plan.context for plan in own],
            [value(plan) for plan in own],
            color=COLOURS[place % len(COLOURS)],
            linestyle=DASHES[place % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            label=Path(model).name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({plan.context for plan in plans})
    axes.set_xticks(contexts, [_tokens(context) for context in contexts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda amount, _: _amount(amount, unit))
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.grid(True, color="0.88", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, handlelength=4)
    save()


def _figure(path: str | Path) -> "tuple[Axes, Callable[[], None]]":
    """Axes to draw on, and what writes them to `path`. InputError for a format other than png and svg, without
    matplotlib, or where the file cannot be written."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a plot is written as {' or '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install kvell[plot]") from None
    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)

    def save() -> None:
        try:
            figure.savefig(path, dpi=200)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None

    return axes, save


def _sequences(plan: Plan) -> str:
    return "one sequence" if plan.batch_size == 1 else f"{plan.batch_size} sequences"


def _tokens(count: int) -> str:
    for factor, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{unit}"
    return f"{count:,}"


def _amount(value: float, unit: str) -> str:
    """0.81 GB, 2 GB, 10 GFLOP."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
