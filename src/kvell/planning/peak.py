"""The working set of a prefill: what a step needs beside weights and cache.

Prompts go through in steps of MAX_STEP tokens, so most of it stops growing there. It is an estimate for Kvell's own
kernels on a CPU, stated from what the parts say of their costs, and calibrated by measuring: the residual in a few
copies, what goes into and out of the matrices of the widest block, and what attention makes of the rows seen.

Two lengths are in it. The tokens of a step are those of the whole batch. The rows that a query sees are its own
sequence's alone, and attention takes one sequence after another: they do not grow with the batch.
"""

from kvell.config import ModelConfig
from kvell.layers.cost import Weight, Work
from kvell.long_prompts import MAX_STEP
from kvell.planning.formats import StorageFormat
from kvell.planning.model_cost import Block, blocks, last_writer

# Copies of the residual while a block reads it and writes to it.
RESIDUAL_COPIES = 5
# Queries that attention works on at once.
QUERY_BLOCK = 256
# Bytes of freed results that lie between results in use, in a process that keeps them (kernels/heap.py).
FREED_NBYTES = 24 * 2**20


def working_nbytes(config: ModelConfig, form: StorageFormat, context: int, batch_size: int = 1) -> int:
    """Bytes that a prefill of `batch_size` prompts of `context` tokens needs at once, beside weights, cache and
    logits."""
    step = min(context * batch_size, MAX_STEP)
    per_token = RESIDUAL_COPIES * config.connection.lanes * config.hidden_size
    if config.per_layer_embedding is not None:
        per_token += config.num_layers * config.per_layer_embedding.width
    last = last_writer(config)
    widest = max(_block_numbers(block, context, step, last) for block in blocks(config) if block.place != "draft")
    return (step * per_token + widest) * form.dtype.itemsize + FREED_NBYTES


def _block_numbers(block: Block, context: int, step: int, last: int) -> int:
    """Numbers that a block makes in a step of `step` tokens that ends at `context` tokens of a sequence. What the
    last writer makes no rows of, and all behind it, is about one token and not worth counting."""
    weights = [one for one in block.cost.weights if block.layer < last or (block.layer == last and one.every_token)]
    works = [one for one in block.cost.works if one.reads and block.layer < last]
    return step * _passed(weights) + max((_seen_numbers(one, context, step) for one in works), default=0)


def _seen_numbers(work: Work, context: int, step: int) -> int:
    """What attention makes of the rows seen. Where every row of the past is, it is read as it stands, and only the
    step's own rows are repeated for their group, beside two outputs. Of a window's rows, or of entries, each as many
    numbers as a query multiplies with, and a mask."""
    if work.stride == 1 and work.most is None:
        return 2 * step * work.per_row
    rows = min(work.rows(context) + QUERY_BLOCK // work.stride, context // work.stride)
    return rows * (work.per_row + QUERY_BLOCK)


def _passed(weights: list[Weight]) -> int:
    """Numbers per token that go into the matrices and come out of them."""
    return sum(sum(weight.shape[-2:]) * weight.used[0] for weight in weights if weight.multiplied)
