"""Residual connections of one stream.

    plain    h + y                                        (He et al. 2015, arXiv 1512.03385)
    scaled   (y + b1) * s1 + (h + b2) * s2, h in fp32     (ZAYA1, arXiv 2605.05365)

A connection says what the residual is and how a block reads it and writes to it: `read` gives the block's input and
what `write` needs to know of that reading. `open` makes the residual of the embedded tokens and `close` collapses it
before the final norm. A model has one kind of connection; hyper_connections.py has the one with several streams.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvell.layers.contract import ConnectionModule, ConnectionPart, EndsModule
from kvell.layers.cost import WeightRole
from kvell.layers.part import Site


class PlainResidual(ConnectionPart):
    """One residual stream, added to."""

    kind: Literal["plain"] = "plain"

    def build(self, site: Site, block: int) -> "PlainConnection":
        return PlainConnection()

    def build_ends(self, site: Site) -> "PlainEnds":
        return PlainEnds()

    def describe(self) -> str:
        return "plain residual"


class ScaledResidual(ConnectionPart):
    """One fp32 residual stream; it and what is added to it are shifted and scaled per channel."""

    kind: Literal["scaled"] = "scaled"

    def build(self, site: Site, block: int) -> "ScaledConnection":
        return ScaledConnection(site)

    def build_ends(self, site: Site) -> "ScaledEnds":
        return ScaledEnds(site)

    def describe(self) -> str:
        return "scaled fp32 residual"


class PlainConnection(ConnectionModule):
    def read(self, h: Float[Tensor, "T C"]) -> tuple[Float[Tensor, "T C"], None]:
        return h, None

    def write(self, h: Float[Tensor, "T C"], y: Float[Tensor, "T C"], reading: None) -> Float[Tensor, "T C"]:
        return h + y


class PlainEnds(EndsModule):
    def open(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
        return x

    def close(self, h: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
        return h


class ScaledConnection(ConnectionModule):
    weight_role: ClassVar[WeightRole] = WeightRole("connection")

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.output_scale, self.residual_scale = (nn.Parameter(torch.ones(site.hidden_size)) for _ in range(2))
        self.output_bias, self.residual_bias = (nn.Parameter(torch.zeros(site.hidden_size)) for _ in range(2))

    def read(self, h: Float[Tensor, "T C"]) -> tuple[Float[Tensor, "T C"], None]:
        """The residual in the weights' dtype."""
        return h.to(self.output_scale.dtype), None

    def write(self, h: Float[Tensor, "T C"], y: Float[Tensor, "T C"], reading: None) -> Float[Tensor, "T C"]:
        return (y + self.output_bias) * self.output_scale + (h + self.residual_bias) * self.residual_scale


class ScaledEnds(EndsModule):
    weight_role: ClassVar[WeightRole] = WeightRole("connection")

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(site.hidden_size))
        self.bias = nn.Parameter(torch.zeros(site.hidden_size))

    def open(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
        return ((x + self.bias) * self.scale).float()

    def close(self, h: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
        return h.to(self.scale.dtype)
