"""Toy data for the tests; nothing is downloaded or read from outside the repository."""

import signal
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dataset import voc_palette

ROOT = Path(__file__).resolve().parent.parent

TOY_SIZES = [(40, 55), (33, 47), (57, 41), (64, 64), (35, 60), (49, 33)]  # height, width
TOY_CLASSES = 4


def hear_ctrl_c() -> None:
    """For a child process: a shell makes background jobs ignore Ctrl-C, and child processes would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_palette_png(path: Path, label: np.ndarray) -> None:
    image = Image.fromarray(label)
    image.putpalette(voc_palette().tobytes())
    image.save(path)


def make_toy_voc(root: Path) -> Path:
    """Six small images in the VOC layout: coloured rectangles of classes 1..3 on class 0, each with an ignored border."""
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
