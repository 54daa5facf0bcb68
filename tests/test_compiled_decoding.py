"""Compiled decoding: its logits are those of the model as it is, whatever the cache has been through.

For drawn configs the traced step runs as it was traced: compiling one takes seconds. A few are compiled.
"""

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_checks import assert_same, check_all_ways, draw_tokens
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_models import MIXED, model_like
from strategies import configs, random_model
from torch import Tensor

from kvell import Cache, Decoder, ModelConfig, kernels
from kvell.cli import main
from kvell.decoding import compiled as compiling
from kvell.errors import CacheError, InputError
from kvell.kernels import cpp, linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all these tests keep what they compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each step that ran compiled."""
    batches: list[int] = []
    run = compiling.CompiledStep.__call__

    def noted(self: compiling.CompiledStep, step: Any) -> Tensor:
        batches.append(len(step.counts))
        return run(self, step)

    monkeypatch.setattr(compiling.CompiledStep, "__call__", noted)
    return batches


@pytest.fixture
def _as_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def traced(
        program: torch.export.ExportedProgram, weights: Mapping[str, Any], folder: Path
    ) -> tuple[Callable[[list[Tensor]], list[Tensor]], dict[str, Tensor]]:
        module = program.module()
        return lambda inputs: [module(*inputs)], {}

    monkeypatch.setattr(compiling, "machine_code", traced)
    return


@pytest.mark.usefixtures("_as_traced")
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(config=configs(), seed=st.integers(0, 1000))
def test_every_config_can_be_traced(config: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = random_model(config)
    compiled = copy.deepcopy(model)
    for sequences in (1, 2):
        compiled.compile_decoding(sequences)
    check_all_ways(model, compiled)


@pytest.mark.parametrize(
    ("kind", "batches"), [("deepseek_v4", [1, 2]), ("zaya", [1]), ("gemma4", [2]), ("mixed", [1])]
)
def test_compiled_code_gives_the_models_logits(kind: str, batches: list[int], folder: Path, runs: list[int]) -> None:
    model = random_model(MIXED if kind == "mixed" else model_like(kind))
    compiled = copy.deepcopy(model)
    for sequences in batches:
        compiled.compile_decoding(sequences, folder=folder)
    check_all_ways(model, compiled)
    assert runs == [1] * 16 * batches.count(1) + [2] * 6 * batches.count(2)


def test_a_compiled_step_leaves_sinkhorns_iterations_to_their_kernel(folder: Path) -> None:
    """Traced, they are most of a hyper-connected model's operators."""
    model = random_model(model_like("deepseek_v4"))
    connections = 2 * len(model.config.layers)
    traced = compiling._OneToken(model, lambda left_out: None)
    with torch.no_grad(), kernels.use("cpp", folder):
        one = torch.zeros(1, dtype=torch.long)
        rows = compiling.empty_table(len(model.config.layers), 1)
        program = torch.export.export(traced, (one, one, rows), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("kvell.sinkhorn" in name for name in called) == connections


def test_windows_reserved_exactly_are_read_and_kept(folder: Path, runs: list[int]) -> None:
    """Such a stream has no room for a window and one row more: what is seen lies beside it, for whoever shares it
    too, and the newest row is kept in both."""
    model = random_model(model_like("gemma4"))
    attentions = [layer.attention for layer in model.config.layers]
    assert any(own.sliding_window for own in attentions)
    assert any(own.kv_source is not None for own in attentions)
    compiled = copy.deepcopy(model).compile_decoding(2, folder=folder)
    tokens = draw_tokens(2, 23)
    cache = compiled.make_cache(2, max_rewind=1, max_length=40)
    with torch.no_grad():
        expected = model(tokens)
        compiled(tokens[:, :9], cache=cache)
        for at in (*range(9, 16), None, *range(15, 23)):
            if at is None:
                cache.rewind(1)
            else:
                assert_same(compiled(tokens[:, at : at + 1], cache=cache), expected[:, at : at + 1])
        assert_same(model(tokens[:, :1], cache=cache), model(torch.cat([tokens, tokens[:, :1]], dim=1))[:, -1:])
    assert runs == [2] * 15


@pytest.mark.parametrize("large", [0, 1 << 18])
def test_bf16_stays_near_the_models_own(large: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code rounds less often: it is no further from fp32's logits, with products called or compiled."""
    monkeypatch.setitem(linear.LARGE, torch.bfloat16, large)
    exact = random_model(MIXED)
    model = copy.deepcopy(exact).bfloat16()
    compiled = copy.deepcopy(model).compile_decoding(folder=folder)
    tokens = draw_tokens(1, 12)
    with torch.no_grad():
        expected = exact(tokens)
        errors = []
        for decoder in (model, compiled):
            cache = decoder.make_cache()
            rows = [decoder(tokens[:, at : at + 1], cache=cache) for at in range(12)]
            errors.append(float((torch.cat(rows, dim=1).float() - expected).abs().mean()))
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.usefixtures("_as_traced")
@pytest.mark.parametrize("kind", ["deepseek_v4", "zaya", "gemma4"])
def test_nothing_is_compiled_once_it_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels in C++ are there before, and are taken unless another version is asked for."""
    model = random_model(model_like(kind)).compile_decoding(folder=tmp_path)
    kept, asked, ask = sorted(tmp_path.iterdir()), [], cpp._operator
    assert {file.suffix for file in kept} == {".so"}
    monkeypatch.setattr(cpp, "_operator", lambda *given: asked.append(given[0]) or ask(*given))
    tokens, caches = draw_tokens(1, 60), [model.make_cache(), model.make_cache()]
    with torch.no_grad():
        with kernels.use("reference"):
            expected = model(tokens)
        for version, cache in zip((None, "fast"), caches, strict=True):
            asked.clear()
            with nullcontext() if version is None else kernels.use(version):
                logits = [model(tokens[:, :50], cache=cache), model(tokens[:, 50:59], cache=cache)]
            assert_same(torch.cat(logits, dim=1), expected[:, :59])
            assert bool(asked) == (version is None)
        assert_same(model(tokens[:, 59:], cache=caches[0]), expected[:, 59:])
    assert sorted(tmp_path.iterdir()) == kept


def test_only_a_step_of_one_token_each_is_compiled(folder: Path, runs: list[int]) -> None:
    model = random_model(MIXED)
    model.compile_decoding(folder=folder)
    cache, tokens = model.make_cache(), draw_tokens(1, 5)
    with torch.no_grad():
        model(tokens, cache=cache)
        model(tokens[:, :1])
        model(tokens[:, :1], cache=cache, return_streams=True)
        model(draw_tokens(2, 1), cache=model.make_cache(2))
        with kernels.use("reference"):
            model(tokens[:, :1], cache=cache)
        assert runs == []
        expected = model(torch.cat([tokens, tokens[:, :1], tokens[:, :1], tokens[:, :1]], dim=1))
        # Read as 64 bits, an id of 32 would be joined to what lies behind it.
        narrow = torch.stack([tokens[0, :1], tokens[0, :1] + 1], dim=1).int()[:, :1]
        assert_same(model(narrow, cache=cache)[:, -1], expected[:, -1])
    assert runs == [1]


def test_weights_changed_in_place_are_seen_and_moved_ones_end_it(folder: Path, runs: list[int]) -> None:
    model = random_model(MIXED)
    model.compile_decoding(folder=folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        token = draw_tokens(1, 1)
        assert_same(model(token, cache=model.make_cache()), model(token))
        assert runs == [1]
        for moved in (copy.deepcopy(model), copy.deepcopy(model).double(), model):
            moved.load_state_dict(moved.state_dict(), assign=True)
            moved(token, cache=moved.make_cache())
    assert runs == [1]


def test_compiled_code_serves_any_weights_of_its_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(MIXED).compile_decoding(folder=folder)
    kept = sorted(folder.iterdir())

    def compile_again(*_: Any) -> None:
        raise AssertionError("nothing is kept")

    monkeypatch.setattr(compiling, "_compile", compile_again)
    torch.manual_seed(1)
    other = random_model(MIXED).compile_decoding(folder=folder)
    assert sorted(folder.iterdir()) == kept
    token = draw_tokens(1, 1)
    with torch.no_grad():
        assert_same(other(token, cache=other.make_cache()), other(token))
    unlike = MIXED.model_copy(update={"norm_eps": 1e-3})
    with pytest.raises(AssertionError, match="nothing is kept"):
        random_model(unlike).compile_decoding(folder=folder)


@pytest.mark.parametrize("method", ["append", "extend"])
def test_an_error_on_the_way_stays_what_it_is(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python is called back, and where rows' places are asked for before anything runs."""
    model = random_model(model_like("zaya")).compile_decoding(folder=folder)
    cache, token = model.make_cache(), draw_tokens(1, 1)
    asked, ask = [], getattr(Cache, method)

    def interrupted(*given: Any) -> Any:
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(*given)

    with monkeypatch.context() as broken, torch.no_grad():
        broken.setattr(Cache, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(token, cache=cache)
    with pytest.raises(CacheError, match="interrupted"), torch.no_grad():
        model(token, cache=cache)


def test_what_cannot_be_compiled_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(MIXED)
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        model.compile_decoding(0)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"cannot be kept in .*file/below: Not a directory"):
        model.compile_decoding(folder=file / "below")
    with pytest.raises(InputError, match="compiled code cannot be kept in /proc: No such file or directory"):
        model.compile_decoding(folder="/proc")
    assert main(["generate", "--prompt", "x", "--compile", "--speculate", "mtp"]) == 1
    model.compile_decoding(folder=tmp_path)
    (code,) = tmp_path.glob("*.pt2")
    code.write_bytes(b"")
    with pytest.raises(InputError, match=rf"compiled code in {code} cannot be read: delete it"):
        model.compile_decoding(folder=tmp_path)
    with (
        torch.device("meta"),
        pytest.raises(InputError, match="recorded on CUDA devices, not on meta"),
    ):
        Decoder(MIXED).compile_decoding()
    environment = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "kvell", "generate", "--prompt", "x", "--compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: compile: no C++ compiler works here: install g++, name another in the environment's CXX, "
        "or decode without compiling"
    ]


def test_threads_that_decode_with_one_model_take_turns(folder: Path) -> None:
    """While a step calls back an operation on the cache, another thread may run; its own step begins when that one is
    over."""
    model = random_model(model_like("deepseek_v4"))
    compiled = copy.deepcopy(model).compile_decoding(folder=folder)
    step = compiled._compiled[1]
    run, operation = step.run, step.left_out.called_back[0]
    inside, most = 0, 0
    second = threading.Event()

    def noted(given: list[Tensor]) -> list[Tensor]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if inside == 2:
            second.set()
        try:
            return run(given)
        finally:
            inside -= 1

    def waiting(*given: Any) -> Tensor:
        second.wait(0.05)
        return operation(*given)

    step.run, step.left_out.called_back[0] = noted, waiting

    @torch.no_grad()
    def decode(tokens: Tensor) -> Tensor:
        cache = compiled.make_cache()
        return torch.cat([compiled(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1)

    prompts = [draw_tokens(1, 9) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        decoded = list(threads.map(decode, prompts))
    with torch.no_grad():
        for logits, prompt in zip(decoded, prompts, strict=True):
            assert_same(logits, model(prompt))
    assert most == 1


def test_generate_says_the_same_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # In bf16, as it is stored, two tokens tie here.
    command = ["generate", "--prompt", "def add(a, b):", "--max-new-tokens", "12", "--dtype", "float32"]
    said = []
    for arguments in (command, [*command, "--compile"]):
        assert main(arguments) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert {file.suffix for file in (tmp_path / "kvell").iterdir()} == {".pt2", ".so"}


def test_code_knows_how_weights_lie(folder: Path) -> None:
    """What was compiled for a weight as it should lie is not run with one whose rows are columns in memory."""
    turned, straight = random_model(MIXED), random_model(MIXED)
    projection = turned.layers[0].attention.v_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().T.contiguous().T)
    token = draw_tokens(1, 1)
    for model in (straight, turned, straight):
        model.compile_decoding(folder=folder)
        with torch.no_grad():
            assert_same(model(token, cache=model.make_cache()), model(token))


@pytest.mark.parametrize("change", ["inner load", "data", "replaced", "moved"])
def test_weights_that_are_put_elsewhere_end_it(change: str, folder: Path, runs: list[int]) -> None:
    model = random_model(MIXED).compile_decoding(folder=folder)
    weight = model.layers[0].attention.v_proj.weight
    if change == "inner load":
        state = {name: 2 * value for name, value in model.layers[0].state_dict().items()}
        model.layers[0].load_state_dict(state, assign=True)
    elif change == "data":
        weight.data = 2 * weight.data
    elif change == "replaced":
        model.layers[0].attention.v_proj.weight = torch.nn.Parameter(2 * weight.detach())
    else:
        model.double()
    token = draw_tokens(1, 1)
    with torch.no_grad():
        assert_same(model(token, cache=model.make_cache()), model(token))
    assert runs == []
    model.compile_decoding(folder=folder)
    with torch.no_grad():
        assert_same(model(token, cache=model.make_cache()), model(token))
    assert runs == [1]


def test_a_weight_shared_by_two_layers_can_be_compiled(folder: Path) -> None:
    model = random_model(MIXED)
    model.layers[1].attention.o_proj.weight = model.layers[0].attention.o_proj.weight
    model.compile_decoding(folder=folder)
    token = draw_tokens(1, 1)
    with torch.no_grad():
        assert_same(model(token, cache=model.make_cache()), model(token))


def test_the_same_step_is_known_by_the_same_name_whatever_ran_before(tmp_path: Path) -> None:
    from kvell.layers.precision import _rounded

    config = MIXED.model_copy(update={"embedding_scale": 3.3})
    model = random_model(config)
    for _ in range(2):
        model.compile_decoding(folder=tmp_path)
        with torch.no_grad():
            model(draw_tokens(1, 3))
    _rounded.cache_clear()
    model.compile_decoding(folder=tmp_path)
    assert len(list(tmp_path.glob("*.pt2"))) == 1
