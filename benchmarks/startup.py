"""Goal 5: what a user waits for before the first token.

    python -m benchmarks.startup

Every command runs in a new process, in turns; `import kvell` stands for all its public names, which are otherwise
imported when they are first used. Loading is measured after the checkpoint's pages have left the system's cache, to
the point where every weight has been read, beside reading the same files without making anything of them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import kvell
from benchmarks import machine
from benchmarks.growth import config_of
from benchmarks.processes import ROOT, WorkerError
from benchmarks.reporting import Goal, Section, median, seconds, table, write_results

IMPORT_LIMIT, HELP_LIMIT, DISK_LIMIT = 0.3, 0.5, 1.25
ROUNDS, QUICK_ROUNDS = 7, 3
MOST_OF_IT = "most of it is pydantic's schemas and numpy"
# Wide enough that the weights, not the number of tensors, are what takes time: 0.6 GB in fp32.
VOCABULARY = 1 << 19

COMMANDS: dict[str, list[str]] = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import kvell": ["-c", "import torch, kvell; [getattr(kvell, name) for name in kvell.__all__]"],
    "kvell --help": ["-m", "kvell", "--help"],
}


def time_command(arguments: Sequence[str]) -> float:
    """Seconds from starting python to its end. WorkerError where it fails."""
    paths = os.pathsep.join(str(Path(part).resolve()) for part in sys.path if part)
    environment = os.environ | {"PYTHONPATH": paths}
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    taken = perf_counter() - start
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise WorkerError(f"python {' '.join(arguments)} failed: {words[-1]}")
    return taken


def measure_commands(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, arguments in commands.items():
            seconds_taken = time_command(arguments)
            if number:  # the first round fills the system's cache and writes bytecode
                taken[name].append(seconds_taken)
    return taken


def forget(folder: Path) -> None:
    """Asks the system to drop the files' pages from its cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folder: Path) -> float:
    buffer = bytearray(1 << 24)
    start = perf_counter()
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return perf_counter() - start


def load_and_read(folder: Path) -> tuple[float, float]:
    """Seconds until the model is there, and until each of its weights has been read."""
    start = perf_counter()
    model = kvell.from_pretrained(folder)
    loaded = perf_counter() - start
    for tensor in model.parameters():
        tensor.detach().sum()
    return loaded, perf_counter() - start


def measure_loading(rounds: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kvell.Decoder(kvell.ModelConfig(**config_of("plain") | {"vocab_size": vocabulary})).save_pretrained(folder)
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        disk, loaded, read = [], [], []
        for _ in range(rounds):
            forget(folder)
            disk.append(read_files(folder))
            forget(folder)
            present, whole = load_and_read(folder)
            loaded.append(present)
            read.append(whole)
    return {"bytes": nbytes, "disk": disk, "loaded": loaded, "read": read}


def run(*, rounds: int = ROUNDS, threads: int = 2, vocabulary: int = VOCABULARY) -> Section:
    torch.set_num_threads(threads)
    title = "Start-up"
    try:
        commands = measure_commands(COMMANDS, rounds)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Section(title, [], [Goal(5, title, float("nan"), "at most", 1, reason=str(error))], {}, [])
    loading = measure_loading(rounds, vocabulary)
    taken = {name: median(values) for name, values in commands.items()}
    disk, loaded, read = (median(loading[name]) for name in ("disk", "loaded", "read"))
    beyond = taken["import kvell"] - taken["import torch"]
    goals = [
        Goal(5, "import kvell beyond torch", beyond, "at most", IMPORT_LIMIT, "s", MOST_OF_IT),
        Goal(5, "kvell --help", taken["kvell --help"], "at most", HELP_LIMIT, "s"),
        Goal(5, "loading and reading every weight, over reading the files", read / disk, "at most", DISK_LIMIT),
    ]
    rows = [[name, seconds(value)] for name, value in taken.items()]
    size = f"{loading['bytes'] / 1e9:.2f} GB"
    rows += [
        [f"reading {size} from the disk", seconds(disk)],
        [f"from_pretrained of {size}", seconds(loaded)],
        ["the same, and every weight read", seconds(read)],
    ]
    return Section(title, [table(["", "median"], rows)], goals, {"commands": commands, "loading": loading}, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    section = run(rounds=options.rounds, threads=options.threads)
    write_results(options.results, "startup", [section], machine.describe(options.threads))
    print(section.markdown())


if __name__ == "__main__":
    main()
