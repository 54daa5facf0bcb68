"""Window + compressed attention: the last tokens as they are, everything before as compressed entries (DeepSeek V4,
arXiv 2606.19348, section 2.3).

    window only                          a layer without a compressor
    heavily compressed attention (HCA)   a compressor with a large ratio, every visible entry is attended to
    compressed sparse attention (CSA)    a compressor with a small ratio and overlapping windows; an indexer picks
                                         the entries that a query attends to

One vector per token is key and value at once, for all heads (shared-KV multi-query attention):

    c_t   = norm(Wa x_t),  q_t = rotate(rms(Wb c_t))            H heads of width D
    kv_t  = rotate(norm(Wkv x_t))                               D channels
    o_t   = rotate back(attention(q_t, [kv of the window | entries], sink))
    y_t   = Wo2 [Wo1_1 o_t,group 1; ...; Wo1_G o_t,group G]     the heads in G groups, each with its own projection

Rotary embeddings turn the last channels of a head, in fp32. As values are turned too, the output is turned back at
the query's position. A compressor makes entry j of the tokens of its window j, [j * ratio, (j + 1) * ratio):

    entry_j = rotate(norm(sum_s softmax_s(Wgate x_s + bias_s) * Wkv x_s))        softmax per channel, fp32

With overlap there are two sets of channels: entry j sums over the window before through the first set and over its
own through the second; the first entry has no window before. Entries stand at the FIRST token of their window. Query
t sees entry j if its window is complete: j < (t + 1) // ratio.

The indexer has entries of its own and scores them by relu(q . k), weighted and summed over its heads; the best
`top_k` visible ones are attended to, of equal ones the first. The choice has no gradient: `step.observed`
collects a loss that trains it (DeepSeek V3.2, arXiv 2512.02556, section 2.1): the divergence of its scores' softmax
from where the attention of all heads really goes.

A layer with `kv_source` reads the rows and the entries of an earlier layer, and has no Wkv and no compressor of its
own (cross-layer sharing, as for keys and values). It picks among those entries with an indexer of its own, takes the
picks that its source made for the same tokens (`source_picks`), or attends to all of them.

What a sequence must remember: window - 1 rows of kv, every entry, and the raw rows that entries to come still need,
ratio - 1 of them, or 2 * ratio - 1 with overlap. What people get wrong: the position of an entry, other rotary
settings for the window's keys than for the entries in layers that have both, and YaRN's attention factor (1 here).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from kvell.cache import StreamSpec
from kvell.cache_operation import CacheOperation
from kvell.kernels.compressed import attention_mass, compile_in_cpp, compressed_attention
from kvell.kernels.rounding import hadamard, round_fp4, round_fp8
from kvell.layers.compressor import Compressor, EntryCompressor, entry_streams
from kvell.layers.contract import AttentionDescription, AttentionModule, AttentionPart
from kvell.layers.cost import Technique, WeightRole, Work
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.indexer import EntryIndexer, Indexer, Questions
from kvell.layers.key_values import KEY_VALUES, KeyValueSource, unlike
from kvell.layers.linear import Linear
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Part, Site
from kvell.layers.precision import KeepsFp32
from kvell.layers.rotary import Rotary, RotaryTable

if TYPE_CHECKING:
    from kvell.step import Step

# Channels that share a scale in the released formats of keys and values, and of the indexer's.
FP8_BLOCK, FP4_BLOCK = 64, 32
# A window that holds whatever there is.
UNLIMITED = 1 << 40


class Compressed(AttentionPart):
    """A layer of window + compressed attention.

    `sliding_window` counts the token itself. `rotary` turns the last `rotary_width` channels of every head, of the
    entries and of the indexer's heads. `query_rank` is the width of c_t, `output_rank` that of each of the
    `output_groups`. The `compressor` of a layer with `kv_source` says how its source's entries were made: both must
    say the same. `released_rounding` simulates the rounding of the released inference code: keys, values and entries
    to FP8 (what is not turned, in blocks of 64), the indexer's to FP4 after a Hadamard transform.
    """

    kind: Literal["compressed"] = "compressed"
    num_heads: PositiveInt
    head_dim: PositiveInt
    sliding_window: PositiveInt
    rotary: Rotary
    rotary_width: Annotated[int, Field(gt=0, multiple_of=2)]
    query_rank: PositiveInt
    output_groups: PositiveInt = 1
    output_rank: PositiveInt
    compressor: Compressor | None = None
    indexer: Indexer | None = None
    kv_source: KeyValueSource = None
    source_picks: bool = False
    released_rounding: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.num_heads % self.output_groups:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of output_groups {self.output_groups}")
        if self.indexer is not None and self.compressor is None:
            raise ValueError("an indexer picks among compressed entries: there is no compressor")
        if self.source_picks and self.kv_source is None:
            raise ValueError("source_picks: there is no kv_source whose picks these could be")
        if self.source_picks and self.indexer is not None:
            raise ValueError("source_picks: the picks are the source's or the layer's own indexer's, not both")
        if not self.rotary.turns_whole_heads:
            raise ValueError("rotary: rotary_width says how many channels turn: give it a fraction of 1")
        for owner, width in (("head_dim", self.head_dim), ("indexer.head_dim", self._index_width)):
            if width is not None and self.rotary_width > width:
                raise ValueError(f"rotary_width {self.rotary_width} is more than {owner} {width}")
        if self.released_rounding and (problem := self._cannot_round()):
            raise ValueError(f"released_rounding: {problem}")
        return self

    def _cannot_round(self) -> str | None:
        """Why the released formats do not fit these widths, or None where they do."""
        if (plain := self.head_dim - self.rotary_width) % FP8_BLOCK:
            return f"{plain} channels that are not turned are no blocks of {FP8_BLOCK}"
        width = self._index_width
        if width is not None and (width % FP4_BLOCK or width & (width - 1)):
            return f"the indexer's {width} channels are no power of two in blocks of {FP4_BLOCK}"
        return None

    @property
    def _index_width(self) -> int | None:
        return None if self.indexer is None else self.indexer.head_dim

    def build(self, site: Site) -> "CompressedAttention":
        return CompressedAttention(self, site)

    def streams(self) -> tuple[StreamSpec, ...]:
        """What a sequence must remember for this layer: its indexer's entries alone where it reads another's rows."""
        specs: list[StreamSpec] = []
        if self.kv_source is None:
            specs.append(StreamSpec("window", self.head_dim, self.sliding_window - 1))
            if self.compressor is not None:
                specs += entry_streams("entry", self.compressor, self.head_dim)
        if self.indexer is not None and self.compressor is not None:
            specs += entry_streams("index", self.compressor, self.indexer.head_dim)
        return tuple(specs)

    def full_attention_width(self) -> int:
        """A key, which is also the value."""
        return self.head_dim

    def released_streams(self, index_form: Literal["fp4", "fp8"]) -> tuple[StreamSpec, ...]:
        """The streams as DeepSeek's inference code stores them: rows of bytes, whole windows, fp32 for what waits.

        A row or an entry is FP8 where no rotary embedding turns it, with a byte of scale per block, filled up to a
        multiple of 8, and bf16 where one does: 448 + 8 + 128 = 584 bytes. An indexer's entry is MXFP4 with a byte of
        scale per block, 64 + 4 = 68, or FP8 with one fp32 scale, 128 + 4 = 132.
        """
        plain = self.head_dim - self.rotary_width
        row = plain + 8 * -(-plain // (8 * FP8_BLOCK)) + 2 * self.rotary_width
        width = self._index_width or 0
        packed = {
            "window": row,
            "entry": row,
            "index": width // 2 + width // FP4_BLOCK if index_form == "fp4" else width + 4,
        }
        return tuple(
            replace(
                spec,
                width=packed.get(spec.name, spec.width),
                past=None if spec.past is None else spec.past + 1,
                dtype=torch.uint8 if spec.name in packed else torch.float32,
            )
            for spec in self.streams()
        )

    def works(self, site: Site, source: Part | None) -> tuple[Work, ...]:
        """For each row or entry attended to two products with every query, and the indexer's scores. `source` is the
        layer that it reads, whose picks it may take."""
        holder = site.index if self.kv_source is None else self.kv_source
        per_row = 2 * self.num_heads * self.head_dim
        works = [Work("attention", per_row, most=self.sliding_window, reads=((holder, "window"),))]
        if self.compressor is None:
            return tuple(works)
        if self.indexer is not None:
            works[:0] = self.indexer.works(self.compressor, site)
        picking = source.indexer if self.source_picks and isinstance(source, Compressed) else self.indexer
        most = None if picking is None else picking.top_k
        entries = Work("attention", per_row, stride=self.compressor.ratio, most=most, reads=((holder, "entry"),))
        return (*works, entries)

    def windowed_streams(self) -> tuple[str, ...]:
        return () if self.kv_source is not None else ("window",)

    def without(self, technique: Technique, site: Site) -> AttentionPart:
        """Without compression it keeps every token's row. Its rows serve all heads: it is without grouping only where
        it does not compress."""
        every_row = {"compressor": None, "indexer": None, "source_picks": False, "sliding_window": UNLIMITED}
        if technique == "sharing":
            return self.model_copy(update={"kv_source": None, "source_picks": False})
        if technique == "compression" and self.compressor is not None:
            return self.model_copy(update=every_row)
        if technique == "windows" and self.compressor is None:
            return self.model_copy(update=every_row)
        if technique == "grouping" and self.compressor is None:
            return GroupedQuery(
                num_heads=self.num_heads,
                num_kv_heads=self.num_heads,
                head_dim=self.head_dim,
                rotary=self.rotary,
                sliding_window=None if self.sliding_window == UNLIMITED else self.sliding_window,
                kv_source=self.kv_source,
            )
        return self

    def check_source(self, source: Part) -> str | None:
        """Why this layer cannot read `source`'s rows, entries and picks, or None where it can."""
        if not isinstance(source, Compressed):
            return "which is no compressed layer"
        if self.source_picks and source.indexer is None:
            return "which has no indexer whose picks could be taken"
        fields = ("head_dim", "rotary", "rotary_width", "compressor", "released_rounding")
        return unlike(self, source, fields)

    def rounded_as_released(self) -> "Compressed":
        return self.model_copy(update={"released_rounding": True})

    @property
    def has_own_loss(self) -> bool:
        """The indexer's."""
        return self.indexer is not None

    def describe(self) -> AttentionDescription:
        compression = None
        if self.compressor is not None:
            compression = f"1 entry per {self.compressor.ratio}" + (" overlapping" if self.compressor.overlap else "")
            if self.indexer is not None:
                compression += f", top {self.indexer.top_k}"
            elif self.source_picks:
                compression += f", those of layer {self.kv_source}"
        return AttentionDescription(
            num_heads=self.num_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            sliding_window=self.sliding_window,
            kv_source=self.kv_source,
            rotary=f"{self.rotary.describe()} of the last {self.rotary_width}",
            compression=compression,
        )


