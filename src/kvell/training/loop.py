"""The training loop: steps, evaluations and checkpoints, from a config to a model's folder.

Everything that decides what a step does is a function of the config and the step's number, so a run that was stopped
goes on as if it had not been: model, optimizers and random state come from the checkpoint, the data from the step.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from kvell.checkpoint import from_pretrained
from kvell.checkpoint.loading import available_device, build_empty
from kvell.config import ModelConfig
from kvell.errors import InputError, KvellError
from kvell.hardware import set_threads
from kvell.model import Decoder
from kvell.training.batches import MicroBatch, check_tasks, steps_of
from kvell.training.compiling import compile_parts
from kvell.training.corpus import Corpus, Document, read_corpus, shown, unread
from kvell.training.ends import Ends, put_first
from kvell.training.evaluation import evaluate_tasks, evaluate_texts
from kvell.training.initialisation import quiet_start
from kvell.training.losses import Totals, step_loss
from kvell.training.optimizers import optimizers, rate, rebalance, set_rates
from kvell.training.parallel import Processes, clip
from kvell.training.parameters import check_groups, freeze
from kvell.training.run import Progress, Run, held
from kvell.training.settings import NewTokenizer, TrainingConfig, ignored_settings
from kvell.training.stopping import StoppedError, StopRequest, stop_requests
from kvell.training.tokens import TokenDocument, read_tokenizer, tokenise, train_tokenizer
from kvell.training.trackers import Tracker, open_trackers


class TrainingError(KvellError):
    """A run that cannot go on."""


@dataclass(frozen=True)
class StepReport:
    """What there is to say after a step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished`, `stopped` by SIGTERM, `interrupted` by Ctrl-C, or `patience` exhausted; and what
    evaluation.json holds of one that is over."""

    reason: str
    step: int
    folder: Path
    evaluation: dict[str, Any]


Watcher = Callable[[StepReport], None]


def train(
    config: TrainingConfig, *, skip_bad: bool = False, fresh: bool = False, on_step: Watcher = lambda report: None
) -> Outcome:
    """Trains, or goes on where the folder's last checkpoint stands, until the steps are done or SIGTERM or Ctrl-C
    comes, which lets the step finish and saves; a second Ctrl-C ends it at once. InputError, ConfigError or
    CheckpointError for what cannot be begun; TrainingError for a loss that is no number: the last good checkpoint
    stays."""
    set_threads(config.threads)
    processes = Processes.of(available_device(config.device))
    try:
        with stop_requests() as stop, ExitStack() as stack:
            problem: KvellError | None = None
            if processes.is_first:
                try:
                    stack.enter_context(held(Path(config.out)))
                except KvellError as error:
                    problem = error
            if (problem := processes.told_by_first(problem)) is not None:
                raise problem
            try:
                training = Training(config, processes, skip_bad, fresh, stop)
            except StoppedError:
                return Outcome(
                    stop.reason, Run(Path(config.out), config, processes).steps_saved(), Path(config.out), {}
                )
            if processes.is_first:
                for line in ignored_settings(config):
                    warnings.warn(line, stacklevel=2)
            return training.run(on_step, stop)
    finally:
        processes.leave()


class Training:
    """A run's parts, put together."""

    def __init__(
        self,
        config: TrainingConfig,
        processes: Processes,
        skip_bad: bool,
        fresh: bool,
        stop: StopRequest | None = None,
    ) -> None:
        """StoppedError where that is asked for before the texts are read; what the folder holds then stays."""
        self.config, self.processes = config, processes
        for stage in config.stages:
            processes.mine(range(stage.micro_batches))
        check_groups(build_empty(config.model, torch.float32), config.optimizer.parameter_groups)
        self.folder = Run(Path(config.out), config, processes)
        stop = stop or StopRequest()
        with suppress(StoppedError):  # the others learn of it below
            digests = self._read(skip_bad, stop)
        if processes.any(stop.is_set):
            raise StoppedError
        torch.manual_seed(config.seed)
        self.model = self._make_model().to(processes.device)
        if config.compile:
            compile_parts(self.model, processes.device)
        processes.shard(self.model)
        freeze(self.model, config.optimizer.parameter_groups)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizers = optimizers(self.model, config.optimizer)
        self.progress = Progress()
        self.saved_step = 0  # before the first step there is nothing to save
        # Only now, when it is known that the run can be, is an older one discarded.
        checkpoint = self.folder.begin(fresh)
        self.folder.hold_to(digests, self.tokenizer, goes_on=checkpoint is not None)
        if checkpoint is not None:
            self.progress = self.folder.load(checkpoint, self.model, self.optimizers)
            self.saved_step = self.progress.step

    def _read(self, skip_bad: bool, stop: StopRequest) -> dict[str, str]:
        """Reads the corpus and makes tokens of it; the documents' hashes by their names. StoppedError where that is
        asked for meanwhile."""
        config = self.config
        corpus = read_corpus(config.data, skip_bad, stop.check)
        if corpus.unreadable:
            self._warn(f"left out: {unread(corpus.unreadable)}")
        self._check_held_out(corpus.held_out)
        self.tokenizer = self._make_tokenizer(corpus, stop)
        if isinstance(config.tokenizer, NewTokenizer):
            self.ends = Ends.of_new(self.tokenizer)
        else:
            self.ends = Ends.of(self.tokenizer, Path(config.tokenizer), config.model)
            put_first(self.tokenizer, self.ends.bos)
        if self.ends.eos is None:
            self._warn(
                f"nothing ends a document: {config.tokenizer} names no eos_token, nor does the config name "
                "model.eos_token_ids, so the model does not learn where a text ends"
            )
        check_tasks(config, self._encode, self.ends.bos)
        left_out: list[str] = []
        self.training = self._tokens_of(corpus.training, stop, left_out)
        self.held_out = self._tokens_of(corpus.held_out, stop, left_out, measured=True)
        if not self.training:
            raise InputError(
                "there is no text to learn from: with this tokenizer no document makes two tokens, of "
                f"{len(left_out)} ({shown(left_out)})"
            )
        if left_out:
            self._warn(
                f"left out: {len(left_out)} {'document makes' if len(left_out) == 1 else 'documents make'} too few "
                f"tokens to learn from or to be measured by: {shown(left_out)}"
            )
        if corpus.held_out:
            self._check_held_out(self.held_out)
        return corpus.digests()

    def _check_held_out(self, documents: Sequence[Document | TokenDocument]) -> None:
        """Says so where nothing is held out that was to be; InputError where a run depends on it."""
        if documents:
            return
        if self.config.evaluation.patience is not None:
            raise InputError("evaluation.patience: no document is held out to be patient with; raise data.held_out")
        if self.config.data.held_out:
            self._warn(
                "no document is held out, so nothing says how well the model does on text that it has not seen: the "
                f"texts are too short for data.held_out {self.config.data.held_out:g}; raise it, or give more text"
            )

    def _warn(self, message: str) -> None:
        if self.processes.is_first:
            warnings.warn(message, stacklevel=2)

    def run(self, on_step: Watcher, stop: StopRequest | None = None) -> Outcome:
        config, progress, stop = self.config, self.progress, stop or StopRequest()
        done = self.folder.evaluation()
        if self._is_over and done is not None:
            return Outcome(self._why_over, progress.step, Path(config.out), done)
        trackers = open_trackers(config.trackers, Path(config.out)) if self.processes.is_first else []
        steps = steps_of(
            config.stages, self.training, config.data.tasks, self._encode, self.ends.bos, config.seed, progress.step
        )
        started, seen = time.perf_counter(), 0
        while (reason := self._reason(stop)) is None:
            figures = self._step(next(steps))
            seen += int(figures["tokens"])
            progress.step += 1
            progress.tokens += int(figures["tokens"])
            speed = seen / (time.perf_counter() - started)
            figures = {"step": progress.step, **figures, "tokens_per_second": speed}
            self._log(figures, trackers)
            on_step(StepReport(progress.step, config.steps, figures["loss"], speed))
            if self._is_due(config.evaluation.every) or (self._is_over and config.evaluation.patience is not None):
                self._evaluate(trackers)
            if self._is_due(config.checkpoints.every):
                self._save()
        return self._end(reason, trackers, stop)

    @property
    def _is_over(self) -> bool:
        """Whether there is no step left to do."""
        patience = self.config.evaluation.patience
        exhausted = patience is not None and self.progress.since_best >= patience
        return exhausted or self.progress.step == self.config.steps

    @property
    def _why_over(self) -> str:
        return "finished" if self.progress.step == self.config.steps else "patience"

    def _reason(self, stop: StopRequest) -> str | None:
        """Why the run ends before its next step, if it does."""
        if self._is_over:
            return self._why_over
        return stop.reason if self.processes.any(stop.is_set) else None

    def _step(self, step: list[MicroBatch]) -> dict[str, float]:
        """One step of the optimizers; the figures of it."""
        config, totals = self.config, Totals.of(step)
        share = rate(config.schedule, self.progress.step, config.steps)
        set_rates(self.optimizers, share)
        parts: dict[str, Tensor] = {}
        loads: dict[int, Tensor] = {}
        loss = torch.zeros((), device=self.processes.device)
        for batch in self.processes.mine(step):
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                made = step_loss(self.model, batch.to(self.processes.device), totals, config.losses)
            # Gradients are averaged over processes; the step's loss is the sum of theirs.
            (made.loss * self.processes.count).backward()
            loss += made.loss.detach()
            for name, part in made.parts.items():
                parts[name] = parts.get(name, torch.zeros_like(part)) + part
            for layer, load in made.expert_loads.items():
                loads[layer] = loads.get(layer, torch.zeros_like(load)) + load
        loss = self.processes.total(loss)
        parts, loads = self.processes.totals(parts), self.processes.totals(loads)
        for parameter in self.parameters:  # what took no part in the loss has a state in the optimizer all the same
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = clip(self.parameters, config.optimizer.clip)
        self._check_finite(step, float(loss), float(norm))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if config.losses.bias_rate:
            rebalance(self.model, loads, config.losses.bias_rate)
        figures = {name: float(part) for name, part in parts.items()}
        return {"loss": float(loss), **figures, "gradient_norm": float(norm), "rate": share, "tokens": totals.tokens}

    def _check_finite(self, step: list[MicroBatch], loss: float, norm: float) -> None:
        if torch.isfinite(torch.tensor([loss, norm])).all():
            return
        what = f"loss is {loss}" if loss != loss or abs(loss) == float("inf") else f"norm of the gradients is {norm}"
        names = sorted({name for batch in step for name in batch.names})
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        saved = self.folder.checkpoints()
        kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint had been written yet"
        raise TrainingError(
            f"step {self.progress.step + 1}: the {what}, in the batch of {shown}; nothing was changed by it, {kept}"
        )

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 and self.progress.step < self.config.steps

    def _evaluate(self, trackers: list[Tracker]) -> None:
        """Records an evaluation. Where patience is set, the best model so far stands in the folder."""
        settings, progress = self.config.evaluation, self.progress
        if not self.held_out:
            return
        figures = evaluate_texts(self.model, self.held_out, self.config.evaluation_length, settings.tokens)
        bits = figures["bits_per_byte"]
        self._log({"step": progress.step, "held_out": figures}, [])
        if bits is None:  # each document's first tokens are one character
            return
        for tracker in trackers:
            tracker.log({"held_out_bits_per_byte": bits}, progress.step)
        if progress.best is None or bits < progress.best:
            progress.best, progress.since_best = bits, 0
            if settings.patience is not None:
                self.folder.export(self.model, self.tokenizer)
        else:
            progress.since_best += 1

    def _save(self) -> None:
        self.folder.save(self.model, self.optimizers, self.progress)
        self.saved_step = self.progress.step

    def _end(self, reason: str, trackers: list[Tracker], stop: StopRequest) -> Outcome:
        """Saves; a run that is over also leaves its model, and what that is worth.

        evaluation.json is written last: a run that ends before it stands does this again when it goes on.
        """
        config, folder = self.config, Path(self.config.out)
        if self.saved_step != self.progress.step:
            self._save()
        for tracker in trackers:
            tracker.close()
        if not self._is_over:
            return Outcome(reason, self.progress.step, folder, {})
        if config.evaluation.patience is None or self.progress.best is None:  # else the best model is there already
            self.folder.export(self.model, self.tokenizer)
        self.processes.leave()
        if not self.processes.is_first:
            return Outcome(reason, self.progress.step, folder, {})
        try:
            figures = self._final_figures(stop)
        except StoppedError:
            return Outcome(stop.reason, self.progress.step, folder, {})
        self.folder.write_evaluation(figures)
        return Outcome(reason, self.progress.step, folder, figures)

    def _final_figures(self, stop: StopRequest) -> dict[str, Any]:
        """What the model in the folder is worth. StoppedError where that is asked for meanwhile."""
        config = self.config
        model = from_pretrained(config.out, dtype=torch.float32, device=self.processes.device)
        figures: dict[str, Any] = {"steps": self.progress.step, "tokens": self.progress.tokens}
        if self.held_out:
            figures["held_out"] = evaluate_texts(model, self.held_out, before_each=stop.check)
        if config.evaluation.tasks:
            figures["tasks"] = evaluate_tasks(
                model,
                config.evaluation,
                self.held_out or self.training,
                self._encode,
                self.ends.bos,
                config.seed,
                before_each=stop.check,
            )
        return figures

    def _log(self, values: dict[str, Any], trackers: list[Tracker]) -> None:
        self.folder.record(values)
        for tracker in trackers:
            tracker.log({name: float(value) for name, value in values.items()}, values["step"])

    def _make_tokenizer(self, corpus: Corpus, stop: StopRequest) -> tokenizers.Tokenizer:
        """The one asked for; training one is the same every time for the same texts."""
        wanted = self.config.tokenizer
        if isinstance(wanted, NewTokenizer):
            return train_tokenizer(wanted, [document.text for document in corpus.training], stop.check)
        return read_tokenizer(wanted)

    def _make_model(self) -> Decoder:
        """Fresh weights, or those of a model that is to be trained on."""
        config = self.config
        model = Decoder(self._described(), activation_checkpointing=config.activation_checkpointing)
        if config.start_from is None:
            quiet_start(model)
            return model
        trained = from_pretrained(config.start_from, dtype=torch.float32, map_per_layer_table=False)
        if trained.config.digest() != model.config.digest():
            raise InputError(f"start_from: the model in {config.start_from} is not the one that the config describes")
        model.load_state_dict(trained.state_dict())
        return model

    def _described(self) -> ModelConfig:
        """The model's config with the ids that begin and end its texts, where it does not name them itself or the
        tokenizer is a new one."""
        model, ends = self.config.model, self.ends
        is_new = isinstance(self.config.tokenizer, NewTokenizer)
        changes: dict[str, Any] = {}
        if ends.bos is not None and (is_new or model.bos_token_id is None):
            changes["bos_token_id"] = ends.bos
        if ends.eos is not None and (is_new or not model.eos_token_ids):
            changes["eos_token_ids"] = (ends.eos,)
        return model.model_copy(update=changes)

    def _tokens_of(
        self, documents: Sequence[Document], stop: StopRequest, left_out: list[str], measured: bool = False
    ) -> list[TokenDocument]:
        """The documents of two tokens and more, some of them text; of those to be measured, the ones with a stretch
        of text that can be. The names of the others are added to `left_out`."""
        found = []
        vocab_size = self.config.model.vocab_size
        for document in tokenise(self.tokenizer, documents, vocab_size, self.ends.eos, measured, stop.check):
            is_text = document.text_stop > document.text_start and len(document.ids) >= 2
            if is_text and (not measured or document.measured()[2]):
                found.append(document)
            else:
                left_out.append(document.name)
        return found

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
