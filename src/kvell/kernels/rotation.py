"""Turning pairs of a head's channels by angles whose cos and sin are given (layers/rotary.py says which angles).

a' = a * cos - b * sin,   b' = b * cos + a * sin
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "T heads D"], cos: Float[Tensor, "T pairs"], sin: Float[Tensor, "T pairs"]
) -> Float[Tensor, "T heads D"]:
    """Turns the first 2 x pairs channels of every head, (i, i + pairs); the rest pass through."""
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


def rotate_last(
    x: Float[Tensor, "T heads D"], cos: Float[Tensor, "T pairs"], sin: Float[Tensor, "T pairs"]
) -> Float[Tensor, "T heads D"]:
    """Turns the last 2 x pairs channels of every head, each pair side by side, in the dtype of cos and sin."""
    width = 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rest, pairs = x[..., :-width], x[..., -width:].to(cos.dtype).unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([rest, turned.to(x.dtype)], dim=-1)
