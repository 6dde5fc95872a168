"""Which class has which colour, as the tools that people label with say it, and masks of colours as class indices."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.classes import IGNORE_LABEL, VOC_CLASSES, Color, is_voc, read_classes, voc_palette
from dataset.labels import BadLabel, check_values, decode_label, read_png
from dataset.lists import read_lines
from utils.command import UserError

TABLES = ("classes.txt", "labelmap.txt", "class_names.txt")


class Table(NamedTuple):
    """The classes of a set of masks, in the order of their indices.

    Attributes:
        rows: names and colours; a colour is None where nobody gives it.
        origin: who says so, for messages.
    """

    rows: list[tuple[str, Color | None]]
    origin: str

    def colors(self) -> dict[Color, int]:
        """Colour -> index; UserError where two classes have one colour."""
        found: dict[Color, int] = {}
        for index, (name, color) in enumerate(self.rows):
            if color is not None and (first := found.setdefault(color, index)) != index:
                both = f"{self.rows[first][0]} and {name}"
                raise UserError(f"{self.origin} gives {both} one colour, {color}; expected a colour for each class")
        return found


VOC = Table([(row.name, row.color) for row in VOC_CLASSES], "PASCAL VOC")
_CVAT = re.compile(r"(.+?):(?:(\d+),\s*(\d+),\s*(\d+))?:[^:]*(?::[^:]*)?", re.ASCII)


def find_table(folders: Sequence[Path], given: Path | None) -> Table | None:
    """The classes that ``given`` names, else the first of TABLES in ``folders``; None where there is none."""
    places = (folder / name for folder in folders for name in TABLES)
    path = given or next((path for path in places if path.is_file()), None)
    if path is None:
        return None
    rows = read_table(path)
    if not 1 <= len(rows) <= IGNORE_LABEL:
        raise UserError(f"{path} names {len(rows)} classes; expected at most {IGNORE_LABEL}: that label means void")
    if not any(color for _, color in rows) and is_voc([name for name, _ in rows]):
        rows = VOC.rows
    return Table(rows, str(path))


def read_table(path: Path) -> list[tuple[str, Color | None]]:
    """Names and colours of a file of classes, told by what it holds.

    CVAT's ``labelmap.txt`` (``name:r,g,b:parts:actions`` a line), labelme's ``class_names.txt`` or ``labels.txt`` (a name a
    line, ``__ignore__`` first, which is no class; the colours are those of the VOC colour map), or our ``classes.txt``.

    Raises:
        DatasetError: the file cannot be read.
    """
    lines = [line for line in read_lines(path, "the file of classes") if line and not line.startswith("#")]
    cvat = [_CVAT.fullmatch(line) for line in lines]
    if lines and all(cvat):
        rows = [found.groups() for found in cvat if found]
        return [(name, (int(r), int(g), int(b)) if r else None) for name, r, g, b in rows]
    if path.name == "class_names.txt" or lines[:1] == ["__ignore__"]:
        names = [line for line in lines if line != "__ignore__"]
        return [(name, (red, green, blue)) for name, (red, green, blue) in zip(names, voc_palette().tolist())]
    return read_classes(path)


def read_labels(data: bytes, table: Mapping[Color, int], num_classes: int) -> np.ndarray:
    """The labels of a PNG by the colours that its pixels are shown in, (H, W) uint8; see :func:`to_indices`.

    Args:
        table: label of each colour; {} takes the values as they are stored.
        num_classes: labels 0..num_classes-1 are classes.

    Raises:
        BadLabel: no PNG, a damaged one, colours of no class, half transparent pixels, an index without a colour, or grey values
            that can be read as colours and as class indices.
    """
    if not table:
        values = decode_label(data)[0]
        check_values(np.unique(values).tolist(), num_classes)
        return values
    pixels, palette, mode = read_png(data)
    if mode == "P":
        if pixels.max() >= len(palette):
            raise BadLabel(f"holds the index {pixels.max()}, and its palette has {len(palette)} colours")
        return to_indices(palette[pixels], table)
    if pixels.dtype != np.uint8:
        raise BadLabel("is grey of 16 bits; expected colours")
    if mode in ("LA", "RGBA") and (half := int(((pixels[..., -1] > 0) & (pixels[..., -1] < 255)).sum())):
        raise BadLabel(f"holds {half} half transparent pixels; expected whole colours")
    if mode in ("RGB", "RGBA"):
        return to_indices(pixels[..., :3], table)
    values = pixels[..., 0] if mode == "LA" else pixels
    stretch = 255 // (2 ** min(data[24], 8) - 1)  # grey of fewer than 8 bits is shown from black to white, too
    # Black and white alone are a binary mask where white is the colour of a class: class 0 and void would tell nothing apart.
    binary = (255, 255, 255) in table and bool(((values == 0) | (values == 255)).all())
    indices = bool(((values < num_classes) | (values == IGNORE_LABEL)).all()) and not binary
    try:
        labels = to_indices(np.repeat((values * stretch)[..., None], 3, axis=2), table)
    except BadLabel:
        if indices:
            return values
        raise
    if indices and not np.array_equal(labels, values):
        raise BadLabel(
            "is grey, and its values are colours of classes as well as class indices; save it as RGB if they are colours"
        )
    return labels


def to_indices(colors: np.ndarray, table: Mapping[Color, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8 labels; BadLabel where a colour is not in the table, with its number of pixels."""
    codes = colors.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    keys, labels = zip(*sorted((red * 65536 + green * 256 + blue, label) for (red, green, blue), label in table.items()))
    places = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    known = np.array(keys, dtype=np.uint32)[places] == codes
    if not known.all():
        unknown, counts = np.unique(codes[~known], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:8]
        shown = [f"({c >> 16}, {c >> 8 & 255}, {c & 255}) on {n} pixels" for c, n in zip(unknown[order], counts[order])]
        hint = "; colours between those of the classes come from resizing or from JPEG" if len(unknown) > 8 else ""
        raise BadLabel(f"holds {len(unknown)} colours of no class: {', '.join(shown)}{', ...' * (len(unknown) > 8)}{hint}")
    return np.array(labels, dtype=np.uint8)[places]
