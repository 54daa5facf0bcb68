"""The registry: every technique is one file, and joins here.

A part of a kind in these unions can stand in any layer of any config, and is covered by the property tests.
"""

from typing import Annotated

from pydantic import Field

from kvell.layers.compressed import Compressed
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import DenseBesideExperts, MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnections
from kvell.layers.residual import PlainResidual, ScaledResidual

Attention = Annotated[GroupedQuery | Convolutional | Compressed, Field(discriminator="kind")]
FeedForward = Annotated[GatedMLP | MixtureOfExperts | DenseBesideExperts, Field(discriminator="kind")]
Connection = Annotated[PlainResidual | ScaledResidual | HyperConnections, Field(discriminator="kind")]
