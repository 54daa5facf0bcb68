"""The compressor of compressed attention: one entry of the tokens of a window (DeepSeek V4, arXiv 2606.19348, section
2.3.1, equations 9 to 12, and 2.3.2, equations 20 to 23).

    entry_j = rotate(norm(sum_s softmax_s(Wgate x_s + bias_s) * Wkv x_s)),  s from j * ratio to (j+1) * ratio - 1

The softmax is over a window's tokens, for every channel on its own, in fp32; `bias` has a row for each place in the
window. With overlap there are two sets of channels, and entry j also sums over window j - 1: its tokens through the
first set, the window's own through the second, in one softmax. The first entry has no window before it.

What people get wrong: the entry's position is its window's FIRST token, and tokens of an unfinished window must wait
for the next step as raw rows, whatever the lengths of the chunks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kvell.cache import StreamSpec
from kvell.kernels.compressor import pooled_entries
from kvell.layers.contract import RotaryPart
from kvell.layers.cost import WeightRole
from kvell.layers.linear import Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Part, Site
from kvell.layers.precision import KeepsFp32
from kvell.layers.rotary import rotary_table

if TYPE_CHECKING:
    from kvell.step import Step

Rounding = Callable[[Tensor], Tensor]


class Compressor(Part):
    """One entry for every `ratio` tokens; with `overlap` it sums over the tokens of the window before as well."""

    ratio: Annotated[int, Field(gt=1)]
    overlap: bool = False


def entry_streams(name: str, compressor: Compressor, width: int) -> tuple[StreamSpec, StreamSpec]:
    """The entries, and the raw rows that entries to come still need: a token's values, then its gates."""
    windows = 2 if compressor.overlap else 1
    return (
        StreamSpec(name, width, stride=compressor.ratio),
        StreamSpec(f"{name}_raw", 2 * windows * width, past=windows * compressor.ratio - 1),
    )


class EntryCompressor(KeepsFp32):
    """Makes the entries of width D that a layer keeps in the stream `name`."""

    fp32: ClassVar[tuple[str, ...]] = ("position_bias",)
    weight_role: ClassVar[WeightRole] = WeightRole(
        "compressor", form="bf16", every_token=("kv_proj", "gate_proj"), added=("position_bias",)
    )

    def __init__(
        self,
        config: Compressor,
        site: Site,
        name: str,
        width: int,
        rotary: RotaryPart,
        rotary_width: int,
        rounding: Rounding | None,
    ) -> None:
        super().__init__()
        self.config, self.index, self.name, self.width = config, site.index, name, width
        self.rotary, self.rotary_width, self.rounding = rotary, rotary_width, rounding
        channels = width * (2 if config.overlap else 1)
        self.kv_proj = Linear(site.hidden_size, channels, bias=False)
        self.gate_proj = Linear(site.hidden_size, channels, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(config.ratio, channels, dtype=torch.float32))
        self.norm = RMSNorm(width, site.norm_eps)

    def forward(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T raw"]:
        """Every token's raw row: its values, then its gates."""
        return torch.cat([self.kv_proj(x), self.gate_proj(x)], dim=1)

    def entries(self, raw: Float[Tensor, "T raw"], step: "Step") -> list[Float[Tensor, "_ D"]]:
        """Every sequence's entries, those of the past and those that its new tokens complete."""
        seen = step.append(self.index, f"{self.name}_raw", raw)
        complete = [
            self._complete(rows, start, start + count)
            for rows, start, count in zip(seen, step.starts, step.counts, strict=True)
        ]
        return step.append_each(self.index, self.name, complete)

    def init_parameters(self) -> None:
        self.position_bias.zero_()

    def _complete(self, rows: Float[Tensor, "S raw"], start: int, stop: int) -> Float[Tensor, "J D"]:
        """The entries whose windows end in [start, stop); `rows` are the raw rows of the tokens before `stop`."""
        ratio = self.config.ratio
        first, last = start // ratio, stop // ratio
        if first == last:
            return rows[:0, : self.width]
        behind = 1 if self.config.overlap and first > 0 else 0  # windows before the first whose tokens it needs
        beyond = rows.shape[0] - stop  # where a token's row stands, less its position
        rows = rows[beyond + (first - behind) * ratio : beyond + last * ratio]
        assert self.norm.weight is not None
        positions = torch.arange(first, last, device=rows.device) * ratio
        cos, sin = rotary_table(self.rotary, self.rotary_width, positions, torch.float32)
        entries = pooled_entries(
            rows, self.position_bias, self.norm.weight, cos, sin, behind=behind, eps=self.norm.eps
        )
        return entries if self.rounding is None else self.rounding(entries)
