"""A model's description: the tree of parts that a Decoder is built of.

It is a value: frozen, validated as a whole, JSON in and out. A layer is data: which attention, whose keys and values
it reads, which feed-forward, where the norms stand.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from kvell.cache import StreamSpec
from kvell.errors import ConfigError
from kvell.layers import Attention, Connection, FeedForward
from kvell.layers.key_values import KEY_VALUES
from kvell.layers.part import Part, Site
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.residual import PlainResidual
from kvell.layers.routers import ROUTER_STATE

NormPlacement = Literal["pre", "sandwich", "post"]

# Bounds far beyond what is: a file whose numbers no tensors bear out is refused before anything is made for them.
MOST_LAYERS = 1024

# Types of pydantic's errors, and what it asks for in the words of who writes a config.
WANTED = {
    "tuple_type": "a list",
    "model_type": "a mapping of names to values",
}
MISSING, UNKNOWN = "missing", "unknown field"
MOST_SAID = 4  # of a kind in one place, and kinds and places


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

    @property
    def stands_alone(self) -> bool:
        """Whether the layer reads nothing of another's."""
        return self.attention.kv_source is None and self.feed_forward.state_source is None


class DraftConfig(Part):
    """A block that proposes the token after the next from the residual before the head (multi-token prediction, MTP):
    one more layer, fed with the next token and what the model made of the one before; see draft.py."""

    kind: Literal["multi_token_prediction"] = "multi_token_prediction"
    layer: LayerConfig


