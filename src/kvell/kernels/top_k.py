"""Top-k with a rule for ties: of equal scores the lowest index. torch.topk breaks them by shape and device, so the
same token could be routed differently in a chunk and alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# So many comparisons of scores, of 45 experts, are cheaper than a sort that a compiled step has to call: of 8 they
# take 3 microseconds instead of 6, of 64 as long, of 256 five times as long.
COMPARED = 1 << 11


def top_k_lowest_first(scores: Float[Tensor, "*shape N"], k: int) -> Int[Tensor, "*shape k"]:
    """Indices of the k largest scores, largest first; of equal scores the lowest index first."""
    if torch.compiler.is_exporting():
        comparisons = scores.numel() * scores.shape[-1]
        if isinstance(comparisons, int) and comparisons <= COMPARED:  # neither, where the number of rows is left open
            return _by_rank(scores, k)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _by_rank(scores: Float[Tensor, "*shape N"], k: int) -> Int[Tensor, "*shape k"]:
    """The same choice where every score is compared with every other: for the few experts' of a decoded token, whose
    compiled step would have to call a sort."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    own, other = scores[..., :, None], scores[..., None, :]
    # What is not a number comes before all others.
    above = (other > own) | (other.isnan() & ~own.isnan())
    level = (other == own) | (other.isnan() & own.isnan())
    ranks = (above | (level & (places < places[:, None]))).sum(-1)
    found = ranks[..., None, :] == places[:k, None]
    return (found * places).sum(-1)


def top_k_ascending(scores: Float[Tensor, "R N"], k: int) -> Int[Tensor, "R k"]:
    """The same choice, its indices in ascending order: for long rows, without sorting them."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    values, places = _largest(scores, k + 1)
    chosen = places[:, :k].sort(dim=1).values
    # Which k they are is only in doubt where the last one in equals the first one out.
    tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    if len(tied):
        rows, last = scores[tied], values[tied, k - 1 : k]
        above, level = rows > last, rows == last
        wanted = k - above.sum(dim=1, keepdim=True)
        among = above | (level & (level.cumsum(dim=1) <= wanted))
        chosen[tied] = among.nonzero()[:, 1].view(len(tied), k)
    return chosen


def top_k_of_seen(scores: Float[Tensor, "R N"], seen: Int[Tensor, " R"] | None, k: int) -> Int[Tensor, "R k"]:
    """The same choice among the first `seen` scores of each row, None for all of them, then -1 where those are fewer;
    the scores are not needed any more."""
    if seen is None:
        return top_k_ascending(scores, k)
    # What all of the rows see needs no mask.
    least = int(seen.min())
    newest = torch.arange(least, scores.shape[1], device=seen.device)
    scores[:, least:].masked_fill_(newest >= seen[:, None], float("-inf"))
    best = top_k_ascending(scores, k)
    return torch.where(best < seen[:, None], best, -1)


def _largest(scores: Float[Tensor, "R N"], k: int) -> tuple[Float[Tensor, "R k"], Int[Tensor, "R k"]]:
    """`scores.topk(k)`, up to its choice among equals.

    Long rows are divided into groups, so many that the k with the largest maxima hold the k largest scores and few
    besides: finding maxima is fast on a CPU, and choosing from many is not. For few scores it is not worth it.
    """
    rows, length = scores.shape
    if scores.device.type != "cpu" or rows * length < 1 << 16 or length < 16 * k:
        found = scores.topk(k)
        return found.values, found.indices
    members = 8 if length >= 48 * k else 4
    groups = length // members
    grouped = scores[:, : members * groups].unflatten(1, (members, groups))
    best = grouped.amax(1).topk(k, sorted=False).indices
    places = torch.arange(length, device=scores.device)
    within = (best[:, None] + places[: members * groups : groups, None]).flatten(1)
    left_over = places[members * groups :].expand(rows, -1)
    candidates = torch.cat([within, left_over], dim=1)
    found = scores.gather(1, candidates).topk(k)
    return found.values, candidates.gather(1, found.indices)


def ranked(scores: Float[Tensor, "R N"]) -> Int[Tensor, "R N"]:
    """Whole numbers of 64 bits in the order of the choice, no two of a row equal: in the upper half a score of fp32
    as a number of the same order, in the lower one its place, counted from the end.

    With these a device chooses without being asked whether anything is tied, for which the host would wait: on an
    H200 in less than half the time for one row of 262,144, in half as long again for 128. Triton's scores come so.
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    # -0.0 + 0.0 is 0.0. Of a negative number's bits a larger number's are smaller: all but the sign are turned over.
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return keys + (scores.shape[1] - 1 - places)


def top_k_of_ranked(ranks: Int[Tensor, "R N"], k: int) -> Int[Tensor, "R k"]:
    """Where the k largest stand, in ascending order."""
    best = ranks.topk(min(k, ranks.shape[1]), sorted=False).values
    return (ranks.shape[1] - 1 - (best & 0xFFFFFFFF)).sort(dim=1).values
