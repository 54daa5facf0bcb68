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

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from kvell.cache import StreamSpec
from kvell.kernels.convolution import convolved_heads
from kvell.layers.cost import Cost, Technique, Weight, Work, linear, together, vector
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.key_values import KeyValueAttention, unlike
from kvell.layers.linear import Linear
from kvell.layers.part import Part, Site
from kvell.layers.rotary import Rotary, check_turns

if TYPE_CHECKING:
    from kvell.step import Step


class Convolutional(Part):
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
    kv_source: NonNegativeInt | None = None
    bias: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rotary is not None and (problem := check_turns(self.rotary, self.head_dim)):
            raise ValueError(problem)
        return self

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
        """What a sequence must remember for this layer: raw rows alone where it reads another layer's keys."""
        raw = StreamSpec("query_key", self.channels, self.reach)
        if self.kv_source is not None:
            return (raw,)
        width = self.num_kv_heads * self.head_dim
        past = None if self.sliding_window is None else self.sliding_window - 1
        return (
            StreamSpec("key", width, past),
            StreamSpec("value", width, past),
            raw,
            StreamSpec("delayed_value", width // 2, 1),
        )

    def full_attention_width(self) -> int:
        """Values a token would hold if this layer kept keys and values for every token."""
        return 2 * self.num_kv_heads * self.head_dim

    def cost(self, site: Site, source: Part | None = None) -> Cost:
        """The projections and convolutions, of which all but the last are made of every token, and for each row seen
        a product of every query with its key and with its value."""
        hidden, bias = site.hidden_size, self.bias
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = [("q_proj", queries)]
        costs = list[Cost]()
        if self.kv_source is None:
            projections += [("k_proj", keys), ("v_proj_current", keys // 2), ("v_proj_delayed", keys // 2)]
            costs.append(Cost((vector("temperature", self.num_kv_heads),)))
        costs += [
            linear(name, width, hidden, "projections", bias=bias, every_token=True) for name, width in projections
        ]
        kernels = [("conv_depthwise", 1, self.depthwise_kernel), ("conv_grouped", self.head_dim, self.grouped_kernel)]
        for name, inputs, kernel in kernels:
            shape = (self.channels, inputs, kernel)
            weight = Weight(f"{name}.weight", shape, "projections", "bf16", multiplied=True, every_token=True)
            costs.append(Cost((weight, vector(f"{name}.bias", self.channels, part="projections"))))
        costs.append(linear("o_proj", hidden, queries, "projections", bias=bias))
        holder = site.index if self.kv_source is None else self.kv_source
        reads = ((holder, "key"), (holder, "value"))
        return together(costs) + Cost(works=(Work("attention", 2 * queries, most=self.sliding_window, reads=reads),))

    def heads_of_rows(self) -> int:
        """Into how many heads a cached row divides: what tensor parallelism can spread."""
        return self.num_kv_heads

    def windowed_streams(self) -> tuple[str, ...]:
        """The streams that would hold every token if the layer had no window."""
        return () if self.sliding_window is None else ("key", "value")

    def without(self, technique: Technique, site: Site) -> "Convolutional | GroupedQuery":
        """The layer without a technique that it may have; to be counted, not built. Without compression its heads
        are as many more as make them as wide as the residual."""
        if technique == "compression":
            factor = max(site.hidden_size // (self.num_heads * self.head_dim), 1)
            return GroupedQuery(
                num_heads=self.num_heads * factor,
                num_kv_heads=self.num_kv_heads * factor,
                head_dim=self.head_dim,
                rotary=self.rotary,
                sliding_window=self.sliding_window,
                kv_source=self.kv_source,
            )
        absent: dict[Technique, dict[str, Any]] = {
            "sharing": {"kv_source": None},
            "windows": {"sliding_window": None},
            "grouping": {"num_kv_heads": self.num_heads},
        }
        return self.model_copy(update=absent[technique])

    def check_source(self, source: Part) -> str | None:
        """Why this layer cannot read `source`'s keys and values, or None where it can."""
        if getattr(source, "kind", None) not in ("grouped_query", "convolutional"):
            return "which keeps no keys and values per head"
        return unlike(self, source, ("num_kv_heads", "head_dim", "rotary"))

    def describe(self) -> dict[str, object]:
        """What `kvell inspect` says of this layer."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "sliding_window": self.sliding_window,
            "kv_source": self.kv_source,
            "rotary": None if self.rotary is None else self.rotary.describe(),
            "compression": f"convolutions of {self.depthwise_kernel} and {self.grouped_kernel}",
        }


class ConvolutionalAttention(nn.Module):
    def __init__(self, config: Convolutional, site: Site) -> None:
        super().__init__()
        self.config, self.index = config, site.index
        self.attend = KeyValueAttention(
            site.index,
            config.kv_source,
            config.num_kv_heads,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
        )
        hidden, bias = site.hidden_size, config.bias
        query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, query_width, bias=bias)
        if config.kv_source is None:
            self.k_proj = Linear(hidden, key_width, bias=bias)
            self.v_proj_current = Linear(hidden, key_width // 2, bias=bias)
            self.v_proj_delayed = Linear(hidden, key_width // 2, bias=bias)
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
        y = step.apart(self.attend, query, None if value is None else key, value, wanted=wanted)
        return self.o_proj(y.flatten(1))

    def output_weights(self) -> tuple[Tensor, ...]:
        """What the block's output was last multiplied by."""
        return (self.o_proj.weight,)

    def compile_kernels(self) -> None:
        """Those in C++: else they are compiled when they are first called."""
        self.attend.compile_kernels(self.q_proj.weight.dtype, self.config.num_heads, self.config.head_dim)

    def _query_and_key(
        self, x: Float[Tensor, "T C"], step: "Step"
    ) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "T K D"]]:
        """Convolved behind the rows that every sequence remembers, joined with their means, normalised and turned;
        no keys where they are another layer's."""
        config = self.config
        own_keys, reach = config.kv_source is None, config.reach
        rows = torch.cat([self.q_proj(x), self.k_proj(x)], dim=1) if own_keys else self.q_proj(x)
        length = rows.shape[0] + reach * len(step.counts)
        laid = step.apart(self._laid, rows, shape=(length, config.channels))
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

    def _laid(self, step: "Step", _: "Step", rows: Float[Tensor, "T channels"]) -> Float[Tensor, "L channels"]:
        """Every sequence's rows behind those that its convolutions reach back to, all end to end."""
        seen = step.append(self.index, "query_key", rows)
        reach = self.config.reach
        return torch.cat([preceded(own, count + reach) for own, count in zip(seen, step.counts, strict=True)])

    def _value(self, x: Float[Tensor, "T C"], step: "Step") -> Float[Tensor, "T K D"]:
        """Half the channels from the token itself, half from the one before it in its sequence."""
        before = step.apart(self._delayed, self.v_proj_delayed(x))
        return torch.cat([self.v_proj_current(x), before], dim=1).unflatten(1, (-1, self.config.head_dim))

    def _delayed(self, step: "Step", _: "Step", own: Float[Tensor, "T width"]) -> Float[Tensor, "T width"]:
        """What the token before each makes."""
        seen = step.append(self.index, "delayed_value", own)
        nothing = self.v_proj_delayed.bias  # what the projection makes of the zeros before a sequence's beginning
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