class Rows(NamedTuple):
    """What each sequence's queries may see: a list each, of the rows (S, D) of the window, of the entries (E, D), and
    of every query's picks among them, None for all visible ones."""

    window: list[Tensor]
    entries: list[Tensor]
    picks: list[Tensor | None]


class CompressedAttention(KeepsFp32, AttentionModule):
    fp32: ClassVar[tuple[str, ...]] = ("sink",)
    weight_role: ClassVar[WeightRole] = WeightRole("projections", every_token=("kv_proj",))

    def __init__(self, config: Compressed, site: Site) -> None:
        super().__init__()
        self.config = config
        hidden, heads, width = site.hidden_size, config.num_heads, config.head_dim
        self.q_a_proj = Linear(hidden, config.query_rank, bias=False)
        self.q_a_norm = RMSNorm(config.query_rank, site.norm_eps)
        self.q_b_proj = Linear(config.query_rank, heads * width, bias=False)
        self.q_norm = RMSNorm(width, site.norm_eps, weighted=False)
        if config.kv_source is None:
            self.kv_proj = Linear(hidden, width, bias=False)
            self.kv_norm = RMSNorm(width, site.norm_eps)
        self.sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        # The rows of o_a_proj are the groups' projections, one after another.
        groups, rank = config.output_groups, config.output_rank
        self.o_a_proj = Linear(heads * width // groups, groups * rank, bias=False)
        self.o_b_proj = Linear(groups * rank, hidden, bias=False)
        self.compressor = self.indexer = None
        if config.compressor is not None:
            rotary, turned = config.rotary, config.rotary_width
            rounding = partial(round_unturned, turned=turned) if config.released_rounding else None
            if config.kv_source is None:
                self.compressor = EntryCompressor(config.compressor, site, "entry", width, rotary, turned, rounding)
            if config.indexer is not None:
                rank, to_index = config.query_rank, round_index if config.released_rounding else None
                self.indexer = EntryIndexer(config.indexer, config.compressor, site, rank, rotary, turned, to_index)
        self.attend = WindowAndEntryAttention(self, config, site.index)

    def forward(self, x: Float[Tensor, "T C"], step: "Step", wanted: "Step | None" = None) -> Float[Tensor, "W C"]:
        """`wanted` narrows the queries to some of the step's tokens: W = T without it."""
        rows = self._rows(x, step) if self.config.kv_source is None else None
        raw = None if self.compressor is None else self.compressor(x)
        index_raw = None if self.indexer is None else self.indexer.compressor(x.detach())
        if wanted is not None:
            x = wanted.select(x)
        low_rank = self.q_a_norm(self.q_a_proj(x))
        turn = self._turn(wanted or step)
        query = turn.rotate_last(self.q_norm(self.q_b_proj(low_rank).unflatten(1, (-1, self.config.head_dim))))
        asked = (None, None) if self.indexer is None else self.indexer(x.detach(), low_rank.detach(), turn)
        y = step.perform(self.attend, query, rows, raw, index_raw, *asked, wanted=wanted)
        return self._project(turn.inverse().rotate_last(y))

    def output_weights(self) -> tuple[Tensor, ...]:
        return (self.o_b_proj.weight,)

    def init_parameters(self) -> None:
        self.sink.zero_()

    def compile_kernels(self) -> None:
        """Those in C++: else they are compiled when they are first called."""
        config = self.config
        index = None if config.indexer is None else (config.indexer.num_heads, config.indexer.head_dim)
        compile_in_cpp(self.q_b_proj.weight.dtype, config.num_heads, config.head_dim, index)

    def _rows(self, x: Float[Tensor, "T C"], step: "Step") -> Float[Tensor, "T D"]:
        """What each token is to later ones: its key and its value."""
        rows = self._turn(step).rotate_last(self.kv_norm(self.kv_proj(x))[:, None])[:, 0]
        return round_unturned(rows, self.config.rotary_width) if self.config.released_rounding else rows

    def _turn(self, step: "Step") -> RotaryTable:
        return step.rotary(self.config.rotary, self.config.rotary_width, torch.float32)

    def _project(self, y: Float[Tensor, "T H D"]) -> Float[Tensor, "T C"]:
        """The groups' own low-rank projections, then one over all of them."""
        groups = y.flatten(1).unflatten(1, (self.config.output_groups, -1))
        weights = self.o_a_proj.weight.unflatten(0, (self.config.output_groups, -1))
        return self.o_b_proj((groups.transpose(0, 1) @ weights.mT).transpose(0, 1).flatten(1))


class WindowAndEntryAttention(CacheOperation):
    """Attention over the window's rows and the entries. Inputs: queries; the layer's own new rows, and the raw rows
    that its entries and its indexer's are made of; what the indexer is asked."""

    def __init__(self, attention: CompressedAttention, part: Compressed, layer: int) -> None:
        self.attention, self.config, self.layer = attention, part, layer
        self.streams = tuple((layer, spec.name) for spec in part.streams())
        self.reads = None if part.kv_source is None else (part.kv_source, KEY_VALUES)

    def __call__(
        self,
        step: "Step",
        wanted: "Step",
        query: Float[Tensor, "W H D"],
        rows: Float[Tensor, "T D"] | None,
        raw: Float[Tensor, "T raw"] | None,
        index_raw: Float[Tensor, "T index_raw"] | None,
        index_query: Float[Tensor, "W H2 D2"] | None,
        index_weights: Float[Tensor, "W H2"] | None,
    ) -> Float[Tensor, "W H D"]:
        """Over the window's rows and the entries, of the past and of this step, that are the layer's own or its
        source's; `raw` and `index_raw` are what new entries are made of."""
        indexer, sink = self.attention.indexer, self.attention.sink
        seen = self._seen(rows, raw, step, wanted)
        queries, visible = wanted.by_sequence(query), self._visible(wanted)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        if indexer is not None and index_raw is not None:
            assert index_query is not None
            assert index_weights is not None
            index_entries = indexer.compressor.entries(index_raw, step)
            questions = Questions(index_query, index_weights)
            seen = seen._replace(picks=indexer.pick(questions, index_entries, visible, wanted))
            if step.observed is not None:
                masses = [
                    attention_mass(*own, sink, scale=scale, window=window)
                    for own in zip(queries, seen.window, seen.entries, visible, strict=True)
                ]
                step.observed.index_losses[self.layer] = indexer.loss(
                    questions, index_entries, visible, masses, wanted
                )
        step.leave(self.layer, KEY_VALUES, seen)
        outputs = [
            compressed_attention(*own, sink, scale=scale, window=window)
            for own in zip(queries, seen.window, seen.entries, visible, seen.picks, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _seen(
        self, rows: Float[Tensor, "T D"] | None, raw: Float[Tensor, "T raw"] | None, step: "Step", wanted: "Step"
    ) -> Rows:
        """The rows and entries of the past and of this step, the layer's own or its source's, and the source's picks
        where they are taken."""
        if self.config.kv_source is None:
            assert rows is not None
            window = step.append(self.layer, "window", rows)
            if self.attention.compressor is None or raw is None:
                entries = [row[:0] for row in window]
            else:
                entries = self.attention.compressor.entries(raw, step)
            return Rows(window, entries, [None] * len(window))
        source: Rows = step.made[self.config.kv_source, KEY_VALUES]
        if not self.config.source_picks:
            return source._replace(picks=[None] * len(source.picks))
        # The source may have picked for all tokens of a step of which only the last are left.
        counts = wanted.counts
        picks = [own if own is None else own[-count:] for own, count in zip(source.picks, counts, strict=True)]
        return source._replace(picks=picks)

    def _visible(self, step: "Step") -> Sequence[Int[Tensor, " _"]]:
        """How many entries each query sees, per sequence."""
        compressor = self.config.compressor
        return step.by_sequence(step.windows_complete(None if compressor is None else compressor.ratio))


def round_unturned(rows: Float[Tensor, "_ D"], turned: int) -> Float[Tensor, "_ D"]:
    """Rows whose channels that no rotary embedding turns are rounded to FP8, in blocks."""
    return torch.cat([round_fp8(rows[:, :-turned], FP8_BLOCK), rows[:, -turned:]], dim=1)


def round_index(rows: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
    """The indexer's queries or entries, transformed and rounded to FP4, in blocks."""
    return round_fp4(hadamard(rows), FP4_BLOCK)
