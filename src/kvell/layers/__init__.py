"""The techniques, one file each. What is registered here can stand in any layer of any config, and is covered by the
property tests; `kvell.register` takes more from outside.
"""

from typing import Annotated

from kvell.layers.compressed import Compressed
from kvell.layers.contract import AttentionPart, ConnectionPart, FeedForwardPart
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import DenseBesideExperts, MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnections
from kvell.layers.registry import ATTENTIONS, CONNECTIONS, FEED_FORWARDS, register
from kvell.layers.residual import PlainResidual, ScaledResidual

for _part in (
    GroupedQuery,
    Convolutional,
    Compressed,
    GatedMLP,
    MixtureOfExperts,
    DenseBesideExperts,
    PlainResidual,
    ScaledResidual,
    HyperConnections,
):
    register(_part)

# The types of a config's fields.
Attention = Annotated[AttentionPart, ATTENTIONS]
FeedForward = Annotated[FeedForwardPart, FEED_FORWARDS]
Connection = Annotated[ConnectionPart, CONNECTIONS]
