"""Top-k with a rule for ties: torch.topk breaks them by shape and device, so the same token could be routed
differently in a chunk and alone."""

from jaxtyping import Float, Int
from torch import Tensor


def top_k_lowest_first(scores: Float[Tensor, "*shape N"], k: int) -> Int[Tensor, "*shape k"]:
    """Indices of the k largest scores, largest first; of equal scores the lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
