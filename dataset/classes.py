"""The class table of PASCAL VOC, the colours of label images, the void label and the mean colour."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

IGNORE_LABEL = 255
"""The void label: never trained on, never counted."""

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
"""Mean colour of the ImageNet training pictures, blue-green-red, 0..255, as the published nets subtract it."""


class VOCClass(NamedTuple):
    id: int
    name: str
    color: tuple[int, int, int]  # RGB


def voc_palette() -> np.ndarray:
    """The VOC colour map as (256, 3) uint8 RGB, row = label.

    The three lowest bits of a label go to the highest bits of red, green and blue, the next three to the next lower bits,
    and so on (VOC development kit, ``VOClabelcolormap``). Label 255 comes out as (224, 224, 192).
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for i in range(8):
        for channel in range(3):
            bit = (labels >> (3 * i + channel)) & 1
            palette[:, channel] |= (bit << (7 - i)).astype(np.uint8)
    return palette


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_CLASSES = tuple(
    VOCClass(i, name, tuple(int(v) for v in color)) for i, (name, color) in enumerate(zip(VOC_NAMES, voc_palette()))
)


def one_class_warning(present: Iterable[int]) -> str | None:
    """What to say where labels hold nothing but one class; None where they hold more.

    Args:
        present: the label values that occur, 255 for void.
    """
    values = set(present)
    classes = values - {IGNORE_LABEL}
    if len(classes) > 1:
        return None
    return f"warning: only class {min(classes, default='none')} occurs"
