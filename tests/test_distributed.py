"""Two gloo processes against one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deeplab import multi_scale_loss, single_scale_loss
from tests.conftest import ROOT
from tests.test_evaluation import snapshot  # noqa: F401
from tests.test_training import SCRATCH, SMALL, command, log_lines, model, train


def torchrun(script: str, *options, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*launcher, str(ROOT / script), *map(str, options)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=240, env=environment)


@pytest.mark.parametrize("script", [("train.py",), ("train_msc.py",), ("train_msc.py", "--one-scale-at-a-time")])
def test_two_processes_train_as_one_does(script, toy_voc, tmp_path):
    """Three steps of four pictures, in two accumulated halves: what each tensor has moved agrees to 1 % of its largest move.

    That is far above rounding and far below what a lost scale, half batch or process would change. Batch norm is frozen:
    batch statistics are those of a process's own pictures unless --sync-bn shares them.
    """
    options = ["--data-dir", toy_voc, *SMALL, *SCRATCH, "--batch-norm", "frozen", "--batch-size", "2", "--iter-size", "2"]
    loss = single_scale_loss if script[0] == "train.py" else multi_scale_loss
    for name, rate in (("start", "0"), ("one", "3e-6")):
        run = [*map(str, options), "--num-steps", "3", "--learning-rate", rate]
        assert train(toy_voc, tmp_path / name, *run, loss=loss) == 0
    two = torchrun(*script, *options, "--num-steps", "3", "--learning-rate", "3e-6", "--snapshot-dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    start, one, two = (model(tmp_path / name / "VOC12_scenes_3.pth") for name in ("start", "one", "two"))
    for key in (key for key in one if "conv" in key):
        moved = float((one[key] - start[key]).abs().max())
        assert moved > 20 * 1.2e-7 * float(start[key].abs().max()), key  # more than float32 rounds away
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=0.01 * moved, msg=lambda m, key=key: f"{key}: {m}")
    assert [line["step"] for line in log_lines(tmp_path / "two")] == [1, 2, 3]


def test_two_processes_count_the_same_matrix(toy_voc, snapshot, tmp_path):  # noqa: F811
    options = [
        "--data-dir",
        toy_voc,
        "--restore-from",
        snapshot,
        "--device",
        "cpu",
        "--num-workers",
        "0",
        "--crf",
        "--crf-workers",
        "1",
    ]
    one = command("evaluate.py", *options, "--save-json", tmp_path / "one.json", "--save-dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = torchrun("evaluate.py", *options, "--save-json", tmp_path / "two.json", "--save-dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    one_result, two_result = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one_result["before_crf"]["confusion_matrix"] == two_result["before_crf"]["confusion_matrix"]
    assert one_result["after_crf"]["confusion_matrix"] == two_result["after_crf"]["confusion_matrix"]
    assert two.stdout.count("mean IoU") == 2  # before and after the CRF, from one process alone
    for i in range(6):
        assert (tmp_path / f"one/toy_{i}.png").read_bytes() == (tmp_path / f"two/toy_{i}.png").read_bytes()


def test_an_indivisible_batch_is_refused(toy_voc, tmp_path):
    result = torchrun("train.py", "--data-dir", toy_voc, "--snapshot-dir", tmp_path, *SMALL, *SCRATCH, "--batch-size", "3")
    assert result.returncode != 0
    assert "--batch-size 3 does not divide into 2 processes" in result.stderr


def test_one_failed_process_ends_all_with_its_message(toy_voc, tmp_path):
    """A picture that only one process reads is broken: its sentence is shown and nothing hangs."""
    (toy_voc / "JPEGImages/toy_2.jpg").write_bytes(b"no picture")
    result = torchrun("train.py", "--data-dir", toy_voc, "--snapshot-dir", tmp_path, *SMALL, *SCRATCH, "--num-steps", "100")
    assert result.returncode != 0
    assert "toy_2.jpg is not a picture" in result.stderr


def test_a_restart_goes_on(toy_voc, tmp_path):
    options = ["--data-dir", toy_voc, "--snapshot-dir", tmp_path, *SMALL, *SCRATCH, "--batch-norm", "frozen", "--resume"]
    for steps in (2, 4):
        result = torchrun("train.py", *options, "--num-steps", steps)
        assert result.returncode == 0, result.stderr
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]
