"""What a run's checkpoint holds: tensors and JSON, read whole or not at all, and never code."""

import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import ADAMW, config_file, metrics, texts
from test_training_stops import signal_at, small, small_values

import kvell
from kvell import cli
from kvell.training import loop
from kvell.training.optimizers import optimizers
from kvell.training.state import load_state, save_state

__all__ = ["texts"]

SOURCES = Path(kvell.__file__).parent


@pytest.fixture(scope="module")
def stopped(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step; tests copy it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    loop.train(small(texts, out), on_step=signal_at(1, signal.SIGTERM))
    return out


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


class Planted:
    """What unpickling it does is to make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def plant(folder: Path, marker: Path) -> None:
    """Puts code in all that torch.distributed.checkpoint would read."""
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Planted(marker)))


def test_code_planted_in_a_run_s_folder_is_not_executed(texts: Path, run: Path, tmp_path: Path) -> None:
    marker, (checkpoint,) = tmp_path / "executed", (run / "checkpoints").iterdir()
    plant(checkpoint, marker)
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert marker.exists(), "what is planted is no code"
    marker.unlink()
    assert loop.train(small(texts, run)).reason == "finished"
    assert not marker.exists()


def test_a_run_that_was_saved_in_pickles_is_refused_with_what_to_do(
    texts: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marker, (checkpoint,) = tmp_path / "executed", (run / "checkpoints").iterdir()
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    plant(checkpoint, marker)
    assert cli.main(["train", str(config_file(tmp_path, small_values(texts, run)))]) == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: .*step-00000001 was written .* pickle .* not read: end that run .* --fresh", said)
    assert not marker.exists()


def test_nothing_in_kvell_reads_pickles() -> None:
    read = re.compile(
        r"torch\.load\b|import pickle|pickle\.load|distributed\.checkpoint\.state_dict_loader|dill|joblib"
    )
    assert not [file for file in SOURCES.rglob("*.py") if read.search(file.read_text())]


def test_a_checkpoint_is_tensors_and_json_alone(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert {file.name for file in checkpoint.iterdir()} == {"progress.json", "state-00000-of-00001.safetensors"}
    assert json.loads((checkpoint / "progress.json").read_text())["step"] == 1


def damaged(checkpoint: Path, how: str) -> None:
    file = checkpoint / "state-00000-of-00001.safetensors"
    tensors = load_file(file)
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
        return
    if how == "gone":
        del tensors["model.embedding.weight"]
    elif how == "another":
        tensors["model.bias"] = torch.zeros(3)
    elif how == "wider":
        tensors["model.embedding.weight"] = torch.zeros(320, 17)
    elif how == "rounded":
        tensors["model.embedding.weight"] = tensors["model.embedding.weight"].bfloat16()
    elif how == "no random numbers":
        tensors["random_state"].zero_()
    elif how == "no progress":
        (checkpoint / "progress.json").write_text('{"step": "many", "tokens": 1, "best": null, "since_best": 0}')
    elif how == "an empty progress":
        (checkpoint / "progress.json").write_text("{}")
    rows = {"model.embedding.weight": [0, 400]} if how == "in part" else {}
    save_file(tensors, file, {"rows": "no JSON" if how == "metadata" else json.dumps(rows)})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", "step-00000001 cannot be read: "),
        ("gone", "step-00000001: model.embedding.weight is missing"),
        ("another", "step-00000001: model.bias is not known to this run"),
        ("wider", r"embedding.weight is F32 of the shape \[320, 17\], and in this run F32 of the shape \[320, 16\]"),
        ("rounded", "model.embedding.weight is BF16 of the shape .*, and in this run F32"),
        ("in part", r"model.embedding.weight is F32 of the shape \[400, 16\]"),
        ("metadata", "safetensors is damaged: rows: "),
        ("no random numbers", "step-00000001 cannot be read: random_state: "),
        ("no progress", "progress.json is damaged: .* integer"),
        ("an empty progress", "progress.json is damaged: step is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(
    how: str, said: str, texts: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged(next((run / "checkpoints").iterdir()), how)
    assert cli.main(["train", str(config_file(tmp_path, small_values(texts, run)))]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line), line


def learnt() -> tuple[kvell.Decoder, list[torch.optim.Optimizer]]:
    """A small model and its optimizers after a step."""
    from test_training_stops import SMALL

    model = kvell.Decoder(kvell.ModelConfig.from_dict({"model_type": "kvell", **SMALL}))
    made = optimizers(model, kvell.training.settings.Optimizer(**ADAMW))
    model(torch.randint(320, (1, 80))).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for optimizer in made:
        optimizer.step()
    return model, made


def held_of(model: kvell.Decoder, made: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    states = [state for optimizer in made for values in optimizer.state.values() for state in values.values()]
    return [*(tensor.detach().clone() for tensor in model.state_dict().values()), *(each.clone() for each in states)]


def test_what_three_processes_wrote_by_rows_one_reads_whole(tmp_path: Path) -> None:
    """320 rows over three processes are 107, 107 and 106; a file that is missing is said."""
    model, made = learnt()
    before = held_of(model, made)
    save_state(tmp_path, model, made, 0, 1)
    whole = tmp_path / "state-00000-of-00001.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    for rank, (low, high) in enumerate([(0, 107), (107, 214), (214, 320)]):
        divided = {name: tensor for name, tensor in tensors.items() if tensor.shape[:1] == (320,)}
        others = {} if rank else {name: tensor for name, tensor in tensors.items() if name not in divided}
        rows = {name: [low, 320] for name in divided}
        pieces = {name: tensor[low:high].clone() for name, tensor in divided.items()}
        save_file(
            {**pieces, **others}, tmp_path / f"state-{rank:05d}-of-00003.safetensors", {"rows": json.dumps(rows)}
        )
    other, others_made = learnt()
    assert not all(map(torch.equal, held_of(other, others_made), before))
    load_state(tmp_path, other, others_made)
    assert all(map(torch.equal, held_of(other, others_made), before))
    (tmp_path / "state-00001-of-00003.safetensors").unlink()
    with pytest.raises(kvell.CheckpointError, match=r"a file is missing, row 107 of \S+ is in none"):
        load_state(tmp_path, other, others_made)


def test_the_random_state_goes_on_too(tmp_path: Path) -> None:
    model, made = learnt()
    save_state(tmp_path, model, made, 0, 1)
    drawn = torch.rand(4)
    torch.manual_seed(99)
    load_state(tmp_path, model, made)
    assert torch.rand(4).equal(drawn)


def test_a_run_goes_on_from_what_it_saved_to_the_bit(texts: Path, run: Path, tmp_path: Path) -> None:
    loop.train(small(texts, run))
    loop.train(small(texts, tmp_path / "whole" / "run"))
    assert metrics(run) == metrics(tmp_path / "whole" / "run")
    ours, theirs = (kvell.from_pretrained(out).fingerprint() for out in (run, tmp_path / "whole" / "run"))
    assert ours == theirs
    assert os.listdir(run / "checkpoints") == ["step-00000006"]
