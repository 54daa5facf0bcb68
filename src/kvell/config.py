"""A model's description: the tree of parts that a Decoder is built of.

It is a value: frozen, validated as a whole, JSON in and out. A layer is data: which attention, whose keys and values
it reads, which feed-forward, where the norms stand.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from kvell.cache import StreamSpec
from kvell.errors import ConfigError
from kvell.layers import Attention, Connection, FeedForward
from kvell.layers.part import Part, Site, Source
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.registry import Registry
from kvell.layers.residual import PlainResidual

NormPlacement = Literal["pre", "sandwich", "post"]

# Far more layers than any model has. A config that asks for more is refused before anything is built for it.
MOST_LAYERS = 1024

# Types of pydantic's errors, and what it asks for in the words of who writes a config.
WANTED = {
    "tuple_type": "a list",
    "model_type": "a mapping of names to values",
}
MISSING, UNKNOWN = "missing", "unknown field"
MOST_SAID = 4  # how many different problems an error lists, and how many fields for each


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
            for source in layer.layer_sources():
                self._check_source(index, source)
        if self.draft is not None and any(self.draft.layer.layer_sources()):
            raise ValueError("draft.layer: it stands behind the model and reads nothing that a layer made")
        if self.draft is not None and self.draft.layer.attention.has_own_loss:
            raise ValueError("draft.layer.attention.indexer: a draft block's indexer would never be trained")
        return self

    def _check_source(self, index: int, source: Source) -> None:
        """ValueError if layer `index` reads from another what that one does not have."""
        place = f"layers.{index}.{source.path}"
        if source.layer >= index:
            raise ValueError(f"{place}: {source.layer} is not an earlier layer")
        block = source.path.split(".")[0]  # attention or feed_forward: each reads its like
        reader, read = getattr(self.layers[index], block), getattr(self.layers[source.layer], block)
        if problem := reader.check_source(read):
            raise ValueError(f"{place}: cannot read layer {source.layer}, {problem}")

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
        return frozenset((source.layer, source.what) for layer in self.layers for source in layer.layer_sources())

    def with_released_rounding(self) -> Self:
        """The same model with the rounding that its released inference code applies to what it caches, simulated.
        ConfigError where no layer has one, or its formats do not fit."""
        rounded = [layer.attention.rounded_as_released() for layer in self.layers]
        if not any(rounded):
            raise ConfigError("config: released_rounding: no layer of this model rounds what it caches")
        layers = [
            layer if attention is None else layer.model_copy(update={"attention": attention})
            for layer, attention in zip(self.layers, rounded, strict=True)
        ]
        return type(self).from_dict(self.model_dump() | {"layers": [layer.model_dump() for layer in layers]})

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
    elif problem["type"] == "extra_forbidden":
        owner = _part_at(part, values, problem["loc"][:-1])
        message = f"{UNKNOWN}; allowed are {', '.join(owner.model_fields)}"
    elif problem["type"] == "missing":
        message = MISSING
    elif problem["type"] in WANTED:
        message = f"{WANTED[problem['type']]}, not {problem['input']!r:.80}"
    return Problem(path, message)


def _part_at(part: type[Part], values: Any, location: Sequence[int | str]) -> type[Part]:
    """The kind of part that stands at a place of a tree of values whose root is a `part`."""
    annotation: Any = None
    metadata: Sequence[Any] = ()
    for step in location:
        if isinstance(values, Mapping):
            if step not in values:
                continue  # which kind of a union it is, as pydantic adds
            annotation, metadata = part.model_fields[str(step)].annotation, part.model_fields[str(step)].metadata
        values = values[step]
        part = _declared(annotation, metadata, values) or part
    return part


def _declared(annotation: Any, metadata: Sequence[Any], values: Any) -> type[Part] | None:
    """The part that an annotation means for these values, by itself or inside a list, an option or a union."""
    for mark in metadata:
        if isinstance(mark, Registry):
            return mark.part_of(values)
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        return _declared(annotation, metadata, values)
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    found = [part for inner in get_args(annotation) if (part := _declared(inner, (), values))]
    kind = values.get("kind") if isinstance(values, Mapping) else None
    named = [part for part in found if "kind" in part.model_fields and part.model_fields["kind"].default == kind]
    return next(iter([*named, *found]), None)


def _steps(location: tuple[int | str, ...], values: Any) -> Iterator[str]:
    """The steps of a path, without those that pydantic adds: which kind of a union it is. The last step may be a
    field that is missing."""
    for number, step in enumerate(location, start=1):
        if isinstance(values, Mapping):
            if step in values or (number == len(location) and step != values.get("kind")):
                yield str(step)
            if step in values:
                values = values[step]
        elif isinstance(values, Sequence) and isinstance(step, int):
            yield str(step)
            values = values[step]
