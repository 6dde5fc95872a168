"""Draws labels: indexed PNGs, overlays on the image, and panels of image, label, prediction and errors."""

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from dataset.classes import IGNORE_LABEL, VOC_NAMES, Color, default_names, voc_palette
from utils.captions import font, write_captions
from utils.files import write_atomically
from utils.outputs import OUTPUT_MARK, marked_jpeg

PALETTE = voc_palette()  # (256, 3) uint8 RGB; the ignore label 255 is a pale yellow
OPACITY = 0.55  # of the class colours in an overlay
WRONG: Color = (255, 0, 60)
GAP = 6  # pixels between the parts of a panel
TILE_SIDES = (160, 1024)  # the longer side of a panel's image: smaller ones are enlarged by an integer, larger ones shrunk
TEXT_SIZE = 13
PAPER, INK, FAINT = (255, 255, 255), (32, 32, 32), (170, 170, 170)


class Classes(NamedTuple):
    """The names and colours of a net's classes.

    Attributes:
        names: one per class.
        palette: (256, 3) uint8 RGB, row = label.
    """

    names: Sequence[str]
    palette: np.ndarray = PALETTE

    @property
    def has_background(self) -> bool:
        """Whether class 0 is named background; overlays leave the image unchanged there."""
        return bool(self.names) and re.fullmatch(r"[\W_]*background[\W_]*(void\))?", self.names[0], re.IGNORECASE) is not None

    @property
    def captions(self) -> dict[int, str]:
        """The names to write into regions, by class index: all except the background."""
        return {label: name for label, name in enumerate(self.names) if label or not self.has_background}


VOC = Classes(VOC_NAMES)


def class_names(num_classes: int, *known: Sequence[str] | None) -> list[str]:
    """The first list of ``known`` that is not empty, else VOC's names for 21 classes, else numbers."""
    return list(next(filter(None, known), default_names(num_classes)))


def make_palette(colors: Mapping[int, Color]) -> np.ndarray:
    """The VOC colour map with ``colors`` in place of some entries: (256, 3) uint8 RGB, row = label."""
    palette = PALETTE.copy()
    for label, color in colors.items():
        palette[label] = color
    return palette


