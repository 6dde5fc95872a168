"""Inspection of the two files of one id, with the warnings of the decoders."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.classes import IGNORE_LABEL, Color, voc_palette
from dataset.images import DatasetError, read_with_orientation
from dataset.labels import BadLabel, check_palette, check_values, read_png, single_channel, whole_table
from dataset.voc import check_pair
from scripts.data.causes import few

MOST = 256  # colours kept per label; a mask has fewer, a photograph more


@dataclass
class Inspection:
    """The findings about the two files of one id."""

    image_id: str
    image_path: Path
    label_path: Path
    problems: list[tuple[str, str]] = field(default_factory=list)  # (kind, finding)
    size: tuple[int, int] | None = None  # width, height of the image
    brightest: int = 255  # value of the image that a thousandth of its values exceed
    digest: bytes = b""  # of the image file, if asked for
    counts: np.ndarray | None = None  # (256,) pixels per value of a single-channel label
    palette: dict[int, Color] = field(default_factory=dict)  # the colours of the indices that occur
    colours: str = ""  # kind of a colour label: "table", "grey" or "other"
    drawn: dict[Color, int] = field(default_factory=dict)  # pixels per colour of a colour label; the MOST commonest


@contextmanager
def complaints() -> Iterator[list[str]]:
    """A context that collects libjpeg's warnings about damaged data, which it can only print to file descriptor 2."""
    lines: list[str] = []
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield lines
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            lines += [line for line in text.splitlines() if line.startswith(("Corrupt JPEG data", "Premature end of JPEG"))]


def inspect(
    image_id: str,
    image_path: Path,
    label_path: Path,
    num_classes: int,
    ignore_label: int,
    colors: Mapping[int, Color],
    classes_of: np.ndarray | None = None,
    with_digest: bool = False,
) -> Inspection:
    """Read the two files of one id as training does; runs in the worker processes."""
    found = Inspection(image_id, image_path, label_path)
    shape = inspect_image(found, image_path)
    if shape and with_digest:
        found.digest = hashlib.blake2b(image_path.read_bytes(), digest_size=16).digest()
    label = inspect_label(found, label_path, num_classes, ignore_label, colors, classes_of)
    if shape and label:
        size, orientation = shape
        try:
            check_pair(image_path, size, orientation, label_path, label)
        except DatasetError as error:
            found.problems.append(("other size" if size != label else "EXIF orientation", str(error)))
    return found


def inspect_image(found: Inspection, path: Path) -> tuple[tuple[int, int], int] | None:
    """Record what is wrong with an image; returns its (H, W) and EXIF orientation, None if it cannot be read."""
    if not path.exists():
        found.problems.append(("missing picture", str(path)))
        return None
    try:
        with complaints() as lines:
            image, orientation = read_with_orientation(path)
    except DatasetError as error:
        found.problems.append(("unreadable picture", str(error)))
        return None
    found.problems += [("damaged picture", f"{path}: {line}") for line in lines[:1]]
    height, width = image.shape[:2]
    darker = np.bincount(image.ravel(), minlength=256).cumsum()
    found.size, found.brightest = (width, height), int(np.searchsorted(darker, 0.999 * image.size))
    return (height, width), orientation


def inspect_label(
    found: Inspection,
    path: Path,
    num_classes: int,
    ignore_label: int,
    colors: Mapping[int, Color],
    classes_of: np.ndarray | None,
) -> tuple[int, int] | None:
    """Record what is wrong with a label; returns its (H, W), None if it cannot be read."""
    if not path.exists():
        found.problems.append(("missing label", str(path)))
        return None
    kind, size = "unreadable label", None
    try:
        pixels, palette, mode = read_png(path.read_bytes())
        size = pixels.shape[0], pixels.shape[1]
        if mode in ("RGB", "RGBA"):
            drawn = _count_colors(pixels[..., :3])
            voc = {tuple(color) for color in voc_palette()[[*range(num_classes), IGNORE_LABEL]].tolist()}
            grey = all(len(set(color)) == 1 for color in drawn)
            found.colours = "table" if drawn.keys() <= (set(colors.values()) or voc) else "grey" if grey else "other"
            found.drawn = dict(list(drawn.items())[:MOST])
            found.problems.append(("colour label", f"{found.image_id}: mode {mode}, {len(drawn)} colours {few(drawn)}"))
            return size
        single_channel(pixels, mode)
        counts = np.bincount(pixels.ravel(), minlength=256)
        present = np.flatnonzero(counts).tolist()
        kind = "wrong values"
        if classes_of is not None:
            check_values(present, len(classes_of), what="label ids")
            found.counts = np.bincount(whole_table(classes_of), counts, minlength=256).astype(np.int64)
            return size
        found.counts = counts
        check_values(present, num_classes, ignore_label)
        kind = "re-ordered palette"
        check_palette(present, palette, colors, ignore_label)
        found.palette = {i: tuple(palette[i].tolist()) for i in present if i < len(palette)}
    except BadLabel as error:
        found.problems.append((kind, f"the label {path} {error}"))
        if kind == "re-ordered palette":
            found.counts = None  # these values are not classes
    except OSError as error:
        found.problems.append((kind, f"the label {path} cannot be read ({error.strerror or error})"))
    return size


def _count_colors(pixels: np.ndarray) -> dict[Color, int]:
    """Pixels per colour of an (H, W, 3) uint8 RGB image, the commonest first."""
    codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    found, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {(c >> 16, c >> 8 & 255, c & 255): n for c, n in zip(found[order].tolist(), counts[order].tolist())}
