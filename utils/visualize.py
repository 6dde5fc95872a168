"""Labels as pictures: indexed PNGs, colours laid over a picture, and panels of picture, label, prediction and errors."""

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

PALETTE = voc_palette()  # (256, 3) uint8 RGB; the void label 255 is a pale yellow
OPACITY = 0.55  # of a colour that is laid over a picture
WRONG: Color = (255, 0, 60)
GAP = 6  # pixels between the tiles of a panel
TILE_SIDES = (160, 1024)  # of a panel: smaller pictures are enlarged by a whole number, larger ones shrunk
TEXT_SIZE = 13
PAPER, INK, FAINT = (255, 255, 255), (32, 32, 32), (170, 170, 170)


class Classes(NamedTuple):
    """How the classes of a net are called and drawn.

    Attributes:
        names: one a class.
        palette: (256, 3) uint8 RGB, row = label.
    """

    names: Sequence[str]
    palette: np.ndarray = PALETTE

    @property
    def has_background(self) -> bool:
        """Whether class 0 is called background: an image stays as it is there."""
        return bool(self.names) and re.fullmatch(r"[\W_]*background[\W_]*(void\))?", self.names[0], re.IGNORECASE) is not None

    @property
    def captions(self) -> dict[int, str]:
        """The names that are written into regions, by class index: those of all classes but the background."""
        return {label: name for label, name in enumerate(self.names) if label or not self.has_background}


VOC = Classes(VOC_NAMES)


def class_names(num_classes: int, *known: Sequence[str] | None) -> list[str]:
    """The first of the lists of names that is one, else VOC's names for 21 classes, else numbers."""
    return list(next(filter(None, known), default_names(num_classes)))


def make_palette(colors: Mapping[int, Color]) -> np.ndarray:
    """The VOC colour map with other colours for some labels: (256, 3) uint8 RGB, row = label."""
    palette = PALETTE.copy()
    for label, color in colors.items():
        palette[label] = color
    return palette


