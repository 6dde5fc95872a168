"""Which class has which colour, as the tools that people label with say it, and masks of colours as class indices."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.classes import IGNORE_LABEL, VOC_CLASSES, VOID_NAMES, Color, is_voc, read_classes, voc_palette
from dataset.images import DatasetError, read_bytes
from dataset.labels import BadLabel, check_values, decode_label, read_png, single_channel
from dataset.lists import read_lines
from scripts.data.polygons import Region
from utils.command import UserError

TABLES = (
    "classes.txt", "labelmap.txt", "class_names.txt", "_classes.csv", "class_dict.csv", "label_colors.txt",
    "objectInfo150.txt", "labels.txt", "obj_class_to_machine_color.json", "classes.json", "classes/classes.json",
    "label_classes.json", "_annotations.coco.json", "notes.json", "result.json",
)  # fmt: skip
"""Files of classes: ours, CVAT's, labelme's, Roboflow's, DeepGlobe's, CamVid's, ADE20K's, labelme's again,
Supervisely's, SuperAnnotate's, Hasty's, and COCO JSON of Roboflow and Label Studio; the first that is there counts."""
PHOTO = "looks like a photograph"  # how the problem of one begins
MOST = 100  # values or colours of a mask; one image has fewer classes
NO_COLORS = "has colours"  # how the problem of a mask begins that has colours, where no class has one


class Table(NamedTuple):
    """The classes of a set of masks, in the order of their indices.

    Attributes:
        rows: names and colours; a colour is None where nobody gives it.
        origin: who says so, for messages.
        void: names and colours of the ignore label there.
    """

    rows: list[tuple[str, Color | None]]
    origin: str
    void: Sequence[tuple[str, Color | None]] = ()

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
_COLOR_FIRST = re.compile(r"(\d+)[ \t,;]+(\d+)[ \t,;]+(\d+)[ \t,;]+(\D.*)", re.ASCII)
_VALUE_FIRST = re.compile(r"(\d+)[ \t,;:]+(?:[\d.]+\t\d+\t\d+\t\d+\t+)?(\D.*)", re.ASCII)  # ADE20K: shares and counts between
_VALUES_TITLE = re.compile(r"(pixel[ _]?value|value|idx?|index)([ \t,;]+\w+)+", re.IGNORECASE)
_HEX = re.compile("#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})(?:[0-9a-f]{2})?", re.IGNORECASE)


