"""What the helper processes of a command do on stop requests and at the end of the main process."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from multiprocessing.process import BaseProcess

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows has the first two
STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def is_heard(number: int) -> bool:
    """Whether a stop request is obeyed: a closed terminal's SIGHUP is not where it is ignored, as under ``nohup``."""
    return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN


def start_helper() -> None:
    """Called first in a helper process: leave stop requests to the main process, and end as soon as that is gone.

    Terminals, ``timeout``, Slurm and torchrun signal the whole group; what a stop means, the main process decides alone. Works
    for processes made by fork, spawn and forkserver. What ends helpers otherwise sends SIGTERM: see :func:`kill_helpers`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if main := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: BaseProcess) -> None:
    # Forked siblings hold copies of each other's pipes to the main process, so that its end may show late: ask for the
    # parent's number too, where that is the main process; a fork server, which a signal to the whole group ends, may go first.
    parent = os.getppid()
    while not connection.wait([main.sentinel], timeout=2) and (parent != main.pid or os.getppid() == parent):
        pass
    os._exit(1)


def kill_helpers(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool whose work is lost, at once.

    To be called where a pool is broken: it ends its other processes by SIGTERM, which helpers ignore, and waits for them.
    """
    for process in list((pool._processes or {}).values()):
        process.kill()
