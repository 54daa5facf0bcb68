"""Reading from and writing to hyper-connected streams, per token (layers/hyper_connections.py has the formulas).

With the N streams h (N, C) of a token, flattened and normalised to x = h / rms(h) of N * C channels:

    numbers = W x                                  N for pre, N for post, N x N for mix, fp32
    pre, post, mix = sigmoid(a_1 pre + b) + eps,  2 sigmoid(a_2 post + b),  sinkhorn(a_3 mix + b)
    read:   sum_j pre_j h_j
    write:  stream k = post_k y + sum_j mix[j, k] h_j
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvell.kernels.autocast import outside_autocast
from kvell.kernels.table import CPP, TRITON, Kernel, KernelVersion


@outside_autocast
def hyper_read(
    h: Float[Tensor, "T N C"],
    weight: Float[Tensor, "M NC"],
    base: Float[Tensor, " M"],
    scale: Float[Tensor, "3"],
    *,
    iterations: int | None,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T N"], Float[Tensor, "T N N"]]:
    """The block's input, post and mix. Without `iterations` of Sinkhorn mix stays as it is. M is N * (2 + N)."""
    read: tuple[Tensor, Tensor, Tensor] = HYPER_READ(
        h, weight, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps
    )
    return read


@outside_autocast
def hyper_write(
    h: Float[Tensor, "T N C"], y: Float[Tensor, "T C"], post: Float[Tensor, "T N"], mix: Float[Tensor, "T N N"]
) -> Float[Tensor, "T N C"]:
    """The streams after a block whose output is y."""
    written: Tensor = HYPER_WRITE(h, y, post, mix)
    return written


def hyper_read_reference(
    h: Float[Tensor, "T N C"],
    weight: Float[Tensor, "M NC"],
    base: Float[Tensor, " M"],
    scale: Float[Tensor, "3"],
    *,
    iterations: int | None,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T N"], Float[Tensor, "T N N"]]:
    """The same in plain torch."""
    streams = h.shape[1]
    parts = [streams, streams, streams**2]
    numbers = F.linear(flat_norm(h, norm_eps), weight)
    pre, post, mix = (
        part * factor + offset
        for part, factor, offset in zip(numbers.split(parts, dim=-1), scale, base.split(parts), strict=True)
    )
    mix = mix.unflatten(-1, (streams, streams))
    if iterations is not None:
        mix = sinkhorn(mix, iterations, eps)
    return collapse(pre.sigmoid() + eps, h), 2 * post.sigmoid(), mix


def hyper_read_fast(
    h: Float[Tensor, "T N C"],
    weight: Float[Tensor, "M NC"],
    base: Float[Tensor, " M"],
    scale: Float[Tensor, "3"],
    *,
    iterations: int | None,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T N"], Float[Tensor, "T N N"]]:
    """The norm is applied to the few numbers behind the projection instead of the many before it, and Sinkhorn's
    iterations run over all tokens in few passes."""
    streams = h.shape[1]
    flat = h.flatten(1).float()
    shrink = (torch.linalg.vector_norm(flat, dim=1, keepdim=True).square() / flat.shape[1] + norm_eps).rsqrt()
    factors = torch.cat([factor.expand(n) for factor, n in zip(scale, (streams, streams, streams**2), strict=True)])
    numbers = torch.addcmul(base, F.linear(flat, weight) * shrink, factors)
    gates, mix = numbers[:, : 2 * streams].sigmoid(), numbers[:, 2 * streams :].unflatten(1, (streams, streams))
    if iterations is not None:
        mix = fast_sinkhorn(mix, iterations, eps)
    return collapse(gates[:, :streams] + eps, h), 2 * gates[:, streams:], mix


def fast_sinkhorn(logits: Float[Tensor, "T N N"], iterations: int, eps: float) -> Float[Tensor, "T N N"]:
    """`sinkhorn`, in few passes over all tokens."""
    mix: Tensor = SINKHORN(logits, iterations, eps)
    return mix


def sinkhorn_tokens_last(logits: Float[Tensor, "T N N"], iterations: int, eps: float) -> Float[Tensor, "T N N"]:
    """The same with the tokens last."""
    by_columns = _sinkhorn_by_columns(logits.permute(1, 2, 0).contiguous(), iterations, eps)
    # Laid out by tokens again: a product of many small matrices that are not takes ten times as long.
    return by_columns.permute(2, 0, 1).contiguous()


def _sinkhorn_by_columns(logits: Float[Tensor, "N N T"], iterations: int, eps: float) -> Float[Tensor, "N N T"]:
    """With the tokens last, in place where no gradients are recorded."""
    halves = [0] + [1, 0] * (iterations - 1)
    mix = logits.softmax(1) + eps
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        for half in halves:
            mix = mix / (mix.sum(half, keepdim=True) + eps)
        return mix
    sums = mix.new_empty(1, *mix.shape[1:]), mix.new_empty(mix.shape[0], 1, mix.shape[2])
    offset = mix.new_full((), eps)
    for half in halves:
        torch.sum(mix, half, keepdim=True, out=sums[half])
        mix.div_(sums[half].add_(offset))
    return mix


def hyper_write_reference(
    h: Float[Tensor, "T N C"], y: Float[Tensor, "T C"], post: Float[Tensor, "T N"], mix: Float[Tensor, "T N N"]
) -> Float[Tensor, "T N C"]:
    """The same in plain torch."""
    placed = post[:, :, None] * y.float()[:, None]
    return placed.baddbmm_(mix.transpose(1, 2), h.float()).to(h.dtype)


def sinkhorn(logits: Float[Tensor, "T N N"], iterations: int, eps: float) -> Float[Tensor, "T N N"]:
    """Matrices whose rows and columns sum to 1: softmax of each row, then columns and rows in turn."""
    mix = logits.softmax(-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def flat_norm(h: Float[Tensor, "T N C"], eps: float) -> Float[Tensor, "T NC"]:
    """All streams of a token as one vector of unit mean square, fp32."""
    flat = h.flatten(1).float()
    return F.rms_norm(flat, (flat.shape[-1],), eps=eps)


def collapse(weights: Float[Tensor, "T N"], h: Float[Tensor, "T N C"]) -> Float[Tensor, "T C"]:
    """The weighted sum of the streams, in their dtype."""
    return (weights[:, None] @ h.float()).squeeze(1).to(h.dtype)


HYPER_READ = Kernel(
    "hyper_read",
    KernelVersion("triton", "triton", f"{TRITON}.hyper_connections:hyper_read"),
    KernelVersion("late norm", "torch", hyper_read_fast),
    KernelVersion("reference", "reference", hyper_read_reference),
)
HYPER_WRITE = Kernel(
    "hyper_write",
    KernelVersion("triton", "triton", f"{TRITON}.hyper_connections:hyper_write"),
    KernelVersion("reference", "reference", hyper_write_reference),
)
SINKHORN = Kernel(
    "sinkhorn",
    KernelVersion("c++", "cpp", f"{CPP}.sinkhorn:sinkhorn", f"{CPP}.sinkhorn:refuses", traceable=True),
    KernelVersion("tokens last", "torch", sinkhorn_tokens_last),
    KernelVersion("reference", "reference", sinkhorn),
)
