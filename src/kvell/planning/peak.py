"""The working set of a prefill: what a step needs beside weights and cache.

A prompt goes through in steps of MAX_STEP tokens, so it stops growing there. It is an estimate, stated from what the
parts' costs say: the numbers that each block makes per token, and a block of attention scores.
"""

from kvell.config import ModelConfig
from kvell.layers.cost import Weight
from kvell.model import MAX_STEP
from kvell.planning.formats import StorageFormat
from kvell.planning.model_cost import blocks

# Scores that an attention holds at once are at most about so many numbers, in fp32, and a copy of them.
SCORES = 1 << 22


def working_nbytes(config: ModelConfig, form: StorageFormat, tokens: int) -> int:
    """Bytes that a prefill of `tokens` tokens needs at once, beside weights and cache."""
    step = min(tokens, MAX_STEP)
    streams = getattr(config.connection, "streams", 1)
    residual = 2 * streams * config.hidden_size
    per_layer = 0 if config.per_layer_embedding is None else config.num_layers * config.per_layer_embedding.width
    widest = max(_made(block.cost.weights) for block in blocks(config) if block.place != "end")
    scores = max(
        (min(work.rows(tokens) * step, SCORES) for block in blocks(config) for work in block.cost.works if work.reads),
        default=0,
    )
    return (residual + per_layer + widest) * step * form.dtype.itemsize + 2 * scores * 4


def _made(weights: tuple[Weight, ...]) -> int:
    """Numbers per token that the matrices of a block make."""
    return sum(weight.shape[-2] * weight.used[0] for weight in weights if weight.multiplied)
