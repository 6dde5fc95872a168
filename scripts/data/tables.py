"""Files of classes in the formats of labelling tools: the colour or value of each class."""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset.classes import IGNORE_LABEL, VOC_CLASSES, VOID_NAMES, Color, is_voc, read_classes, voc_palette
from dataset.images import DatasetError, read_bytes
from dataset.lists import read_lines
from utils.command import UserError

TABLES = (
    "classes.txt", "labelmap.txt", "class_names.txt", "_classes.csv", "class_dict.csv", "label_colors.txt",
    "objectInfo150.txt", "labels.txt", "obj_class_to_machine_color.json", "classes.json", "classes/classes.json",
    "label_classes.json", "_annotations.coco.json", "notes.json", "result.json",
)  # fmt: skip
"""Files of classes: ours, CVAT's, labelme's, Roboflow's, DeepGlobe's, CamVid's, ADE20K's, labelme's again,
Supervisely's, SuperAnnotate's, Hasty's, and COCO JSON of Roboflow and Label Studio; the first that exists is used."""


class Table(NamedTuple):
    """The classes of a set of masks, in the order of their indices.

    Attributes:
        rows: names and colours; a colour is None if it is not given.
        origin: the source of the classes, for messages.
        void: names and colours of the ignore label.
    """

    rows: list[tuple[str, Color | None]]
    origin: str
    void: Sequence[tuple[str, Color | None]] = ()

    def colors(self) -> dict[Color, int]:
        """Colour -> index; UserError if two classes have one colour."""
        found: dict[Color, int] = {}
        for index, (name, color) in enumerate(self.rows):
            if color is not None and (first := found.setdefault(color, index)) != index:
                both = f"{self.rows[first][0]} and {name}"
                raise UserError(f"{self.origin} gives {both} the same colour, {color}; expected a colour for each class")
        return found


VOC = Table([(row.name, row.color) for row in VOC_CLASSES], "PASCAL VOC")
_CVAT = re.compile(r"(.+?):(?:(\d+),\s*(\d+),\s*(\d+))?:[^:]*(?::[^:]*)?", re.ASCII)
_COLOR_FIRST = re.compile(r"(\d+)[ \t,;]+(\d+)[ \t,;]+(\d+)[ \t,;]+(\D.*)", re.ASCII)
_VALUE_FIRST = re.compile(r"(\d+)[ \t,;:]+(?:[\d.]+\t\d+\t\d+\t\d+\t+)?(\D.*)", re.ASCII)  # ADE20K: with shares and counts
_VALUES_TITLE = re.compile(r"(pixel[ _]?value|value|idx?|index)([ \t,;]+\w+)+", re.IGNORECASE)
_HEX = re.compile("#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})(?:[0-9a-f]{2})?", re.IGNORECASE)