def class_lines(rows: Iterable[tuple[str, Color | None]], origin: str) -> list[str]:
    """The lines of ``classes.txt``; UserError for classes that would not be read back from it."""
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
    """The classes that ``given`` names, else the first of ``names`` in the folders; None where there is none.

    Args:
        inside: the folders of the masks, of which all that have that file must agree.
        beside: folders that are looked into where these have none, but for JSON.
        zero_is_void: value 0 has no name.

    Rows with a colour that are called Void, Ignore or Unlabelled are no classes, but the ignore label.
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
            raise UserError(f"{path} and {other} name other classes; expected the same, or --classes FILE to say which")
    if wrong := next((name for name, color in rows if color and max(color) > 255), None):
        raise UserError(f"{path} gives {wrong} a colour above 255; expected red, green and blue of 0..255")
    if not 1 <= len(rows) <= IGNORE_LABEL:
        raise UserError(f"{path} names {len(rows)} classes; expected at most {IGNORE_LABEL}: that label means void")
    if not any(color for _, color in rows) and is_voc([name for name, _ in rows]):
        rows = VOC.rows
    void = [row for row in rows if row[1] and VOID_NAMES.fullmatch(row[0]) and not zero_is_void]
    return Table([row for row in rows if row not in void], str(path), void)


def read_table(path: Path, zero_is_void: bool = False) -> list[tuple[str, Color | None]]:
    """Names and colours of a file of classes, by what it holds.

    CVAT's ``labelmap.txt`` (``name:r,g,b:parts:actions`` a line), labelme's ``class_names.txt`` or ``labels.txt`` (a name a
    line, ``__ignore__`` first, which is no class; the colours are those of the VOC colour map), CamVid's ``r g b name``,
    Roboflow's and ADE20K's ``value, name``, JSON (see :func:`_read_json`), or what :func:`dataset.classes.read_classes` reads.

    Raises:
        DatasetError: the file cannot be read.
        UserError: it is JSON without classes, or leaves out values.
    """
    if path.suffix.lower() == ".json":
        if (found := _read_json(path, zero_is_void)) is None:
            raise UserError(f"{path} is no JSON of classes; expected COCO's categories, or names and colours")
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
    ``label_classes.json`` (``class_name``, ``png_index``) or Supervisely's ``obj_class_to_machine_color.json``; None of other
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
    """The rows of classes that are given with their values in the masks: 0.., or 1.. where 0 is the background or void."""
    pairs = sorted((int(value), str(name)) for value, name in pairs)
    values = [value for value, _ in pairs]
    first = 0 if values[:1] == [0] else 1
    if values != list(range(first, first + len(pairs))):
        shown = ", ".join(map(str, values[:8])) + ", ..." * (len(values) > 8)
        raise UserError(f"{path} gives classes the values {shown}; expected 0, 1, 2 and so on, or from 1, without gaps")
    rows: list[tuple[str, Color | None]] = [(name, None) for value, name in pairs if value or not zero_is_void]
    return rows if first == 0 or zero_is_void else [("background", None), *rows]


class Labels(NamedTuple):
    """The labels of one mask.

    Attributes:
        values: (H, W) uint8.
        source: "stored" for the values that the file holds, "colours" or "grey" for those of its colours.
        palette: of a file whose values are as they are stored, the colour of each that occurs; {} without a palette.
    """

    values: np.ndarray
    source: str
    palette: Mapping[int, Color] = {}


def read_labels(data: bytes, table: Mapping[Color, int], num_classes: int, guessed: bool = False) -> Labels:
    """The labels of a PNG by the colours that its pixels are shown in, see :func:`to_indices`, or as they are stored.

    Args:
        table: label of each colour; {} takes the values as they are stored.
        num_classes: labels 0..num_classes-1 are classes.
        guessed: nobody gave ``table``: where a grey mask, or one with the palette of VOC's colour map, holds a value without a
            colour in it, its values stay.

    Raises:
        BadLabel: no PNG, a damaged one, colours of no class, half transparent pixels, an index without a colour, or grey values
            that can be read as colours and as class indices.
    """
    pixels, palette, mode = read_png(data)
    if pixels.ndim == 2 and pixels.dtype != np.uint8:
        pixels, mode = _eight_bits(pixels), "L"
    if mode == "P" and pixels.max() >= len(palette):
        raise BadLabel(f"holds the index {pixels.max()}, and its palette has {len(palette)} colours")
    if table:
        try:
            return _by_color(data, pixels, palette, mode, table, num_classes)
        except BadLabel:
            if not guessed:
                raise
            stored = _as_stored(pixels, palette, mode)
            if stored is None or not all(color in (tuple(voc_palette()[i]), (i, i, i)) for i, color in stored.palette.items()):
                raise
            return _no_photo(stored)
    stored = _as_stored(pixels, palette, mode)
    if stored is None and mode != "LA" and (count := len(np.unique(_codes(pixels[..., :3])))) > MOST:
        raise BadLabel(f"{PHOTO}: it holds {count} colours; expected a mask")
    if stored is None:
        raise BadLabel(f"{NO_COLORS}, and nothing says which class each is; expected `name r g b` a line in a classes.txt")
    check_values(np.unique(_no_photo(stored).values).tolist(), num_classes)
    return stored


def _no_photo(labels: Labels) -> Labels:
    """The same; BadLabel where they are the grey values of a photograph."""
    if not labels.palette and (count := len(np.unique(labels.values))) > MOST:
        raise BadLabel(f"{PHOTO}: it is grey and holds {count} values; expected class indices")
    return labels


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey of 16 bits, (H, W) uint8; BadLabel for values above 255 other than white, 65535, in a mask of black and white."""
    if bool(((pixels == 0) | (pixels == 65535)).all()):
        return (pixels // 257).astype(np.uint8)
    if pixels.max() > 255:
        raise BadLabel(f"is grey of 16 bits and holds {pixels.max()}; expected values of 0..255, class indices or void")
    return pixels.astype(np.uint8)


def is_reordered(palette: Mapping[int, Color]) -> bool:
    """Whether colours are those of VOC's colour map, but stand at other values, as tools re-order them."""
    home = {color: index for index, color in enumerate(map(tuple, voc_palette().tolist()))}
    colors = set(palette.values())
    return 1 < len(palette) == len(colors) and colors <= home.keys() and any(home[c] != i for i, c in palette.items())


def _as_stored(pixels: np.ndarray, palette: np.ndarray, mode: str) -> Labels | None:
    """The values of a mask of one channel, or of equal channels; None for colours."""
    if mode in ("LA", "RGB", "RGBA"):
        channels, alpha = (pixels, None) if mode == "RGB" else (pixels[..., :-1], pixels[..., -1])
        whole = alpha is None or bool((alpha == 255).all())
        return Labels(channels[..., 0].copy(), "stored") if whole and (channels == channels[..., :1]).all() else None
    single_channel(pixels, mode)
    present = np.unique(pixels).tolist() if mode == "P" else []
    return Labels(pixels, "stored", {i: tuple(palette[i].tolist()) for i in present})


def _by_color(
    data: bytes, pixels: np.ndarray, palette: np.ndarray, mode: str, table: Mapping[Color, int], num_classes: int
) -> Labels:
    if mode == "P":
        return Labels(to_indices(palette[pixels], table), "colours")
    if mode in ("LA", "RGBA") and (half := int(((pixels[..., -1] > 0) & (pixels[..., -1] < 255)).sum())):
        raise BadLabel(f"holds {half} half transparent pixels; expected whole colours")
    if mode in ("RGB", "RGBA"):
        return Labels(to_indices(pixels[..., :3], table), "colours")
    values = pixels[..., 0] if mode == "LA" else pixels
    stretch = 255 // (2 ** min(data[24], 8) - 1)  # grey of fewer than 8 bits is shown from black to white, too
    # Black and white alone are a binary mask where white is the colour of a class: class 0 and void would tell nothing apart.
    binary = (255, 255, 255) in table and bool(((values == 0) | (values == 255)).all())
    indices = bool(((values < num_classes) | (values == IGNORE_LABEL)).all()) and not binary
    try:
        labels = to_indices(np.repeat((values * stretch)[..., None], 3, axis=2), table)
    except BadLabel:
        if indices:
            return Labels(values, "stored")
        raise
    if indices and not np.array_equal(labels, values):
        raise BadLabel(
            "is grey, and its values are colours of classes as well as class indices; save it as RGB if they are colours"
        )
    return Labels(labels, "grey")


def join_layers(layers: Sequence[tuple[int, bytes | Region]], rest: int) -> np.ndarray:
    """Masks or regions of one class each as one mask of class indices, (H, W) uint8.

    Later regions cover earlier ones, as tools show them; of masks nobody knows the order, so that where two are is 255.

    Args:
        layers: class, and PNG of 255 where it is, else 0, or region.
        rest: the class of the pixels that have none, or 255.

    Raises:
        BadLabel: a mask that holds other values, or is of another size.
    """
    labels, taken = np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=bool)
    for place, (index, layer) in enumerate(layers):
        here = layer.mask() if isinstance(layer, Region) else _binary(layer)
        if place == 0:
            labels, taken = np.full(here.shape, rest, dtype=np.uint8), np.zeros(here.shape, dtype=bool)
        if here.shape != labels.shape:
            raise BadLabel(f"is {labels.shape[::-1]} pixels, another mask of its image {here.shape[::-1]}")
        twice = here & taken & (labels != index) & (not isinstance(layer, Region))
        labels[here] = index
        labels[twice] = IGNORE_LABEL
        taken |= here
    return labels


