"""A run's folder: its checkpoints, its metrics, and the model that comes out.

    run.lock                     held by the run that is using the folder
    training.json                the resolved config
    inputs.json                  what the tokenizer and every document were, by their hashes
    metrics.jsonl                one line a step, one an evaluation
    checkpoints/step-00000200/   what a run needs to go on: progress.json, and tensors as state.py says
    config.json, model.safetensors, tokenizer.json, evaluation.json        a model like any other, and its figures

A checkpoint is written aside and gets its name when it is whole, so a run may be killed at any moment.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

import tokenizers
import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from kvell.errors import CheckpointError, InputError
from kvell.files import beside, move_in, read_json
from kvell.model import Decoder
from kvell.training.corpus import digest, shown
from kvell.training.parallel import Processes
from kvell.training.settings import TrainingConfig, differences
from kvell.training.state import load_state, save_state

CONFIG, METRICS, CHECKPOINTS, PROGRESS = "training.json", "metrics.jsonl", "checkpoints", "progress.json"
INPUTS, EVALUATION, LOCK = "inputs.json", "evaluation.json", "run.lock"


@dataclass
class Progress:
    """How far a run has come: steps done, tokens seen, the best evaluation and how many since were no better."""

    step: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    best: float | None = None
    since_best: NonNegativeInt = 0


class Run:
    def __init__(self, folder: Path, config: TrainingConfig, processes: Processes) -> None:
        self.folder, self.config, self.processes = folder, config, processes

    def begin(self, fresh: bool) -> Path | None:
        """The checkpoint to go on from, if there is one; otherwise the folder is made ready for a new run.

        InputError, with the differing keys, where one was begun with another config; `fresh` discards it.
        """
        found = self.checkpoints()
        if found and not fresh:
            begun = TrainingConfig.of(read_json(self.folder / CONFIG), CONFIG)
            if changed := differences(self.config, begun):
                raise InputError(
                    f"{self.folder} holds a run with another config, differing in {'; '.join(changed)}: "
                    "change it back, give another --out, or discard that run with --fresh"
                )
            return found[-1]
        self.processes.wait()
        if self.processes.is_first:
            try:
                for stale in (CHECKPOINTS, METRICS, EVALUATION):
                    path = self.folder / stale
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.folder} cannot be made ready for a run: {error}") from None
            self._write(CONFIG, self.config.model_dump_json(indent=2) + "\n")
        self.processes.wait()
        return None

    def hold_to(self, digests: dict[str, str], tokenizer: tokenizers.Tokenizer, goes_on: bool) -> None:
        """Keeps what a new run learns from, or demands that it is the same still: InputError, with what differs."""
        inputs = {"tokenizer": digest(tokenizer.to_str()), "documents": digests}
        if goes_on:
            begun = read_json(self.folder / INPUTS)
            documents = begun.get("documents")
            if not isinstance(documents, dict) or "tokenizer" not in begun:
                raise CheckpointError(f"{self.folder / INPUTS} cannot be read: it names no documents or no tokenizer")
            changed, same_tokenizer = changes(documents, digests), begun["tokenizer"] == inputs["tokenizer"]
            if changed or not same_tokenizer:
                what = "; ".join(changed or ["the tokenizer is another"])
                raise InputError(
                    f"{self.folder} holds a run on other texts: {what}; bring them back, give another --out, or "
                    "discard that run with --fresh"
                )
        elif self.processes.is_first:
            self._write(INPUTS, json.dumps(inputs, indent=0) + "\n")

    def checkpoints(self) -> list[Path]:
        """The whole ones, oldest first."""
        return sorted(path.parent for path in (self.folder / CHECKPOINTS).glob(f"step-*/{PROGRESS}"))

    def steps_saved(self) -> int:
        """How many steps had been done when the last checkpoint was written."""
        found = self.checkpoints()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def save(self, model: Decoder, optimizers: list[Optimizer], progress: Progress) -> None:
        """Writes a checkpoint aside, names it, and removes the oldest that need not be kept. CheckpointError if that
        fails; the last good one stays."""
        parent = self.folder / CHECKPOINTS
        scratch, final = parent / ".saving", parent / f"step-{progress.step:08d}"
        rank, count = self.processes.rank, self.processes.count
        self._as_one(final, lambda: self._make_room(scratch))
        try:
            self._as_one(final, lambda: save_state(scratch, model, optimizers, rank, count))
            self._as_one(final, lambda: self._name(scratch, final, progress))
        except CheckpointError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _as_one(self, final: Path, act: Callable[[], None]) -> None:
        """Does what all processes do at the same time. CheckpointError on all of them where one could not."""
        problem: str | None = None
        try:
            act()
        except OSError as error:
            problem = str(error)
        if (problem := self.processes.told_by_any(problem)) is not None:
            raise CheckpointError(f"could not save to {final}: {problem}; what was there is unchanged")

    def _make_room(self, scratch: Path) -> None:
        if self.processes.is_first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def _name(self, scratch: Path, final: Path, progress: Progress) -> None:
        """Makes a checkpoint of what all processes have written."""
        if not self.processes.is_first:
            return
        with open(scratch / PROGRESS, "w") as file:
            file.write(json.dumps(asdict(progress)))
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(scratch, final)
        for old in self.checkpoints()[: -self.config.checkpoints.keep]:
            shutil.rmtree(old)

    def load(self, path: Path, model: Decoder, optimizers: list[Optimizer]) -> Progress:
        """Puts model and optimizers where a checkpoint left them. CheckpointError for one that is damaged."""
        try:
            values = read_json(path / PROGRESS)
            if missing := [one.name for one in fields(Progress) if one.name not in values]:
                raise CheckpointError(f"{path / PROGRESS} is damaged: {missing[0]} is missing")
            progress = TypeAdapter(Progress).validate_python(values)
        except ValidationError as error:
            raise CheckpointError(f"{path / PROGRESS} is damaged: {error.errors()[0]['msg']}") from None
        load_state(path, model, optimizers)
        self._forget_metrics_after(progress.step)
        return progress

    def record(self, values: dict[str, Any]) -> None:
        """Adds a line to the metrics."""
        if self.processes.is_first:
            try:
                with open(self.folder / METRICS, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise CheckpointError(f"{self.folder / METRICS} cannot be written: {error}") from None

    def export(self, model: Decoder, tokenizer: tokenizers.Tokenizer) -> None:
        """Writes the model as `kvell generate` reads it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        if self.processes.is_first:
            copy = Decoder(model.config)
            copy.load_state_dict(weights)
            copy.to(getattr(torch, self.config.save_dtype)).save_pretrained(self.folder)
            with beside(self.folder) as scratch:
                (scratch / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
                move_in(scratch, self.folder, ["tokenizer.json"])
        self.processes.wait()

    def write_evaluation(self, figures: dict[str, Any]) -> None:
        if self.processes.is_first:
            self._write(EVALUATION, json.dumps(figures, indent=2) + "\n")

    def evaluation(self) -> dict[str, Any] | None:
        """What a run that is over left as its last; None without one. CheckpointError for one that is damaged."""
        file = self.folder / EVALUATION
        try:
            figures: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}; without it the model is evaluated again"
            ) from None
        return figures

    def _write(self, name: str, text: str) -> None:
        with beside(self.folder) as scratch:
            (scratch / name).write_text(text)
            move_in(scratch, self.folder, [name])

    def _forget_metrics_after(self, step: int) -> None:
        """Steps that will be done again are recorded again."""
        file = self.folder / METRICS
        if not self.processes.is_first or not file.exists():
            return
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
        kept = [line for line in lines if _is_up_to(line, step)]
        if kept == lines:
            return
        self._write(METRICS, "".join(f"{line}\n" for line in kept))


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What became of documents, in words."""
    found = {
        "changed": [name for name in before if name in now and before[name] != now[name]],
        "gone": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
    }
    words = [f"{len(names)} {what} ({shown(names)})" for what, names in found.items() if names]
    return words or (["in another order"] if list(before) != list(now) else [])


def _is_up_to(line: str, step: int) -> bool:
    """Whether a line of the metrics is whole and about a step that is not done again."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps a run's folder from other processes; however this one ends, the system lets go of it.

    InputError where another holds it; CheckpointError for a folder that cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"the run's folder {folder} cannot be written to: {error.strerror}") from None
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another run: wait for its end, or give another --out") from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): let no other run use it", stacklevel=2)
        yield
