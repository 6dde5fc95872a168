"""Likely causes of the values and colours found in a set of labels."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from dataset.classes import IGNORE_LABEL, TO_INDICES, VOC_CLASSES, name_the_classes, one_class_warning, voc_palette

VOID_GREY = {220}  # grey level of VOC's void, (224, 224, 192)


def few(values: Iterable[object]) -> str:
    """The first values, separated by commas, with dots if there are more."""
    values = list(values)
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def likely_causes(
    counts: np.ndarray, wrong_counts: np.ndarray, colours: Counter, num_classes: int, ignore_label: int = IGNORE_LABEL
) -> list[str]:
    """Likely causes of the values found, one sentence each.

    Args:
        counts: (256,) pixels per value over all single-channel labels.
        wrong_counts: the same over the labels that hold a wrong value.
        colours: number of colour labels by kind: "table" (all colours are in the table), "grey" or "other".
    """
    causes = []
    if colours["table"]:
        causes.append(
            f"{colours['table']} labels look like a colour rendering of the classes: `python {TO_INDICES}` converts them back"
        )
    if colours["grey"]:
        causes.append(
            f"{colours['grey']} labels are grey, saved with three channels: `python {TO_INDICES} MASKS NEW` keeps one; with "
            "--binary black and white become two classes"
        )
    if colours["other"]:
        causes.append(
            f"{colours['other']} labels are colour images: `python {TO_INDICES} MASKS NEW` converts them to class indices by "
            "the colours in classes.txt in MASKS (`name r g b` per line)"
        )
    ignored = {IGNORE_LABEL, ignore_label}
    present = set(np.flatnonzero(counts).tolist())
    values = present - ignored
    if wrong := {value for value in values if value >= num_classes}:
        grey = set(np.flatnonzero(wrong_counts).tolist()) - VOID_GREY - ignored <= _voc_levels().keys()
        return [*causes, _wrong_values(values, wrong, grey, num_classes)]
    if present and (warning := one_class_warning(IGNORE_LABEL if value in ignored else value for value in present)):
        causes.append(warning)
    elif values == {0, 1} and num_classes == len(VOC_CLASSES):
        causes.append(f"only 0 and 1 occur, but the classes are VOC's {num_classes}: {name_the_classes(2)}")
    elif values and 0 not in present:
        causes.append(
            f"class 0 never occurs: if the labels count from 1, `python {TO_INDICES} --zero-is-void MASKS NEW` subtracts 1; "
            f"then pass --num-classes {max(values)}"
        )
    return causes


def _voc_levels() -> dict[int, str]:
    """{grey level: class name} of VOC's colours, rounded down as OpenCV reads a PNG as grey, and rounded to the nearest."""
    grey = voc_palette()[: len(VOC_CLASSES)] @ (0.299, 0.587, 0.114)
    rows = [(level, row.name) for levels in (np.floor(grey), np.rint(grey)) for level, row in zip(levels, VOC_CLASSES)]
    return {int(level): name for level, name in reversed(rows)}


def _wrong_values(values: set[int], wrong: set[int], grey: bool, num_classes: int) -> str:
    """The likely cause of values that are no class.

    Args:
        values: all that occur, without ignored ones; ``wrong``: those of them that are no class.
        grey: whether all values of these labels are grey levels of VOC's colours.
    """
    largest, step = max(wrong), min(values - {0})
    if values - {0} in ({127}, {128}):
        return (
            f"the labels are masks of three levels (a trimap: 0, {largest}, 255): 255 is ignored; write class indices, "
            "and 255 for the level that means unknown"
        )
    if grey:
        example = min(wrong)
        return (
            f"the values are the grey levels of the VOC palette ({example} = {_voc_levels().get(example, 'ignored')}): palette "
            "PNGs were read as grey, as OpenCV does; use the palette PNGs"
        )
    if wrong == {num_classes} and 0 not in values:
        return f"the labels count from 1 to {num_classes}: `python {TO_INDICES} --zero-is-void MASKS NEW` subtracts 1"
    if wrong == {num_classes}:
        return (
            f"{num_classes} is one more than the last class: pass --num-classes {num_classes + 1} if it is a class, "
            f"--ignore-label {num_classes} to ignore it; to ignore 0, `python {TO_INDICES} --zero-is-void` turns 1.. into 0.."
        )
    if len(values) > 2 and step > 2 and not any(value % step for value in values) and largest // step < num_classes:
        return f"all values are multiples of {step}: the labels were stretched for viewing; divide by {step} (255 is ignored)"
    if len(wrong) > 40:
        return (
            f"{len(values)} different values: labels resized with interpolation or saved as JPEG, or ordinary "
            "images; resize labels by nearest neighbour and save PNGs"
        )
    gaps = f"; {len(values)} values so far apart may be grey levels of colours: use the masks in colour"
    text = f"the largest label is {largest}: pass --num-classes {largest + 1} if all of them are classes"
    return text + (gaps if 4 * len(values) < largest else "")
