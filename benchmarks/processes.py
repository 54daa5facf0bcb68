"""Processes that stay alive between measurements, so that two sides can take turns within one run.

A worker is asked by a line of JSON on its stdin and answers with one on its stdout. Each has the malloc settings it
was started with, which the C library reads once, at the start.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent

# The C library gives freed memory back to the system and faults it in again at the next step, unless told to keep it.
MALLOC_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"},
}


# Seconds that a worker has to end by itself.
PATIENCE = 10.0

Key = TypeVar("Key")


class WorkerError(Exception):
    """A worker could not do what it was asked, in one line."""


class Worker:
    """One side in a process of its own: `worker.call("prefill", tokens=4096)`."""

    def __init__(self, side: str, malloc: str = "default", threads: int = 2) -> None:
        self.side, self.malloc = side, malloc
        self.name = f"{side} ({malloc} malloc)"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment |= MALLOC_SETTINGS[malloc] | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *(str(Path(part).resolve()) for part in sys.path if part)]
        )
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", side],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    def call(self, method: str, **arguments: Any) -> Any:
        """The worker's answer. WorkerError where it fails or has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name} ended during {method}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name} failed in {method}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Lets it end, so that it deletes its temporary files, and kills it if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # An answer that nobody waits for any more does not keep it.
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                stream.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._complaints.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return lines[-1] if lines else f"exit code {code}"


@contextmanager
def workers(names: Sequence[tuple[str, str]], threads: int = 2) -> Iterator[dict[tuple[str, str], Worker]]:
    """Workers by (side, malloc setting), ended when the context closes."""
    made: dict[tuple[str, str], Worker] = {}
    try:
        for side, malloc in names:
            made[side, malloc] = Worker(side, malloc, threads)
        yield made
    finally:
        at_once(made.values(), Worker.close)


def at_once(sides: Collection[Worker], ask: Callable[[Worker], Any]) -> list[Any]:
    """Asks them all at the same time: not to be timed."""
    with ThreadPoolExecutor(max(len(sides), 1)) as pool:
        return list(pool.map(ask, sides))


def take_turns(sides: Mapping[Key, Worker], rounds: int, ask: Callable[[Worker], Any]) -> dict[Key, list[Any]]:
    """Asks each worker once a round, one after another; every other round in the opposite order."""
    answers: dict[Key, list[Any]] = {key: [] for key in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for key in order:
            answers[key].append(ask(sides[key]))
    return answers