def save_indexed_png(path: str | os.PathLike[str], labels: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Save labels as a palette PNG, the format of the VOC label files: Pillow reads the indices back unchanged.

    The file is written whole or not at all. Missing folders are created.

    Args:
        path: the file, with the suffix .png.
        labels: (H, W) uint8.
        palette: (256, 3) uint8 RGB, row = label.

    Raises:
        ValueError: another suffix, shape or dtype.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: labels are saved as .png only; other formats would change them")
    if palette.shape != (256, 3) or palette.dtype != np.uint8:
        raise ValueError(f"the palette is {palette.dtype} of shape {palette.shape}; expected uint8 of shape (256, 3)")
    data = indexed_png(labels, palette)
    write_atomically(path, lambda file: file.write(data))


def save_prediction(path: Path, labels: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """:func:`save_indexed_png` for a predicted mask, marked as output so that a later run may overwrite it."""
    data = indexed_png(labels, palette, pnginfo=marked_png())
    write_atomically(path, lambda file: file.write(data))


def marked_png() -> PngInfo:
    """The text that marks a PNG as output, so that a later run may overwrite it."""
    info = PngInfo()
    info.add_text("Software", OUTPUT_MARK)
    return info


def indexed_png(labels: np.ndarray, palette: np.ndarray = PALETTE, **options: Any) -> bytes:
    """(H, W) uint8 labels as the bytes of a palette PNG; ``options`` are passed to Pillow's ``save()``."""
    _check_labels(labels, "labels")
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette(palette.tobytes())  # changes the mode from L to P; the indices stay
    image.save(file := io.BytesIO(), format="PNG", **options)
    return file.getvalue()


def blend(image_rgb: np.ndarray, labels: np.ndarray, classes: Classes = VOC, names: bool = False) -> np.ndarray:
    """Overlay the class colours on an image, with outlines in full colour; the background shows the image itself.

    Args:
        image_rgb: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8.
        classes: the colours and names of the classes; class 0 is the background if its name says so.
        names: write the class names into the regions, where they fit.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colors = classes.palette[labels]
    mixed = cv2.addWeighted(image_rgb, 1 - OPACITY, colors, OPACITY, 0)
    edges = outlines(labels)
    mixed[edges] = colors[edges]
    mixed = np.where(labels[:, :, None] == 0, image_rgb, mixed) if classes.has_background else mixed
    return write_captions(mixed, labels, classes.captions) if names else mixed


def outlines(labels: np.ndarray) -> np.ndarray:
    """The pixels with another label directly above, below, left or right of them: (H, W) bool."""
    edges = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges


def wrong_pixels(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The labelled pixels that were predicted as another class: (H, W) bool; ignored pixels are never wrong."""
    return (label != IGNORE_LABEL) & (label != prediction)


def draw_errors(image_rgb: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image in pale grey, wrong pixels in red, ignored ones in the colour of label 255: (H, W, 3) uint8 RGB."""
    grey = cv2.cvtColor(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    tile = cv2.addWeighted(grey, 0.5, np.full_like(grey, 255), 0.35, 0)
    for pixels, color in ((label == IGNORE_LABEL, PALETTE[IGNORE_LABEL]), (wrong_pixels(label, prediction), np.array(WRONG))):
        tile[pixels] = (tile[pixels] * 0.2 + color * 0.8).astype(np.uint8)
    return tile


def panel(
    image_rgb: np.ndarray, label: np.ndarray | None, prediction: np.ndarray, classes: Classes, names: bool = False
) -> np.ndarray:
    """Image | label | prediction | errors, or image | prediction without a label, with a legend below.

    Args:
        image_rgb: (H, W, 3) uint8 RGB. Small images are enlarged, large ones shrunk (``TILE_SIDES``).
        label: (H, W) uint8, 255 for ignored pixels, or None.
        prediction: (H, W) uint8.
        classes: the names and colours of the classes; the legend shows those that occur.
        names: see :func:`blend`.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: wrong shape or dtype, or sizes that differ.
    """
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.size == 0 or image_rgb.dtype != np.uint8:
        raise ValueError(f"the image is {image_rgb.dtype} of shape {image_rgb.shape}; expected uint8 of shape (H, W, 3)")
    shown = {"prediction": prediction} if label is None else {"label": label, "prediction": prediction}
    for name, labels in shown.items():
        _check_labels(labels, name)
        if labels.shape != image_rgb.shape[:2]:
            raise ValueError(
                f"the {name} is {labels.shape[0]}x{labels.shape[1]} and the image {image_rgb.shape[0]}x{image_rgb.shape[1]} "
                "(height x width); expected the same size"
            )
    present = sorted({value for labels in shown.values() for value in np.unique(labels).tolist()})
    factor = tile_factor(image_rgb.shape[:2])
    image_rgb = scale(image_rgb, factor)
    tiles = {"image": image_rgb}
    tiles |= {name: blend(image_rgb, scale(labels, factor), classes, names) for name, labels in shown.items()}
    if label is not None:
        counted = max(int((label != IGNORE_LABEL).sum()), 1)
        share = int(wrong_pixels(label, prediction).sum()) / counted
        tiles[f"errors {100 * share:.1f} %"] = draw_errors(image_rgb, scale(label, factor), scale(prediction, factor))
    rows = [_side_by_side(tiles), _legend(present, classes, len(tiles) * (image_rgb.shape[1] + GAP) - GAP)]
    return np.concatenate(rows)


def tile_factor(size: Sequence[int]) -> float:
    """The scale of an image of ``size`` (H, W) in a panel; an integer if above 1."""
    smallest, largest = TILE_SIDES
    return largest / max(size) if max(size) > largest else float(max(1, smallest // max(size)))


def scale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Resize an image, (H, W, 3), or labels, (H, W); labels by nearest neighbour."""
    if factor == 1:
        return pixels
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    exact = pixels.ndim == 2 or factor > 1
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT if exact else cv2.INTER_AREA)


def save_panel(
    path: str | os.PathLike[str],
    image_rgb: np.ndarray,
    label: np.ndarray | None,
    prediction: np.ndarray,
    classes: Classes,
    names: bool = False,
) -> None:
    """Save :func:`panel` as .png or .jpg/.jpeg, whole or not at all. Missing folders are created.

    Raises:
        ValueError: another suffix, or as in :func:`panel`.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{path}: a panel is saved as .png, .jpg or .jpeg")
    save_image(path, panel(image_rgb, label, prediction, classes, names))


def save_image(path: Path, image_rgb: np.ndarray) -> None:
    """Save (H, W, 3) uint8 RGB as PNG or JPEG, by the suffix, whole or not at all. Missing folders are created."""
    png = path.suffix.lower() == ".png"
    options: dict[str, Any] = {"format": "PNG", "pnginfo": marked_png()} if png else {"format": "JPEG", "quality": 95}
    Image.fromarray(image_rgb).save(buffer := io.BytesIO(), subsampling=0, **options)
    data = buffer.getvalue() if png else marked_jpeg(buffer.getvalue())
    write_atomically(path, lambda file: file.write(data))


def _side_by_side(tiles: Mapping[str, np.ndarray]) -> np.ndarray:
    """Images of one size side by side, with their names above."""
    height, width = next(iter(tiles.values())).shape[:2]
    head = TEXT_SIZE + 5
    sheet = Image.new("RGB", (len(tiles) * (width + GAP) - GAP, head + height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (name, tile) in enumerate(tiles.items()):
        left = number * (width + GAP)
        draw.text((left + 1, 1), _fitting(name, width, draw), INK, font(TEXT_SIZE))
        draw.rectangle((left + width, 0, left + width + GAP, head), PAPER)
        sheet.paste(Image.fromarray(tile), (left, head))
    return np.asarray(sheet)


def _legend(present: Sequence[int], classes: Classes, width: int) -> np.ndarray:
    """A strip with a patch of colour and the name of each label in ``present``, wrapped at ``width`` pixels."""
    line = TEXT_SIZE + 8
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    entries, x, y = [], GAP, 0
    for label in present:
        name = "ignored" if label == IGNORE_LABEL else f"{label} {classes.names[label]}"
        name = _fitting(name, width - TEXT_SIZE - 2 * GAP, draw)
        length = TEXT_SIZE + GAP + int(draw.textlength(name, font(TEXT_SIZE))) + 2 * GAP
        if x > GAP and x + length > width:
            x, y = GAP, y + line
        entries.append((x, y, label, name))
        x += length
    sheet = Image.new("RGB", (width, y + line + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, y, label, name in entries:
        top = y + GAP
        color = tuple(classes.palette[label].tolist())
        draw.rectangle((x, top, x + TEXT_SIZE, top + TEXT_SIZE), color, outline=FAINT)
        draw.text((x + TEXT_SIZE + GAP, top - 1), name, INK, font(TEXT_SIZE))
    return np.asarray(sheet)


def _fitting(text: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """``text``, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if draw.textlength(text, font(TEXT_SIZE)) <= width:
        return text
    while text and draw.textlength(text + "…", font(TEXT_SIZE)) > width:
        text = text[:-1]
    return text + "…" if text else ""


def _check_labels(labels: np.ndarray, name: str) -> None:
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.size == 0 or labels.dtype != np.uint8:
        found = f"{labels.dtype} of shape {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"the {name} to draw is {found}; expected a numpy array, uint8 of shape (H, W)")
