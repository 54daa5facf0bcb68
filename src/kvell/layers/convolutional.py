"""Compressed convolutional attention (CCA; Figliolia et al. 2025, arXiv 2510.04476; ZAYA1, arXiv 2605.05365).

Attention as a whole happens in a narrow space: H query and K KV heads of width D, with H * D well below the hidden
size C. A short causal convolution and a mean between queries and keys make up for it. With x_t a token's input:

    q, k    = Wq x, Wk x                                     H * D and K * D channels
    c       = conv_grouped(conv_depthwise([q; k]))           causal, kernels of 2; the second mixes within a head
    m_q     = (q + k of its group) / 2,   m_k = mean of its group's m_q
    query   = normalised(c_q + m_q),      key = normalised(c_k + m_k) * temperature of the KV head
    value_t = [Wv1 x_t; Wv2 x_(t-1)]                         half the channels come from the token before
    y       = Wo attention(rotate(query), rotate(key), value)

`normalised` divides by the L2 norm and multiplies by sqrt(D). A layer with `kv_source` reads the keys and values of
an earlier layer (key_values.py): it convolves its queries alone, and in place of m_q stands q itself.

What a sequence must remember besides keys and values: the last rows of [q; k] BEFORE the convolution, as many as it
looks back on (2), and the last delayed half of a value. What people get wrong: the state of a chunk shorter than the
kernels (rows shift, they are not replaced), and the beginning: zeros stand before the first convolution only, so the
second one sees its bias there. Nothing but a sequence's own rows ever enters the convolution.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from kvell.cache import StreamKey, StreamSpec
from kvell.cache_operation import CacheOperation
from kvell.kernels.convolution import convolved_heads
from kvell.layers.contract import AttentionDescription, AttentionModule, AttentionPart
from kvell.layers.cost import Technique, WeightRole
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.key_values import KeyValueAttention, KeyValuePart, KeyValueSource
from kvell.layers.linear import Linear
from kvell.layers.part import Site
from kvell.layers.rotary import Rotary

if TYPE_CHECKING:
    from kvell.step import Step


class Convolutional(KeyValuePart):
    """A CCA layer. `depthwise_kernel` and `grouped_kernel` count the token itself.

    `sliding_window` counts it too; None sees everything.
    """

    kind: Literal["convolutional"] = "convolutional"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    sliding_window: PositiveInt | None = None
    rotary: Rotary | None
    depthwise_kernel: PositiveInt = 2
    grouped_kernel: PositiveInt = 2
    kv_source: KeyValueSource = None
    bias: bool = False

    @property
    def channels(self) -> int:
        """Channels that are convolved: those of all heads that the layer makes."""
        return (self.num_heads + self.own_kv_heads) * self.head_dim

    @property
    def own_kv_heads(self) -> int:
        """KV heads that the layer makes itself."""
        return self.num_kv_heads if self.kv_source is None else 0

    @property
    def reach(self) -> int:
        """How many rows before a token its convolution sees."""
        return self.depthwise_kernel + self.grouped_kernel - 2

    def build(self, site: Site) -> "ConvolutionalAttention":
        return ConvolutionalAttention(self, site)

    def streams(self) -> tuple[StreamSpec, ...]:
        """Keys and values where they are the layer's own, and the raw rows that its convolutions look back on."""
        raw = StreamSpec("query_key", self.channels, self.reach)
        if self.kv_source is not None:
            return (raw,)
        return (*super().streams(), raw, StreamSpec("delayed_value", self.num_kv_heads * self.head_dim // 2, 1))

    def without(self, technique: Technique, site: Site) -> AttentionPart:
        """Without compression its heads are as many more as make them as wide as the residual."""
        if technique != "compression":
            return super().without(technique, site)
        factor = max(site.hidden_size // (self.num_heads * self.head_dim), 1)
        return GroupedQuery(
            num_heads=self.num_heads * factor,
            num_kv_heads=self.num_kv_heads * factor,
            head_dim=self.head_dim,
            rotary=self.rotary,
            sliding_window=self.sliding_window,
            kv_source=self.kv_source,
        )

    def describe(self) -> AttentionDescription:
        compression = f"convolutions of {self.depthwise_kernel} and {self.grouped_kernel}"
        return replace(super().describe(), compression=compression)


class ConvolutionalAttention(AttentionModule):
    # All but the last projection make what later tokens' convolutions look back on.
    weight_role: ClassVar[WeightRole] = WeightRole(
        "projections",
        every_token=("q_proj", "k_proj", "v_proj_current", "v_proj_delayed", "conv_depthwise", "conv_grouped"),
        bf16=("conv_depthwise", "conv_grouped"),
        parts={"temperature": "norms"},
    )

    def __init__(self, config: Convolutional, site: Site) -> None:
        super().__init__()
        self.config, self.index = config, site.index
        self.attend = KeyValueAttention(config, site.index, scale=config.head_dim**-0.5)
        self.lay_behind = LayBehindPast((site.index, "query_key"), config.reach)
        hidden, bias = site.hidden_size, config.bias
        query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, query_width, bias=bias)
        if config.kv_source is None:
            self.k_proj = Linear(hidden, key_width, bias=bias)
            self.v_proj_current = Linear(hidden, key_width // 2, bias=bias)
            self.v_proj_delayed = Linear(hidden, key_width // 2, bias=bias)
            self.delay = DelayByOne((site.index, "delayed_value"), self.v_proj_delayed)
            self.temperature = nn.Parameter(torch.ones(config.num_kv_heads))
        channels, heads = config.channels, config.num_heads + config.own_kv_heads
        self.conv_depthwise = nn.Conv1d(channels, channels, config.depthwise_kernel, groups=channels)
        self.conv_grouped = nn.Conv1d(channels, channels, config.grouped_kernel, groups=heads)
        self.o_proj = Linear(query_width, hidden, bias=bias)

    def forward(self, x: Float[Tensor, "T C"], step: "Step", wanted: "Step | None" = None) -> Float[Tensor, "W C"]:
        """`wanted` narrows the queries to some of the step's tokens: W = T without it."""
        config = self.config
        query, key = self._query_and_key(x, step)
        value = self._value(x, step) if config.kv_source is None else None
        if wanted is not None:
            query = wanted.select(query)
        y = step.perform(self.attend, query, None if value is None else key, value, wanted=wanted)
        return self.o_proj(y.flatten(1))

    def output_weights(self) -> tuple[Tensor, ...]:
        return (self.o_proj.weight,)

    def compile_kernels(self) -> None:
        """Those in C++: else they are compiled when they are first called."""
        self.attend.compile_kernels(self.q_proj.weight.dtype)

    def _query_and_key(
        self, x: Float[Tensor, "T C"], step: "Step"
    ) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "T K D"]]:
        """Convolved behind the rows that every sequence remembers, joined with their means, normalised and turned;
        no keys where they are another layer's."""
        config = self.config
        own_keys = config.kv_source is None
        rows = torch.cat([self.q_proj(x), self.k_proj(x)], dim=1) if own_keys else self.q_proj(x)
        laid = step.perform(self.lay_behind, rows)
        cos, sin = None, None
        if config.rotary is not None:
            cos, sin = step.rotary(config.rotary, config.head_dim, x.dtype)
        depthwise, grouped = self.conv_depthwise, self.conv_grouped
        assert depthwise.bias is not None
        assert grouped.bias is not None
        return convolved_heads(
            laid,
            depthwise.weight,
            depthwise.bias,
            grouped.weight,
            grouped.bias,
            self.temperature if own_keys else None,
            cos,
            sin,
            step.counts,
        )

    def _value(self, x: Float[Tensor, "T C"], step: "Step") -> Float[Tensor, "T K D"]:
        """Half the channels from the token itself, half from the one before it in its sequence."""
        before = step.perform(self.delay, self.v_proj_delayed(x))
        return torch.cat([self.v_proj_current(x), before], dim=1).unflatten(1, (-1, self.config.head_dim))


class LayBehindPast(CacheOperation):
    """Every sequence's raw rows behind those that its convolutions reach back to, all end to end. Input: the rows
    (T, channels); result: (L, channels), L = T + reach * sequences."""

    def __init__(self, stream: StreamKey, reach: int) -> None:
        self.streams, self.reach = (stream,), reach

    def __call__(
        self, step: "Step", wanted: "Step", rows: Float[Tensor, "T channels"]
    ) -> Float[Tensor, "L channels"]:
        seen = step.append(*self.streams[0], rows)
        return torch.cat([preceded(own, n + self.reach) for own, n in zip(seen, step.counts, strict=True)])

    def result_shape(self, step: "Step", *inputs: Tensor | None) -> Sequence[int]:
        (rows,) = inputs
        assert rows is not None
        return rows.shape[0] + self.reach * len(step.counts), rows.shape[1]


class DelayByOne(CacheOperation):
    """What a projection made of the token before each. Input and result: (T, width)."""

    def __init__(self, stream: StreamKey, projection: Linear) -> None:
        self.streams, self.projection = (stream,), projection

    def __call__(self, step: "Step", wanted: "Step", own: Float[Tensor, "T width"]) -> Float[Tensor, "T width"]:
        seen = step.append(*self.streams[0], own)
        nothing = self.projection.bias  # what it makes of the zeros before a sequence's beginning
        return torch.cat([preceded(s, n + 1, nothing)[:-1] for s, n in zip(seen, step.counts, strict=True)])


def preceded(
    seen: Float[Tensor, "S width"], count: int, nothing: Float[Tensor, " width"] | None = None
) -> Float[Tensor, "count width"]:
    """The last `count` of the rows seen; before the beginning stand rows of `nothing`, zeros without it."""
    missing = count - len(seen)
    if missing <= 0:
        return seen[-count:]
    if nothing is None:
        return F.pad(seen, (0, 0, missing, 0))
    return torch.cat([nothing.expand(missing, -1), seen])
