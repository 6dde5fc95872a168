"""Conversion of masks to class indices one by one, and the checks over all of them."""

import filecmp
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import DatasetError, read_image
from dataset.classes import IGNORE_LABEL, Color
from dataset.labels import BadLabel, decode_label
from scripts.data.colours import NO_COLORS, PHOTO, Labels, is_reordered, join_layers, read_labels
from scripts.data.polygons import Region
from scripts.data.tables import Table
from utils.command import UserError
from utils.files import write_atomically
from utils.visualize import save_indexed_png

SHOWN = 50  # files per message


class Options(NamedTuple):
    """How masks become labels, for all masks.

    Attributes:
        colors: label of each colour; {} keeps values as stored.
        num_classes: number of classes among the values.
        guessed: see :func:`scripts.data.colours.read_labels`.
        zero_is_void: 0 becomes 255 (ignored), 1.. become 0...
        palette: (256, 3) uint8 RGB of the written PNGs.
        classes: class of each label, if each has its own masks.
        rest: class of pixels without any of these labels.
    """

    colors: Mapping[Color, int]
    num_classes: int
    guessed: bool
    zero_is_void: bool
    palette: np.ndarray
    classes: Mapping[str, int] = {}
    rest: int = 0


class Outcome(NamedTuple):
    """The result for one mask: ``problem`` is "" if it is fine; ``there`` means that it had been written before."""

    path: Path
    problem: str = ""
    there: bool = False
    source: str = ""
    values: tuple[int, ...] = ()
    palette: Mapping[int, Color] = {}


def convert(
    mask: Path,
    layers: Sequence[tuple[str, Path | Region]],
    target: Path,
    image: tuple[Path, Path] | None,
    options: Options,
    write: bool,
) -> Outcome:
    """Read and check one mask, or its layers; if ``write``, write its indices and copy its image.

    Runs in the worker processes.
    """
    try:
        if layers:
            read = [
                (options.classes[label], layer.read_bytes() if isinstance(layer, Path) else layer) for label, layer in layers
            ]
            found = Labels(join_layers(read, options.rest), "layers")
        else:
            found = read_labels(mask.read_bytes(), options.colors, options.num_classes, options.guessed)
    except (BadLabel, OSError) as error:
        return Outcome(mask, str(error) if isinstance(error, BadLabel) else f"cannot be read ({error.strerror or error})")
    labels = found.values
    if options.zero_is_void:
        labels = np.where((labels == 0) | (labels == IGNORE_LABEL), IGNORE_LABEL, labels - 1).astype(np.uint8)
    if image and not write and (other := other_size(image[0], labels)):
        return Outcome(mask, other)
    if image and os.path.lexists(image[1]) and not filecmp.cmp(*image, shallow=False):
        return Outcome(mask, f"has an image that would replace {image[1]}, which holds something else: choose another folder")
    if there := os.path.lexists(target):
        try:
            same = np.array_equal(decode_label(target.read_bytes())[0], labels)
        except (BadLabel, OSError):
            same = False
        if not same:
            return Outcome(mask, f"would replace {target}, which holds something else: choose another folder")
    elif write:
        save_indexed_png(target, labels, options.palette)
    if write and image and not image[1].exists():
        with open(image[0], "rb") as file:
            write_atomically(image[1], lambda copy: shutil.copyfileobj(file, copy))
    return Outcome(mask, "", there, found.source, tuple(np.unique(found.values).tolist()), found.palette)


def other_size(image: Path, labels: np.ndarray) -> str:
    """What is wrong if labels and their image differ in size; "" if they do not, or if the image cannot be read."""
    try:
        size = read_image(image).shape[:2]
    except DatasetError:  # reported by check_dataset.py
        return ""
    (height, width), (rows, columns) = size, labels.shape
    return "" if size == labels.shape else f"is {columns}x{rows} pixels and its image {image} {width}x{height} (width x height)"


def check_masks(outcomes: Sequence[Outcome], table: Table | None, options: Options) -> None:
    """Raise :class:`UserError` if a mask is wrong, or if the masks together show that stored values are not classes."""
    if table and table.void and (stored := [o.path for o in outcomes if o.source == "stored"]):
        name = table.void[0][0]
        raise UserError(
            f"{stored[0]} holds class indices, and {table.origin} has a line for {name}: the values of the "
            f"classes are ambiguous; delete that line if it has no value, or rename {name} to keep it as a class"
        )
    if table and not options.colors and (drawn := [o.path for o in outcomes if o.problem.startswith(NO_COLORS)]):
        raise UserError(
            f"{table.origin} gives no colours, but {drawn[0]} has some, so their classes are unknown; expected "
            "`name r g b` per line, as in `road 128 64 128`"
        )
    if photos := [outcome.path for outcome in outcomes if outcome.problem.startswith(PHOTO)]:
        raise UserError(
            f"{len(photos)} of {len(outcomes)} masks look like photographs, or have smooth edges, such as {photos[0]}, "
            "and nothing was written; expected PNGs of class indices or of a colour per class: pass their folder, or one that "
            "holds images/ and masks/"
        )
    if bad := [f"{outcome.path} {outcome.problem}" for outcome in outcomes if outcome.problem]:
        print("\n".join(bad[:SHOWN]), file=sys.stderr)
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        raise UserError(
            f"{len(bad)} of {len(outcomes)} masks could not be converted, see above{more}; nothing was written; fix them or "
            "give their colours with --void, or in a file of classes (--classes), `name r g b` per line, and run it again"
        )
    colors: dict[int, tuple[Color, Path]] = {}
    for outcome in outcomes:
        for index, color in outcome.palette.items():
            first, path = colors.setdefault(index, (color, outcome.path))
            if first != color:
                raise UserError(
                    f"the palettes of {path} and {outcome.path} differ: index {index} is {first} and {color}, so a tool "
                    "re-ordered them; write the colours into the file of classes, `name r g b` per line, as `road 128 64 128`"
                )
    # A tool orders the colours of each mask separately, so agreeing palettes with different colours were not re-ordered.
    various = {tuple(outcome.palette) for outcome in outcomes if outcome.palette}
    if len(various) == 1 and is_reordered({index: color for index, (color, _) in colors.items()}):
        raise UserError(
            f"the palette of {next(iter(colors.values()))[1]} has VOC's colours in another order, so a tool may have "
            "re-ordered it; write the colours into the file of classes, `name r g b` per line, as in `road 128 64 128`"
        )
    values = {value for outcome in outcomes for value in outcome.values}
    if values == {0, IGNORE_LABEL} and not options.zero_is_void and {outcome.source for outcome in outcomes} == {"stored"}:
        raise UserError(
            "the masks hold only 0 and 255, and 255 is the ignore label: they are binary; add --binary, which writes 0 and 1"
        )
