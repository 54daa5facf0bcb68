"""Hyper-connections: a residual of several streams, read and mixed by weights that depend on the token.

With N streams h (N, C) of a token, flattened and normalised to x = h / rms(h) of N * C channels:

    pre, post, mix = split(scale * (W x) + base)             N, N and N x N numbers, fp32
    pre = sigmoid(pre) + eps,  post = 2 sigmoid(post),  mix = sinkhorn(mix)
    block input     = sum_j pre_j h_j
    new stream k    = post_k * block output + sum_j mix[j, k] h_j
    before the head = sum_j (sigmoid(scale * (W' x)_j + base_j) + eps) h_j

Sinkhorn makes `mix` doubly stochastic: softmax over the last dimension, + eps, then columns and rows divided by their
sums in turn, columns first and last. Mixing then can neither blow up nor die out through any number of layers
(manifold-constrained hyper-connections, mHC; Xie et al. 2025, arXiv 2512.24880, section 4; DeepSeek V4, arXiv
2606.19348, section 2.2). Without the constraint (`constrained` false, mix as it is) these are the hyper-connections
of Zhu et al. 2024, arXiv 2409.19606, with mHC's way of making the weights: for comparison.

What people get wrong: the direction of `mix` (it is not symmetric, the sum is over its first index), and the order of
columns and rows.
"""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from kvell.kernels.autocast import outside_autocast
from kvell.kernels.hyper_connections import collapse, flat_norm, hyper_read, hyper_write
from kvell.layers.contract import ConnectionModule, ConnectionPart, EndsModule
from kvell.layers.cost import WeightRole, Work, per_token
from kvell.layers.part import Site
from kvell.layers.precision import KeepsFp32

# Bounds far beyond what is (4 and 20): no tensor bears out how often is iterated, and lanes count squared.
MOST_LANES, MOST_ITERATIONS = 64, 1000


class HyperConnections(ConnectionPart):
    """`streams` residual streams; `iterations` of Sinkhorn, the softmax being the first half of the first."""

    kind: Literal["hyper"] = "hyper"
    streams: Annotated[int, Field(gt=0, le=MOST_LANES)] = 4
    iterations: Annotated[int, Field(gt=0, le=MOST_ITERATIONS)] = 20
    eps: PositiveFloat = 1e-6
    constrained: bool = True

    def build(self, site: Site, block: int) -> "HyperConnection":
        return HyperConnection(self, site, block)

    def build_ends(self, site: Site) -> "HyperEnds":
        return HyperEnds(self, site)

    @property
    def lanes(self) -> int:
        return self.streams

    def works(self, site: Site) -> tuple[Work, ...]:
        """The sum that is read, and the mixing of the streams. Reading belongs to what makes a block's rows, so it is
        done for every token."""
        return (
            per_token("connection", self.streams * site.hidden_size, form="fp32", every_token=True),
            per_token("connection", self.streams**2 * site.hidden_size, form="fp32"),
        )

    def ends_works(self, site: Site) -> tuple[Work, ...]:
        return (per_token("connection", self.streams * site.hidden_size, form="fp32"),)

    def describe(self) -> str:
        return f"{self.streams} hyper-connected streams" + ("" if self.constrained else ", unconstrained")


class Reading(NamedTuple):
    """How a block's output and the streams come together."""

    post: Float[Tensor, "T N"]
    mix: Float[Tensor, "T N N"]


class HyperConnection(KeepsFp32, ConnectionModule):
    """One block's connection. Rows of `weight`: N for pre, N for post, N x N for mix."""

    has_gpu_kernels: ClassVar[bool] = True

    fp32: ClassVar[tuple[str, ...]] = ("weight", "base", "scale")
    weight_role: ClassVar[WeightRole] = WeightRole("connection", every_token=("weight",))

    def __init__(self, config: HyperConnections, site: Site, block: int) -> None:
        super().__init__()
        self.config, self.norm_eps, self.block = config, site.norm_eps, block
        streams = config.streams
        self.weight = nn.Parameter(
            torch.empty((2 + streams) * streams, streams * site.hidden_size, dtype=torch.float32)
        )
        self.base = nn.Parameter(torch.zeros((2 + streams) * streams, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float32))

    def read(self, h: Float[Tensor, "T N C"]) -> tuple[Float[Tensor, "T C"], Reading]:
        """The block's input, and what `write` needs to know of this reading."""
        config = self.config
        x, post, mix = hyper_read(
            h,
            self.weight,
            self.base,
            self.scale,
            iterations=config.iterations if config.constrained else None,
            eps=config.eps,
            norm_eps=self.norm_eps,
        )
        return x, Reading(post, mix)

    def write(self, h: Float[Tensor, "T N C"], y: Float[Tensor, "T C"], reading: Reading) -> Float[Tensor, "T N C"]:
        return hyper_write(h, y, *reading)

    def init_parameters(self) -> None:
        """The training initialisation of mHC (arXiv 2512.24880, appendix A.6): small gating scales, and a base with
        which each block reads mostly one stream, its home, and writes to all: a plain residual to begin with."""
        streams = self.config.streams
        self.scale.fill_(0.01)
        self.base.zero_()
        self.base[:streams] = -3.0
        self.base[self.block % streams] = 3.0
        identity = torch.eye(streams, device=self.base.device).flatten()
        self.base[2 * streams :] = 6 * identity - 3 if self.config.constrained else identity


class HyperEnds(KeepsFp32, EndsModule):
    """Every stream begins as the embedded token; the last norm sees a weighted sum of them."""

    fp32: ClassVar[tuple[str, ...]] = ("weight", "base", "scale")
    weight_role: ClassVar[WeightRole] = WeightRole("connection", every_token=("weight",))

    def __init__(self, config: HyperConnections, site: Site) -> None:
        super().__init__()
        self.config, self.norm_eps = config, site.norm_eps
        streams = config.streams
        self.weight = nn.Parameter(torch.empty(streams, streams * site.hidden_size, dtype=torch.float32))
        self.base = nn.Parameter(torch.zeros(streams, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def open(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "T N C"]:
        return x[:, None].repeat(1, self.config.streams, 1)

    @outside_autocast
    def close(self, h: Float[Tensor, "T N C"]) -> Float[Tensor, "T C"]:
        numbers = nn.functional.linear(flat_norm(h, self.norm_eps), self.weight)
        return collapse((numbers * self.scale + self.base).sigmoid() + self.config.eps, h)

    def init_parameters(self) -> None:
        self.scale.fill_(0.01)
        self.base.zero_()