def save_indexed_png(path: str | os.PathLike[str], labels: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Save labels as a palette PNG, the format of the VOC label files: Pillow reads the indices back unchanged.

    The file is written whole or not at all. Missing folders are made.

    Args:
        path: the file, ending in .png.
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
    """:func:`save_indexed_png` for a mask that a net made: with a mark, by which a later run knows what it may write over."""
    data = indexed_png(labels, palette, pnginfo=marked_png())
    write_atomically(path, lambda file: file.write(data))


def marked_png() -> PngInfo:
    """The text in a PNG by which a later run knows what it may write over."""
    info = PngInfo()
    info.add_text("Software", OUTPUT_MARK)
    return info


def indexed_png(labels: np.ndarray, palette: np.ndarray = PALETTE, **options: Any) -> bytes:
    """(H, W) uint8 labels as the bytes of a palette PNG; ``options`` are those of Pillow's ``save()``."""
    _check_labels(labels, "labels")
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette(palette.tobytes())  # turns the mode from L to P; the indices stay
    image.save(file := io.BytesIO(), format="PNG", **options)
    return file.getvalue()


def blend(image_rgb: np.ndarray, labels: np.ndarray, classes: Classes = VOC, names: bool = False) -> np.ndarray:
    """The colours of the classes laid over an image, their outlines in full colour; the background shows the image itself.

    Args:
        image_rgb: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8.
        classes: their colours and names; class 0 is the background if it is called that.
        names: write the names into the regions where they fit.

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
    """The pixels beside which, above, below, left or right, another label begins: (H, W) bool."""
    edges = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges


def wrong_pixels(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Where a labelled pixel was predicted as another class: (H, W) bool; void is never wrong."""
    return (label != IGNORE_LABEL) & (label != prediction)


def draw_errors(image_rgb: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The picture in pale grey, wrong pixels in red, void ones in its colour: (H, W, 3) uint8 RGB."""
    grey = cv2.cvtColor(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    tile = cv2.addWeighted(grey, 0.5, np.full_like(grey, 255), 0.35, 0)
    for pixels, color in ((label == IGNORE_LABEL, PALETTE[IGNORE_LABEL]), (wrong_pixels(label, prediction), np.array(WRONG))):
        tile[pixels] = (tile[pixels] * 0.2 + color * 0.8).astype(np.uint8)
    return tile


def panel(
    image_rgb: np.ndarray, label: np.ndarray | None, prediction: np.ndarray, classes: Classes, names: bool = False
) -> np.ndarray:
    """Picture | label | prediction | errors, or picture | prediction where there is no label, with a legend below.

    Args:
        image_rgb: (H, W, 3) uint8 RGB. Small pictures are enlarged, large ones shrunk (``TILE_SIDES``).
        label: (H, W) uint8, 255 for void, or None.
        prediction: (H, W) uint8.
        classes: their names and colours; those that occur stand in the legend.
        names: see :func:`blend`.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: another shape or dtype, sizes that differ.
    """
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.size == 0 or image_rgb.dtype != np.uint8:
        raise ValueError(f"the picture is {image_rgb.dtype} of shape {image_rgb.shape}; expected uint8 of shape (H, W, 3)")
    shown = {"prediction": prediction} if label is None else {"label": label, "prediction": prediction}
    for name, labels in shown.items():
        _check_labels(labels, name)
        if labels.shape != image_rgb.shape[:2]:
            raise ValueError(
                f"the {name} is {labels.shape[0]}x{labels.shape[1]} and the picture {image_rgb.shape[0]}x{image_rgb.shape[1]} "
                "(height x width); expected one size"
            )
    present = sorted({value for labels in shown.values() for value in np.unique(labels).tolist()})
    factor = tile_factor(image_rgb.shape[:2])
    image_rgb = scale(image_rgb, factor)
    tiles = {"picture": image_rgb}
    tiles |= {name: blend(image_rgb, scale(labels, factor), classes, names) for name, labels in shown.items()}
    if label is not None:
        counted = max(int((label != IGNORE_LABEL).sum()), 1)
        share = int(wrong_pixels(label, prediction).sum()) / counted
        tiles[f"errors {100 * share:.1f} %"] = draw_errors(image_rgb, scale(label, factor), scale(prediction, factor))
    rows = [_side_by_side(tiles), _legend(present, classes, len(tiles) * (image_rgb.shape[1] + GAP) - GAP)]
    return np.concatenate(rows)


def tile_factor(size: Sequence[int]) -> float:
    """By what a picture of ``size`` (H, W) is scaled for a panel: a whole number where it is enlarged."""
    smallest, largest = TILE_SIDES
    return largest / max(size) if max(size) > largest else float(max(1, smallest // max(size)))


def scale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """A picture (H, W, 3), or labels (H, W), whose classes stay what they are, at another size."""
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
    """Save :func:`panel` as .png or .jpg/.jpeg, whole or not at all. Missing folders are made.

    Raises:
        ValueError: another suffix, or see :func:`panel`.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{path}: a panel is saved as .png, .jpg or .jpeg")
    save_image(path, panel(image_rgb, label, prediction, classes, names))


def save_image(path: Path, image_rgb: np.ndarray) -> None:
    """Save (H, W, 3) uint8 RGB as PNG or JPEG, by the suffix, whole or not at all. Missing folders are made."""
    png = path.suffix.lower() == ".png"
    options: dict[str, Any] = {"format": "PNG", "pnginfo": marked_png()} if png else {"format": "JPEG", "quality": 95}
    Image.fromarray(image_rgb).save(picture := io.BytesIO(), subsampling=0, **options)
    data = picture.getvalue() if png else marked_jpeg(picture.getvalue())
    write_atomically(path, lambda file: file.write(data))


def _side_by_side(tiles: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tiles of one size with their names above."""
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
    """A strip with a patch and the name of each label in ``present``, in as many lines as ``width`` asks for."""
    line = TEXT_SIZE + 8
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    entries, x, y = [], GAP, 0
    for label in present:
        name = "void" if label == IGNORE_LABEL else f"{label} {classes.names[label]}"
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
    """``text``, cut off with dots where it is longer than ``width`` pixels."""
    if draw.textlength(text, font(TEXT_SIZE)) <= width:
        return text
    while text and draw.textlength(text + "…", font(TEXT_SIZE)) > width:
        text = text[:-1]
    return text + "…" if text else ""


def _check_labels(labels: np.ndarray, name: str) -> None:
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.size == 0 or labels.dtype != np.uint8:
        found = f"{labels.dtype} of shape {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"the {name} to draw is {found}; expected a numpy array, uint8 of shape (H, W)")
