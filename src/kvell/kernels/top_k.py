"""Top-k with a rule for ties: of equal scores the lowest index. torch.topk breaks them by shape and device, so the
same token could be routed differently in a chunk and alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k_lowest_first(scores: Float[Tensor, "*shape N"], k: int) -> Int[Tensor, "*shape k"]:
    """Indices of the k largest scores, largest first; of equal scores the lowest index first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top_k_ascending(scores: Float[Tensor, "R N"], k: int) -> Int[Tensor, "R k"]:
    """The same choice, its indices in ascending order: for long rows, without sorting them."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    best = scores.topk(k + 1)
    chosen = best.indices[:, :k].sort(dim=1).values
    # Which k they are is only in doubt where the last one in equals the first one out.
    tied = (best.values[:, k - 1] == best.values[:, k]).nonzero().flatten()
    if len(tied):
        rows, last = scores[tied], best.values[tied, k - 1 : k]
        above, level = rows > last, rows == last
        wanted = k - above.sum(dim=1, keepdim=True)
        among = above | (level & (level.cumsum(dim=1) <= wanted))
        chosen[tied] = among.nonzero()[:, 1].view(len(tied), k)
    return chosen
