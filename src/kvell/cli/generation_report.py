"""What a generation took: for people a table, for programs JSON."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class GenerationReport:
    """The result of `kvell generate`. Rates are None where a single token leaves nothing to measure.

    `accepted_length` is how many tokens a step of the model gave, None without speculation.
    `sampling` and `suppress_tokens` are how tokens were chosen, by flags, generation_config.json and defaults.
    `full_attention_bytes` is what a cache of every layer's own keys and values would hold for as many tokens.
    """

    prompt_tokens: int
    tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    seconds_to_first_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    sampling: dict[str, float | None]
    suppress_tokens: list[int]
    speculate: str
    accepted_length: float | None
    cache_bytes: int
    full_attention_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def _described_sampling(self) -> str:
        if self.sampling["temperature"] == 0:
            return "greedy"
        return ", ".join(f"{name} {value:g}" for name, value in self.sampling.items() if value is not None)

    def to_table(self) -> "Table":
        from rich.filesize import decimal
        from rich.table import Table

        rate, length = self.decode_tokens_per_second, self.accepted_length
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        table.add_column(justify="right")
        table.add_row("tokens in", f"{self.prompt_tokens}")
        table.add_row("tokens out", f"{self.tokens} ({self.finish_reason})")
        table.add_row("time to first token", f"{self.seconds_to_first_token:.2f} s")
        table.add_row("prefill", f"{self.prefill_tokens_per_second:.1f} tokens/s")
        table.add_row("decode", "-" if rate is None else f"{rate:.1f} tokens/s")
        table.add_row("sampling", self._described_sampling())
        if self.suppress_tokens:
            table.add_row("never chosen", f"{len(self.suppress_tokens)} tokens of suppress_tokens")
        if self.speculate != "off":
            table.add_row("accepted length", "-" if length is None else f"{length:.2f} tokens/step")
        table.add_row("cache", decimal(self.cache_bytes))
        table.add_row("full attention would hold", decimal(self.full_attention_bytes))
        return table
