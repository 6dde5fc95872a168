"""Writes class names into the regions of a mask, where they fit."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZES = (0.05, 0.036, 0.026)  # font sizes as fractions of the longer side; the largest that fits is used
SMALLEST_SIZE = 11  # pixels


class Caption(NamedTuple):
    """The place of a class name in one of the regions of the class, in pixels.

    Attributes:
        label: the class index.
        left, top, width, height: the box of the text with its outline.
        size: the font size.
    """

    label: int
    left: int
    top: int
    width: int
    height: int
    size: int


def place_captions(labels: np.ndarray, names: Mapping[int, str]) -> list[Caption]:
    """The place of the class name in each connected region that it fits into.

    The whole box of the text is inside the region. Of all such places, the centre of the box is the one farthest from the
    region's edge, by the distance transform.

    Args:
        labels: (H, W) uint8.
        names: class index -> name, for the classes that get captions.
    """
    sizes = sorted({max(SMALLEST_SIZE, round(share * max(labels.shape))) for share in SIZES}, reverse=True)
    captions = []
    for label in sorted(names.keys() & set(np.unique(labels).tolist())):
        boxes = [(size, *_box(names[label], size)[2:]) for size in sizes]
        _, regions, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=4)
        least = boxes[-1][1] * boxes[-1][2]
        for number in (1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= max(1, least))).tolist():
            x, y, width, height, _ = stats[number].tolist()
            region = np.pad(regions[y : y + height, x : x + width] == number, 1).astype(np.uint8)
            if found := _deepest(region, boxes):
                left, top, *box = found
                captions.append(Caption(label, x - 1 + left, y - 1 + top, *box))
    return captions


def _deepest(region: np.ndarray, boxes: Sequence[tuple[int, int, int]]) -> tuple[int, int, int, int, int] | None:
    """The first of the (size, width, height) boxes that fits into a region (uint8, 0 at its border), and its place.

    Returns:
        left, top, width, height, size; None if no box fits.
    """
    distance = cv2.distanceTransform(region, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    for size, width, height in boxes:
        if width < region.shape[1] and height < region.shape[0]:
            fits = cv2.erode(region, np.ones((height, width), np.uint8))  # 1 where the box around a pixel is in the region
            if fits.any():
                depth = distance * fits
                deepest = np.argwhere(depth > depth.max() - 1e-3)  # several in a rectangle: use the middle one
                y, x = min(deepest.tolist(), key=lambda place: math.dist(place, deepest.mean(axis=0)))
                return x - width // 2, y - height // 2, width, height, size
    return None


def write_captions(image_rgb: np.ndarray, labels: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """A copy of an image, (H, W, 3) uint8 RGB, with class names in their regions, white with a black outline."""
    sheet = Image.fromarray(image_rgb)
    draw = ImageDraw.Draw(sheet)
    for label, left, top, _, _, size in place_captions(labels, names):
        x, y, *_ = _box(names[label], size)
        place, white, black = (left - x, top - y), (255, 255, 255), (0, 0, 0)
        draw.text(place, names[label], white, font(size), stroke_width=_stroke(size), stroke_fill=black)
    return np.array(sheet)


def _box(text: str, size: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a text with its outline, if drawn at (0, 0)."""
    left, top, right, bottom = map(round, font(size).getbbox(text, stroke_width=_stroke(size)))
    return left, top, right - left, bottom - top


def _stroke(size: int) -> int:
    return max(1, size // 8)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's default font."""
    return ImageFont.load_default(size)
