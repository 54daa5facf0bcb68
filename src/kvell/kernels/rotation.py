"""Turning pairs of a head's channels by angles whose cos and sin are given (layers/rotary.py says which angles).

a' = a * cos - b * sin,   b' = b * cos + a * sin
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kvell.kernels.table import TRITON, Kernel, KernelVersion


def rotate(
    x: Float[Tensor, "T heads D"], cos: Float[Tensor, "T pairs"], sin: Float[Tensor, "T pairs"]
) -> Float[Tensor, "T heads D"]:
    """Turns the first 2 x pairs channels of every head, (i, i + pairs); the rest pass through."""
    turned: Tensor = ROTATE(x, cos, sin)
    return turned


def rotate_reference(
    x: Float[Tensor, "T heads D"], cos: Float[Tensor, "T pairs"], sin: Float[Tensor, "T pairs"]
) -> Float[Tensor, "T heads D"]:
    """The same in plain torch."""
    pairs = cos.shape[-1]
    halves = x[..., : 2 * pairs].unflatten(-1, (2, pairs))
    turned = halves * cos[:, None, None]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        turned = torch.addcmul(turned, halves.flip(-2), torch.stack([-sin, sin], dim=1)[:, None])
    else:  # without a copy of what is turned over
        turned[..., 0, :].addcmul_(halves[..., 1, :], sin[:, None], value=-1)
        turned[..., 1, :].addcmul_(halves[..., 0, :], sin[:, None])
    turned = turned.flatten(-2)
    return turned if 2 * pairs == x.shape[-1] else torch.cat([turned, x[..., 2 * pairs :]], dim=-1)


def rotate_last(
    x: Float[Tensor, "T heads D"], cos: Float[Tensor, "T pairs"], sin: Float[Tensor, "T pairs"]
) -> Float[Tensor, "T heads D"]:
    """Turns the last 2 x pairs channels of every head, each pair side by side, in the dtype of cos and sin."""
    turned: Tensor = ROTATE_LAST(x, cos, sin)
    return turned


def rotate_last_reference(
    x: Float[Tensor, "T heads D"], cos: Float[Tensor, "T pairs"], sin: Float[Tensor, "T pairs"]
) -> Float[Tensor, "T heads D"]:
    """The same in plain torch."""
    width = 2 * cos.shape[-1]
    if torch.compiler.is_compiling():  # torch's compiler has no complex numbers
        pairs = x[..., -width:].to(cos.dtype).unflatten(-1, (-1, 2))
        (a, b), c, s = pairs.unbind(-1), cos[:, None], sin[:, None]
        both = torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)
        return torch.cat([x[..., :-width], both.to(x.dtype)], dim=-1)
    # A pair is a complex number, and turning it one product: in place, where they lie as such.
    y = x.clone(memory_format=torch.contiguous_format)
    turning = y[..., -width:]
    in_place = y.dtype == cos.dtype and y.shape[-1] % 2 == 0
    wide = turning if in_place else turning.to(cos.dtype, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin)[:, None])
    if not in_place:
        turning.copy_(wide)
    return y


ROTATE = Kernel(
    "rotate",
    KernelVersion("triton", "triton", f"{TRITON}.rotation:rotate"),
    KernelVersion("reference", "reference", rotate_reference),
)
ROTATE_LAST = Kernel(
    "rotate_last",
    KernelVersion("triton", "triton", f"{TRITON}.rotation:rotate_last"),
    KernelVersion("reference", "reference", rotate_last_reference),
)
