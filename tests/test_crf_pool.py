"""The pool of CRF processes: the same classes under every start method, and no process outlives the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deeplab import dense_crf
from deeplab.inference import enlarge
from tests.helpers import ROOT, hear_ctrl_c
from tests.helpers_data import samples_with_logits
from utils.command import UserError
from utils.evaluation.crf_pool import CRFPool


def test_images_come_back_in_order_and_are_read_as_needed():
    taken, seen = 0, []

    def stream():
        nonlocal taken
        for entry in samples_with_logits(20):
            taken += 1
            yield entry

    with CRFPool(2) as pool:
        for sample, classes in pool.refine(stream()):
            seen.append((sample, classes))
            assert taken - len(seen) <= pool.capacity
        assert list(pool.refine([])) == []
    assert [sample.id for sample, _ in seen] == [str(i) for i in range(20)]
    for (sample, classes), (_, logits) in zip(seen, samples_with_logits(20)):
        probabilities = enlarge(logits[None], sample.image.shape[:2])[0].softmax(dim=0).numpy()
        assert (classes == dense_crf(sample.image[:, :, ::-1], probabilities).argmax(axis=0)).all()
    assert not any(process.is_alive() for process in pool.processes)


def test_a_killed_process_is_one_sentence():
    with CRFPool(2) as pool:
        for process in pool.processes:
            process.kill()
        with pytest.raises(UserError, match=r"CRF was killed at image \d+; .* --crf-workers"):
            list(pool.refine(samples_with_logits(4)))


def test_a_pool_that_cannot_start_leaves_no_process(monkeypatch):
    started = []
    start = CRFPool._start_process

    def fail_at_the_second(pool: CRFPool, *options: float) -> None:
        if pool.processes:
            raise KeyboardInterrupt
        start(pool, *options)
        started.extend(pool.processes)

    monkeypatch.setattr(CRFPool, "_start_process", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        CRFPool(2)
    assert [process.is_alive() for process in started] == [False]


def command(toy_voc: Path, snapshot: Path, out: Path, images: int, num_workers: int) -> list[str]:
    (toy_voc / "list.txt").write_text("toy_0\ntoy_1\n" * (images // 2))
    options = ["--data-dir", toy_voc, "--data-list", toy_voc / "list.txt", "--restore-from", snapshot, "--device", "cpu"]
    options += ["--crf", "--crf-workers", 1, "--num-workers", num_workers, "--save-dir", out]
    return [str(ROOT / "evaluate.py"), *map(str, options)]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_real_command_under_every_start_method(toy_voc, snapshot, tmp_path, method):
    runner = [sys.executable, ROOT / "tests/helpers_start_method.py", method]
    arguments = [*runner, *command(toy_voc, snapshot, tmp_path / "out", 2, 1)]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "after CRF" in result.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["toy_0.png", "toy_1.png"]


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGUSR1, True, 128 + signal.SIGUSR1),
        (signal.SIGINT, True, 130),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
)
def test_a_stopped_evaluation_leaves_nothing_behind(toy_voc, snapshot, tmp_path, number, to_group, status):
    """Both for a signal from ``kill`` and for one to the whole process group, as from a terminal or Slurm."""
    arguments = [sys.executable, *command(toy_voc, snapshot, tmp_path / "out", 10000, 1)]
    options = {"start_new_session": True, "preexec_fn": hear_ctrl_c, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, **options) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/toy_1.png").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (os.killpg if to_group else os.kill)(process.pid, number)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while not group_is_gone(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] or number == signal.SIGKILL
