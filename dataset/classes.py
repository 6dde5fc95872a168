"""The classes of the data sets and of a ``classes.txt``: names and colours; the ignore label; the mean colour."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from dataset.images import DatasetError
from dataset.lists import SHOWN, read_lines

Color: TypeAlias = tuple[int, int, int]
"""Red, green, blue, 0..255."""

IGNORE_LABEL = 255
"""The ignore label (VOC calls it void): never trained on, never counted."""

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
"""Mean colour of the ImageNet training images, blue-green-red, 0..255, which the published nets subtract."""

TO_INDICES = "scripts/masks_to_indices.py"

VOID_NAMES = re.compile("void|ignored?|unlabell?ed", re.IGNORECASE)  # names of a line for the ignore label
_COLORED = re.compile(r"(.+?)[ \t,;]+(\d+)[ \t,;]+(\d+)[ \t,;]+(\d+)[ \t,;]*", re.ASCII)
_HEADER = re.compile(r".+?[ \t,;]+(r|red)[ \t,;]+(g|green)[ \t,;]+(b|blue)", re.IGNORECASE)  # "name r g b"
_TITLE = re.compile("(class|label)?[ _]?names?|class(es)?|labels?|ids?", re.IGNORECASE)  # of a column of names
_WORD = (
    "(class|label)?[ _]?names?|class(es)?|labels?|(class|label)?[ _]?ids?|idx|index|(pixel )?values?|colou?rs?"
    "|r|g|b|red|green|blue"
)
_TITLES = re.compile(rf"({_WORD})([ \t,;]+({_WORD}))+", re.IGNORECASE)  # of several columns
_ALPHA = re.compile(r".+?([ \t,;]+\d+){3}[ \t,;]+255", re.ASCII)
# "#ff0000", "(255,0,0)", "[255 0 0]", "0.5 0 0", "255 0", "-1 0 0", "255 0 0 road"
_NO_COLOR = re.compile(
    r".*(#[0-9a-f]{6}|[(\[][-\d.]+[, ][-\d., ]+[)\]]|([ \t,;]+-?\d+(\.\d+)?){2})|\d+([ \t,;]+\d+){2}[ \t,;]+.*",
    re.IGNORECASE | re.ASCII,
)
_NUMBERED = re.compile(r"(\d+)[ \t,;.:)]+\D")


class NamedClass(NamedTuple):
    """A class; ``id`` is its value in the label files of its data set."""

    id: int
    name: str
    color: Color


def voc_palette() -> np.ndarray:
    """The VOC colour map as (256, 3) uint8 RGB, row = label.

    The three lowest bits of a label go to the highest bits of red, green and blue, the next three to the next lower bits,
    and so on (VOC development kit, ``VOClabelcolormap``). Label 255 comes out as (224, 224, 192).
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for i in range(8):
        for channel in range(3):
            bit = (labels >> (3 * i + channel)) & 1
            palette[:, channel] |= (bit << (7 - i)).astype(np.uint8)
    return palette


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID_COLOR: Color = (224, 224, 192)  # row 255 of the VOC colour map
VOC_CLASSES = tuple(
    NamedClass(index, name, (red, green, blue))
    for index, (name, (red, green, blue)) in enumerate(zip(VOC_NAMES, voc_palette().tolist()))
)

CITYSCAPES_CLASSES = (  # in the order of the train ids, which are the classes here (cityscapesScripts, helpers/labels.py)
    NamedClass(7, "road", (128, 64, 128)),
    NamedClass(8, "sidewalk", (244, 35, 232)),
    NamedClass(11, "building", (70, 70, 70)),
    NamedClass(12, "wall", (102, 102, 156)),
    NamedClass(13, "fence", (190, 153, 153)),
    NamedClass(17, "pole", (153, 153, 153)),
    NamedClass(19, "traffic light", (250, 170, 30)),
    NamedClass(20, "traffic sign", (220, 220, 0)),
    NamedClass(21, "vegetation", (107, 142, 35)),
    NamedClass(22, "terrain", (152, 251, 152)),
    NamedClass(23, "sky", (70, 130, 180)),
    NamedClass(24, "person", (220, 20, 60)),
    NamedClass(25, "rider", (255, 0, 0)),
    NamedClass(26, "car", (0, 0, 142)),
    NamedClass(27, "truck", (0, 0, 70)),
    NamedClass(28, "bus", (0, 60, 100)),
    NamedClass(31, "train", (0, 80, 100)),
    NamedClass(32, "motorcycle", (0, 0, 230)),
    NamedClass(33, "bicycle", (119, 11, 32)),
)
CITYSCAPES_COLORS: dict[int, Color] = {
    **{index: row.color for index, row in enumerate(CITYSCAPES_CLASSES)},
    IGNORE_LABEL: (0, 0, 0),
}

