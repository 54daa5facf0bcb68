"""Being asked to stop: a run finishes its step and saves, instead of ending at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
