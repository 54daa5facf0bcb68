"""What a technique promises: everything that the decoder, the cache, the planner, compiled and recorded steps and the
tests ask of a part. A class that keeps one of these contracts can be registered (registry.py), and then stands in any
layer of any config.

What has a sensible answer for most techniques is answered here; the rest is abstract. Units: widths and rows are
counted in numbers, not bytes; work in multiply-adds.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from jaxtyping import Float
from torch import Tensor, nn

from kvell.cache import StreamSpec
from kvell.layers.cost import Technique, Work
from kvell.layers.part import Part, Site

if TYPE_CHECKING:
    from kvell.step import Step


@dataclass(frozen=True)
class AttentionDescription:
    """An attention in the columns of `kvell inspect`. Numbers of heads are those of queries, and of rows cached."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    kv_source: int | None = None
    rotary: str | None = None
    compression: str | None = None


class BlockModule(nn.Module, ABC):
    """The module of an attention or a feed-forward."""

    @abstractmethod
    def output_weights(self) -> tuple[Tensor, ...]:
        """The weights that produce the block's output: its last projections (2-D, or 3-D for experts), or the weights
        of the norm behind them (1-D). Training from fresh weights starts them at zero, or small for a norm."""


class AttentionModule(BlockModule):
    @abstractmethod
    def forward(self, x: Float[Tensor, "T C"], step: "Step", wanted: "Step | None" = None) -> Float[Tensor, "W C"]:
        """`wanted` narrows the queries to some of the step's tokens: W = T without it. The cache is used only through
        operations (cache_operation.py)."""

    def compile_kernels(self) -> None:
        """Compiles the C++ kernels that this layer calls for a decoded token, except those that tracing the step
        compiles."""


class FeedForwardModule(BlockModule):
    @abstractmethod
    def forward(self, x: Float[Tensor, "T C"], step: "Step") -> Float[Tensor, "T C"]:
        """Each token by itself."""


class TokenWise(nn.Module):
    """A module that treats each token by itself, so that training may compile its `forward` on its own."""


class Block(Part, ABC):
    """A part that stands in a layer between two reads of the residual: an attention or a feed-forward."""

    kind: str

    @abstractmethod
    def build(self, site: Site) -> BlockModule:
        """The module, with fresh weights; on the meta device it must need no memory."""

    def check_source(self, source: Part) -> str | None:
        """Why this part cannot read what `source`, the same block of an earlier layer, makes; None where it can.
        Called only where a field marked `Reads` names that layer."""
        return f"which makes nothing that a {self.kind} reads"


class AttentionPart(Block):
    """An attention. A token's output does not depend on how the sequence was split into steps."""

    @abstractmethod
    def build(self, site: Site) -> AttentionModule: ...

    @abstractmethod
    def streams(self) -> tuple[StreamSpec, ...]:
        """The streams that the cache keeps for this layer and each sequence, and that a plan adds up."""

    @abstractmethod
    def works(self, site: Site, source: Part | None) -> tuple[Work, ...]:
        """The multiply-adds of one token beyond those with weights: above all for each row that it sees. `source` is
        the attention that it reads, if it reads one."""

    @abstractmethod
    def describe(self) -> AttentionDescription:
        """What `kvell inspect` says of this layer."""

    @abstractmethod
    def full_attention_width(self) -> int:
        """Numbers that a token would hold if this layer kept keys and values of its own for every token."""

    def released_streams(self, index_form: Literal["fp4", "fp8"]) -> tuple[StreamSpec, ...]:
        """The streams as the released inference code packs them; Kvell's own where it does not pack them."""
        return self.streams()

    def heads_of_rows(self) -> int:
        """Into how many heads a cached row divides: what tensor parallelism can spread."""
        return 1

    def windowed_streams(self) -> tuple[str, ...]:
        """The streams that would hold every token if the layer had no window."""
        return ()

    def without(self, technique: Technique, site: Site) -> "AttentionPart":
        """The layer without a technique that it may have. It is counted, not run."""
        return self

    def rounded_as_released(self) -> Self | None:
        """The layer with the rounding that its released inference code applies to what it caches, simulated; None
        where there is none."""
        return None

    @property
    def has_own_loss(self) -> bool:
        """Whether it has weights that the model's loss does not train, but one of its own (`Observed`)."""
        return False


