"""What is said to torch's compiler while a step is traced, and means nothing where it runs as it stands."""

from jaxtyping import Float
from torch import Tensor


def kept(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same to torch's compiler, but computed once: it would make elementwise work again for each use of it. What
    is read by strides must lie in memory."""
    return x.as_strided(x.shape, x.stride())
