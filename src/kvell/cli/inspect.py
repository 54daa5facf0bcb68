"""`kvell inspect`: a model's config resolved, layer by layer."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvell.cli import console
from kvell.cli.options import LENIENT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvell.config import LayerConfig, ModelConfig

COLUMNS = (
    "layer",
    "attention",
    "query heads",
    "KV heads",
    "head width",
    "window",
    "compression",
    "reads KV of",
    "rotary",
    "feed-forward",
    "parameters",
)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's directory, its config.json, a YAML file, or a built-in name such as gemma-4-e2b."
        ),
    ],
    lenient: Annotated[bool, LENIENT] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show every layer of a model resolved, its parameters, and the streams its cache holds. Loads no weights."""
    from kvell.config import ModelConfig

    description = describe(ModelConfig.from_pretrained(model, strict=not lenient))
    if as_json:
        print(json.dumps(description, indent=2))
        return
    output = console.stdout()
    print_layers(output, model, description)
    output.print(_grid([("stream", "rows kept", "width", "layers"), *_stream_rows(description["streams"])]))


def print_layers(output: "Console", model: str, description: dict[str, Any]) -> None:
    """An overview of a model, and a table of its layers."""
    output.print(_overview(model, description), "")
    rows = [_layer_row(layer) for layer in description["layers"]]
    if description["draft"] is not None:
        rows.append(("draft", *_layer_row(description["draft"])[1:]))
    output.print(_grid([COLUMNS, *rows]), "")


def describe(config: "ModelConfig") -> dict[str, Any]:
    """The facts of a config as plain data, one entry per layer and one per stream."""
    import torch

    from kvell.checkpoint import build_empty

    model = build_empty(config, torch.bfloat16)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        parts[part] = parts.get(part, 0) + parameter.numel()
    layers = [_describe_layer(index, layer, parts[f"layers.{index}"]) for index, layer in enumerate(config.layers)]
    draft = None
    if config.draft is not None:
        draft = _describe_layer(config.num_layers, config.draft.layer, parts["draft_block"])
    streams = [
        {"layer": index, "name": spec.name, "width": spec.width, "past_rows": spec.past, "stride": spec.stride}
        for (index, _), spec in {**config.streams(), **config.draft_streams()}.items()
    ]
    return {
        "family": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_positions": config.max_positions,
        "connection": config.connection.describe(),
        "parameters": model.num_parameters(),
        "parameters_by_part": {name: count for name, count in parts.items() if not name.startswith("layers.")}
        | {"layers": sum(count for name, count in parts.items() if name.startswith("layers."))},
        "layers": layers,
        "draft": draft,
        "streams": streams,
    }


def _describe_layer(index: int, layer: "LayerConfig", parameters: int) -> dict[str, Any]:
    return {
        "layer": index,
        "attention": layer.attention.kind,
        **asdict(layer.attention.describe()),
        "feed_forward": layer.feed_forward.describe(),
        "parameters": parameters,
    }


def _overview(model: str, description: dict[str, Any]) -> "Table":
    rows = [
        ("model", model),
        ("family", description["family"] or "kvell"),
        ("parameters", f"{description['parameters']:,}"),
        *((f"  {part}", f"{count:,}") for part, count in description["parameters_by_part"].items()),
        ("residual", description["connection"]),
        ("hidden size", str(description["hidden_size"])),
        ("vocabulary", f"{description['vocab_size']:,}"),
        ("positions", f"{description['max_positions']:,}"),
    ]
    return _grid(rows, header=False)


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(layer["layer"]),
        layer["attention"].replace("_", " "),
        str(layer["num_heads"]),
        str(layer["num_kv_heads"]),
        str(layer["head_dim"]),
        "full" if layer["sliding_window"] is None else str(layer["sliding_window"]),
        layer["compression"] or "none",
        "own" if layer["kv_source"] is None else f"layer {layer['kv_source']}",
        layer["rotary"] or "none",
        layer["feed_forward"],
        f"{layer['parameters']:,}",
    )


def _stream_rows(streams: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Streams alike in all but their layer stand in one row."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for stream in streams:
        kept = "all" if stream["past_rows"] is None else f"last {stream['past_rows']}"
        kept += "" if stream["stride"] == 1 else f", one every {stream['stride']} tokens"
        groups.setdefault((stream["name"], kept, str(stream["width"])), []).append(stream["layer"])
    return [(*group, " ".join(map(str, layers))) for group, layers in groups.items()]


def _grid(rows: Sequence[tuple[str, ...]], *, header: bool = True) -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=header, pad_edge=False, header_style="bold")
    for title in rows[0]:
        numeric = title in ("layer", "query heads", "KV heads", "head width", "parameters", "width")
        table.add_column(title, justify="right" if header and numeric else "left")
    for row in rows[1:] if header else rows:
        table.add_row(*row)
    return table
