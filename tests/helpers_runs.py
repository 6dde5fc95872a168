"""Helpers for tests of whole runs: the commands in this process or another, and the files that they leave."""

import json
import os
import signal
import subprocess
import sys
import threading
from functools import wraps
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import train_msc as train_msc_script
from deeplab import single_scale_loss
from tests.helpers import ROOT, TOY_CLASSES
from utils.evaluation import run as evaluation
from utils.evaluation.options import evaluation_parser
from utils.training import loop as training
from utils.training.options import training_parser


def limit(size: int | None) -> None:
    """Limit the size of files that this process writes, in bytes; None lifts the limit."""
    resource = pytest.importorskip("resource")  # POSIX
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def evaluate(toy_voc: Path, snapshot: Path, *options: str) -> None:
    arguments = ["--data-dir", str(toy_voc), "--restore-from", str(snapshot), "--device", "cpu", "--num-workers", "0", *options]
    assert evaluation.run(evaluation_parser("").parse_args(arguments)) == 0


def scores(toy_voc: Path, snapshot: Path, tmp_path: Path, *options: str) -> dict:
    evaluate(toy_voc, snapshot, "--save-json", str(tmp_path / "scores.json"), *options)
    return json.loads((tmp_path / "scores.json").read_text())


def stopping(loss, batches: int):
    """``loss``, with a SIGTERM in its ``batches``-th call."""

    @wraps(loss)
    def wrapped(*args, **kwargs):
        wrapped.left -= 1
        if wrapped.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **kwargs)

    wrapped.left = batches
    return wrapped


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


TORCH = TorchVersion(torch.__version__)
SMALL = ["--backbone", "resnet18", "--num-classes", str(TOY_CLASSES), "--input-size", "33,41", "--batch-size", "2",
         "--device", "cpu", "--num-workers", "0", "--log-every", "1", "--save-num-images", "0"]  # fmt: skip
SCRATCH = ["--restore-from", "none", "--batch-norm", "full", "--random-scale", "--random-mirror", "--learning-rate", "1e-3"]


def train(toy_voc: Path, folder: Path, *options: str, loss=single_scale_loss) -> int:
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    return training.run(parser.parse_args(["--data-dir", str(toy_voc), "--snapshot-dir", str(folder), *SMALL, *options]), loss)


def train_msc(toy_voc: Path, folder: Path, *options: str) -> int:
    """train_msc.py with its real command line, in this process."""
    arguments = ["--data-dir", str(toy_voc), "--snapshot-dir", str(folder), *SMALL, "--iter-size", "1", *options]
    return train_msc_script.main(arguments)


def command(script: str, *options: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / script, *options], capture_output=True, text=True, cwd=ROOT, timeout=120, **kwargs
    )


def model(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# Every option that changes how a step is computed, alone and in combinations that share a mechanism.
STEPS = {
    "plain": [],
    "fp16": ["--amp", "fp16"],
    "bf16": ["--amp", "bf16"],
    "grad-checkpoint": ["--grad-checkpoint"],
    "loss-size": ["--loss-size", "input"],
    "iter-size": ["--iter-size", "2"],
    "one-scale": ["--one-scale-at-a-time"],
    "fp16 iter-size": ["--amp", "fp16", "--iter-size", "2"],
    "fp16 one-scale": ["--amp", "fp16", "--one-scale-at-a-time"],
    "bf16 grad-checkpoint": ["--amp", "bf16", "--grad-checkpoint"],
    "one-scale grad-checkpoint iter-size": ["--one-scale-at-a-time", "--grad-checkpoint", "--iter-size", "2"],
    "added": ["--class-weights", "balanced", "--warmup-steps", "2", "--color-jitter", "0.4,0.4,0.4,0.1",
              "--clip-grad-norm", "1", "--learning-rate", "1e-2"],  # at a lower one such short steps vanish in float32
    "one-scale loss-size": ["--one-scale-at-a-time", "--loss-size", "input"],
}  # fmt: skip


def at(acts: dict):
    """A loss that calls ``acts[n]()`` before its n-th call, after all pending snapshots are written."""

    @wraps(single_scale_loss)
    def loss(*args, **options):
        loss.calls += 1
        if loss.calls in acts:
            for thread in threading.enumerate():
                if thread.name == "snapshot":
                    thread.join()
            acts[loss.calls]()
        return single_scale_loss(*args, **options)

    loss.calls = 0
    return loss
