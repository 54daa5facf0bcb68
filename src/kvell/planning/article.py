"""The simplified formula of an article on these architectures (Ahead of AI, 2026-05-16), for comparison:

    batch * tokens * head_dim * KV heads * layers that make keys and values * 2 * bytes

It knows one head width for all layers and no windows, so it is no measure of what a model holds: of Gemma 4 E2B's
2.01 GB at 131,072 tokens 0.81 GB are real. For Gemma 4 E4B the article takes heads of 320, hidden size / heads.
"""

from collections import Counter

from kvell.config import ModelConfig
from kvell.errors import InputError
from kvell.layers.key_values import KeyValuePart


def article_nbytes(
    config: ModelConfig,
    tokens: int,
    *,
    batch_size: int = 1,
    head_dim: int | None = None,
    itemsize: int = 2,
    sharing: bool = True,
) -> int:
    """Its figure; `head_dim` None is what most layers have. `sharing` False counts all layers. InputError for layers
    that keep no keys and values per head."""
    attentions = [layer.attention for layer in config.layers]
    keepers = [attention for attention in attentions if isinstance(attention, KeyValuePart)]
    if len(keepers) < len(attentions):
        raise InputError("method article: its formula has no figure for layers without keys and values per head")
    layers = [attention for attention in keepers if attention.kv_source is None or not sharing]
    width, heads = (
        Counter(getattr(attention, name) for attention in layers).most_common(1)[0][0]
        for name in ("head_dim", "num_kv_heads")
    )
    return batch_size * tokens * (head_dim or width) * heads * len(layers) * 2 * itemsize
