"""Models to compare with, which Kvell counts but does not load: latent attention with an indexer (DeepSeek V3.2),
grouped-query attention (Llama 3.1 8B) and multi-head attention (Llama 2 7B). Shapes: their released configs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kvell.cache import StreamSpec
from kvell.config import LayerConfig, ModelConfig
from kvell.errors import CheckpointError
from kvell.layers.contract import AttentionDescription, AttentionModule, AttentionPart
from kvell.layers.cost import WeightRole, Work
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.indexer import Indexer
from kvell.layers.linear import Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Part, Site
from kvell.layers.rotary import DefaultRotary
from kvell.layers.routers import SigmoidRouter

if TYPE_CHECKING:
    from kvell.step import Step


class LatentAttention(AttentionPart):
    """Multi-head latent attention (MLA; DeepSeek V2, arXiv 2405.04434) whose rows an indexer picks (DeepSeek Sparse
    Attention; V3.2, arXiv 2512.02556): one latent row per token, of `rank` channels that are value and key at once
    and `rotary_width` that turn. Every head asks all of it, the projection to keys and values being part of the
    query's and the output's. It is counted, never built.
    """

    kind: Literal["latent"] = "latent"
    num_heads: int
    head_dim: int
    value_dim: int
    rotary_width: int
    query_rank: int
    rank: int
    indexer: Indexer

    def streams(self) -> tuple[StreamSpec, ...]:
        """A latent row and an indexer's row for every token."""
        return StreamSpec("latent", self.rank + self.rotary_width), StreamSpec("index", self.indexer.head_dim)

    def released_streams(self, index_form: Literal["fp4", "fp8"]) -> tuple[StreamSpec, ...]:
        """As DeepSeek's inference code stores them: FP8 with an fp32 scale per 128 channels, bf16 where it turns,
        656 bytes; the indexer's FP8 with one scale, 132 bytes."""
        latent = self.rank + 4 * (self.rank // 128) + 2 * self.rotary_width
        index = self.indexer.head_dim + 4
        return StreamSpec("latent", latent, dtype=torch.uint8), StreamSpec("index", index, dtype=torch.uint8)

    def build(self, site: Site) -> "LatentShapes":
        return LatentShapes(self, site)

    def works(self, site: Site, source: Part | None) -> tuple[Work, ...]:
        indexer = self.indexer
        per_row = self.num_heads * (2 * self.rank + self.rotary_width)
        attention = Work("attention", per_row, most=indexer.top_k, reads=((site.index, "latent"),))
        scored = partial(Work, "indexer", beyond=indexer.top_k)
        products = scored(indexer.num_heads * indexer.head_dim, reads=((site.index, "index"),), form="fp8")
        return attention, products, scored(indexer.num_heads, form="fp32")

    def full_attention_width(self) -> int:
        return self.rank + self.rotary_width

    def describe(self) -> AttentionDescription:
        return AttentionDescription(
            num_heads=self.num_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            rotary=f"{self.rotary_width} channels",
            compression=f"latent of {self.rank}, top {self.indexer.top_k}",
        )


class LatentShapes(AttentionModule):
    """The weights of latent attention, to be counted: it is never called."""

    weight_role: ClassVar[WeightRole] = WeightRole("projections", every_token=("kv_a_proj",))

    def __init__(self, config: LatentAttention, site: Site) -> None:
        super().__init__()
        hidden, heads = site.hidden_size, config.num_heads
        self.q_a_proj = Linear(hidden, config.query_rank, bias=False)
        self.q_a_norm = RMSNorm(config.query_rank, site.norm_eps)
        self.q_b_proj = Linear(config.query_rank, heads * (config.head_dim + config.rotary_width), bias=False)
        self.kv_a_proj = Linear(hidden, config.rank + config.rotary_width, bias=False)
        self.kv_a_norm = RMSNorm(config.rank, site.norm_eps)
        self.kv_b_proj = Linear(config.rank, heads * (config.head_dim + config.value_dim), bias=False)
        self.o_proj = Linear(heads * config.value_dim, hidden, bias=False)
        self.indexer = IndexerShapes(config.indexer, config.query_rank, hidden)

    def forward(self, x: Tensor, step: "Step", wanted: "Step | None" = None) -> Tensor:
        raise NotImplementedError("latent attention is counted, not run")

    def output_weights(self) -> tuple[Tensor, ...]:
        return (self.o_proj.weight,)


class IndexerShapes(nn.Module):
    """Those of its indexer, whose keys are made of every token."""

    weight_role: ClassVar[WeightRole] = WeightRole(
        "indexer", every_token=("k_proj",), bf16=("weights_proj",), parts={"k_norm": "norms"}
    )

    def __init__(self, config: Indexer, query_rank: int, hidden: int) -> None:
        super().__init__()
        self.q_proj = Linear(query_rank, config.num_heads * config.head_dim, bias=False)
        self.k_proj = Linear(hidden, config.head_dim, bias=False)
        self.weights_proj = Linear(hidden, config.num_heads, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim)


def deepseek_v32() -> ModelConfig:
    attention = LatentAttention(
        num_heads=128,
        head_dim=128,
        value_dim=128,
        rotary_width=64,
        query_rank=1536,
        rank=512,
        indexer=Indexer(num_heads=64, head_dim=128, top_k=2048),
    )
    dense = GatedMLP(intermediate_size=18432)
    mixture = MixtureOfExperts(
        num_experts=256,
        top_k=8,
        intermediate_size=2048,
        shared_intermediate_size=2048,
        router=SigmoidRouter(),
        routed_scale=2.5,
    )
    # Constructed without validation: no registered attention is latent, and this model is never run.
    layers = tuple(
        LayerConfig.model_construct(attention=attention, feed_forward=dense if index < 3 else mixture)
        for index in range(61)
    )
    return ModelConfig.model_construct(
        family="deepseek_v32", vocab_size=129_280, hidden_size=7168, max_positions=163_840, layers=layers
    )


def llama(layers: int, hidden: int, kv_heads: int, feed_forward: int, vocab: int, positions: int) -> ModelConfig:
    """Llama (arXiv 2307.09288, 2407.21783): heads of 128, no norms on queries and keys."""
    attention = GroupedQuery(
        num_heads=hidden // 128,
        num_kv_heads=kv_heads,
        head_dim=128,
        rotary=DefaultRotary(theta=500_000.0),
        query_norm=False,
        key_norm=False,
    )
    layer: Any = LayerConfig(attention=attention, feed_forward=GatedMLP(intermediate_size=feed_forward))
    return ModelConfig(vocab_size=vocab, hidden_size=hidden, max_positions=positions, layers=(layer,) * layers)


REFERENCES: dict[str, Callable[[], ModelConfig]] = {
    "deepseek-v3.2": deepseek_v32,
    "llama-3.1-8b": lambda: llama(32, 4096, 8, 14_336, 128_256, 131_072),
    "llama-2-7b": lambda: llama(32, 4096, 32, 11_008, 32_000, 4096),
}


def known_config(name: str, *, strict: bool = True) -> ModelConfig:
    """A reference by name, or whatever ModelConfig.from_pretrained finds."""
    if name in REFERENCES:
        return REFERENCES[name]()
    try:
        return ModelConfig.from_pretrained(name, strict=strict)
    except CheckpointError as error:
        if Path(name).exists():
            raise
        raise CheckpointError(f"{error}; references to compare with are {', '.join(REFERENCES)}") from error
