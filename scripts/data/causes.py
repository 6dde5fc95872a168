"""What the values and colours that are found in a set of labels point to."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from dataset.classes import IGNORE_LABEL, TO_INDICES, VOC_CLASSES, name_the_classes, one_class_warning, voc_palette

VOID_GREY = {220}  # of the colour (224, 224, 192) of VOC's void


def few(values: Iterable[object]) -> str:
    """The first values, separated by commas, and dots where there are more."""
    values = list(values)
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def likely_causes(
    counts: np.ndarray, wrong_counts: np.ndarray, colours: Counter, num_classes: int, ignore_label: int = IGNORE_LABEL
) -> list[str]:
    """What the found values point to, one sentence each.

    Args:
        counts: (256,) pixels of each value over all single-channel labels.
        wrong_counts: the same over those labels that hold a wrong value.
        colours: number of colour labels by kind: "table" (all colours stand in the table), "grey" or "other".
    """
    causes = []
    if colours["table"]:
        causes.append(
            f"{colours['table']} labels look like a colour rendering of the classes: `python {TO_INDICES}` turns them back"
        )
    if colours["grey"]:
        causes.append(
            f"{colours['grey']} labels are grey and saved with three channels: `python {TO_INDICES} MASKS NEW` keeps one, with "
            "--binary it makes two classes of black and white"
        )
    if colours["other"]:
        causes.append(
            f"{colours['other']} labels are colour pictures: `python {TO_INDICES} MASKS NEW` turns them into class indices, by "
            "the colours of a classes.txt in MASKS (`name r g b` a line)"
        )
    void = {IGNORE_LABEL, ignore_label}
    present = set(np.flatnonzero(counts).tolist())
    values = present - void
    if wrong := {value for value in values if value >= num_classes}:
        grey = set(np.flatnonzero(wrong_counts).tolist()) - VOID_GREY - void <= _voc_levels().keys()
        return [*causes, _wrong_values(values, wrong, grey, num_classes)]
    if present and (warning := one_class_warning(IGNORE_LABEL if value in void else value for value in present)):
        causes.append(warning)
    elif values == {0, 1} and num_classes == len(VOC_CLASSES):
        causes.append(f"0 and 1 alone occur, and the classes are VOC's {num_classes}: {name_the_classes(2)}")
    elif values and 0 not in present:
        causes.append(
            f"class 0 never occurs: if the labels count from 1, `python {TO_INDICES} --zero-is-void MASKS NEW` subtracts 1; "
            f"then pass --num-classes {max(values)}"
        )
    return causes


def _voc_levels() -> dict[int, str]:
    """The grey levels of VOC's colours, and whose; OpenCV rounds down where it reads a PNG as grey, else to the nearest."""
    grey = voc_palette()[: len(VOC_CLASSES)] @ (0.299, 0.587, 0.114)
    rows = [(level, row.name) for levels in (np.floor(grey), np.rint(grey)) for level, row in zip(levels, VOC_CLASSES)]
    return {int(level): name for level, name in reversed(rows)}


def _wrong_values(values: set[int], wrong: set[int], grey: bool, num_classes: int) -> str:
    """The cause of values that are no class.

    Args:
        values: all that occur, without void; ``wrong`` those among them that are no class.
        grey: all values of the labels concerned are grey levels of VOC's colours.
    """
    largest, step = max(wrong), min(values - {0})
    if values - {0} in ({127}, {128}):
        return (
            f"the labels are masks of three levels (a trimap: 0, {largest}, 255): 255 is read as void; write class indices, "
            "and 255 for the level that means unknown"
        )
    if grey:
        example = min(wrong)
        return (
            f"the values are the grey levels of the VOC palette ({example} = {_voc_levels().get(example, 'void')}): palette "
            "PNGs were read as grey, as OpenCV does; go back to the palette PNGs"
        )
    if wrong == {num_classes} and 0 not in values:
        return f"the labels count from 1 to {num_classes}: `python {TO_INDICES} --zero-is-void MASKS NEW` subtracts 1"
    if wrong == {num_classes}:
        return (
            f"{num_classes} is one more than the last class: pass --num-classes {num_classes + 1} if it is a class, "
            f"--ignore-label {num_classes} if it is void; if 0 is void, `python {TO_INDICES} --zero-is-void` turns 1.. into 0.."
        )
    if len(values) > 2 and step > 2 and not any(value % step for value in values) and largest // step < num_classes:
        return f"all values are multiples of {step}: the labels were stretched to be looked at; divide by {step} (255 is void)"
    if len(wrong) > 40:
        return (
            f"{len(values)} different values: labels that were resized with interpolation or saved as JPEG, or ordinary "
            "pictures; resize labels by nearest neighbour and save PNGs"
        )
    gaps = f"; {len(values)} values so far apart may be grey levels of colours: go back to the masks that have the colours"
    text = f"the largest label is {largest}: pass --num-classes {largest + 1} if all of them are classes"
    return text + (gaps if 4 * len(values) < largest else "")
