"""README and docs do what they say: code and commands run as printed, files and links are there, tables are current.

`path/to/model` and DIR are a tiny model with the bundled one's tokenizer. Commands that take too long for a test are
named in UNRUN with the reason, and are only checked to be possible.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic_core import PydanticUndefined

from kvell import Decoder, ModelConfig
from kvell.bundled import bundled_model_path
from kvell.cli import application, main
from kvell.config import LayerConfig
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.part import Part
from kvell.layers.rotary import DefaultRotary
from kvell.training import tasks
from kvell.training.settings import TrainingConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
CARD = bundled_model_path() / "README.md"
IDS = [path.name for path in DOCUMENTS]

# What begins so is not run, and why.
UNRUN = {
    "make": "they install, measure for minutes, or run this very test",
    "pip install": "what is installed is what the tests run in",
    "kvell generate DIR --prompt-file notes.txt --compile": "compiles for up to a minute",
    "kvell bench": "measures for minutes",
    "kvell train examples/mini.yaml": "trains for an hour",
    "torchrun": "eight processes",
    "python benchmarks/": "measures for minutes",
}


def fenced(path: Path, language: str) -> list[str]:
    """The blocks of a language, or of none (""), that a document prints."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(path: Path) -> list[str]:
    """The lines of indented blocks, and what stands in `...` with a command's name before it, without comments."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s+#", line)[0].strip() for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)]
    names = "|".join(application_commands())
    lines += [inline for inline in re.findall(r"`([^`\n]+)`", text) if re.match(rf"kvell ({names}) \S|pip ", inline)]
    return list(dict.fromkeys(line for line in lines if re.match(r"(kvell|torchrun|make|pip|python) ", line)))


def application_commands() -> dict[str, Any]:
    return typer.main.get_command(application).commands  # type: ignore[attr-defined]


def unrun(command: str) -> str | None:
    return next((reason for begin, reason in UNRUN.items() if command.startswith(begin)), None)


ALL_COMMANDS = [(path, command) for path in DOCUMENTS if path.name != "CHANGELOG.md" for command in commands(path)]
RUN = [command for _, command in ALL_COMMANDS if unrun(command) is None]


ROTARY = DefaultRotary(theta=10000.0)
TINY = ModelConfig(
    vocab_size=2048,
    hidden_size=16,
    max_positions=8192,
    layers=tuple(
        LayerConfig(
            attention=GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8, sliding_window=window, rotary=ROTARY),
            feed_forward=GatedMLP(intermediate_size=32),
        )
        for window in (16, None)
    ),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents speak of: a model, texts, and the files that they print."""
    monkeypatch.chdir(tmp_path)
    Decoder(TINY).save_pretrained("path/to/model")
    shutil.copy(bundled_model_path() / "tokenizer.json", "path/to/model")
    shutil.copytree(ROOT / "examples", "examples")
    Path("notes.txt").write_text("def add(a, b):\n    return a + b\n")
    Path("my.yaml").write_text(fenced(ROOT / "README.md", "yaml")[0])
    Path("run.yaml").write_text(fenced(ROOT / "docs" / "training.md", "yaml")[0])
    Path("texts").mkdir()
    for number in range(40):
        lines = [f"{word} {number * factor}\n" for factor, word in enumerate(("one", "two", "three") * 8)]
        Path(f"texts/{number}.txt").write_text("".join(lines))
    return tmp_path


def arguments_of(command: str) -> list[str]:
    return [{"DIR": "path/to/model"}.get(word, word) for word in shlex.split(command)]


@pytest.mark.parametrize(
    "path", [path for path in [*DOCUMENTS, CARD] if fenced(path, "python")], ids=lambda p: p.name
)
def test_code_runs_from_the_first_block_to_the_last(path: Path, place: Path) -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(fenced(path, "python")):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, f"{path.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program, *arguments = arguments_of(command)
    assert program == "kvell"
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    code = main(arguments)
    output = capfd.readouterr()
    assert (code, "error: " in output.err) == (0, False), output.err
    assert output.out


@pytest.mark.parametrize("command", [command for _, command in ALL_COMMANDS if unrun(command) is not None])
def test_a_command_that_takes_too_long_is_possible(command: str, place: Path) -> None:
    program, *arguments = arguments_of(command)
    if program == "kvell":
        accepted(arguments)
    elif program == "torchrun":
        run = importlib.import_module("torch.distributed.run").parse_args(arguments)
        assert run.module
        assert importlib.util.find_spec(run.training_script)
        accepted(["train", *run.training_script_args])
    elif program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        installable(arguments)
    else:
        script, *options = arguments
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert all(option in done.stdout for option in options if option.startswith("-"))


def accepted(arguments: list[str]) -> None:
    """The command line takes these options, and files named are there."""
    name, *rest = arguments
    application_commands()[name].make_context(name, list(rest))
    assert all(Path(word).exists() for word in rest if word.endswith((".yaml", ".txt")))


def installable(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments[1:]:
        if found := re.fullmatch(r"kvell\[(\w+)\]", word):
            assert found[1] in extras
        elif not word.startswith("-"):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("path", [*DOCUMENTS, CARD], ids=lambda path: path.name)
def test_yaml_is_a_models_or_a_runs_config(path: Path, place: Path) -> None:
    for number, block in enumerate(fenced(path, "yaml")):
        file = place / f"{number}.yaml"
        file.write_text(block)
        if re.search("^model:", block, re.MULTILINE):
            assert TrainingConfig.read(file).steps > 0
        else:
            assert ModelConfig.from_pretrained(file).num_layers > 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, target


def test_the_table_beside_deepseek_v3_2_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command = next(command for command in commands(ROOT / "README.md") if "--against" in command)
    assert main(arguments_of(command)[1:]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
    shown = fenced(ROOT / "README.md", "")[0].splitlines()
    assert printed[-len(shown) :] == shown


def parts_in(annotation: Any) -> list[type[Part]]:
    """The parts that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for inner in get_args(annotation) for part in parts_in(inner)]


TASKS = parts_in(tasks.Task)


def keys_of(parts: list[type[Part]], path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of settings classes by its path, with its default as JSON, "" where it must be given or chooses among
    several classes. A model's own keys, and tasks', are told elsewhere."""
    for part in parts:
        for name, field in part.model_fields.items():
            inner = parts_in(field.annotation)
            told_elsewhere = inner == [ModelConfig] or inner == TASKS
            if told_elsewhere or field.annotation not in inner:
                must = field.default is PydanticUndefined or (name == "kind" and len(parts) > 1)
                yield path + name, "" if must else json.dumps(field.default)
            if not told_elsewhere:
                yield from keys_of(inner, f"{path}{name}.")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table behind a line of docs/training.md."""
    text = (ROOT / "docs" / "training.md").read_text().split(f"{heading}\n", 1)[1]
    found = re.search(r"^\|(?:---\|)+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in found[1].splitlines()]


def test_every_key_of_a_run_stands_in_the_table_with_its_default() -> None:
    told = {key.strip("`"): default for key, default, _ in rows("## The keys of a run's file")}
    assert told == dict(keys_of([TrainingConfig]))
    assert all(meaning for *_, meaning in rows("## The keys of a run's file"))


def test_every_task_stands_in_the_table_with_its_keys() -> None:
    told = {
        kind.strip("`"): re.findall(r"`(\w+)`", names)
        for kind, names in rows("Tasks are `{kind: ...}`, with these keys:")
    }
    fields = {
        task.model_fields["kind"].default: [name for name in task.model_fields if name != "kind"] for task in TASKS
    }
    assert told == fields
