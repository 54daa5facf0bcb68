"""The plain residual connection: h + block(norm(h)) (He et al. 2015, arXiv 1512.03385).

A connection says what the residual is and how a block reads it and writes to it. `open` makes it of the embedded
tokens and `close` collapses it before the final norm; both are the identity here.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from kvell.layers.part import Part, Site


class PlainResidual(Part):
    """One residual stream, added to."""

    kind: Literal["plain"] = "plain"

    def build(self, site: Site) -> "PlainConnection":
        """The connection of one block."""
        return PlainConnection()

    def build_ends(self, site: Site) -> "PlainEnds":
        """What opens and closes the residual of the whole model."""
        return PlainEnds()


class PlainConnection(nn.Module):
    def read(self, h: Float[Tensor, "T C"]) -> tuple[Float[Tensor, "T C"], None]:
        """The block's input, and what `write` needs to know of this reading."""
        return h, None

    def write(self, h: Float[Tensor, "T C"], y: Float[Tensor, "T C"], reading: None) -> Float[Tensor, "T C"]:
        return h + y


class PlainEnds(nn.Module):
    def open(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
        return x

    def close(self, h: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
        return h
