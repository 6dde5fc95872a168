"""Toy data for the tests: nothing is read from outside the repository and nothing is downloaded."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from deeplab import deeplabv2
from tests.helpers_nets import randomise_batch_norm
from utils.checkpoint import make_meta, save_snapshot

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import voc_palette  # noqa: E402

TOY_SIZES = [(40, 55), (33, 47), (57, 41), (64, 64), (35, 60), (49, 33)]  # height, width
TOY_CLASSES = 4


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture
def in_a_group():
    """Start a process in a process group of its own, of which nothing is left when the test is over, however it ends."""
    started = []

    def start(words: list, **options) -> subprocess.Popen:
        options = {
            "cwd": ROOT,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        } | options
        started.append(subprocess.Popen([*map(str, words)], start_new_session=True, preexec_fn=hear_ctrl_c, **options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def hear_ctrl_c() -> None:
    """For a child process: a shell lets what it starts in the background ignore Ctrl-C, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_palette_png(path: Path, label: np.ndarray) -> None:
    image = Image.fromarray(label)
    image.putpalette(voc_palette().tobytes())
    image.save(path)


@pytest.fixture
def toy_voc(tmp_path: Path) -> Path:
    """See :func:`make_toy_voc`."""
    return make_toy_voc(tmp_path / "toy")


def make_toy_voc(root: Path) -> Path:
    """Six small pictures in the VOC layout: coloured rectangles of classes 1..3 on class 0, with a void border each."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = []
    for i, (height, width) in enumerate(TOY_SIZES):
        image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        label = np.zeros((height, width), dtype=np.uint8)
        for k in range(1, TOY_CLASSES):
            top, left = int(rng.integers(0, height - 16)), int(rng.integers(0, width - 16))
            label[top : top + 16, left : left + 16] = 255
            label[top + 1 : top + 15, left + 1 : left + 15] = k
            image[top : top + 16, left : left + 16] = (np.array([40, 120, 220]) * k) % 256
        ids.append(f"toy_{i}")
        cv2.imwrite(str(root / "JPEGImages" / f"toy_{i}.jpg"), image)
        save_palette_png(root / "SegmentationClassAug" / f"toy_{i}.png", label)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:4]) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids) + "\n")
    return root


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    net = randomise_batch_norm(deeplabv2("resnet18", TOY_CLASSES))
    path = tmp_path_factory.mktemp("snapshot") / "VOC12_scenes_7.pth"
    save_snapshot(path, net, make_meta(net, ["ground", "red", "green", "blue"], 7, {}, seen_voc_val=""))
    return path
