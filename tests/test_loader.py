"""The workers of a loader: however the context ends, no worker is left, and the main process never waits for a stuck one."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import Dataset

from dataset import DatasetError
from tests.helpers import ROOT
from utils.command import UserError
from utils.loader import make_loader, running

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
STUCK, BROKEN = -1, -2  # indices


class Numbers(Dataset):
    """The process id of the worker, for all indices except two."""

    def __getitem__(self, index):
        if index == STUCK:
            time.sleep(300)
        if index == BROKEN:
            raise DatasetError("the file is broken")
        return os.getpid()


def loader_of(*indices):
    return make_loader(Numbers(), [[index] for index in indices], 2, torch.device("cpu"))


def first_two(batches):
    """The process ids of the two workers; both have started by then."""
    return [int(next(batches)) for _ in range(2)]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def soon(monkeypatch):
    """torch waits for a shorter time for a worker to end by itself."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("state", ["at work", "stopped", "asleep", "killed"])
def test_no_worker_outlives_its_context(state, error):
    before, caught = multiprocessing.active_children(), None
    try:
        with running(loader_of(0, 0, *([STUCK] * 4 if state == "asleep" else range(20)))) as batches:
            workers = first_two(batches)
            if number := {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}.get(state):
                os.kill(workers[1], number)
            if error:
                raise error("mine")
    except (ValueError, KeyboardInterrupt, RuntimeError, UserError) as found:
        caught = found
    assert all(map(is_gone, workers))
    assert set(multiprocessing.active_children()) <= set(before)
    if state != "killed":  # torch may report the killed worker first
        assert (type(caught) is error and str(caught) == "mine") if error else caught is None


@pytest.mark.usefixtures("soon")
def test_a_killed_worker_is_one_sentence_when_its_batch_is_needed():
    with pytest.raises(UserError, match="was killed: memory ran out, or a file crashes its decoder"):  # noqa: SIM117, PT012
        with running(loader_of(0, 0, STUCK, STUCK, STUCK, STUCK)) as batches:
            workers = first_two(batches)
            os.kill(workers[0], signal.SIGKILL)
            next(batches)
    assert all(map(is_gone, workers))


def test_an_error_in_a_worker_ends_the_others_though_its_traceback_holds_the_iterator():
    with pytest.raises(DatasetError, match=r"^the file is broken$"):  # noqa: SIM117, PT012
        with running(loader_of(0, 0, BROKEN, 0)) as batches:
            workers = first_two(batches)
            list(batches)
    assert all(map(is_gone, workers))


def test_a_second_interrupt_leaves_no_worker(monkeypatch):
    """It comes while torch waits for a stuck worker."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117, PT012
        with running(loader_of(0, 0, 0)) as batches:
            workers = first_two(batches)
            os.kill(workers[0], signal.SIGSTOP)
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 0.5)
    assert all(map(is_gone, workers))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's __del__ of an incomplete iterator
def test_workers_end_if_not_all_can_be_started(monkeypatch):
    """The queue of the second worker does not fit in /dev/shm."""
    start, begun = multiprocessing.Process.start, []

    def fails(process):
        if begun:
            raise OSError(28, "No space left on device")
        begun.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", fails)
    with pytest.raises(UserError, match=r"no workers can be started \(No space left on device\): give it more"):  # noqa: SIM117
        with running(loader_of(0)):
            pass
    assert is_gone(begun[0].pid)


PROGRAM = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {root!r})
import torch
from tests.test_loader import STUCK, first_two, loader_of
from utils.loader import running

if __name__ == "__main__":
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    multiprocessing.set_forkserver_preload(["tests.test_loader"])
    multiprocessing.set_start_method(sys.argv[1])
    with running(loader_of(0, 0, STUCK, 0)) as batches:
        workers = first_two(batches)
        os.kill(workers[1], signal.SIGSTOP)
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        raise ValueError("mine")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_command_ends_with_its_error_even_if_workers_are_stuck(tmp_path, method):
    """Each worker holds the other end of the pipe, so reading it to the end waits for all of them."""
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    command = [sys.executable, str(tmp_path / "program.py"), method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("ValueError: mine")
