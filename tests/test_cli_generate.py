"""`kvell generate`, and what every command has in common."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from generation_mocks import MockConfig, MockModel, byte_level_backend, install

from kvell.cli import main
from kvell.generation import Tokenizer

TOKENIZER = Tokenizer(byte_level_backend())
PROMPT = "the cat"
ANSWER = " sat on the mat 🙂"


def answering(answer: str = ANSWER, **config: Any) -> MockModel:
    size = TOKENIZER._backend.get_vocab_size()
    prompt_length = len(TOKENIZER.encode(PROMPT))
    return MockModel(
        MockConfig(vocab_size=size, eos_token_ids=(1,), **config), [*TOKENIZER.encode(answer), 1], prompt_length
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model's directory. Its weights are never read: `install` gives the model."""
    (tmp_path / "model.safetensors").touch()
    TOKENIZER._backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch, directory: Path) -> MockModel:
    model = answering()
    install(monkeypatch, model, directory)
    return model


def stdin_of(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# The result


def test_the_text_goes_to_stdout_and_the_table_to_stderr(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(directory), "--prompt", PROMPT]) == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in err.strip().splitlines())
    tokens = len(TOKENIZER.encode(ANSWER)) + 1
    held = len(TOKENIZER.encode(PROMPT)) + tokens - 1
    assert rows["tokens in"] == str(len(TOKENIZER.encode(PROMPT)))
    assert rows["tokens out"] == f"{tokens} (eos)"
    assert rows["cache"] == f"{2 * held} bytes"
    assert rows["full attention would hold"] == f"{held:.1f} kB"
    assert re.fullmatch(r"\d+\.\d\d s", rows["time to first token"])
    assert re.fullmatch(r"\d+\.\d tokens/s", rows["prefill"])
    assert re.fullmatch(r"\d+\.\d tokens/s", rows["decode"])


def test_json_is_one_object_and_nothing_else(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(directory), "--prompt", PROMPT, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    ids = [*TOKENIZER.encode(ANSWER), 1]
    held = report["prompt_tokens"] + len(ids) - 1
    assert err == ""
    assert min(report.pop("seconds_to_first_token"), report.pop("prefill_tokens_per_second")) > 0
    assert report.pop("decode_tokens_per_second") > 0
    assert report == {
        "prompt_tokens": len(TOKENIZER.encode(PROMPT)),
        "tokens": len(ids),
        "token_ids": ids,
        "text": ANSWER,
        "finish_reason": "eos",
        "sampling": {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0},
        "suppress_tokens": [],
        "speculate": "off",
        "accepted_length": None,
        "cache_bytes": 2 * held,
        "full_attention_bytes": 1000 * held,
    }


def test_text_is_shown_before_the_next_token_is_computed(
    directory: Path, model: MockModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout, seen = io.BytesIO(), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, "utf-8"))
    model.register_forward_pre_hook(lambda *_: seen.append(stdout.getvalue().decode()))
    assert main(["generate", str(directory), "--prompt", PROMPT]) == 0
    ids = TOKENIZER.encode(ANSWER)
    assert seen[1:4] == [TOKENIZER.decode(ids[:count]) for count in (1, 2, 3)]