def _binary(data: bytes) -> np.ndarray:
    values = decode_label(data)[0]
    if other := sorted(set(np.unique(values).tolist()) - {0, 255}):
        raise BadLabel(f"holds {', '.join(map(str, other[:8]))}; expected 255 where its label is, and 0")
    return values == 255


def to_indices(colors: np.ndarray, table: Mapping[Color, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8 labels; BadLabel where a colour is not in the table, with its number of pixels."""
    codes = _codes(colors)
    keys, labels = zip(*sorted((red * 65536 + green * 256 + blue, label) for (red, green, blue), label in table.items()))
    places = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    known = np.array(keys, dtype=np.uint32)[places] == codes
    if not known.all():
        unknown, counts = np.unique(codes[~known], return_counts=True)
        if len(unknown) > MOST:
            raise BadLabel(f"{PHOTO}: it holds {len(unknown)} colours of no class; expected a mask")
        order = np.argsort(-counts, kind="stable")[:8]
        shown = [f"({c >> 16}, {c >> 8 & 255}, {c & 255}) on {n} pixels" for c, n in zip(unknown[order], counts[order])]
        hint = "; colours between those of the classes come from resizing or from JPEG" if len(unknown) > 8 else ""
        raise BadLabel(f"holds {len(unknown)} colours of no class: {', '.join(shown)}{', ...' * (len(unknown) > 8)}{hint}")
    return np.array(labels, dtype=np.uint8)[places]


def _codes(colors: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB as one number a pixel."""
    return colors.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
