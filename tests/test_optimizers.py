"""What moves which weights: decay on matrices alone, Muon for experts, rates and freezing by parameters' names."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

import kvell
from kvell import Decoder
from kvell.config_file import resolve
from kvell.training import loop
from kvell.training.muon import StackedMuon
from kvell.training.optimizers import optimizers, rebalance
from kvell.training.parameters import freeze
from kvell.training.settings import Optimizer, TrainingConfig

CCA = {"kind": "convolutional", "num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "rotary": None}
CSA = {
    "kind": "compressed",
    "num_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "rotary": {"kind": "default", "theta": 100.0},
    "rotary_width": 4,
    "query_rank": 8,
    "output_rank": 8,
    "compressor": {"ratio": 4, "overlap": True},
    "indexer": {"num_heads": 2, "head_dim": 4, "top_k": 3},
}
EXPERTS = {
    "kind": "mixture_of_experts",
    "num_experts": 4,
    "top_k": 2,
    "intermediate_size": 8,
    "shared_intermediate_size": 8,
    "router": {"kind": "sigmoid"},
}
# Every technique that has weights which are no linear layer's.
MODEL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "max_positions": 512,
    "connection": {"kind": "hyper", "streams": 2, "iterations": 3},
    "per_layer_embedding": {"width": 4},
    "layers": [
        {"attention": CCA, "feed_forward": {"kind": "gated_mlp", "intermediate_size": 24}},
        {"attention": CSA, "feed_forward": EXPERTS},
    ],
}


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(resolve(MODEL, "model"))


def optimizer(**settings: Any) -> Optimizer:
    return Optimizer.model_validate(settings)


def state(made: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_falls_on_matrices_alone(kind: str) -> None:
    """Steps without gradients: a matrix shrinks; tables keep the rows that no token looks up, norms, biases, sinks,
    temperatures and scales their values, and hyper-connections the identity that they begin as."""
    made = model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5)
    before = state(made)
    by = optimizers(made, optimizer(kind=kind, weight_decay=0.1, matrix_weight_decay=0.1))
    for _ in range(3):
        for parameter in made.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for each in by:
            each.step()
    changed = {name for name, values in state(made).items() if not torch.equal(values, before[name])}
    spared = r"embedding\.weight|table\.weight|norm\.weight|bias|sink|temperature|connection\.|ends\.|depthwise"
    assert changed == {name for name in before if not re.search(spared, name)}
    assert {"head.weight", "layers.0.attention.o_proj.weight", "layers.1.feed_forward.down_proj"} <= changed
    assert "layers.0.attention.conv_grouped.weight" in changed


def test_by_default_adamw_has_one_rate_and_no_decay_for_all() -> None:
    made = model()
    (only,) = optimizers(made, optimizer(kind="adamw"))
    (group,) = only.param_groups
    assert len(group["params"]) == sum(parameter.requires_grad for parameter in made.parameters())
    assert (group["lr"], group["weight_decay"]) == (0.004, 0.0)


def test_muon_moves_the_matrices_inside_the_model_and_those_of_experts() -> None:
    made = model()
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    by = {type(each): each for each in optimizers(made, optimizer(kind="muon"))}
    taken = {
        kind: {names[id(p)] for group in each.param_groups for p in group["params"]} for kind, each in by.items()
    }
    assert taken[StackedMuon] == {"layers.1.feed_forward.gate_up_proj", "layers.1.feed_forward.down_proj"}
    linears = {f"{name}.weight" for name, module in made.named_modules() if isinstance(module, nn.Linear)}
    assert taken[Muon] == linears - {"head.weight"}
    learning = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert taken[AdamW] == learning - taken[Muon] - taken[StackedMuon]


@pytest.mark.parametrize("shape", [(5, 8, 16), (5, 16, 8), (3, 8, 8), (1, 24, 4)])
def test_each_expert_s_matrix_moves_as_torch_s_muon_moves_it_alone(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(shape))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    ours = StackedMuon([stack], lr=0.02, weight_decay=0.1)
    theirs = Muon(alone, lr=0.02, weight_decay=0.1)
    for step in range(3):
        stack.grad = torch.randn(shape)
        stack.grad[-1] *= step > 0  # an expert that no token chose in the first step
        for matrix, gradient in zip(alone, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    # bf16 products of another order of summing differ by a bit of 2^-8; moves are of the size of the rate.
    torch.testing.assert_close(stack.detach(), torch.stack(list(alone)).detach(), atol=1e-3, rtol=0)


def rates(made: Decoder, settings: Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    groups = [group for each in optimizers(made, settings) for group in each.param_groups]
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_parameter_groups_set_rates_and_decay_by_name_and_the_first_that_matches_counts() -> None:
    settings = optimizer(
        kind="muon",
        learning_rate=0.01,
        matrix_learning_rate=0.02,
        matrix_weight_decay=0.1,
        parameter_groups=[
            {"pattern": "layers.0.attention.q_proj.*", "learning_rate": 0.5},
            {"pattern": "layers.0.*_proj.weight", "learning_rate_scale": 0.5},
            {"pattern": "embedding.*", "weight_decay": 0.3, "learning_rate_scale": 2},
            {"pattern": "layers.1.feed_forward.*_proj", "weight_decay": 0.0},
        ],
    )
    found = rates(model(), settings)
    assert found["layers.0.attention.q_proj.weight"] == (0.5, 0.1)
    assert found["layers.0.attention.k_proj.weight"] == (0.01, 0.1)
    assert found["layers.1.attention.q_a_proj.weight"] == (0.02, 0.1)
    assert found["embedding.weight"] == (0.02, 0.3)
    assert found["layers.1.feed_forward.down_proj"] == (0.02, 0.0)
    assert found["norm.weight"] == (0.01, 0.0)


def test_what_is_frozen_is_in_no_optimizer() -> None:
    made = model()
    settings = optimizer(parameter_groups=[{"pattern": "layers.0.*", "freeze": True}])
    freeze(made, settings.parameter_groups)
    assert set(rates(made, settings)) == {
        name
        for name, parameter in made.named_parameters()
        if not name.startswith("layers.0.") and not name.endswith("selection_bias") and parameter.requires_grad
    }


def test_a_frozen_router_keeps_its_selection_bias() -> None:
    loads = {1: torch.tensor([4, 0, 0, 0])}
    learning, frozen = model(), model()
    freeze(frozen, optimizer(parameter_groups=[{"pattern": "*.router.*", "freeze": True}]).parameter_groups)
    for made in (learning, frozen):
        rebalance(made, loads, 0.01)
    name = "layers.1.feed_forward.router.selection_bias"
    torch.testing.assert_close(learning.get_parameter(name), torch.tensor([-0.01, 0.01, 0.01, 0.01]))
    assert torch.equal(frozen.get_parameter(name), torch.zeros(4))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for name in ("bisect", "hmac"):
        module = __import__(name)
        assert module.__file__ is not None
        (folder / f"{name}.txt").write_text(Path(module.__file__).read_text())
    return folder


def run_values(texts: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "tokenizer": {"vocab_size": 320},
        "data": {"sources": [{"kind": "files", "paths": [str(texts)]}], "held_out": 0},
        "stages": [{"steps": 4, "length": 64, "tokens": 128, "micro_batches": 2}],
        "schedule": {"warmup": 0},
        "checkpoints": {"every": 2},
        "threads": 1,
        "optimizer": settings,
        "out": str(out),
    }


def config(texts: Path, out: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig.of(json.loads(json.dumps(run_values(texts, out, **settings))) | {"model": MODEL_CONFIG}, "")


MODEL_CONFIG = resolve(MODEL, "model")


def stop_at_two(report: loop.StepReport) -> None:
    if report.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def weights(out: Path) -> dict[str, Tensor]:
    return dict(kvell.from_pretrained(out).named_tensors())


FROZEN = {"pattern": "layers.0.*", "freeze": True}
TABLES = {"pattern": "*table.weight", "freeze": True}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_with_frozen_parameters_keeps_them_and_goes_on_as_if_it_had_not_been_stopped(
    texts: Path, tmp_path: Path, kind: str
) -> None:
    settings = {"kind": kind, "weight_decay": 0.1, "parameter_groups": [FROZEN, TABLES]}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    training = loop.Training(config(texts, whole, **settings), loop.Processes.of(torch.device("cpu")), False, False)
    before = state(training.model)
    training.run(lambda report: None)
    assert loop.train(config(texts, stopped, **settings), on_step=stop_at_two).step == 2
    loop.train(config(texts, stopped, **settings))
    ours, theirs = weights(stopped), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, values in before.items():
        frozen = name.startswith("layers.0.") or name == "per_layer_inputs.table.weight"
        assert torch.equal(theirs[name], values) == frozen, name


def in_two_processes(*program: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_experts_divided_over_two_processes_move_as_they_do_in_one(tmp_path: Path) -> None:
    """Three experts: one process has two of them."""
    program = tmp_path / "divided.py"
    program.write_text(
        """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from kvell.training.muon import StackedMuon

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
first, gradients = torch.randn(3, 8, 6), torch.randn(2, 3, 8, 6)

