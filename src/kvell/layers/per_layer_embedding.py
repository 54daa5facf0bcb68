"""Per-layer embeddings (PLE; Gemma 3n and Gemma 4): every layer gets a small vector of its own for every token.

Once per step, for all L layers at once, with width P and the scaled token embeddings e:

    token   = table[id] * sqrt(P)                         (T, L, P), rows of a table that need not be in memory
    context = RMSNorm_P(Wm e * hidden_size^-0.5)          (T, L, P)
    inputs  = (context + token) / sqrt(2)

and in each layer, after its feed-forward:

    h += norm(Wp (gelu_tanh(Wg h) * inputs[layer]))

The table is most of a small model's parameters and only the rows of used tokens are read, so it may stay
memory-mapped on disk or off the accelerator. What people get wrong: dropping one of the three scales.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from kvell.cache_operation import CacheOperation
from kvell.layers.contract import TokenWise
from kvell.layers.cost import WeightRole
from kvell.layers.feed_forward import ACTIVATIONS, ActivationName
from kvell.layers.linear import Embedding, Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Part, Site
from kvell.layers.precision import rounded

if TYPE_CHECKING:
    from kvell.step import Step

# Where the table is a larger share of the model than this, loading on the CPU leaves it on disk.
MAPPED_SHARE = 0.25


def stays_on_disk(table_numbers: int, model_numbers: int, device_type: str) -> bool:
    """Whether loading leaves the table on disk unless it is told otherwise: a large one, on the CPU."""
    return device_type == "cpu" and table_numbers > model_numbers * MAPPED_SHARE


class PerLayerEmbedding(Part):
    """`width` channels for every layer and token. `vocab_size` is the table's number of rows; None is the model's.

    A table with fewer rows has none for the last token ids, which are then refused.
    """

    kind: Literal["per_layer_embedding"] = "per_layer_embedding"
    width: Annotated[int, Field(gt=0)]
    activation: ActivationName = "gelu_tanh"
    vocab_size: PositiveInt | None = None

    def rows(self, site: Site) -> int:
        """How many rows the table has."""
        return self.vocab_size or site.vocab_size

    def build_inputs(self, site: Site) -> "PerLayerInputs":
        return PerLayerInputs(self, site)

    def build(self, site: Site) -> "PerLayerInjection":
        return PerLayerInjection(self, site)


class MappedTable(nn.Module):
    """An embedding table kept outside the parameters, on the CPU, usually a view of a file on disk.

    It stays where and as it is when the model moves or changes its dtype; rows are converted once looked up.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table  # a plain attribute: neither parameter nor buffer, so that .to() leaves it alone

    def forward(self, tokens: Int[Tensor, " T"]) -> Float[Tensor, "T width"]:
        return nn.functional.embedding(tokens.to(self.table.device), self.table)

    def extra_repr(self) -> str:
        return f"{tuple(self.table.shape)}, {self.table.dtype}"


class PerLayerInputs(nn.Module):
    """Prepares the per-layer inputs of a step."""

    def __init__(self, config: PerLayerEmbedding, site: Site) -> None:
        super().__init__()
        self.width, self.num_layers = config.width, site.num_layers
        self.weight_role = WeightRole(
            "per-layer embedding",
            every_token=("projection",),
            used={"table": (1, config.rows(site))},
            parts={"table": "per-layer table"},
        )
        channels = site.num_layers * config.width
        self.table: nn.Embedding | MappedTable = Embedding(config.rows(site), channels)
        self.projection = Linear(site.hidden_size, channels, bias=False)
        self.projection_scale = site.hidden_size**-0.5
        self.norm = RMSNorm(config.width, site.norm_eps)

    def forward(self, embedded: Float[Tensor, "T C"], step: "Step") -> Float[Tensor, "T L P"]:
        shape = (-1, self.num_layers, self.width)
        if isinstance(self.table, MappedTable):
            rows = step.perform(LookUp(self.table), embedded)
        else:
            rows = self.table(step.tokens)
        token = rows.view(shape) * rounded(self.width**0.5, rows.dtype)
        context = self.norm((self.projection(embedded) * self.projection_scale).view(shape))
        return (context + token) * 2**-0.5


class LookUp(CacheOperation):
    """Looks up rows of a table outside the device's memory. It does not touch the cache, but it cannot be compiled.
    Input: the embedded tokens (T, C), for their dtype and device; result: (T, width)."""

    def __init__(self, table: MappedTable) -> None:
        self.table = table

    def __call__(self, step: "Step", wanted: "Step", embedded: Float[Tensor, "T C"]) -> Float[Tensor, "T width"]:
        return self.table(step.tokens).to(embedded)

    def result_shape(self, step: "Step", *inputs: Tensor | None) -> Sequence[int]:
        return len(step.tokens), self.table.table.shape[1]


class PerLayerInjection(TokenWise):
    """Makes one layer's share, which is added to the residual."""

    weight_role: ClassVar[WeightRole] = WeightRole("per-layer embedding")

    def __init__(self, config: PerLayerEmbedding, site: Site) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = Linear(site.hidden_size, config.width, bias=False)
        self.projection = Linear(config.width, site.hidden_size, bias=False)
        self.norm = RMSNorm(site.hidden_size, site.norm_eps)

    def forward(self, h: Float[Tensor, "T C"], inputs: Float[Tensor, "T P"]) -> Float[Tensor, "T C"]:
        return self.norm(self.projection(self.activation(self.gate_proj(h)) * inputs))

    def output_weights(self) -> tuple[Tensor, ...]:
        """The norm's: as of a block (layers/contract.py)."""
        assert self.norm.weight is not None
        return (self.norm.weight,)
