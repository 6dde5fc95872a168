"""Labels as pictures: indexed PNGs, colour masks, and panels of picture, label and prediction side by side."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.classes import voc_palette
from utils.files import write_atomically

PALETTE = voc_palette()  # (256, 3) uint8 RGB; the void label 255 is a pale yellow
GAP = 4  # pixels between the tiles of a panel
GAP_COLOR = 255


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
    _check_labels(labels, "labels")
    if palette.shape != (256, 3) or palette.dtype != np.uint8:
        raise ValueError(f"the palette is {palette.dtype} of shape {palette.shape}; expected uint8 of shape (256, 3)")
    picture = Image.fromarray(np.ascontiguousarray(labels))
    picture.putpalette(palette.tobytes())  # turns the mode from L to P; the indices stay
    _save(picture, path)


def color_mask(labels: np.ndarray) -> np.ndarray:
    """(H, W) uint8 labels -> (H, W, 3) uint8 RGB in the colours of the VOC palette.

    Raises:
        ValueError: another shape or dtype.
    """
    _check_labels(labels, "labels")
    return PALETTE[labels]


def panel(image_rgb: np.ndarray, label: np.ndarray | None, prediction: np.ndarray) -> np.ndarray:
    """Picture | label | prediction side by side, or picture | prediction where there is no label.

    Args:
        image_rgb: (H, W, 3) uint8 RGB.
        label: (H, W) uint8, 255 for void, or None.
        prediction: (H, W) uint8.

    Returns:
        (H, 3 W + 2 GAP, 3) or (H, 2 W + GAP, 3) uint8 RGB; the tiles are separated by GAP white columns.

    Raises:
        ValueError: another shape or dtype, sizes that differ.
    """
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.size == 0 or image_rgb.dtype != np.uint8:
        raise ValueError(f"the picture is {image_rgb.dtype} of shape {image_rgb.shape}; expected uint8 of shape (H, W, 3)")
    height, width = image_rgb.shape[:2]
    tiles = [image_rgb]
    shown = {"prediction": prediction} if label is None else {"label": label, "prediction": prediction}
    for name, labels in shown.items():
        _check_labels(labels, name)
        if labels.shape != (height, width):
            raise ValueError(
                f"the {name} is {labels.shape[0]}x{labels.shape[1]} and the picture {height}x{width} (height x width); "
                "expected one size"
            )
        tiles += [np.full((height, GAP, 3), GAP_COLOR, dtype=np.uint8), color_mask(labels)]
    return np.concatenate(tiles, axis=1)


def save_panel(path: str | os.PathLike[str], image_rgb: np.ndarray, label: np.ndarray | None, prediction: np.ndarray) -> None:
    """Save :func:`panel` as .png or .jpg/.jpeg, whole or not at all. Missing folders are made.

    Raises:
        ValueError: another suffix, or see :func:`panel`.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{path}: a panel is saved as .png, .jpg or .jpeg")
    _save(Image.fromarray(panel(image_rgb, label, prediction)), path)


def _check_labels(labels: np.ndarray, name: str) -> None:
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.size == 0 or labels.dtype != np.uint8:
        found = f"{labels.dtype} of shape {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"the {name} to draw is {found}; expected a numpy array, uint8 of shape (H, W)")


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG or JPEG, by its suffix."""
    options = {"format": "PNG"} if path.suffix.lower() == ".png" else {"format": "JPEG", "quality": 95, "subsampling": 0}
    write_atomically(path, lambda file: picture.save(file, **options))
