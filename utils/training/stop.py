"""Requests to stop: Ctrl-C, SIGTERM, SIGHUP of a closed terminal, and SIGUSR1, which Slurm's --signal and submitit send ahead
of the time limit."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType

from utils import distributed
from utils.processes import STOP_SIGNALS, is_heard

LAUNCHER_SECONDS = 2.0  # torchrun sends Ctrl-C on to processes that have it from the terminal already


class StopRequest:
    """A context in which a signal is noted instead of obeyed, so that the loop can finish its step, save and end.

    ``signal`` is the number of the first signal, 0 until one comes. A second Ctrl-C interrupts at once. Outside the main
    thread, where Python lets nobody set handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._time = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        with suppress(ValueError):
            self._before = {number: signal.signal(number, self._note) for number in filter(is_heard, STOP_SIGNALS)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() itself returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal:
            copy = distributed.world_size() > 1 and now - self._time < LAUNCHER_SECONDS
            if number == signal.SIGINT and not copy:
                raise KeyboardInterrupt
            return
        self.signal, self._time = number, now
        if distributed.is_main():
            more = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            with suppress(OSError):  # the terminal has gone
                # Not print(): this may run in the middle of another print.
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{more}\n".encode())