class ModelConfig(Part):
    """A whole model.

    `embedding_scale` multiplies the token embeddings (rounded to their dtype first). `logit_softcap` c turns logits
    x into c * tanh(x / c). `family` names the released family whose files this config came from, if any. A text ends
    at one of `eos_token_ids`, and `suppress_tokens` are never chosen.
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
    draft: DraftConfig | None = None
    tied_head: bool = False
    logit_softcap: PositiveFloat | None = None
    initializer_range: PositiveFloat = 0.02
    bos_token_id: NonNegativeInt | None = None
    eos_token_ids: tuple[NonNegativeInt, ...] = ()
    suppress_tokens: tuple[NonNegativeInt, ...] = ()
    pad_token_id: NonNegativeInt | None = None

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(one_line(error, "config", fields, type(self))) from None

    @model_validator(mode="after")
    def _layers_fit_together(self) -> Self:
        if not self.layers:
            raise ValueError("layers: a model has at least one layer")
        if len(self.layers) > MOST_LAYERS:
            raise ValueError(f"layers: there are {len(self.layers)}, and Kvell builds no more than {MOST_LAYERS:,}")
        for index, layer in enumerate(self.layers):
            self._check_source(index, "attention.kv_source", layer.attention, layer.attention.kv_source)
            self._check_source(
                index, "feed_forward.state_source", layer.feed_forward, layer.feed_forward.state_source
            )
        if self.draft is not None and not self.draft.layer.stands_alone:
            raise ValueError("draft.layer: it stands behind the model and reads nothing that a layer made")
        if self.draft is not None and getattr(self.draft.layer.attention, "indexer", None) is not None:
            raise ValueError("draft.layer.attention.indexer: a draft block's indexer would never be trained")
        return self

    def _check_source(self, index: int, field: str, part: Any, source: int | None) -> None:
        """ValueError if layer `index` reads from another what that one does not have."""
        if source is None:
            return
        if source >= index:
            raise ValueError(f"layers.{index}.{field}: {source} is not an earlier layer")
        if problem := part.check_source(getattr(self.layers[source], field.split(".")[0])):
            raise ValueError(f"layers.{index}.{field}: cannot read layer {source}, {problem}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_known_tokens(self) -> int:
        """How many token ids can be fed: those in the vocabulary that have a row in every table."""
        per_layer = self.per_layer_embedding and self.per_layer_embedding.vocab_size
        return min(self.vocab_size, per_layer or self.vocab_size)

    def site(self, index: int = -1) -> Site:
        """Where layer `index` (or, at -1, a part outside the layers) is built."""
        return Site(self.hidden_size, self.vocab_size, self.num_layers, self.norm_eps, index)

    def streams(self) -> dict[tuple[int, str], StreamSpec]:
        """Everything a sequence must remember, by layer and name: what the cache allocates and a plan adds up."""
        return {
            (index, spec.name): spec for index, layer in enumerate(self.layers) for spec in layer.attention.streams()
        }

    def draft_streams(self) -> dict[tuple[int, str], StreamSpec]:
        """The same for the draft block, which has a cache of its own; empty without one."""
        specs = () if self.draft is None else self.draft.layer.attention.streams()
        return {(self.num_layers, spec.name): spec for spec in specs}

    def reads(self) -> frozenset[tuple[int, str]]:
        """What layers read of earlier ones, by the earlier one's index and what it is."""
        keys = ((layer.attention.kv_source, KEY_VALUES) for layer in self.layers)
        states = ((layer.feed_forward.state_source, ROUTER_STATE) for layer in self.layers)
        return frozenset((source, name) for source, name in [*keys, *states] if source is not None)

    def with_released_rounding(self) -> Self:
        """The same model with the rounding that its released inference code applies to what it caches, simulated.
        ConfigError where no layer has one, or its formats do not fit."""
        layers = [layer.model_dump() for layer in self.layers]
        rounded = [layer["attention"] for layer in layers if "released_rounding" in layer["attention"]]
        if not rounded:
            raise ConfigError("config: released_rounding: no layer of this model rounds what it caches")
        for attention in rounded:
            attention["released_rounding"] = True
        return type(self).from_dict(self.model_dump() | {"layers": layers})

    def digest(self) -> str:
        """A short name for the mathematics described: whatever a token's logits depend on, besides the weights."""
        token_ids = ("bos_token_id", "eos_token_ids", "pad_token_id", "suppress_tokens")
        other: dict[str, Any] = dict.fromkeys(("family", "max_positions", "initializer_range", *token_ids), True)
        if self.per_layer_embedding is not None and self.per_layer_embedding.vocab_size is None:
            other["per_layer_embedding"] = {"vocab_size"}
        return hashlib.sha256(self.model_dump_json(exclude=other).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """A config from Kvell's own JSON. ConfigError, in one line, if it cannot be built."""
        try:
            return cls.model_validate(values)
        except ConfigError as error:
            raise ConfigError(where + str(error).removeprefix("config")) from None

    @classmethod
    def from_pretrained(cls, path: str | Path, *, strict: bool = True) -> "ModelConfig":
        """The config of a model's directory, of a config.json of any known family or Kvell's own, or of a
        built-in name such as "gemma-4-e2b". With `strict` false, keys of a released config that Kvell does not know
        are left out with a warning, where else they are a ConfigError."""
        from kvell.families import read_config

        return read_config(path, strict=strict)

    def to_json(self) -> str:
        """Kvell's own config.json, every field spelled out."""
        return self.model_dump_json(indent=2)


def one_line(error: ValidationError, where: str, values: Any, part: type[Part]) -> str:
    """The problems of a failed validation of a `part`; see `in_a_line`."""
    return f"{where}: {in_a_line(problems(error, values, part))}"


class Problem(NamedTuple):
    """What is wrong at a path of the values ("" for all of them), in words."""

    path: str
    words: str


def in_a_line(found: Sequence[Problem]) -> str:
    """The first few problems, and how many more there are. The fields of one place that are missing or unknown stand
    together."""
    together: dict[tuple[str, str], list[str]] = {}
    for path, words in found:
        parent = path.rpartition(".")[0] if words in (MISSING, UNKNOWN) or words.startswith(f"{UNKNOWN};") else path
        together.setdefault((parent, words), []).append(path)
    said = [_of_paths(paths[:MOST_SAID], words) for (_, words), paths in together.items()]
    left = len(found) - sum(len(paths[:MOST_SAID]) for paths in list(together.values())[:MOST_SAID])
    return "; and ".join(said[:MOST_SAID]) + (f" (and {left} more)" if left else "")


def _of_paths(paths: Sequence[str], words: str) -> str:
    names = ", ".join(paths)
    if words == MISSING:
        return f"{names} {'is' if len(paths) == 1 else 'are'} {MISSING}"
    if len(paths) > 1:
        words = words.replace(UNKNOWN, f"{UNKNOWN}s", 1)
    return f"{names}: {words}" if names else words


def problems(
    error: ValidationError, values: Any, part: type[Part], ignored: frozenset[str] = frozenset()
) -> list[Problem]:
    """What a failed validation of a `part` found, each with its path in the values and what is allowed there, but for
    `ignored` types of errors. Unknown fields come first: where another is missing, they tell why."""
    found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return [_in_words(problem, values, part) for problem in found if problem["type"] not in ignored]


def _in_words(problem: Any, values: Any, part: type[Part]) -> Problem:
    path = ".".join(_steps(problem["loc"], values))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_not_found":
        message = "kind is missing"
    elif problem["type"] == "union_tag_invalid":
        message = f"kind {problem['ctx']['tag']!r} is unknown; known are {problem['ctx']['expected_tags']}"
    elif problem["type"] == "extra_forbidden" and (owner := _part_at(part, problem["loc"][:-1])) is not None:
        message = f"{UNKNOWN}; allowed are {', '.join(owner.model_fields)}"
    elif problem["type"] == "missing":
        message = MISSING
    elif problem["type"] in WANTED:
        message = f"{WANTED[problem['type']]}, not {problem['input']!r:.80}"
    return Problem(path, message)


def _part_at(annotation: Any, location: Sequence[int | str]) -> type[Part] | None:
    """The kind of part that stands at a place of an annotated tree, if one does."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        if not location:
            return annotation
        step, *rest = location
        fields = annotation.model_fields
        if step in fields:
            return _part_at(fields[step].annotation, rest)
        is_kind = "kind" not in fields or step == fields["kind"].default
        return _part_at(annotation, rest) if is_kind else None
    if get_origin(annotation) is tuple and location and isinstance(location[0], int):
        location = location[1:]
    found = (_part_at(inner, location) for inner in get_args(annotation))
    return next((one for one in found if one is not None), None)


def _steps(location: tuple[int | str, ...], values: Any) -> Iterator[str]:
    """The steps of a path, without those that pydantic adds: which kind of a part it is, where it could have been
    another. The last step may be a field that is missing."""
    for number, step in enumerate(location, start=1):
        if isinstance(values, Mapping):
            if step in values or (number == len(location) and step != values.get("kind")):
                yield str(step)
            if step in values:
                values = values[step]
        elif isinstance(values, Sequence) and isinstance(step, int):
            yield str(step)
            values = values[step]
