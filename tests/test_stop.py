"""Signals to a training run, to its process or to its whole process group, with workers running; output without a reader."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers_runs import SCRATCH, SMALL, at, log_lines, train
from utils import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups and signals of POSIX")


def begin(
    in_a_group, toy_voc: Path, folder: Path, *options: str, runner: tuple = ("train.py",), **streams: int
) -> subprocess.Popen:
    """Start a run of 100,000 steps with two workers, in its own process group; returns after its second step."""
    arguments = ["--data-dir", toy_voc, "--snapshot-dir", folder, *SMALL, *SCRATCH, "--num-steps", "100000"]
    process = in_a_group([sys.executable, *runner, *arguments, "--num-workers", "2", *options], **streams)
    for _ in range(1200):
        if (folder / "log.jsonl").exists() and len(log_lines(folder)) > 1:
            return process
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run did not begin within a minute")


def group_is_gone(process: subprocess.Popen) -> bool:
    """Whether the process group has ended; waits up to 5 s for it."""
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("SIGTERM", "fork"),
        ("SIGUSR1", "fork"),
        ("SIGHUP", "forkserver"),
        ("SIGINT", "fork"),
        ("SIGTERM", "spawn"),
        ("SIGTERM", "forkserver"),
    ],
)
def test_a_signal_to_the_whole_group_saves(name, method, in_a_group, toy_voc, tmp_path):
    process = begin(in_a_group, toy_voc, tmp_path, runner=("tests/helpers_start_method.py", method, "train.py"))
    number = getattr(signal, name)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    if name != "SIGHUP":  # SIGHUP also ends multiprocessing's helper process, with tracebacks
        assert "Traceback" not in errors
    assert f"{name}: stopping after this step" in errors
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == log_lines(tmp_path)[-1]["step"]
    assert group_is_gone(process)


def test_a_second_ctrl_c_ends_at_once(in_a_group, toy_voc, tmp_path):
    process = begin(in_a_group, toy_voc, tmp_path, "--save-pred-every", "100000")
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert group_is_gone(process)


def test_an_uncaught_exception_ends(in_a_group, toy_voc, tmp_path):
    """A bug keeps its traceback, and the workers, although they ignore SIGTERM, do not keep the process alive."""
    (tmp_path / "bug.py").write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "import deeplab, train\n"
        "real, calls = deeplab.single_scale_loss, []\n"
        "def single_scale_loss(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        raise ZeroDivisionError('a bug')\n"
        "    return real(*args, **kwargs)\n"
        "deeplab.single_scale_loss = single_scale_loss\n"
        "train.main()\n"
    )
    process = begin(in_a_group, toy_voc, tmp_path / "s", runner=(str(tmp_path / "bug.py"),))
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert process.returncode == 1
    assert "ZeroDivisionError: a bug" in errors
    assert group_is_gone(process)


def test_a_closed_terminal_saves(in_a_group, toy_voc, tmp_path):
    """It sends SIGHUP, and neither the bar nor a message can be written to it."""
    terminal, name = os.openpty()
    again = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    own_terminal = f"import os, sys; os.open(os.ttyname(1), os.O_RDWR); {again}"
    streams = {"stdout": name, "stderr": name}
    process = begin(in_a_group, toy_voc, tmp_path, runner=("-c", own_terminal, "train.py"), **streams)
    os.close(name)
    os.close(terminal)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == log_lines(tmp_path)[-1]["step"]
    assert group_is_gone(process)


@pytest.mark.parametrize(("handler", "status", "steps"), [(signal.SIG_DFL, 128 + signal.SIGHUP, 1), (signal.SIG_IGN, 0, 3)])
def test_sighup_is_ignored_under_nohup(handler, status, steps, toy_voc, tmp_path):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        loss = at({1: lambda: signal.raise_signal(signal.SIGHUP)})
        assert train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "3", loss=loss) == status
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == steps


@pytest.mark.parametrize(("handler", "status"), [("SIG_DFL", 128 + signal.SIGHUP), ("SIG_IGN", 0)])
def test_sighup_to_any_command(handler, status, tmp_path):
    """Its ``finally`` clauses run; under ``nohup`` the command goes on."""
    program = f"""
import signal
signal.signal(signal.SIGHUP, signal.{handler})
from utils.command import run_command
def main():
    try:
        signal.raise_signal(signal.SIGHUP)
    finally:
        print("cleared away")
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (status, "cleared away\n", "")


@pytest.mark.parametrize("both", [False, True])
def test_a_closed_pipe_does_not_end_a_run(both, in_a_group, toy_voc, tmp_path):
    """As in ``train.py | tee`` after tee is killed, with and without ``2>&1``."""
    arguments = ["--data-dir", toy_voc, "--snapshot-dir", tmp_path, *SMALL, *SCRATCH, "--num-steps", "4", "--val-every", "4"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if both else subprocess.PIPE}
    process = in_a_group([sys.executable, "train.py", *arguments], **streams)
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors or "") == (0, "")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 4]
    assert (tmp_path / "best.pth").exists()


def test_the_exit_status_of_a_mistake_needs_no_reader(tmp_path):
    """Neither of standard output nor of standard error."""
    program = "from utils.command import UserError, run_command\ndef main():\n    raise UserError('x')\nrun_command(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stderr=writer, stdout=writer, cwd=ROOT)
    os.close(writer)
    assert done.returncode == 2


@pytest.mark.parametrize("validated", [False, True])
def test_a_stop_in_the_last_save(validated, toy_voc, tmp_path, monkeypatch, capfd):
    """Everything is saved. A missing last evaluation is reported, and --resume does it."""
    save = checkpoint._save

    def stopped(path, *args, **options):
        save(path, *args, **options)
        if path.name == "VOC12_scenes_2.pth":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "_save", stopped)
    options = [*SCRATCH, "--num-steps", "2", *(["--val-every", "1"] if validated else [])]
    assert train(toy_voc, tmp_path, *options) == 128 + signal.SIGTERM
    monkeypatch.undo()
    said = capfd.readouterr()
    assert "SIGTERM: stopping" in said.err
    if not validated:
        assert "VOC12_scenes_2.pth; next: python evaluate.py" in said.out
        return
    assert said.out.splitlines()[-1].startswith(
        "all 2 steps are done and saved, but the last net is not evaluated; add --resume"
    )
    assert torch.load(tmp_path / "best.pth", weights_only=True)["meta"]["step"] == 1
    assert [line["step"] for line in log_lines(tmp_path) if "val_mean_iou" in line] == [1]
    assert train(toy_voc, tmp_path, "--resume") == 0
    assert [line["step"] for line in log_lines(tmp_path) if "val_mean_iou" in line] == [1, 2]
    assert train(toy_voc, tmp_path, "--resume") == 0
    assert "nothing is left to do" in capfd.readouterr().out.splitlines()[-1]
