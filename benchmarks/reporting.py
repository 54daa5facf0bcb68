"""Figures as tables, goals as lines that say whether they are met, and both as JSON."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """A figure and its limit: `at least` or `at most`. A figure of None was not measured, and `reason` says why."""

    number: int
    name: str
    figure: float | None
    bound: Literal["at least", "at most"]
    limit: float
    unit: str = "x"
    reason: str = ""

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        if math.isnan(self.figure):
            return False
        return self.figure >= self.limit if self.bound == "at least" else self.figure <= self.limit

    def line(self) -> str:
        wanted = f"{self.bound} {_number(self.limit)}{_unit(self.unit)}"
        if self.figure is None:
            return f"goal {self.number}, {self.name}: open ({wanted}; {self.reason or 'not measured'})"
        said = f"{_number(self.figure)}{_unit(self.unit)}"
        if self.met:
            return f"goal {self.number}, {self.name}: met ({said}, {wanted})"
        away = abs(self.figure - self.limit) / self.limit if self.limit else math.inf
        side = "below" if self.bound == "at least" else "above"
        because = f"; {self.reason}" if self.reason else ""
        return f"goal {self.number}, {self.name}: not met ({said}, {away:.0%} {side} {wanted}{because})"


@dataclass
class Section:
    """What one benchmark found: tables to read, goals, and everything it measured."""

    title: str
    tables: list[str]
    goals: list[Goal]
    figures: dict[str, Any]
    notes: list[str]

    def markdown(self) -> str:
        goals = [f"- {goal.line()}" for goal in self.goals]
        parts = [f"## {self.title}", *self.tables, *self.notes, "\n".join(goals)]
        return "\n\n".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        goals = [asdict(goal) | {"met": goal.met} for goal in self.goals]
        return {"title": self.title, "goals": goals, "notes": self.notes, "figures": self.figures}


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it stands; all columns but the first to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]

    def written(line: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths)) + "|"
    return "\n".join([written(lines[0]), rule, *(written(line) for line in lines[1:])])


def seconds(value: float | None) -> str:
    """As milliseconds below a second."""
    if value is None:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.3g} MiB" if value < 999 * 2**20 else f"{value / 2**20:.0f} MiB"


def flops(value: float) -> str:
    """In thousands, millions ... of floating-point operations."""
    power = min(int(math.log10(value) // 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {['-', 'K', 'M', 'G', 'T', 'P'][power]}".removesuffix(" -")


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def write_results(folder: Path, name: str, sections: Sequence[Section], machine: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "sections": [section.as_json() for section in sections]}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    described = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
    text = "\n\n".join([f"Machine: {described}.", *(section.markdown() for section in sections)])
    (folder / f"{name}.md").write_text(text + "\n")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _unit(unit: str) -> str:
    return unit if unit in ("x", "") else f" {unit}"
