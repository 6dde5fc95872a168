"""Signals to a training run, to the process alone and to its whole group, with workers under way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.test_training import SCRATCH, SMALL, log_lines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups and signals of POSIX")


def begin(in_a_group, toy_voc: Path, folder: Path, *options: str, runner: tuple = ("train.py",)) -> subprocess.Popen:
    """A run of 100,000 steps with two workers, in a process group of its own, that has made its second step."""
    arguments = ["--data-dir", toy_voc, "--snapshot-dir", folder, *SMALL, *SCRATCH, "--num-steps", "100000"]
    process = in_a_group([sys.executable, *runner, *arguments, "--num-workers", "2", *options])
    for _ in range(1200):
        if (folder / "log.jsonl").exists() and len(log_lines(folder)) > 1:
            return process
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run did not begin within a minute")


def group_is_gone(process: subprocess.Popen) -> bool:
    """Whether nothing of the process group is left; waits a little for what is just ending."""
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("name", "method"),
    [("SIGTERM", "fork"), ("SIGUSR1", "fork"), ("SIGINT", "fork"), ("SIGTERM", "spawn"), ("SIGTERM", "forkserver")],
)
def test_a_signal_to_the_whole_group_saves(name, method, in_a_group, toy_voc, tmp_path):
    process = begin(in_a_group, toy_voc, tmp_path, runner=("tests/start_method.py", method, "train.py"))
    number = getattr(signal, name)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
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
    """A bug keeps its traceback, and the workers, which ignore SIGTERM, do not keep the process."""
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
