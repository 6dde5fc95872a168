"""Reading label masks: a wrong file raises an error and never gives wrong labels."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from dataset.classes import IGNORE_LABEL, TO_INDICES, Color, voc_colors
from dataset.images import LARGEST, PNG_SIGNATURE, DatasetError, png_damage, read_bytes

_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


class BadLabel(ValueError):
    """A label is wrong; the message continues after the file name: "is a JPEG file, ..."."""


def read_label(
    path: str | Path,
    num_classes: int,
    ignore_label: int = IGNORE_LABEL,
    colors: Mapping[int, Color] | None = None,
    classes_of: np.ndarray | None = None,
) -> np.ndarray:
    """A label mask as (H, W) uint8 class indices, with every ignored pixel as 255.

    Args:
        path: a PNG of one channel and at most 8 bits: a palette, whose indices are the classes, or grey.
        num_classes: values 0..num_classes-1 are classes.
        ignore_label: a value that is ignored, besides 255.
        colors: the colours of the classes, to detect a re-ordered palette; None means VOC's for 21 classes, else none.
        classes_of: (n,) uint8, the classes of the values 0..n-1 if the values are not the classes, 255 for ignored; the
            palette is then not checked.

    Raises:
        DatasetError: a missing, damaged or lossy file, a colour or 16-bit image, a re-ordered palette, or a value that is
            neither a class nor ignored.
    """
    data = read_bytes(path, "the label")
    try:
        label, palette = decode_label(data)
        present = np.flatnonzero(cv2.calcHist([label], [0], None, [256], [0, 256])).tolist()  # faster than np.unique
        if classes_of is None:
            check_values(present, num_classes, ignore_label)
            check_palette(present, palette, voc_colors(num_classes) if colors is None else colors, ignore_label)
        else:
            check_values(present, len(classes_of), what="label ids")
            label = cv2.LUT(label, whole_table(classes_of))
    except BadLabel as error:
        raise DatasetError(f"the label {path} {error}") from None
    if ignore_label != IGNORE_LABEL:
        label[label == ignore_label] = IGNORE_LABEL
    return label


def whole_table(classes_of: np.ndarray) -> np.ndarray:
    """``classes_of`` extended to all 256 values, (256,) uint8: 255 for the others."""
    return np.pad(classes_of, (0, 256 - len(classes_of)), constant_values=IGNORE_LABEL)


def decode_label(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The values of a one-channel PNG as stored, (H, W) uint8, and its palette, (n, 3) uint8 RGB, n = 0 for grey.

    Raises:
        BadLabel: see :func:`read_png`; a colour or 16-bit image.
    """
    pixels, palette, mode = read_png(data)
    single_channel(pixels, mode)
    return pixels, palette


def single_channel(pixels: np.ndarray, mode: str) -> None:
    """BadLabel if pixels of :func:`read_png` cannot be class indices: colours, or more than 8 bits."""
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        advice = f"; {TO_INDICES} converts colours to indices" if mode in ("RGB", "RGBA") else ""
        advice = f"; {TO_INDICES} saves 16 bits as 8 if the values fit" if pixels.ndim == 2 else advice
        raise BadLabel(
            f"has Pillow mode {mode} with shape {pixels.shape} and type {pixels.dtype}; "
            f"expected a single-channel 8-bit PNG of class indices (mode P or L){advice}"
        )


def read_png(data: bytes) -> tuple[np.ndarray, np.ndarray, str]:
    """The pixels of a PNG as stored, its palette and its mode in Pillow's terms.

    Every checksum is verified first, and the pixels are counted. OpenCV would convert a palette to grey levels. Pillow
    stretches grey of 1, 2 and 4 bits to 0..255, which is undone here.

    Returns:
        (H, W) uint8 for palette and grey files of at most 8 bits, (H, W) of a wider type for grey of 16 bits, else (H, W, 2..4)
        uint8; the palette as (n, 3) uint8 RGB, n = 0 if there is none; the mode.

    Raises:
        BadLabel: the file is no PNG, is damaged, or has more than 2^30 pixels.
    """
    if not data.startswith(PNG_SIGNATURE):
        raise BadLabel(_other_format(data))
    if damage := png_damage(data, inflate=True):
        raise BadLabel(f"is damaged: {damage}; fetch or make it again")
    try:
        # Not Image.open, which refuses large images: a label may be as large as an image that OpenCV reads.
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST:
                raise BadLabel(f"is {image.width}x{image.height} pixels; expected at most {LARGEST} of them")
            palette = np.array((image.getpalette() or []) if image.mode == "P" else [], dtype=np.uint8).reshape(-1, 3)
            pixels = np.array(image)
    except BadLabel:
        raise
    except Exception as error:  # depending on the damage, Pillow raises OSError, SyntaxError, ValueError and others
        raise BadLabel(f"cannot be decoded ({error}); it is damaged: fetch or make it again") from None
    if image.mode == "1":
        pixels = pixels.astype(np.uint8)
    elif image.mode == "L" and (bits := data[24]) < 8:  # bits per value (PNG specification, IHDR)
        pixels //= 255 // (2**bits - 1)
    return pixels, palette, image.mode


def _other_format(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            name = image.format or ""
    except Exception:
        return f"cannot be decoded (its {len(data)} bytes are no PNG); expected a PNG of class indices"
    if name in _LOSSY:
        return f"is a {name} file despite its name, and that format changes labels; make a PNG from the original instead"
    return f"is a {name} file despite its name; expected a PNG of class indices"


def check_values(
    present: Sequence[int], num_classes: int, ignore_label: int = IGNORE_LABEL, what: str = "class indices"
) -> None:
    """BadLabel if values ``present`` in a label are neither a class nor ignored."""
    if wrong := [value for value in present if value >= num_classes and value not in (ignore_label, IGNORE_LABEL)]:
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        raise BadLabel(
            f"holds the value{'s' * (len(wrong) > 1)} {shown}; expected {what} 0..{num_classes - 1}; {IGNORE_LABEL} is ignored"
        )


def check_palette(
    present: Sequence[int], palette: np.ndarray, colors: Mapping[int, Color], ignore_label: int = IGNORE_LABEL
) -> None:
    """Refuse a palette that a tool has re-ordered (ImageMagick, pngquant and others do, on any crop, resize or strip).

    Its colours are those of the classes, but at other indices. A palette of other colours is not checked.

    Args:
        present: the indices that occur in the label, ascending.
        palette: (n, 3) uint8 RGB.
        colors: RGB of class indices and of the ignore label.

    Raises:
        BadLabel: at least two indices occur, each has a colour of the table, and one has the colour of another index.
    """
    if not colors or len(present) < 2 or present[-1] >= len(palette):
        return
    found = {index: tuple(palette[index].tolist()) for index in present}
    home = {color: index for index, color in colors.items()}
    moved = [
        (index, home[color])
        for index, color in found.items()
        if color in home and colors.get(index) != color and (index, color) != (ignore_label, colors.get(IGNORE_LABEL))
    ]
    # Two indices of one colour: the palette was never filled in. Tools keep one index per colour.
    if moved and set(found.values()) <= home.keys() and len(set(found.values())) == len(found):
        shown = ", ".join(f"{index} has the colour of {right}" for index, right in moved[:5])
        raise BadLabel(
            f"has a palette that a tool re-ordered: index {shown}; the indices are no longer the classes: "
            f"map the colours back with `python {TO_INDICES} FOLDER NEW_FOLDER`"
        )
