"""Being asked to stop: a run finishes its step and saves, instead of ending at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Value = TypeVar("Value")
BETWEEN_CHECKS = 0.05  # seconds


class StoppedError(Exception):
    """Raised where stopping was asked for and nothing is left to be saved."""


class StopRequest:
    """Which signal, if any, has asked a run to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def is_set(self) -> bool:
        return self.signal is not None

    @property
    def reason(self) -> str:
        """The outcome's name for it; another process may be the one that was asked."""
        return "interrupted" if self.signal == signal.SIGINT else "stopped"

    def check(self) -> None:
        """StoppedError if it was asked for."""
        if self.is_set:
            raise StoppedError


def nothing() -> None:
    """The check of work that nobody can stop."""


def interruptibly(work: Callable[[], Value], check: Callable[[], None]) -> Value:
    """What `work` returns or raises, unless `check`, called meanwhile, raises.

    For work in native code, during which Python handles no signals: it runs in a thread of its own. If `check`
    raises, the thread goes on but its result is dropped, and it does not keep the process from ending.
    """
    made: Future[Value] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:  # raised again below, where the work is waited for
            made.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        check()
        thread.join(BETWEEN_CHECKS)
    check()
    return made.result()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A request that SIGTERM and Ctrl-C set, instead of ending the process at once. Only a main thread may listen.

    A second Ctrl-C ends a process that is alone. torchrun hands the terminal's Ctrl-C on to processes that have had
    it already, so there a second one means nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if number == request.signal == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