COCO_NAMES = (  # in the order of the values in stuffthingmaps: 91 things, then 91 kinds of stuff (cocostuff, labels.txt)
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "street sign", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear",
    "zebra", "giraffe", "hat", "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window",
    "desk", "toilet", "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "blender", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
    "hair brush", "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff", "dirt",
    "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood", "flower", "fog",
    "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves", "light", "mat",
    "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other",
    "plastic", "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug", "salad", "sand",
    "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw", "structural-other", "table",
    "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel",
    "wall-stone", "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # things that were removed before the labels were published
COCO_COLORS: dict[int, Color] = {  # none are published; the VOC colour map is large enough
    label: (red, green, blue)
    for label, (red, green, blue) in enumerate(voc_palette().tolist())
    if label < len(COCO_NAMES) or label == IGNORE_LABEL
}


def voc_colors(num_classes: int) -> dict[int, Color]:
    """The colours of VOC's 21 classes and of the ignore label; empty for another number of classes."""
    if num_classes != len(VOC_CLASSES):
        return {}
    return {**{row.id: row.color for row in VOC_CLASSES}, IGNORE_LABEL: VOID_COLOR}


def read_classes(path: str | Path) -> list[tuple[str, Color | None]]:
    """The names and, if given, colours in a file of classes: a line per class in the order of the labels, ``name`` or
    ``name r g b``, separated by blanks, tabs, commas or semicolons. Names may contain spaces.

    Lines that begin with ``#``, a header line ``name r g b`` and blank lines at the end are skipped.

    Raises:
        DatasetError: the file cannot be read as UTF-8 text, a line has no name, or a name occurs twice.
    """
    lines = [(number, line) for number, line in enumerate(read_lines(path, "the file of classes"), 1) if line[:1] != "#"]
    while lines and not lines[-1][1]:
        lines.pop()
    if lines and _HEADER.fullmatch(lines[0][1]):
        lines = lines[1:]
    if _are_numbered([line for _, line in lines]):
        raise DatasetError(f"{path} numbers its classes ({lines[0][1]}); {_ONE_NAME}, without the numbers")
    if len(lines) > 1 and all(_ALPHA.fullmatch(line) for _, line in lines):
        raise DatasetError(f"{path} gives colours of four numbers ({lines[0][1]}); {_ONE_NAME}, without the opacity")
    if len(lines) == 1 and re.search("[,;]", lines[0][1]) and not _COLORED.fullmatch(lines[0][1]):
        raise DatasetError(f"{path} holds several names in one line ({lines[0][1][:60]}); {_ONE_NAME}")
    rows: list[tuple[str, Color | None]] = []
    first: dict[str, int] = {}
    for number, line in lines:
        found = _COLORED.fullmatch(line)
        red, green, blue = map(int, found.groups()[1:]) if found else (0, 0, 0)
        name = found[1] if found else line
        problem = f"a value of its colour is above {IGNORE_LABEL}" if max(red, green, blue) > IGNORE_LABEL else _no_name(name)
        if not rows and (_TITLE.fullmatch(name) or _TITLES.fullmatch(line)):
            problem = "it is the title of a column, which would become class 0; delete it"
        if problem:
            raise DatasetError(f"{path} holds no class in line {number}, {line[:60]!r}: {problem}; {_ONE_NAME}")
        if name in first:
            raise DatasetError(
                f"{path} names {name} twice, in lines {first[name]} and {number}; expected a different name for each class"
            )
        first[name] = number
        rows.append((name, (red, green, blue) if found else None))
    return rows


def _are_numbered(lines: Sequence[str]) -> bool:
    """Whether several lines are numbered in order: ``7,sky``, ``8,road``, or ``sky 0``, ``road 1``; ``class 0`` is a name."""
    before = [int(found[1]) for line in lines if (found := _NUMBERED.match(line))]
    halves = [line.rpartition(" ") for line in lines if not _COLORED.fullmatch(line)]
    behind = [number for _, _, number in halves] == [str(index) for index in range(len(lines))]
    apart = len({name for name, _, _ in halves}) == len(lines)
    in_order = bool(before) and before == list(range(before[0], before[0] + len(lines)))
    return len(lines) > 1 and (in_order or (behind and apart))


_ONE_NAME = "expected a line per class, in the order of the labels: name, or name r g b with a colour of 0..255"


def _no_name(name: str) -> str:
    """What is wrong with a class name; "" if nothing is."""
    if not name:
        return "the line is empty"
    if name == "__ignore__":
        return "labelme's __ignore__ is the ignore label (255 in the masks), not a class; delete that line"
    if name[0] in "-*/;{[<\"'" or name[-1] in "]}>\"'" or set(name) & set(":=\t"):
        return "it is a line of another format, such as YAML or JSON"
    if not any(map(str.isalpha, name)):
        return "it contains no letter"
    if re.search(r"[,;][ \t]*\d+$", name):
        return "a part of its colour is missing"
    return "its colour is not three numbers after the name" if _NO_COLOR.fullmatch(name) else ""


@dataclass(frozen=True)
class ClassFile:
    """The contents of ``<root>/classes.txt``: ``rows`` has a name and perhaps a colour per class; None without a file."""

    path: Path
    rows: list[tuple[str, Color | None]] | None

    def count(self, ignore_label: int = IGNORE_LABEL) -> int | None:
        """The number of classes, None without a file; DatasetError for one class, over 255, or a line for the ignore label."""
        if self.rows is None:
            return None
        count = len(self.rows)
        if count == ignore_label + 1 and VOID_NAMES.fullmatch(last := self.rows[-1][0]):
            raise DatasetError(
                f"{self.path} names {last} as its last class, but --ignore-label {ignore_label} says that it is not a class: "
                "delete that line"
            )
        if not 2 <= count <= IGNORE_LABEL:
            raise DatasetError(f"{self.path} names {count} classes; expected 2 to {IGNORE_LABEL}, including the background")
        return count

    def names(self, num_classes: int) -> list[str] | None:
        """The class names, None without a file; DatasetError if their number is not ``num_classes``."""
        if self.rows is None:
            return None
        if (count := len(self.rows)) != num_classes:
            advice = f"leave --num-classes out to use all {count}, or edit the file"
            if count and VOID_NAMES.fullmatch(last := self.rows[-1][0]):
                advice = (
                    f"delete its last line, {last}, which is not a class; if ignored pixels are {count - 1} in the masks, "
                    f"pass --ignore-label {count - 1}"
                )
            raise DatasetError(f"{self.path} names {count} classes; expected {num_classes}: {advice}")
        return [name for name, _ in self.rows]

    def colors(self, num_classes: int) -> dict[int, Color]:
        """The colours of the classes in label files, by class index; the ignore label gets VOC's unless a class has it.

        They come from the file, else from VOC if the classes are VOC's, else there are none. DatasetError as for ``names``.
        """
        names = self.names(num_classes)
        colors = {index: color for index, (_, color) in enumerate(self.rows or ()) if color}
        if colors:
            return colors if VOID_COLOR in colors.values() else {**colors, IGNORE_LABEL: VOID_COLOR}
        return voc_colors(num_classes) if names is None or is_voc(names) else {}


def read_class_file(root: str | Path) -> ClassFile:
    """``<root>/classes.txt``, read once; see :func:`read_classes`."""
    path = Path(root) / "classes.txt"
    return ClassFile(path, read_classes(path) if path.is_file() else None)


def count_classes(root: str | Path, ignore_label: int = IGNORE_LABEL) -> int | None:
    """The number of classes in ``<root>/classes.txt``, see :meth:`ClassFile.count`."""
    return read_class_file(root).count(ignore_label)


def read_class_names(root: str | Path, num_classes: int) -> list[str] | None:
    """The class names of ``<root>/classes.txt``, see :meth:`ClassFile.names`."""
    return read_class_file(root).names(num_classes)


def default_names(num_classes: int) -> list[str]:
    """Names for classes without given names: VOC's for 21 classes, else their numbers."""
    return list(VOC_NAMES) if num_classes == len(VOC_NAMES) else [f"class {i}" for i in range(num_classes)]


def is_voc(names: Sequence[str]) -> bool:
    """Whether names are those of VOC's classes, apart from case and punctuation: labelme writes ``_background_``."""
    return [re.sub("[^a-z]", "", name.lower()) for name in names] == list(VOC_NAMES)


def one_class_warning(present: Iterable[int]) -> str | None:
    """A warning with the likely cause if at most one class occurs in labels; None if there are more.

    Args:
        present: the values that occur in labels after reading: class indices, and 255 for ignored.
    """
    values = set(present)
    classes = sorted(values - {IGNORE_LABEL})
    if len(classes) > 1:
        return None
    if not classes:
        return "all labels are ignored: they hold only 255" if values else "there are no labels"
    if classes == [0] and IGNORE_LABEL in values:
        return (
            "the labels are binary masks 0/255, and 255 is the ignore label, so only class 0 is learnt: "
            f"`python {TO_INDICES} --binary MASKS NEW` writes 1 for 255"
        )
    return f"only class {classes[0]} occurs in the labels: there is nothing to learn"


def name_the_classes(count: int) -> str:
    """The advice if labels hold the values 0..count-1, but there is no ``classes.txt``."""
    lines = "`background` and `object`" if count == 2 else "`background`, `cat` and so on"
    return f"for {count} classes write their names into classes.txt in the data set's folder, {count} lines such as {lines}"


def absent_classes(
    present: Iterable[int], names: Sequence[str], ignore_label: int = IGNORE_LABEL, unused: Sequence[int] = ()
) -> str:
    """The classes that never occur in labels, ``"3 bird, 4 boat"``, at most 20; "" if all or less than two classes do.

    Args:
        present: the values that occur in labels after reading: class indices, and 255 for ignored.
        names: of all classes, by index.
        ignore_label: a value that is no class, so never listed.
        unused: classes that no label of the data set has.
    """
    values = set(present)
    known = values | {ignore_label, *unused}
    absent = [f"{index} {name}" for index, name in enumerate(names) if index not in known]
    more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
    return "" if one_class_warning(values) else ", ".join(absent[:SHOWN]) + more
