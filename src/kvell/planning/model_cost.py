"""The costs of a whole model, laid out as a token passes through it.

Shapes are those of the modules themselves, built on the meta device, where they need no memory; layers that are alike
are built once. What a weight means beside its shape its module says (`weight_role`), and what is multiplied beside
weights the part does (`works`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvell.config import LayerConfig, ModelConfig
from kvell.draft import DraftBlock
from kvell.layer import Layer
from kvell.layers.cost import Form, Weight, WeightPart, WeightRole, Work, per_token
from kvell.layers.linear import Embedding
from kvell.layers.norms import RMSNorm
from kvell.layers.precision import KeepsFp32

Place = Literal["inputs", "attention", "attention frame", "rest of layer", "end", "draft"]
# Modules of a layer whose work is counted apart, in the order in which a token meets them; all others come behind.
PLACES: dict[str, Place] = {"attention_frame": "attention frame", "attention": "attention"}
NORMS, EMBEDDING, HEAD, DRAFT = (
    WeightRole("norms"),
    WeightRole("embedding"),
    WeightRole("head", form="bf16"),
    WeightRole("draft block"),
)


class Cost(NamedTuple):
    """All weights and works of a block."""

    weights: tuple[Weight, ...] = ()
    works: tuple[Work, ...] = ()


@dataclass(frozen=True)
class Block:
    """What stands at one place: before the layers, in layer `layer`, behind them, or in the draft block."""

    place: Place
    layer: int
    cost: Cost


@lru_cache(maxsize=64)
def blocks(config: ModelConfig) -> tuple[Block, ...]:
    """All of a model, in the order in which a token passes through."""
    with torch.device("meta"):
        return tuple(_blocks(config))


def weights(config: ModelConfig) -> Iterator[Weight]:
    """All of a model's tensors."""
    for block in blocks(config):
        yield from block.cost.weights


def last_writer(config: ModelConfig) -> int:
    """The last layer that makes rows for later steps: what stands behind it is only needed for wanted tokens."""
    return max((layer for layer, _ in config.streams()), default=-1)


def _blocks(config: ModelConfig) -> Iterator[Block]:
    hidden, vocab, site, end = config.hidden_size, config.vocab_size, config.site(), config.num_layers
    # A tied table is also the head: all of it is read, and multiplied with.
    table = EMBEDDING if config.tied_head else replace(EMBEDDING, used={"embedding": (1, vocab)})
    yield Block("inputs", -1, Cost(tuple(weights_of(Embedding(vocab, hidden), "embedding", table))))
    if config.per_layer_embedding is not None:
        inputs = config.per_layer_embedding.build_inputs(site)
        yield Block("inputs", -1, Cost(tuple(weights_of(inputs, "per_layer_inputs"))))
    built: dict[LayerConfig, Layer] = {}
    for index, layer in enumerate(config.layers):
        alike = layer.reading(0)  # which layer another one reads changes no shape
        if alike not in built:
            built[alike] = Layer(config, layer, 0, per_layer_embedding=config.per_layer_embedding is not None)
        yield from _layer(config, layer, built[alike], index)
    ends = Cost(tuple(weights_of(config.connection.build_ends(site), "ends")), config.connection.ends_works(site))
    yield Block("end", end, ends)
    yield Block("end", end, Cost(tuple(weights_of(RMSNorm(hidden, config.norm_eps), "norm", NORMS))))
    if config.tied_head:
        yield Block("end", end, Cost(works=(per_token("head", vocab * hidden, form="bf16"),)))
    else:
        yield Block("end", end, Cost(tuple(weights_of(nn.Linear(hidden, vocab, bias=False), "head", HEAD))))
    if config.draft is not None:
        draft = DraftBlock(config, config.draft)
        own = Cost(tuple(replace(one, part="draft block") for one in weights_of(draft, "draft_block", DRAFT)))
        works = [work for block in _layer(config, config.draft.layer, draft.layer, end) for work in block.cost.works]
        yield Block("draft", end, own._replace(works=(*config.connection.ends_works(site), *works)))


def _layer(config: ModelConfig, layer: LayerConfig, module: Layer, index: int) -> Iterator[Block]:
    """Attention, feed-forward and what belongs to the layer's end."""
    site, connection = config.site(index), config.connection.works(config.site(index))
    source = next((one.layer for one in layer.attention.layer_sources()), None)
    attention = layer.attention.works(site, None if source is None else config.layers[source].attention)
    works = {"attention": attention} | dict.fromkeys(("attention_frame", "feed_forward_frame"), connection)
    children = dict(module.named_children())
    if module.per_layer_embedding is not None:
        works["per_layer_connection"] = connection
    names = [*PLACES, "feed_forward_frame", "feed_forward", "per_layer_connection", "per_layer_embedding"]
    for name in [one for one in names if one in children]:
        held = weights_of(children[name], f"layers.{index}.{name}", NORMS)
        yield Block(PLACES.get(name, "rest of layer"), index, Cost(tuple(held), works.get(name, ())))
    own = module.named_buffers(recurse=False)
    scalar = tuple(_weight(f"layers.{index}.{name}", tensor, NORMS, name) for name, tensor in own)
    yield Block("rest of layer", index, Cost(scalar))


def weights_of(module: nn.Module, name: str, role: WeightRole = NORMS, key: str | None = None) -> Iterator[Weight]:
    """The weights of a module and of those inside it. `role` is that of what it stands in, as `key`."""
    own: WeightRole | None = getattr(module, "weight_role", None)
    role, key = (role, key) if own is None else (own, None)
    inside = key or name.rpartition(".")[2]
    for child_name, child in module.named_children():
        yield from weights_of(child, f"{name}.{child_name}", role, child_name)
    for own_name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        named = own_name if own is not None else inside
        yield _weight(f"{name}.{own_name}", tensor, role, named, module)


def _weight(name: str, tensor: Tensor, role: WeightRole, key: str, module: nn.Module | None = None) -> Weight:
    leaf, matrix = name.rpartition(".")[2], tensor.dim() > 1
    table = isinstance(module, nn.Embedding)
    part: WeightPart = "norms" if isinstance(module, RMSNorm) else role.parts.get(key, role.part)
    form: Form = role.form if matrix and not table and key not in role.bf16 else "bf16"
    if not tensor.is_floating_point():
        form = "int64"
    elif isinstance(module, KeepsFp32) and leaf in module.fp32:
        form = "fp32"
    return Weight(
        name,
        tuple(tensor.shape),
        part,
        form,
        multiplied=matrix and not table and key not in role.added,
        every_token=matrix and key in role.every_token,
        used=role.used.get(key, (1, 1)),
        learnt=isinstance(tensor, nn.Parameter),
    )
