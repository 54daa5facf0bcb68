"""A training run as a value: the model, the data, and how it learns. Read from a YAML or JSON file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from kvell.config import ModelConfig, one_line
from kvell.config_file import read_mapping, resolve
from kvell.errors import ConfigError
from kvell.families import builtin_names
from kvell.layers.part import Part
from kvell.training.tasks import Task

Share = Annotated[float, Field(ge=0, lt=1)]
LONGEST_EVALUATED = 4096


class StandardLibrary(Part):
    """The built-in corpus: the Python standard library's own sources, without its tests and generated tables.

    `docstrings` adds, as documents of their own, the documentation strings that the sources hold.
    """

    kind: Literal["standard_library"] = "standard_library"
    docstrings: bool = False


class TextFiles(Part):
    """Files, and folders searched at every depth for files whose name matches `pattern`.

    Relative paths are seen from where the run is started. `pattern` may name folders, as in "src/*.py"; links to
    folders are not followed.
    """

    kind: Literal["files"] = "files"
    paths: tuple[str, ...]
    pattern: str = "*.txt"

    @field_validator("pattern")
    @classmethod
    def _names_files(cls, pattern: str) -> str:
        if not pattern or pattern.startswith("/") or "**" in pattern:
            raise ValueError(
                f"{pattern!r}: the end of a path, such as '*.txt' or 'src/*.py', searched at every depth"
            )
        return pattern


Source = Annotated[StandardLibrary | TextFiles, Field(discriminator="kind")]


class MixedTask(Part):
    """A task with known answers among the texts: `share` of the tokens of every step.

    Its examples are as long as the step's stage allows, or shorter, down to `shortest` tokens, whatever its own
    `length` says, which has to hold it all the same. One of bare tokens uses the ids below its `vocab_size`, whatever
    they are to the tokenizer.
    """

    task: Task
    share: Annotated[float, Field(gt=0, lt=1)]
    shortest: PositiveInt = 128


class Data(Part):
    """`held_out` is the share of documents, drawn by their names, that evaluation keeps for itself; where there are
    too few documents it is the last share of each."""

    sources: tuple[Source, ...]
    held_out: Share = 0.05
    tasks: tuple[MixedTask, ...] = ()


class NewTokenizer(Part):
    """A byte-level BPE trained on the training documents, every digit a token of its own."""

    vocab_size: Annotated[int, Field(ge=300)]


# pydantic then tells what is wrong with the one that is meant, not with each in turn.
Tokenizer = Annotated[
    Annotated[NewTokenizer, Tag("new")] | Annotated[str, Tag("directory")],
    Discriminator(lambda value: "directory" if isinstance(value, str) else "new"),
]


class Stage(Part):
    """`steps` steps of `tokens` tokens in pieces of at most `length`; `micro_batches` is how many forward passes a
    step's tokens go through (gradient accumulation, and what several devices share among them)."""

    steps: PositiveInt
    length: PositiveInt
    tokens: PositiveInt
    micro_batches: PositiveInt = 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tokens % self.micro_batches:
            raise ValueError(f"tokens {self.tokens} are not a multiple of micro_batches {self.micro_batches}")
        if self.length > self.tokens // self.micro_batches:
            raise ValueError(
                f"length {self.length} is more than the {self.tokens // self.micro_batches} tokens of a micro-batch"
            )
        return self


class ParameterGroup(Part):
    """Settings for parameters whose names match `pattern` ("*" stands for anything, dots too).

    A rate is stated (`learning_rate`) or multiplies the one that they would have (`learning_rate_scale`);
    `weight_decay` falls on them whatever they are. `freeze` leaves them as they are: they get no gradients, and no
    state in the optimizer. A router of which everything is frozen keeps its selection bias too.
    """

    pattern: Annotated[str, Field(min_length=1)]
    learning_rate: NonNegativeFloat | None = None
    learning_rate_scale: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    freeze: bool = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        rates = (self.learning_rate, self.learning_rate_scale)
        stated = [value for value in (*rates, self.weight_decay) if value is not None]
        if self.freeze and stated:
            raise ValueError("freeze: what is frozen has neither a learning_rate nor a weight_decay")
        if not self.freeze and not stated:
            raise ValueError("says nothing: give learning_rate, learning_rate_scale, weight_decay or freeze: true")
        if None not in rates:
            raise ValueError("learning_rate and learning_rate_scale: give one of the two")
        return self


