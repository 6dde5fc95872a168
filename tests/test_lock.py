"""Two runs in one folder: the second is refused and the holder named, and the lock of a killed run is recognised."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers_runs import SCRATCH, at, log_lines, train
from utils.command import UserError
from utils.training import lock
from utils.training.lock import HOLDER, LOCK, FolderLock

RUN = [*SCRATCH, "--num-steps", "1"]
HOLD = """
import os, sys, time
from pathlib import Path
from utils.training.lock import FolderLock

with FolderLock(Path(sys.argv[1])):
    if sys.argv[2:] and not os.fork():
        time.sleep(0.5)
        os._exit(0)
    print(flush=True)
    input()
"""


def held(folder, *helper: str) -> subprocess.Popen:
    """Another process that holds ``folder``, with a forked helper if asked for."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, *helper], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    process.stdout.readline()
    return process


def test_a_second_run_is_refused_and_the_lock_of_a_killed_run_is_taken_over(toy_voc, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    folder = tmp_path / "s"
    first = held(folder)
    name = f"process {first.pid} on {socket.gethostname()}"
    for options in (RUN, ["--resume"], ["--resume", str(folder / "last.ckpt")]):
        with pytest.raises(UserError, match=f"s is in use by {name}; wait until it ends, or choose another folder") as error:
            train(toy_voc, folder, *options)
        assert error.value.exit_status == 2
    assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}
    first.kill()
    first.communicate()
    assert train(toy_voc, folder, *RUN) == 0
    assert f"s was left locked by {name}; this run takes over the lock\n" in capsys.readouterr().out
    assert not list(folder.glob(".*"))


def test_a_lock_ends_with_its_run(tmp_path):
    """It leaves nothing: neither its own files nor empty folders that it created."""
    (tmp_path / "a").mkdir()

    def fail() -> None:
        with FolderLock(tmp_path / "a/b/c") as line:
            assert line == ""
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    first = held(tmp_path / "a")
    first.communicate("\n")
    assert first.returncode == 0
    with FolderLock(tmp_path / "a") as line:
        assert line == ""


def test_a_holder_on_another_machine_may_still_run(tmp_path):
    """Some network disks lock only within each machine."""
    (tmp_path / HOLDER).write_text('{"host": "elsewhere", "pid": 7}')
    with FolderLock(tmp_path) as line:
        assert line.endswith(
            "process 7 on elsewhere; this run takes over the lock; if that process still runs there, stop this run"
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked helpers")
def test_forked_helpers_do_not_keep_the_lock_of_a_killed_run(tmp_path):
    """Whether or not the library releases it in the child: a helper ends soon after its main process."""
    first = held(tmp_path, "helper")
    first.kill()
    first.wait()
    first.stdin.close()
    first.stdout.close()
    with FolderLock(tmp_path) as line:
        assert f"process {first.pid} on" in line


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_the_run_goes_on_if_nothing_can_be_locked(error, toy_voc, tmp_path, monkeypatch, capsys):
    def acquire(*args, **options):
        raise error

    monkeypatch.setattr(lock.FileLock, "acquire", acquire)
    assert train(toy_voc, tmp_path / "s", *RUN) == 0
    reason = "No locks available" if isinstance(error, OSError) else "no flock here"
    assert f"s cannot be locked ({reason}); make sure that no other run writes there" in capsys.readouterr().out
    assert (tmp_path / "s/VOC12_scenes_1.pth").exists()


@pytest.mark.parametrize("how", ["lock deleted", "folder created again", "folder created again by a run that has ended"])
def test_a_run_that_lost_its_folder_to_another_writes_nothing_more(how, toy_voc, tmp_path):
    folder, others = tmp_path / "s", []

    def come() -> None:
        (folder / LOCK).unlink() if how == "lock deleted" else shutil.rmtree(folder)
        others.append(held(folder))
        (folder / "last.ckpt").write_bytes(b"the other's")
        (folder / "log.jsonl").write_bytes(b"the other's")
        if "ended" in how:
            (folder / "args.json").write_bytes(b"the other's")
            others[0].communicate("\n")

    name = "another run" if "ended" in how else r"process \d+ on .*"
    with pytest.raises(UserError, match=rf"s or its \.run\.lock was deleted, and {name} has the folder now; this run writes"):
        train(toy_voc, folder, *RUN, "--num-steps", "3", "--save-pred-every", "2", loss=at({2: come}))
    assert (folder / "last.ckpt").read_bytes() == (folder / "log.jsonl").read_bytes() == b"the other's"
    assert not list(folder.glob("*.pth"))
    if "ended" not in how:
        assert json.loads((folder / HOLDER).read_text())["pid"] == others[0].pid
        with pytest.raises(UserError, match="is in use by process"):  # the first run's end has not released it
            train(toy_voc, folder, *RUN)
        others[0].communicate("\n")


@pytest.mark.parametrize("deleted", [[LOCK], [LOCK, HOLDER, "args.json"]])
def test_a_deleted_lock_is_acquired_again(deleted, toy_voc, tmp_path, monkeypatch):
    """If no other run has come; from the next save on the folder is held as before."""
    folder, tried = tmp_path / "s", []
    monkeypatch.setattr(lock, "PATIENCE", 0.1)

    def delete() -> None:
        for name in deleted:
            (folder / name).unlink()

    def refused() -> None:
        with pytest.raises(UserError, match=f"s is in use by process {os.getpid()} on"):
            FolderLock(folder).__enter__()
        tried.append(True)

    loss = at({2: delete, 4: refused})
    assert train(toy_voc, folder, *RUN, "--num-steps", "4", "--save-pred-every", "2", loss=loss) == 0
    assert tried
    assert {path.name for path in folder.glob("*.pth")} == {"VOC12_scenes_2.pth", "VOC12_scenes_4.pth"}
    assert [line["step"] for line in log_lines(folder)] == [1, 2, 3, 4]
    assert not list(folder.glob(".*"))
