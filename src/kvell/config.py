"""A model's description: the tree of parts that a Decoder is built of.

It is a value: frozen, validated as a whole, JSON in and out. A layer is data: which attention, whose keys and values
it reads, which feed-forward, where the norms stand.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from kvell.cache import StreamSpec
from kvell.errors import ConfigError
from kvell.layers import Attention, Connection, FeedForward
from kvell.layers.part import Part, Site
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.residual import PlainResidual

NormPlacement = Literal["pre", "sandwich", "post"]


class LayerConfig(Part):
    """One layer: attention, then feed-forward.

    Norms stand before a block ("pre"), before and after it ("sandwich") or after it ("post"; the block then reads
    the residual as it is). `layer_scalar` multiplies the whole residual at the layer's end by a stored number.
    """

    attention: Attention
    feed_forward: FeedForward
    attention_norm: NormPlacement = "pre"
    feed_forward_norm: NormPlacement = "pre"
    layer_scalar: bool = False


class ModelConfig(Part):
    """A whole model.

    `embedding_scale` multiplies the token embeddings (rounded to their dtype first). `logit_softcap` c turns logits
    x into c * tanh(x / c). `family` names the released family whose files this config came from, if any.
    """

    model_type: Literal["kvell"] = "kvell"
    family: str | None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    max_positions: PositiveInt
    layers: tuple[LayerConfig, ...]
    norm_eps: PositiveFloat = 1e-6
    embedding_scale: PositiveFloat = 1.0
    connection: Connection = PlainResidual()
    per_layer_embedding: PerLayerEmbedding | None = None
    tied_head: bool = False
    logit_softcap: PositiveFloat | None = None
    initializer_range: PositiveFloat = 0.02
    bos_token_id: NonNegativeInt | None = None
    eos_token_ids: tuple[NonNegativeInt, ...] = ()
    pad_token_id: NonNegativeInt | None = None

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(one_line(error, "config")) from None

    @model_validator(mode="after")
    def _layers_fit_together(self) -> Self:
        if not self.layers:
            raise ValueError("layers: a model has at least one layer")
        for index, layer in enumerate(self.layers):
            source = layer.attention.kv_source
            if source is None:
                continue
            if source >= index:
                raise ValueError(f"layers.{index}.attention.kv_source: {source} is not an earlier layer")
            if problem := layer.attention.check_source(self.layers[source].attention):
                raise ValueError(f"layers.{index}.attention.kv_source: cannot read layer {source}, {problem}")
        return self

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def site(self, index: int = -1) -> Site:
        """Where layer `index` (or, at -1, a part outside the layers) is built."""
        return Site(self.hidden_size, self.vocab_size, self.num_layers, self.norm_eps, index)

    def streams(self) -> dict[tuple[int, str], StreamSpec]:
        """Everything a sequence must remember, by layer and name: what the cache allocates and a plan adds up."""
        return {
            (index, spec.name): spec for index, layer in enumerate(self.layers) for spec in layer.attention.streams()
        }

    def digest(self) -> str:
        """A short name for the mathematics described: whatever a token's logits depend on, besides the weights."""
        other = {"family", "max_positions", "initializer_range", "bos_token_id", "eos_token_ids", "pad_token_id"}
        return hashlib.sha256(self.model_dump_json(exclude=other).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """A config from Kvell's own JSON. ConfigError, in one line, if it cannot be built."""
        try:
            return cls.model_validate(values)
        except ConfigError as error:
            raise ConfigError(where + str(error).removeprefix("config")) from None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """The config of a model's directory, of a config.json of any known family or Kvell's own, or of a
        built-in name such as "gemma-4-e2b"."""
        from kvell.families import read_config

        return read_config(path)

    def to_json(self) -> str:
        """Kvell's own config.json, every field spelled out."""
        return self.model_dump_json(indent=2)


def one_line(error: ValidationError, where: str) -> str:
    """The first problem of a failed validation, with the path to it, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    path = ".".join(str(step) for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {path + ': ' if path else ''}{message}{more}"