class Optimizer(Part):
    """AdamW on every parameter, or Muon on the matrices inside the model and AdamW on the rest.

    Muon: Jordan 2024, kellerjordan.github.io/posts/muon. It moves the weights of linear layers and of experts, each
    expert's by itself; never the tables (embedding, per-layer embeddings), the head, and what is no matrix.

    `learning_rate` and `weight_decay` are AdamW's, `matrix_learning_rate` and `matrix_weight_decay` Muon's. Decay
    falls on matrices alone: not on tables, of which rows that never occur would shrink, nor on norms, biases, sinks,
    temperatures, scales and hyper-connections. `parameter_groups` say otherwise for some; of those that match a
    parameter the first one counts.
    """

    kind: Literal["adamw", "muon"] = "muon"
    learning_rate: PositiveFloat = 0.004
    matrix_learning_rate: PositiveFloat = 0.02
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    matrix_weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat | None = 1.0
    parameter_groups: tuple[ParameterGroup, ...] = ()


# Settings that `kind: adamw` does not use.
MUON_S_OWN = ("matrix_learning_rate", "matrix_weight_decay")


class Schedule(Part):
    """The learning rate's course over all steps: `warmup` steps up from zero, then down to `floor` times the rate, by
    a cosine, or (warm-up, stable, decay) in a straight line over the last `decay` share of the steps."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: NonNegativeInt = 40
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    floor: Share = 0.0


class Losses(Part):
    """What the model learns from besides the next token: weights of the other losses, 0 for none.

    `answers` weighs the mean loss of a task's known answers. `draft` is the draft block's loss for the token after
    the next, `index` what aligns indexers with attention, `balance` what evens out experts, both within a
    micro-batch; `bias_rate` moves the routers' selection biases against the load after every step, not by a loss.
    """

    answers: NonNegativeFloat = 1.0
    draft: NonNegativeFloat = 0.3
    index: NonNegativeFloat = 1.0
    balance: NonNegativeFloat = 0.0
    bias_rate: NonNegativeFloat = 0.001


class Evaluation(Part):
    """Every `every` steps the held-out documents' first `tokens` tokens, each document cut at `length` (None: 4,096,
    or the model's positions if those are fewer); at the end all of them whole, in pieces of as many tokens as the
    model has positions. `patience` evaluations in a row without a better one end the run, and the best model is kept.
    `tasks` are drawn `cases` times each, at every one of `lengths`."""

    every: PositiveInt = 500
    tokens: PositiveInt = 50_000
    length: Annotated[int, Field(ge=2)] | None = None
    patience: PositiveInt | None = None
    tasks: tuple[Task, ...] = ()
    cases: PositiveInt = 100
    lengths: tuple[PositiveInt, ...] = ()


class Checkpoints(Part):
    """Every `every` steps everything is written that a run needs to go on as if it had not been stopped."""

    every: PositiveInt = 200
    keep: PositiveInt = 1


class TrainingConfig(Part):
    """A whole run. `tokenizer` is one to train, or a directory that holds one. `start_from` takes the weights of a
    model's directory, which must be of this config; without it they are fresh. `compile` runs the token-wise parts
    through torch.compile, see compiling.py. Relative paths are seen from where the run is started."""

    model: ModelConfig
    tokenizer: Tokenizer
    data: Data
    stages: tuple[Stage, ...]
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    losses: Losses = Losses()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    trackers: tuple[Literal["tensorboard", "trackio"], ...] = ()
    start_from: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    seed: NonNegativeInt = 0
    device: str = "cpu"
    threads: PositiveInt | None = None
    out: str

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.stages:
            raise ValueError("stages: there is at least one")
        if not self.data.sources:
            raise ValueError("data.sources: there is at least one")
        if isinstance(self.tokenizer, NewTokenizer) and self.tokenizer.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size {self.tokenizer.vocab_size} is not the model's {self.model.vocab_size}"
            )
        lengths = {f"stages.{index}.length": stage.length for index, stage in enumerate(self.stages)}
        lengths |= {f"evaluation.lengths.{index}": length for index, length in enumerate(self.evaluation.lengths)}
        if self.evaluation.length is not None:
            lengths["evaluation.length"] = self.evaluation.length
        for field, length in lengths.items():
            if length > self.model.max_positions:
                raise ValueError(f"{field}: {length} is more than model.max_positions {self.model.max_positions}")
        if self.evaluation.tasks and not self.evaluation.lengths:
            raise ValueError("evaluation.lengths: there is no length to draw evaluation.tasks at")
        for index, mixed in enumerate(self.data.tasks):
            shortest_stage = min(stage.length for stage in self.stages)
            if mixed.shortest > shortest_stage:
                raise ValueError(
                    f"data.tasks.{index}.shortest: {mixed.shortest} tokens do not fit a stage of {shortest_stage}"
                )
        if sum(mixed.share for mixed in self.data.tasks) >= 1:
            raise ValueError("data.tasks: shares of all tasks together must leave room for texts")
        return self

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def evaluation_length(self) -> int:
        """How many tokens of a document an evaluation between steps sees."""
        return self.evaluation.length or min(LONGEST_EVALUATED, self.model.max_positions)

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Self:
        """A run's config from a YAML or JSON file; `changes` replace what it says at the top level.

        `model` is a mapping as in a model's own config file, a built-in name, or the path of a config, seen from this
        file's folder. ConfigError or CheckpointError, in one line with the path in the file, for what cannot be.
        """
        values = {**read_mapping(path), **(changes or {})}
        if "model" not in values and ("layers" in values or "model_type" in values):
            raise ConfigError(
                f"{path} describes a model, not a run: a run's file names it, `model: {Path(path).name}`, beside "
                "tokenizer, data and stages (docs/training.md)"
            )
        values.setdefault("out", f"runs/{Path(path).stem}")
        model = values.get("model")
        if isinstance(model, str):
            named = model if model in builtin_names() else Path(path).parent / model
            values["model"] = ModelConfig.from_pretrained(named)
        elif isinstance(model, Mapping):
            values["model"] = resolve(model, f"{Path(path).name}: model")
        return cls.of(values, Path(path).name)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(one_line(error, where, values, cls)) from None


def ignored_settings(config: TrainingConfig) -> list[str]:
    """A line for each setting of a run that has no effect, or not the effect that it states."""
    said, schedule, kind = [], config.schedule, config.optimizer.kind
    if schedule.warmup >= config.steps:
        reached = config.steps / (schedule.warmup + 1)
        said.append(
            f"schedule.warmup: {schedule.warmup} steps are not over when the run ends after {config.steps}: the "
            f"learning rate gets no higher than {reached:.2g} of what is asked"
        )
    described = config.model.model_dump_json()
    experts, indexer = ('"kind":"mixture_of_experts"' in described), ('"indexer":{' in described)
    asked: list[tuple[Part, str, tuple[str, ...], bool, str]] = [
        (config.optimizer, "optimizer", MUON_S_OWN, kind == "muon", f"kind: {kind}"),
        (schedule, "schedule", ("floor", "decay"), schedule.kind != "constant", f"kind: {schedule.kind}"),
        (schedule, "schedule", ("decay",), schedule.kind != "cosine", f"kind: {schedule.kind}"),
        (config.losses, "losses", ("answers",), bool(config.data.tasks), "no data.tasks"),
        (config.losses, "losses", ("draft",), config.model.draft is not None, "a model without a draft block"),
        (config.losses, "losses", ("index",), indexer, "a model without an indexer"),
        (config.losses, "losses", ("balance", "bias_rate"), experts, "a model without experts"),
        (config.evaluation, "evaluation", ("cases", "lengths"), bool(config.evaluation.tasks), "no evaluation.tasks"),
        (
            config.evaluation,
            "evaluation",
            ("every", "tokens", "length"),
            config.data.held_out > 0,
            "data.held_out: 0",
        ),
    ]
    for part, place, names, counts, why in asked:
        fields = type(part).model_fields
        given = [f"{place}.{name}" for name in names if getattr(part, name) != fields[name].default]
        if given and not counts:
            said.append(f"{' and '.join(given)}: without effect with {why}")
    return said


# What may change between the parts of one run.
FREE_TO_CHANGE = {"out", "device", "threads", "trackers"}


def differences(mine: TrainingConfig, theirs: TrainingConfig) -> list[str]:
    """Where two runs' configs differ, as `path: theirs -> mine`, leaving out what changes nothing."""
    return [
        f"{path}: {their} -> {my}"
        for path, my, their in _differing(mine.model_dump(mode="json"), theirs.model_dump(mode="json"), "")
        if path.split(".")[0] not in FREE_TO_CHANGE
    ]


def _differing(mine: Any, theirs: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = list(dict.fromkeys([*mine, *theirs]))
        pairs = [(key, mine.get(key), theirs.get(key)) for key in keys]
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        pairs = [(str(index), my, their) for index, (my, their) in enumerate(zip(mine, theirs, strict=True))]
    else:
        return [] if mine == theirs else [(path, mine, theirs)]
    found = []
    for key, my, their in pairs:
        found += _differing(my, their, f"{path}.{key}" if path else key)
    return found
