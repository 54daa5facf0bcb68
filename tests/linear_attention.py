"""An attention from outside the package, as somebody would write one: linear attention (Katharopoulos et al. 2020,
arXiv 2006.16236, equation 9) over a window.

    phi(x) = elu(x) + 1
    y_t    = Wo sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s)        s the last `window` tokens
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from kvell.cache import StreamSpec
from kvell.cache_operation import CacheOperation
from kvell.layers.contract import AttentionDescription, AttentionModule, AttentionPart
from kvell.layers.cost import WeightRole, Work
from kvell.layers.linear import Linear
from kvell.layers.part import Part, Site
from kvell.step import Step


class LinearAttention(AttentionPart):
    """`num_heads` heads of `head_dim`; a token sees itself and `window` - 1 before it."""

    kind: Literal["linear"] = "linear"
    num_heads: PositiveInt
    head_dim: PositiveInt
    window: PositiveInt

    def build(self, site: Site) -> "LinearAttentionModule":
        return LinearAttentionModule(self, site)

    def streams(self) -> tuple[StreamSpec, ...]:
        return (StreamSpec("key_value", 2 * self.num_heads * self.head_dim, self.window - 1),)

    def works(self, site: Site, source: Part | None) -> tuple[Work, ...]:
        per_row = 2 * self.num_heads * self.head_dim
        return (Work("attention", per_row, most=self.window, reads=((site.index, "key_value"),)),)

    def describe(self) -> AttentionDescription:
        return AttentionDescription(self.num_heads, self.num_heads, self.head_dim, sliding_window=self.window)

    def full_attention_width(self) -> int:
        return 2 * self.num_heads * self.head_dim


class LinearAttentionModule(AttentionModule):
    weight_role: ClassVar[WeightRole] = WeightRole("projections", every_token=("kv_proj",))

    def __init__(self, part: LinearAttention, site: Site) -> None:
        super().__init__()
        width = part.num_heads * part.head_dim
        self.q_proj = Linear(site.hidden_size, width, bias=False)
        self.kv_proj = Linear(site.hidden_size, 2 * width, bias=False)
        self.o_proj = Linear(width, site.hidden_size, bias=False)
        self.attend = AttendLinearly(part, site.index)

    def forward(self, x: Float[Tensor, "T C"], step: Step, wanted: Step | None = None) -> Float[Tensor, "W C"]:
        rows = self.kv_proj(x)
        if wanted is not None:
            x = wanted.select(x)
        return self.o_proj(step.perform(self.attend, self.q_proj(x), rows, wanted=wanted))

    def output_weights(self) -> tuple[Tensor, ...]:
        return (self.o_proj.weight,)


class AttendLinearly(CacheOperation):
    def __init__(self, part: LinearAttention, layer: int) -> None:
        self.part, self.streams = part, ((layer, "key_value"),)

    def __call__(
        self, step: Step, wanted: Step, query: Float[Tensor, "W HD"], rows: Float[Tensor, "T HD2"]
    ) -> Float[Tensor, "W HD"]:
        seen = step.append(*self.streams[0], rows)
        return torch.cat([self._one(q, own) for q, own in zip(wanted.by_sequence(query), seen, strict=True)])

    def _one(self, query: Float[Tensor, "n HD"], rows: Float[Tensor, "S HD2"]) -> Float[Tensor, "n HD"]:
        heads = (-1, self.part.head_dim)
        q = F.elu(query.unflatten(1, heads)) + 1
        k, v = (half.unflatten(1, heads) for half in rows.chunk(2, dim=1))
        last = torch.arange(len(rows) - len(q), len(rows), device=q.device)[:, None]
        place = torch.arange(len(rows), device=q.device)
        near = (place <= last) & (place > last - self.part.window)
        weights = torch.einsum("nhd,shd->nhs", q, F.elu(k) + 1) * near[:, None]
        return torch.einsum("nhs,shd->nhd", weights / weights.sum(-1, keepdim=True), v).flatten(1)
