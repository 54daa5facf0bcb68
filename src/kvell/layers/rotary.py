"""Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864) and the variants that long contexts use.

A pair of channels (a, b) of a head at position p is turned by the angle p * f, f the pair's inverse frequency:

    a' = a * cos(p f) - b * sin(p f)
    b' = b * cos(p f) + a * sin(p f)

The pairs are (i, i + n) of a head's first channels, n the number of pairs; DeepSeek V4 has its pairs side by side,
(2i, 2i + 1), in the last channels. What differs besides is which channels turn and how fast:

    default        the first `fraction` of the head turns; f_i = theta^(-2i / rotary width)
    proportional   pairs span the whole head, (i, i + head_dim / 2), and only the first `fraction` of them turn;
                   f_i = theta^(-2i / head_dim): the denominator is the FULL head (Gemma 4's full layers)
    yarn           default, with slow pairs interpolated by `factor`, fast pairs left alone, and a ramp between
                   (Peng et al. 2023, arXiv 2309.00071, section 3.2 and 3.4)

What people get wrong: mixing up the denominators of default and proportional, and YaRN's attention factor. It is
the final scale on cos and sin, applied once; released configs state it, and the paper's value is only a default.
"""

import math
from functools import cache
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from kvell.kernels.rotation import rotate, rotate_last
from kvell.kernels.tracing import kept
from kvell.layers.contract import RotaryPart
from kvell.layers.registry import ROTARIES, register

Fraction = Annotated[float, Field(gt=0, le=1)]
Theta = Annotated[float, Field(gt=1)]


class DefaultRotary(RotaryPart):
    """Turns the first `fraction` of each head's channels."""

    kind: Literal["default"] = "default"
    theta: Theta
    fraction: Fraction = 1.0

    def describe(self) -> str:
        return _named("default", self.theta, self.fraction)

    def rotary_width(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)

    @property
    def turns_whole_heads(self) -> bool:
        return self.fraction == 1

    def inverse_frequencies(self, head_dim: int) -> Float[Tensor, " pairs"]:
        width = self.rotary_width(head_dim)
        return self.theta ** -(torch.arange(0, width, 2, dtype=torch.int64).float() / width)


class ProportionalRotary(RotaryPart):
    """Pairs span the whole head; the first `fraction` of them turn, at the frequencies of the full width."""

    kind: Literal["proportional"] = "proportional"
    theta: Theta
    fraction: Fraction = 1.0

    def describe(self) -> str:
        return _named("proportional", self.theta, self.fraction)

    def rotary_width(self, head_dim: int) -> int:
        return head_dim

    def inverse_frequencies(self, head_dim: int) -> Float[Tensor, " pairs"]:
        turning = int(self.fraction * head_dim // 2)
        exponents = torch.arange(0, 2 * turning, 2, dtype=torch.int64).float() / head_dim
        return torch.cat([self.theta**-exponents, torch.zeros(head_dim // 2 - turning)])


class YarnRotary(RotaryPart):
    """YaRN: pairs that turn less than `beta_slow` times in `original_positions` are slowed down by `factor`,
    pairs that turn more than `beta_fast` times are left, those between are blended linearly.
    """

    kind: Literal["yarn"] = "yarn"
    theta: Theta
    fraction: Fraction = 1.0
    factor: Annotated[float, Field(ge=1)]
    original_positions: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None

    def describe(self) -> str:
        return f"{_named('yarn', self.theta, self.fraction)} x{self.factor:g}"

    def rotary_width(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)

    @property
    def turns_whole_heads(self) -> bool:
        return self.fraction == 1

    def inverse_frequencies(self, head_dim: int) -> Float[Tensor, " pairs"]:
        width = self.rotary_width(head_dim)
        fast = self.theta ** (torch.arange(0, width, 2).float() / width)
        first = max(math.floor(self._pair_of(self.beta_fast, width)), 0)
        last = min(math.ceil(self._pair_of(self.beta_slow, width)), width - 1)
        ramp = (torch.arange(width // 2).float() - first) / max(last - first, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return (1.0 / (self.factor * fast)) * (1 - keep) + (1.0 / fast) * keep

    def scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def _pair_of(self, turns: float, width: int) -> float:
        """The (fractional) pair that turns `turns` times in the original positions."""
        return width * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def _named(kind: str, theta: float, fraction: float) -> str:
    return f"{kind} {theta:g}" + ("" if fraction == 1 else f" of {fraction:.0%}")


for _rotary in (DefaultRotary, ProportionalRotary, YarnRotary):
    register(_rotary)
Rotary = Annotated[RotaryPart, ROTARIES]


def check_turns(rotary: RotaryPart, head_dim: int) -> str | None:
    """Why heads of this width cannot be turned so, or None where they can."""
    if (width := rotary.rotary_width(head_dim)) < 2 or width % 2:
        return f"rotary: {rotary.describe()} turns {width} channels of a head: not pairs"
    return None


class RotaryTable(NamedTuple):
    """cos and sin of every token's angle in every pair, (T, pairs)."""

    cos: Float[Tensor, "T pairs"]
    sin: Float[Tensor, "T pairs"]

    def rotate(self, x: Float[Tensor, "T heads D"]) -> Float[Tensor, "T heads D"]:
        """Turns the first 2 x pairs channels of every head; the rest pass through."""
        return rotate(x, self.cos, self.sin)

    def rotate_last(self, x: Float[Tensor, "T heads D"]) -> Float[Tensor, "T heads D"]:
        """Turns the last 2 x pairs channels of every head, each pair side by side, in the table's dtype."""
        return rotate_last(x, self.cos, self.sin)

    def inverse(self) -> "RotaryTable":
        """The table that turns back."""
        return RotaryTable(self.cos, -self.sin)


def rotary_table(
    rotary: RotaryPart,
    head_dim: int,
    positions: Int[Tensor, " T"],
    dtype: torch.dtype,
) -> RotaryTable:
    """The table for tokens at these positions; angles in fp32 whatever `dtype` the table has."""
    # What is traced neither meets tensors from outside nor leaves its own behind.
    if torch.compiler.is_compiling() or type(positions) is not Tensor:
        with positions.device:
            frequencies = rotary.inverse_frequencies(head_dim)
    else:
        frequencies = _inverse_frequencies(rotary, head_dim, positions.device)
    angles = positions[:, None].float() * frequencies
    cos, sin, scale = angles.cos(), angles.sin(), rotary.scale()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    cos, sin = cos.to(dtype), sin.to(dtype)
    if torch.compiler.is_compiling():
        cos, sin = kept(cos), kept(sin)  # or every head would compute them again
    return RotaryTable(cos, sin)


@cache  # never dropped: recorded graphs know these tensors by their addresses
def _inverse_frequencies(rotary: RotaryPart, head_dim: int, device: torch.device) -> Float[Tensor, " pairs"]:
    """Computed on the CPU, and copied to the device once: every copy makes the host wait. Training may use what
    inference asked for first."""
    with torch.inference_mode(False), torch.device("cpu"):
        return rotary.inverse_frequencies(head_dim).to(device)