class FeedForwardPart(Block):
    """A feed-forward."""

    @abstractmethod
    def build(self, site: Site) -> FeedForwardModule: ...

    @abstractmethod
    def describe(self) -> str:
        """What `kvell inspect` says of it."""


class ConnectionModule(nn.Module, ABC):
    """The connection of one block."""

    # Whether it has kernels of its own on a GPU, which are faster than what torch's compiler makes of it.
    has_gpu_kernels: ClassVar[bool] = False

    @abstractmethod
    def read(self, h: Float[Tensor, "T *C"]) -> tuple[Float[Tensor, "T C"], Any]:
        """The block's input, and what `write` needs to know of this reading."""

    @abstractmethod
    def write(self, h: Float[Tensor, "T *C"], y: Float[Tensor, "T C"], reading: Any) -> Float[Tensor, "T *C"]:
        """The residual with the block's output in it."""


class EndsModule(nn.Module, ABC):
    """Both ends of the residual: how it is made of the embedded tokens, and what the last norm reads of it."""

    @abstractmethod
    def open(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T *C"]:
        """The residual of the embedded tokens."""

    @abstractmethod
    def close(self, h: Float[Tensor, "T *C"]) -> Float[Tensor, "T C"]:
        """One vector for each token."""


class ConnectionPart(Part, ABC):
    """How blocks read the residual and write to it; one kind for a whole model."""

    kind: str

    @abstractmethod
    def build(self, site: Site, block: int) -> ConnectionModule:
        """The connection of one block; `block` counts those of the whole model."""

    @abstractmethod
    def build_ends(self, site: Site) -> EndsModule:
        """What opens the residual of the whole model and closes it."""

    @abstractmethod
    def describe(self) -> str:
        """What `kvell inspect` says of it."""

    def works(self, site: Site) -> tuple[Work, ...]:
        """The multiply-adds of one block and token beyond products with weights."""
        return ()

    def ends_works(self, site: Site) -> tuple[Work, ...]:
        """The same of `open` and `close` together."""
        return ()

    @property
    def lanes(self) -> int:
        """How many lanes the residual has."""
        return 1


class RouterPart(Part, ABC):
    """How a mixture chooses experts. Its module is called with (x, step) and returns weights (T, k) and the chosen
    experts (T, k), of which `num_experts` stands for none."""

    kind: str

    @abstractmethod
    def build(self, site: Site, num_experts: int, top_k: int) -> nn.Module:
        """The module, with fresh weights."""

    def skipped(self) -> Literal["identity", "zero"] | None:
        """What a token gets that chooses none of the experts; None where it cannot."""
        return None

    def check_source(self, source: "RouterPart") -> str | None:
        """Why this router cannot read what another layer's leaves, or None where it can."""
        return "whose router leaves no state"


class RotaryPart(Part, ABC):
    """Which channels of a head turn, and how fast."""

    kind: str

    @abstractmethod
    def describe(self) -> str:
        """What `kvell inspect` says of it."""

    @abstractmethod
    def rotary_width(self, head_dim: int) -> int:
        """Channels of a head that take part."""

    @abstractmethod
    def inverse_frequencies(self, head_dim: int) -> Float[Tensor, " pairs"]:
        """Radians per position of every pair, fp32."""

    def scale(self) -> float:
        """The factor on cos and sin."""
        return 1.0

    @property
    def turns_whole_heads(self) -> bool:
        """Whether every pair of a head turns, whatever its width."""
        return False
