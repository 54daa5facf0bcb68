"""Grouped-query attention (GQA; Ainslie et al. 2023, arXiv 2305.13245) and what long-context models add to it.

    q = rotate(norm(Wq x)), k = rotate(norm(Wk x)), v = norm(Wv x)
    o_h = sum_s softmax_s(scale * q_h . k_s) v_s        over the s that h's token may see
    y = Wo (o * gate(x))

Query head h reads KV head h // (heads / KV heads). Each layer has its own number of query heads (layer-wise
attention budgeting, Laguna XS.2), its own head width (Gemma 4) and its own sliding window. A layer with `kv_source`
has no keys and values at all: it reads another layer's, which may also be a convolutional one; see key_values.py.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from kvell.layers.contract import AttentionModule
from kvell.layers.cost import WeightRole
from kvell.layers.key_values import KeyValueAttention, KeyValuePart, KeyValueSource
from kvell.layers.linear import Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Site
from kvell.layers.rotary import Rotary

if TYPE_CHECKING:
    from kvell.step import Step


class GroupedQuery(KeyValuePart):
    """A grouped-query attention layer.

    `sliding_window` counts the token itself: a token sees itself and window - 1 before it; None sees everything.
    `value_from_key` makes the values of the raw key projection, before its norm and rotation (Gemma 4's k_eq_v).
    `output_gate` multiplies softplus(Wg x), one value per head or per element, onto the output (Laguna).
    `scale` multiplies the scores; None is head_dim ** -0.5.
    """

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    sliding_window: PositiveInt | None = None
    rotary: Rotary | None
    kv_source: KeyValueSource = None
    query_norm: bool = True
    key_norm: bool = True
    value_norm: bool = False
    value_from_key: bool = False
    output_gate: Literal["per_head", "per_element"] | None = None
    bias: bool = False
    scale: PositiveFloat | None = None

    def build(self, site: Site) -> "GroupedQueryAttention":
        return GroupedQueryAttention(self, site)


class GroupedQueryAttention(AttentionModule):
    weight_role: ClassVar[WeightRole] = WeightRole("projections", every_token=("k_proj", "v_proj"))

    def __init__(self, config: GroupedQuery, site: Site) -> None:
        super().__init__()
        self.config = config
        hidden, heads, width = site.hidden_size, config.num_heads, config.head_dim
        self.attend = KeyValueAttention(config, site.index, scale=config.scale or width**-0.5)
        self.q_proj = Linear(hidden, heads * width, bias=config.bias)
        self.q_norm = RMSNorm(width, site.norm_eps) if config.query_norm else None
        if config.kv_source is None:
            self.k_proj = Linear(hidden, config.num_kv_heads * width, bias=config.bias)
            self.k_norm = RMSNorm(width, site.norm_eps) if config.key_norm else None
            if not config.value_from_key:
                self.v_proj = Linear(hidden, config.num_kv_heads * width, bias=config.bias)
            self.v_norm = RMSNorm(width, site.norm_eps, weighted=False) if config.value_norm else None
        if config.output_gate is not None:
            gates = heads if config.output_gate == "per_head" else heads * width
            self.g_proj = Linear(hidden, gates, bias=False)
        self.o_proj = Linear(heads * width, hidden, bias=config.bias)

    def forward(self, x: Float[Tensor, "T C"], step: "Step", wanted: "Step | None" = None) -> Float[Tensor, "W C"]:
        """`wanted` narrows the queries to some of the step's tokens: W = T without it."""
        key = value = None
        if self.config.kv_source is None:
            raw = self.k_proj(x)
            key = self._turned(self._heads(raw, self.k_norm), step)
            value = self._heads(raw if self.config.value_from_key else self.v_proj(x), self.v_norm)
        if wanted is not None:
            x = wanted.select(x)
        query = self._turned(self._heads(self.q_proj(x), self.q_norm), wanted or step)
        y = step.perform(self.attend, query, key, value, wanted=wanted)
        return self.o_proj(self._gate(x, y).flatten(1))

    def output_weights(self) -> tuple[Tensor, ...]:
        return (self.o_proj.weight,)

    def compile_kernels(self) -> None:
        """Those in C++: else they are compiled when they are first called."""
        self.attend.compile_kernels(self.q_proj.weight.dtype)

    def _turned(self, heads: Float[Tensor, "T H D"], step: "Step") -> Float[Tensor, "T H D"]:
        rotary = self.config.rotary
        return heads if rotary is None else step.rotary(rotary, self.config.head_dim, heads.dtype).rotate(heads)

    def _heads(self, x: Float[Tensor, "T HD"], norm: RMSNorm | None) -> Float[Tensor, "T H D"]:
        heads = x.unflatten(-1, (-1, self.config.head_dim))
        return heads if norm is None else norm(heads)

    def _gate(self, x: Float[Tensor, "T C"], y: Float[Tensor, "T H D"]) -> Float[Tensor, "T H D"]:
        if self.config.output_gate is None:
            return y
        gate = F.softplus(self.g_proj(x).float()).to(y.dtype)
        return y * gate.view(y.shape if self.config.output_gate == "per_element" else (*y.shape[:2], 1))
