"""Helper processes of a command: their number, and their behaviour on stop signals and when the main process ends."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows has the first two
STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def usable_cores() -> int:
    """The number of processor cores that this process may use, at least 1.

    The limits are the affinity (set by ``taskset`` and Slurm) and the quota of the control group (``docker --cpus``, Kubernetes
    limits; version 2, https://docs.kernel.org/admin-guide/cgroup-v2.html), not the number of cores of the machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or "max" (no quota)
        pass
    return cores


def default_processes(most: int) -> int:
    """The default number of helper processes: this process's share of the cores, at most ``most``.

    The cores are divided among the processes that torchrun (LOCAL_WORLD_SIZE) or Slurm (SLURM_NTASKS_PER_NODE) started on this
    machine. Windows cannot wait for more than 61 processes at a time.
    """
    siblings = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    share = usable_cores() // (int(siblings) if siblings.isdecimal() and int(siblings) else 1)
    return max(1, min(share, most, 61 if sys.platform == "win32" else most))


def is_heard(number: int) -> bool:
    """Whether to obey a stop signal: all except the SIGHUP of a closed terminal if it is ignored, as under ``nohup``."""
    return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN


def start_helper() -> None:
    """Called first in a helper process: ignore stop signals, and end as soon as the main process is gone.

    Terminals, ``timeout``, Slurm and torchrun signal the whole process group; only the main process decides what to do. This
    works with fork, spawn and forkserver. Process pools end their helpers by SIGTERM, hence :func:`kill_helpers`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if main := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: BaseProcess) -> None:
    # Forked siblings hold copies of each other's pipes to the main process, so the sentinel may come late. So also check the
    # parent process id if the parent is the main process; a fork server may end before it, by a signal to the whole group.
    parent = os.getppid()
    while not connection.wait([main.sentinel], timeout=2) and (parent != main.pid or os.getppid() == parent):
        pass
    os._exit(1)


def kill_helpers(pool: ProcessPoolExecutor) -> None:
    """Kill the processes of a pool at once.

    Call it when a pool is broken: the pool ends its other processes by SIGTERM, which helpers ignore, and waits for them.
    """
    for process in list((pool._processes or {}).values()):
        process.kill()
