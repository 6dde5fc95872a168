"""Signals and errors that end a run before its last step: one small piece of state, on one process and on many."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType, TracebackType

from dataset import Crop
from utils import distributed
from utils.processes import STOP_SIGNALS, is_heard

LAUNCHER_SECONDS = 2.0  # torchrun sends Ctrl-C again to processes that already got it from the terminal


class Ending:
    """A context manager that notes signals and errors without ending at once, so that all processes finish a step and save.

    It notes Ctrl-C, SIGTERM, SIGHUP (a closed terminal), SIGUSR1 (which Slurm's --signal and submitit send before the time
    limit), and errors while images are loaded. A second Ctrl-C interrupts at once. Outside the main thread no signal is noted,
    as Python sets handlers only there.

    Attributes:
        signal: number of the first signal in this process, 0 until one comes.
        error: the error in this process.
        stopped: number of the signal that :meth:`is_due` found, over all processes.
        failed: whether :meth:`is_due` found an error in any process.
    """

    def __init__(self) -> None:
        self.signal = self.stopped = 0
        self.error: Exception | None = None
        self.failed = False
        self._time = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Ending":
        with suppress(ValueError):
            self._before = {number: signal.signal(number, self._note) for number in filter(is_heard, STOP_SIGNALS)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() itself returned

    def read(self, batches: Iterator[Crop], count: int) -> list[Crop]:
        """The next ``count`` batches; [] after an error, which is noted: raised here, it would leave the others waiting."""
        try:
            return [next(batches) for _ in range(count)]
        except Exception as error:  # an image, a label, a worker
            self.error = error
            return []

    def is_due(self) -> bool:
        """Whether any process noted something. All processes must call this together; the result is the same on all."""
        self.stopped, failed = distributed.agree(self.signal, int(self.error is not None))
        self.failed = bool(failed)
        return self.failed or self.stopped > 0

    def raise_error(self) -> None:
        """Raise the error of this or another process, unless a signal stopped the run: then resuming meets the error again."""
        if self.failed and not self.stopped:
            distributed.raise_any(self.error)

    def status(self) -> int:
        """The exit status: 0, or 128 + the number of the signal, even if that came after the last step."""
        number = self.stopped or self.signal
        return 128 + number if number else 0

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
            with suppress(OSError):  # the terminal is closed
                # Not print(): this may run in the middle of another print.
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{more}\n".encode())
