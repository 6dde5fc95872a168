"""The life of a loader's workers: however their context ends, none is left, and nobody waits for one that is stuck."""

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
    """The worker's process number for any index, but for two."""

    def __getitem__(self, index):
        if index == STUCK:
            time.sleep(300)
        if index == BROKEN:
            raise DatasetError("the file is broken")
        return os.getpid()


def loader_of(*indices):
    return make_loader(Numbers(), [[index] for index in indices], 2, torch.device("cpu"))


def first_two(batches):
    """The processes of the two workers, which have both started by then."""
    return [int(next(batches)) for _ in range(2)]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def soon(monkeypatch):
    """torch asks whether a worker has ended by itself for a shorter time."""
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
    if state != "killed":  # whose death torch may report first
        assert (type(caught) is error and str(caught) == "mine") if error else caught is None


@pytest.mark.usefixtures("soon")
def test_a_killed_worker_is_a_sentence_where_its_batch_is_awaited():
    with pytest.raises(UserError, match="was killed: memory ran out, or a file crashes its decoder"):  # noqa: SIM117, PT012
        with running(loader_of(0, 0, STUCK, STUCK, STUCK, STUCK)) as batches:
            workers = first_two(batches)
            os.kill(workers[0], signal.SIGKILL)
            next(batches)
    assert all(map(is_gone, workers))


def test_an_error_in_a_worker_ends_the_others_while_its_traceback_holds_the_iterator():
    with pytest.raises(DatasetError, match=r"^the file is broken$"):  # noqa: SIM117, PT012
        with running(loader_of(0, 0, BROKEN, 0)) as batches:
            workers = first_two(batches)
            list(batches)
    assert all(map(is_gone, workers))


def test_a_second_interrupt_leaves_none_either(monkeypatch):
    """It comes while torch waits for a worker that is stuck."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117, PT012
        with running(loader_of(0, 0, 0)) as batches:
            workers = first_two(batches)
            os.kill(workers[0], signal.SIGSTOP)
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 0.5)
    assert all(map(is_gone, workers))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's __del__, of an iterator half made
def test_workers_that_cannot_all_be_started_end(monkeypatch):
    """The second one's queue finds no room in /dev/shm."""
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
def test_a_command_ends_with_its_error_whatever_its_workers_do(tmp_path, method):
    """Each worker holds the other end of the pipe, which is read to its end."""
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    command = [sys.executable, str(tmp_path / "program.py"), method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("ValueError: mine")