def test_a_single_token_has_no_decode_rate(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(directory), "--prompt", PROMPT, "--max-new-tokens", "1"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decode_tokens_per_second"] is None
    assert main(arguments) == 0
    assert re.search(r"decode +-\n", capsys.readouterr().err)


def test_speculation_reports_how_many_tokens_a_step_gave(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = TOKENIZER.encode(ANSWER)
    # The prompt ends as it begins, and what followed its beginning is the answer.
    prompt = PROMPT + ANSWER + PROMPT
    model = answering()
    model.prompt_length = len(TOKENIZER.encode(prompt))
    install(monkeypatch, model, directory)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: steps.append(inputs[0].shape[1]))
    arguments = ["generate", str(directory), "--prompt", prompt, "--speculate", "lookup", "--drafts", "4"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    decoding = steps[1:]
    assert max(decoding) == 5, "the last token and four drafts"
    assert report["token_ids"] == [*ids, 1]
    assert (report["speculate"], report["accepted_length"]) == ("lookup", len(ids) / len(decoding))
    assert 2 < report["accepted_length"] <= 5
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    assert re.search(rf"accepted length +{report['accepted_length']:.2f} tokens/step\n", err)


def test_a_single_token_has_no_accepted_length(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(directory), "--prompt", PROMPT, "--speculate", "lookup", "--max-new-tokens", "1"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accepted_length"] is None
    assert main(arguments) == 0
    assert re.search(r"accepted length +-\n", capsys.readouterr().err)


def test_a_table_without_speculation_says_nothing_of_it(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(directory), "--prompt", PROMPT]) == 0
    assert "accepted" not in capsys.readouterr().err


def test_options_reach_the_generation(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvell.generation

    seen: dict[str, Any] = {}
    real = kvell.generation.generate

    def spy(model: Any, prompt_ids: Any, **settings: Any) -> Any:
        seen.update(settings)
        return real(model, prompt_ids, **settings)

    monkeypatch.setattr(kvell.generation, "generate", spy)
    options = "--max-new-tokens 9 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 3 --stop on --stop at"
    options += " --speculate lookup --drafts 5"
    assert main(["generate", str(directory), "--prompt", PROMPT, *options.split()]) == 0
    expected = {
        "max_new_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 3,
        "stop": ["on", "at"], "speculate": "lookup", "num_drafts": 5,
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected


def test_a_stop_string_is_not_shown(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(directory), "--prompt", PROMPT, "--stop", " on the"]) == 0
    out, err = capsys.readouterr()
    assert out == " sat\n"
    assert "(stop)" in err


def test_dtype_device_threads_and_rounding_are_taken(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import kvell

    loaded: dict[str, Any] = {}
    monkeypatch.setattr(
        kvell, "from_pretrained", lambda path, **options: loaded.update(options, path=path) or answering()
    )
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--threads", "1", "--released-rounding", "--lenient"]
    assert main(["generate", str(directory), "--prompt", PROMPT, *options]) == 0
    device = torch.device("cpu")
    assert loaded == {
        "path": directory,
        "dtype": torch.bfloat16,
        "device": device,
        "released_rounding": True,
        "strict": False,
    }
    assert threads == [1]
    assert main(["generate", str(directory), "--prompt", PROMPT]) == 0
    assert loaded["dtype"] is None, "as stored"
    assert loaded["released_rounding"] is False
    assert loaded["strict"] is True


# Where the prompt comes from


@pytest.mark.parametrize("arguments", [["-"], ["DIRECTORY", "-"], ["--prompt-file", "-"], ["--prompt", PROMPT]])
def test_a_prompt_comes_from_stdin_or_the_command_line(
    arguments: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin_of(monkeypatch, PROMPT.encode())
    assert main(["generate", *(str(directory) if a == "DIRECTORY" else a for a in arguments)]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


def test_a_prompt_file_is_read_as_it_is(
    directory: Path, model: MockModel, capsys: pytest.CaptureFixture[str]
) -> None:
    file = directory / "prompt.txt"
    file.write_bytes("naïve\r\n".encode())
    assert main(["generate", str(directory), "--prompt-file", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(TOKENIZER.encode("naïve\r\n"))


# What is refused


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command which fails says."""
    code = main(["generate", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no prompt is given: use one of --prompt TEXT, --prompt-file FILE, or - for stdin"),
        (["--prompt", "a", "--prompt-file", "b"], "more than one prompt is given"),
        (["-", "--prompt", "a"], "more than one prompt is given"),
        (["hello"], "argument hello is not understood"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "caf\udce9"], "the text holds a lone surrogate"),
        (["--prompt-file", "/no/such/file"], "the prompt file /no/such/file cannot be read: No such file"),
        (["--prompt-file", "/"], "the prompt file / cannot be read: Is a directory"),
        (["--prompt", "a", "--dtype", "float8"], "dtype float8 is unknown: use one of bfloat16, float32, float16"),
        (["--prompt", "a", "--device", "tpu"], "device tpu is not to be had here: use one of cpu"),
        (["--prompt", "a", "--threads", "0"], "threads must be at least 1, not 0"),
        (["--prompt", "a", "--threads", "99999999"], "threads must be at most "),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1.0 is not"),
        (["--prompt", "a", "--top-p", "0"], "top_p 0.0 is not"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["--prompt", "a", "--drafts", "2"], "2 drafts are asked for, but speculate is off"),
        (
            ["--prompt", "a", "--speculate", "lookup", "--drafts", "0"],
            "the number of drafts must be at least 1, not 0",
        ),
        (["--prompt", "a", "--speculate", "mtp"], 'speculate="mtp" needs a model with a draft block'),
    ],
    ids=lambda value: " ".join(value).encode(errors="replace").decode() if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(
    options: list[str], message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused([str(directory), *options], capsys).startswith(message)


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_that_is_not_utf8_says_which_byte(
    source: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = directory / "prompt.txt"
    file.write_bytes(b"abc\xffdef")
    stdin_of(monkeypatch, b"abc\xffdef")
    line = refused([str(directory), "--prompt-file", str(file) if source == "file" else "-"], capsys)
    named = str(file) if source == "file" else "stdin"
    assert line == f"{named} is not UTF-8: byte 0xff at offset 3 (invalid start byte)"


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["no/such/model", "--prompt", "a"], capsys).startswith("no/such/model is neither")


def test_a_path_that_is_not_there_is_said_in_one_short_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    class Unknown(errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Client Error.\nRepository Not Found for url")

    answers = {
        errors.LocalEntryNotFoundError("x" * 999): "could not be asked for a repository of that name",
        errors.OfflineModeIsEnabled("offline"): "could not be asked for a repository of that name",
        Unknown(): "has no repository of that name",
    }
    for error, answer in answers.items():

        def ask(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
        line = refused(["models/gema", "--prompt", "a"], capsys)
        assert line == f"there is no folder models/gema, and the Hugging Face hub {answer}"


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["bench"]], ids=["generate", "bench"])
def test_what_holds_no_weights_is_said_before_anything_of_a_tokenizer(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("hidden_size: 8")
    for folder in ("empty", "configured", "stopped"):
        (tmp_path / folder).mkdir()
    for file in ("configured/config.json", "stopped/training.json"):
        (tmp_path / file).write_text("{}")
    said = {
        "r.yaml": "is a file, without weights: give the folder of a model, which `kvell train` makes of a config",
        "empty": "holds no model: there is no config.json in it",
        "configured": "holds no weights, neither model.safetensors nor model.safetensors.index.json",
        "stopped": "holds a training run that has no model yet: the same `kvell train` command goes on with it, "
        "and its end leaves the model there",
    }
    for place, message in said.items():
        assert main([command[0], str(tmp_path / place), *command[1:]]) == 1
        assert capsys.readouterr().err == f"error: {tmp_path / place} {message}\n"


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    line = refused(["--prompt", "a", "--device", "cuda"], capsys)
    why = f"this build of torch, {torch.__version__}, has no CUDA"
    assert line == f"device cuda is not to be had here ({why}): use one of cpu"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(["--prompt", "a", "--device", "cuda:1"], capsys)
    assert line == "device cuda:1 is not to be had here (torch finds no CUDA device): use one of cpu"


def test_an_error_of_several_lines_becomes_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kvell
    from kvell.errors import CheckpointError

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("damaged\n  in two ways")

    monkeypatch.setattr(kvell, "from_pretrained", fail)
    assert refused([str(directory), "--prompt", "a"], capsys) == "damaged in two ways"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--no-such-option"],
        ["no-such-command"],
        ["generate", "a", "b", "c"],
        ["generate", "--speculate", "fast"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_a_warning_is_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, answering(max_positions=8), directory)
    assert main(["generate", str(directory), "--prompt", PROMPT, "--json"]) == 0
    assert re.fullmatch(r"warning: the text may reach \d+ tokens [^\n]+\n", capsys.readouterr().err)


# The process


def start(code: str, *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    """The command line as a process of its own, after `code` has prepared it. It minds Ctrl-C, as in a terminal: what
    a shell starts in the background ignores it, and so do all that this starts."""
    minds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"import sys; {minds}; {code}; from kvell.cli import main; sys.exit(main())"
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )


def endless(directory: Path) -> str:
    """Prepares a process with a model that never stops."""
    return (
        "import pytest, pathlib, generation_mocks as mocks;"
        f"config = mocks.MockConfig({TOKENIZER._backend.get_vocab_size()}, max_positions=10**9);"
        f"path = pathlib.Path({str(directory)!r});"
        "mocks.install(pytest.MonkeyPatch(), mocks.MockModel(config, delay=0.001), path)"
    )


ENDLESS = ("generate", "--prompt", PROMPT, "--max-new-tokens", "1000000")


def test_ctrl_c_ends_with_130_and_no_traceback(directory: Path) -> None:
    process = start(endless(directory), *ENDLESS)
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")


def test_ctrl_c_outside_a_command_is_no_traceback_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvell.cli.application", interrupted)
    assert main(["generate"]) == 130


def test_an_error_of_a_file_is_not_taken_for_one_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/file")

    monkeypatch.setattr("kvell.cli.application", refused)
    assert main(["generate"]) == 1
    assert capsys.readouterr().err == "error: /somewhere/file: Permission denied\n"


def test_a_reader_that_leaves_ends_the_text_quietly(directory: Path) -> None:
    process = start(endless(directory), *ENDLESS)
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1


def test_a_reader_that_has_left_before_the_json_comes_is_no_traceback(directory: Path) -> None:
    process = start(endless(directory), *ENDLESS[:-1], "5", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1


def test_progress_is_shown_on_a_terminal_only(directory: Path) -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    process = start(endless(directory), *ENDLESS[:-1], "2", stderr=follower)
    process.communicate(timeout=60)
    os.close(follower)
    terminal = os.read(leader, 100_000)
    os.close(leader)
    assert b"prompt" in terminal
    process = start(endless(directory), *ENDLESS[:-1], "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"prompt" not in err


def test_characters_that_stdout_lacks_are_replaced(directory: Path) -> None:
    process = start("sys.stdout.reconfigure(encoding='ascii');" + endless(directory), *ENDLESS[:-1], "50")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, b"?" in out, b"Traceback" in err) == (0, True, False)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"], []], ids=" ".join)
def test_help_comes_without_loading_torch(arguments: list[str]) -> None:
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules, 'rich' in sys.modules))"
    process = start(check, *arguments)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"False False\n")
    assert out.startswith(b"kvell " if arguments == ["--version"] else b"Usage: kvell")


def test_kvell_runs_as_a_module() -> None:
    process = subprocess.run([sys.executable, "-m", "kvell", "generate"], capture_output=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith(b"error: no prompt is given")


def test_an_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for arguments in (["--prompt", ""], ["--prompt-file", str(tmp_path / "empty")]):
        assert main(["generate", *arguments]) == 1
        assert capsys.readouterr().err == "error: the prompt is empty: a model continues at least one character\n"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_under_the_output_is_one_line(options: list[str], directory: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = start(endless(directory), *ENDLESS[:-1], "5", *options, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(rb"error: the output cannot be written: [^\n]*No space left on device\n", err)