def moved(given):
    stack = torch.nn.Parameter(given(first.clone()))
    muon = StackedMuon([stack], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        stack.grad = given(gradient)
        muon.step()
    return stack.detach()

whole, divided = moved(lambda tensor: tensor), moved(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
torch.testing.assert_close(divided.full_tensor(), whole, atol=1e-3, rtol=0)
dist.destroy_process_group()
"""
    )
    in_two_processes(str(program))


def test_a_run_with_frozen_parameters_learns_alike_on_two_processes(texts: Path, tmp_path: Path) -> None:
    settings = {"kind": "adamw", "parameter_groups": [FROZEN, TABLES]}
    one, two = tmp_path / "one", tmp_path / "two"
    loop.train(config(texts, one, **settings))
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_values(texts, two, **settings)))
    in_two_processes("-m", "kvell.train", str(file))
    ours, theirs = weights(two), weights(one)
    for name in theirs:
        if name.startswith("layers.0.") or name == "per_layer_inputs.table.weight":
            assert torch.equal(ours[name], theirs[name]), name
    figures = [json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]) for out in (one, two)]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"pattern": "layers.9.*", "freeze": True}, r"0\.pattern: 'layers\.9\.\*' matches no parameter that learns"),
        ({"pattern": "*selection_bias", "freeze": True}, "matches no parameter that learns"),
        ({"pattern": "*", "freeze": True}, "every parameter is frozen, and nothing is left to learn"),
        ({"pattern": "*"}, "says nothing: give learning_rate, learning_rate_scale, weight_decay or freeze: true"),
        ({"pattern": "*", "freeze": True, "weight_decay": 0.1}, "what is frozen has neither"),
        ({"pattern": "*", "learning_rate": 0.1, "learning_rate_scale": 2}, "give one of the two"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused_in_one_line(
    texts: Path, tmp_path: Path, group: dict[str, Any], words: str
) -> None:
    with pytest.raises(kvell.ConfigError, match=words) as refused:
        loop.train(config(texts, tmp_path / "run", parameter_groups=[group]))
    assert "parameter_groups" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_group_that_others_leave_nothing_to_is_refused(texts: Path, tmp_path: Path) -> None:
    groups = [{"pattern": "layers.*", "weight_decay": 0.1}, {"pattern": "layers.1.*", "freeze": True}]
    with pytest.raises(kvell.ConfigError, match=r"1\.pattern: 'layers\.1\.\*' matches only parameters that groups"):
        loop.train(config(texts, tmp_path / "run", parameter_groups=groups))


def one_group(made: Decoder, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """As optimizers were grouped when decay fell on everything."""
    learning = [parameter for parameter in made.parameters() if parameter.requires_grad]
    adamw = AdamW(learning, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    adamw.param_groups[0]["full_lr"] = settings.learning_rate
    return [adamw]


def test_a_checkpoint_of_one_group_without_decay_goes_on_to_the_same_bits(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("older", "whole"):
        with monkeypatch.context() as before:
            before.setattr(loop, "optimizers", one_group)
            loop.train(
                config(texts, tmp_path / out, kind="adamw"),
                on_step=stop_at_two if out == "older" else lambda report: None,
            )
    assert loop.train(config(texts, tmp_path / "older", kind="adamw")).reason == "finished"
    ours, theirs = weights(tmp_path / "older"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
