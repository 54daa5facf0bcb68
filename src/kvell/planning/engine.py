"""What an engine reserves beside what the mathematics needs: why its memory is larger than a plan's.

    paged blocks        a cache is kept in blocks of b tokens, and the last one is as large as the others
    window rows         a windowed layer gets more rows than its window: a fixed number, or one for every token
    tensor parallelism  devices share a row's KV heads; where there are fewer heads than devices, heads are held twice

Each is one transformation of the stream specifications that the cache itself is made of.
"""

from dataclasses import dataclass, replace
from typing import Literal

from kvell.cache import StreamSpec, StreamSpecs, streams_nbytes
from kvell.config import ModelConfig
from kvell.errors import whole_number
from kvell.planning.formats import StorageFormat, stored_streams


@dataclass(frozen=True)
class Engine:
    """How an engine keeps its cache; the default is as Kvell does."""

    block_tokens: int = 1
    window_rows: int | Literal["full"] | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("block_tokens", "tensor_parallel", "window_rows"):
            if (value := getattr(self, name)) not in (None, "full"):
                whole_number(name, value)

    @property
    def steps(self) -> tuple[tuple[str, "Engine"], ...]:
        """The options that are not the default, one after another, each with those before it."""
        given = {name: value for name, value in vars(self).items() if value != getattr(Engine, name)}
        names = {
            "block_tokens": f"blocks of {self.block_tokens} tokens",
            "window_rows": f"{self.window_rows} rows in windowed layers",
            "tensor_parallel": f"KV heads over {self.tensor_parallel} devices",
        }
        taken = list(given)
        return tuple(
            (names[name], Engine(**{one: given[one] for one in taken[: place + 1]}))
            for place, name in enumerate(taken)
        )


def engine_nbytes(config: ModelConfig, form: StorageFormat, context: int, engine: Engine) -> int:
    """Bytes that all devices together hold for one sequence."""
    tokens = -(-context // engine.block_tokens) * engine.block_tokens
    return streams_nbytes(_engine_streams(config, stored_streams(config, form), engine), tokens, 0, form.row_dtype)


def _engine_streams(config: ModelConfig, specs: StreamSpecs, engine: Engine) -> dict[tuple[int, str], StreamSpec]:
    changed = {}
    for (index, name), spec in specs.items():
        attention = config.layers[index].attention
        past = spec.past
        if past is not None and name in attention.windowed_streams():
            if engine.window_rows is not None:
                past = None if engine.window_rows == "full" else engine.window_rows
            elif engine.block_tokens > 1:
                past = -(-past // engine.block_tokens) * engine.block_tokens
        heads = attention.heads_of_rows()
        held = -(-heads // engine.tensor_parallel) * engine.tensor_parallel
        changed[index, name] = replace(spec, past=past, width=spec.width * held // heads)
    return changed