def class_lines(rows: Iterable[tuple[str, Color | None]], origin: str) -> list[str]:
    """The lines of ``classes.txt``; UserError if reading them would give other classes."""
    rows = list(rows)
    lines = [" ".join(map(str, (name, *(color or ())))) for name, color in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classes.txt"
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        try:
            reason = "" if read_classes(path) == rows else "it would be read back as other names"
        except DatasetError as error:
            reason = str(error).replace(str(path), "it")
    if reason:
        raise UserError(f"the classes of {origin} cannot be written into a classes.txt: {reason}; rename them there")
    return lines


def find_table(
    inside: Sequence[Path],
    beside: Sequence[Path],
    given: Path | None,
    zero_is_void: bool = False,
    names: Sequence[str] = TABLES,
) -> Table | None:
    """The classes in ``given``, else in the first of ``names`` in the folders; None if there is no such file.

    Args:
        inside: the folders of the masks; if several have that file, they must agree.
        beside: folders to try if these have no such file, without JSON.
        zero_is_void: value 0 has no name.

    Rows with a colour that are named Void, Ignore or Unlabelled are the ignore label, not classes.
    """
    text = [name for name in names if not name.endswith(".json")]
    places = [*(folder / name for folder in inside for name in names), *(folder / name for folder in beside for name in text)]
    path = given or next(
        (path for path in places if path.is_file() and (path.suffix != ".json" or _read_json(path, False))), None
    )
    if path is None:
        return None
    rows = read_table(path, zero_is_void)
    for other in (folder / path.name for folder in inside if not given):
        if other.is_file() and read_table(other, zero_is_void) != rows:
            raise UserError(f"{path} and {other} have different classes; expected the same, or pass --classes FILE to choose")
    if wrong := next((name for name, color in rows if color and max(color) > 255), None):
        raise UserError(f"{path} gives {wrong} a colour above 255; expected red, green and blue of 0..255")
    if not 1 <= len(rows) <= IGNORE_LABEL:
        raise UserError(f"{path} names {len(rows)} classes; expected at most {IGNORE_LABEL}, which is the ignore label")
    if not any(color for _, color in rows) and is_voc([name for name, _ in rows]):
        rows = VOC.rows
    void = [row for row in rows if row[1] and VOID_NAMES.fullmatch(row[0]) and not zero_is_void]
    return Table([row for row in rows if row not in void], str(path), void)


def read_table(path: Path, zero_is_void: bool = False) -> list[tuple[str, Color | None]]:
    """The names and colours in a file of classes; the format is recognised by the contents.

    CVAT's ``labelmap.txt`` (``name:r,g,b:parts:actions`` per line), labelme's ``class_names.txt`` or ``labels.txt`` (a name
    per line, first ``__ignore__``, which is no class; the colours are those of the VOC colour map), CamVid's ``r g b name``,
    Roboflow's and ADE20K's ``value, name``, JSON (see :func:`_read_json`), or what :func:`dataset.classes.read_classes` reads.

    Raises:
        DatasetError: the file cannot be read.
        UserError: it is JSON without classes, or values are missing.
    """
    if path.suffix.lower() == ".json":
        if (found := _read_json(path, zero_is_void)) is None:
            raise UserError(f"{path} is no JSON file of classes; expected COCO's categories, or names and colours")
        return found
    lines = [line for line in read_lines(path, "the file of classes") if line and not line.startswith("#")]
    cvat = [_CVAT.fullmatch(line) for line in lines]
    if lines and all(cvat):
        rows = [found.groups() for found in cvat if found]
        return [(name, (int(r), int(g), int(b)) if r else None) for name, r, g, b in rows]
    if path.name == "class_names.txt" or lines[:1] in (["__ignore__"], ["_background_"]):
        names = [line for line in lines if line != "__ignore__"]
        return [(name, (red, green, blue)) for name, (red, green, blue) in zip(names, voc_palette().tolist())]
    colored = [_COLOR_FIRST.fullmatch(line) for line in lines]
    if lines and all(colored):
        return [(found[4], (int(found[1]), int(found[2]), int(found[3]))) for found in colored if found]
    titled = bool(lines and _VALUES_TITLE.fullmatch(lines[0]))
    valued = [_VALUE_FIRST.fullmatch(line) for line in lines[titled:]]
    if valued and all(valued):
        return _by_value(path, [(int(found[1]), found[2]) for found in valued if found], zero_is_void)
    return read_classes(path)


def _read_json(path: Path, zero_is_void: bool) -> list[tuple[str, Color | None]] | None:
    """The classes of COCO JSON (``categories``), of SuperAnnotate's ``classes.json`` (``name``, ``color``), Hasty's
    ``label_classes.json`` (``class_name``, ``png_index``) or Supervisely's ``obj_class_to_machine_color.json``; None for other
    JSON."""
    try:
        content: Any = json.loads(read_bytes(path, "the file of classes"))
        if isinstance(content, dict) and "categories" in content:
            return _by_value(path, [(row["id"], row["name"]) for row in content["categories"]], zero_is_void)
        if isinstance(content, dict):
            greys = [(value, name) for name, (value, *others) in content.items() if others == [value, value]]
            return _by_value(path, greys, zero_is_void) if greys else None
        if "png_index" in content[0]:
            return _by_value(path, [(row["png_index"], row["class_name"]) for row in content], zero_is_void)
        found: list[tuple[str, Color | None]] = [(row["name"], _color(row["color"])) for row in content]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return found if any(color == (0, 0, 0) for _, color in found) else [("background", (0, 0, 0)), *found]


def _color(text: str) -> Color:
    if not (found := _HEX.fullmatch(text)):
        raise ValueError(text)
    red, green, blue = (int(part, 16) for part in found.groups())
    return red, green, blue


def _by_value(path: Path, pairs: Iterable[tuple[Any, Any]], zero_is_void: bool) -> list[tuple[str, Color | None]]:
    """The rows of classes given by their mask values: 0.., or 1.. if 0 is the background or ignored."""
    pairs = sorted((int(value), str(name)) for value, name in pairs)
    values = [value for value, _ in pairs]
    first = 0 if values[:1] == [0] else 1
    if values != list(range(first, first + len(pairs))):
        shown = ", ".join(map(str, values[:8])) + ", ..." * (len(values) > 8)
        raise UserError(f"{path} gives classes the values {shown}; expected 0, 1, 2 and so on, or from 1, without gaps")
    rows: list[tuple[str, Color | None]] = [(name, None) for value, name in pairs if value or not zero_is_void]
    return rows if first == 0 or zero_is_void else [("background", None), *rows]
