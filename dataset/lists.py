"""Lists of image ids, the files that they mean, and the reading of text files."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

from dataset.images import DatasetError, read_bytes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png",)
SHOWN = 20  # names in a message
FOLDERS = 3  # in a message
IMAGE_DIR = "JPEGImages"
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".svg", ".pdf", ".mat",
                    ".npy", ".json", ".xml", ".txt")  # fmt: skip
"""Suffixes of files that lists may name, but that are read as neither images nor labels."""
_SUFFIX = "|".join(map(re.escape, (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES)))
_COLUMN_END = re.compile(rf"(?<=.)({_SUFFIX})(?:$|[ \t]*[,;][ \t]*|[ \t]+)", re.IGNORECASE)


class Entry(NamedTuple):
    """A line of a list: an id and, if the line names them, the paths of image and label below the data set's folder."""

    id: str
    image: str | None = None
    label: str | None = None


def read_ids(path: str | Path) -> list[str]:
    """The image ids of a list file, see :func:`read_list`."""
    return [entry.id for entry in read_list(path)]


def read_list(path: str | Path, image_dir: str = IMAGE_DIR) -> list[Entry]:
    """The entries of a list file, in its order.

    A line holds a bare id (``2007_000032``), which may contain spaces, or an image and its label:
    ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``, as in the official Caffe lists. An image is recognised by its suffix.
    Both paths are below the data set's folder, with or without the leading ``/``. An image alone is below ``image_dir``,
    unless its path begins with that or with ``/``. The id of an image is its path without suffix below ``image_dir``, or
    below the one other folder that has all images of the list. Blank lines are skipped; a backslash is read as a slash.

    Raises:
        DatasetError: the file is missing, not UTF-8 text or without ids, or a line leaves the data set's folder.
    """
    entries = []
    for number, line in enumerate(read_lines(path, "the list of image ids"), start=1):
        if not (line := line.replace("\\", "/")):
            continue
        if any(len(part.encode()) > 255 for part in line.split("/")):
            raise DatasetError(
                f"the list of image ids {path} holds {line[:40]!r}... in line {number}, which is too long for a file name; "
                "expected one id per line"
            )
        image, label, problem = _columns(line, image_dir)
        if problem:
            raise DatasetError(f"the list of image ids {path} holds {line!r} in line {number}: {problem}")
        paths = [image, label] if image else [line]
        if any(_leaves(text, bare=not image) for text in paths if text):
            raise DatasetError(
                f"the list of image ids {path} holds {line!r} in line {number}, which leaves the data set's folder; "
                "expected an id such as 2007_000032, or paths in that folder such as /JPEGImages/x.jpg /SegmentationClass/x.png"
            )
        if image and not label and not image.startswith("/") and not _inside(image, image_dir):
            image = f"{image_dir}/{image}"
        entries.append(Entry(_clean(line), image and _clean(image), label and _clean(label)))
    if not entries:
        raise DatasetError(f"the list of image ids {path} is empty; expected one id per line")
    return _with_ids(entries, image_dir)


def is_bare(image_id: str) -> bool:
    """Whether a line with ``image_id`` is read as that id and not as a path."""
    whole = image_id == image_id.strip(" \t") == _clean(image_id) and not re.search("[\r\n\0\ufeff\\\\]", image_id)
    return whole and not _leaves(image_id, bare=True) and _columns(image_id, IMAGE_DIR) == (None, None, "")


def _columns(line: str, image_dir: str) -> tuple[str | None, str | None, str]:
    """The image and the label that a line names, None for a bare id; and what is wrong with the line, or ""."""
    ends = list(_COLUMN_END.finditer(line))
    if not ends:
        return None, None, ""
    columns = [line[start : end.end(1)] for start, end in zip([0, *(end.end() for end in ends)], ends)]
    rest = line[ends[-1].end() :]
    endings = [os.path.splitext(column)[1].lower() for column in columns]
    expected = "expected an id, or an image and its label separated by a blank or tab"
    if len(columns) == 1 and rest and (endings[0] in FOREIGN_SUFFIXES or not rest.isdigit()):  # shot.png copy
        return None, None, ""
    if (foreign := next((i for i, ending in enumerate(endings) if ending in FOREIGN_SUFFIXES), None)) is not None:
        kind, advice = "a label", "a PNG of class indices"
        if foreign == 0:
            kind, advice = "an image", f"{', '.join(IMAGE_SUFFIXES)}; convert it to JPEG or PNG"
        return None, None, f"{columns[foreign]} is not read as {kind}; expected {advice}"
    if len(columns) > 2 or rest:
        return None, None, f"it has more columns than image and label, {rest or columns[2]!r}; {expected}"
    image, label = columns[0], columns[1] if len(columns) == 2 else None
    if label and (
        (endings[0] in LABEL_SUFFIXES and endings[1] not in LABEL_SUFFIXES)
        or (_inside(label, image_dir) and not _inside(image, image_dir))
    ):
        return None, None, f"the label comes before the image; {expected}"
    if label and endings[1] not in LABEL_SUFFIXES:
        return None, None, f"{label} is not read as a label; expected a PNG of class indices"
    if label and re.match("[ \t]*[,;]", line[len(image) :]):
        return None, None, f"its columns are separated by {line[len(image) :].strip()[0]!r}; {expected}"
    return image, label, ""


def read_folder(path: Path, image_dir: str, pattern: str = "*", expected: str = "images such as <id>.jpg") -> list[Entry]:
    """The entries of all images in a folder, ``<root>/<image_dir>`` or one in it, sorted by name.

    Args:
        pattern: glob pattern of their paths below ``path``.
        expected: what to expect there, for the message.

    Raises:
        DatasetError: there is no image.
    """
    files = [file for file in sorted(path.glob(pattern)) if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
    if not files:
        raise DatasetError(f"the folder {path} holds no image; expected {expected}")
    folder = image_dir if path.name == PurePosixPath(image_dir).name else f"{image_dir}/{path.name}"
    return _with_ids([Entry("", f"{folder}/{file.relative_to(path).as_posix()}") for file in files], image_dir)


def below(named: str | None, folder: str) -> str | None:
    """``named`` if it is below ``folder``, else None."""
    return named if named and _inside(named, folder) else None


def _clean(text: str) -> str:
    return str(PurePosixPath(text.lstrip("/")))


def _inside(path: str, folder: str) -> bool:
    return _clean(path).startswith(_clean(folder) + "/")


def _leaves(text: str, bare: bool) -> bool:
    """Whether a path leaves the folder that it is relative to; a bare id does so with a leading slash, too."""
    return (
        ".." in text.split("/")
        or text.startswith("/" if bare else "//")
        or re.match("[A-Za-z]:", text) is not None
        or _clean(text) == "."
    )


def _with_ids(entries: list[Entry], image_dir: str) -> list[Entry]:
    """The entries; if one names an image, its id is made from the path."""
    images = [entry.image for entry in entries if entry.image]
    folders = {image_dir if _inside(image, image_dir) else image.rpartition("/")[0].split("/")[0] for image in images}
    shared = _clean(folders.pop() if len(folders) == 1 else image_dir) + "/"
    return [
        Entry(str(PurePosixPath(image.removeprefix(shared)).with_suffix("")) if image else id, image, label)
        for id, image, label in entries
    ]


def read_lines(path: str | Path, what: str) -> list[str]:
    r"""The lines of a UTF-8 file, without surrounding blanks and tabs or byte-order marks; lines end at \n, \r\n or \r only.

    Other line ends of Unicode (U+2028, U+0085, the vertical tab) may be part of a name and are kept.

    Args:
        what: name of the file in messages: "the list of image ids".

    Raises:
        DatasetError: the file cannot be read, or is in another encoding.
    """
    data = read_bytes(path, what)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise DatasetError(f"{what} {path} cannot be read as text: it looks like UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8").replace("\ufeff", "")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{what} {path} cannot be read as text: byte {data[error.start]:#04x} in line {line} is not UTF-8; save it as UTF-8"
        ) from None
    return [line.strip(" \t") for line in re.split("\r\n|\r|\n", text)]


class Listing:
    """The files below a folder, found by their paths without suffix; paths have forward slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, dict[str, list[str]]] = {}

    def names(self, path: str) -> list[str]:
        """The names of all files whose path without suffix is ``path``: ``"a/x"`` -> ``["x.jpg", "x.json"]``."""
        folder, _, stem = path.rpartition("/")
        return self.by_stem(folder).get(normalize("NFC", stem), [])  # macOS writes umlauts as two characters

    def find(self, path: str, suffixes: Sequence[str]) -> str | None:
        """The file ``path`` with one of the suffixes, in any case, earlier suffixes first; None if there is none."""
        endings = {name: os.path.splitext(name)[1].lower() for name in self.names(path)}
        found = [name for name, ending in endings.items() if ending in suffixes]
        folder = path[: path.rfind("/") + 1]
        return folder + min(found, key=lambda name: (suffixes.index(endings[name]), name.swapcase())) if found else None

    def has(self, path: str) -> bool:
        """Whether a file with this path, including its suffix, exists."""
        return path.rpartition("/")[2] in self.names(os.path.splitext(path)[0]) or (self.root / path).exists()

    def by_stem(self, folder: str) -> dict[str, list[str]]:
        """The names of a folder's files by their stem; {} if there is no such folder."""
        if folder not in self._folders:
            stems = defaultdict(list)
            if (self.root / folder).is_dir():
                for name in os.listdir(self.root / folder):
                    stems[normalize("NFC", os.path.splitext(name)[0])].append(name)
            self._folders[folder] = dict(stems)
        return self._folders[folder]

    def missing(self, kind: str, paths: Iterable[str], suffixes: Sequence[str]) -> list[str]:
        """A clause per folder about the missing ``paths`` and what the folder has instead; for the first few folders."""
        lost: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            if not self.has(path):
                lost[path.rpartition("/")[0]].append(path)
        clauses = [f"no {kind} {self._describe(folder, found, suffixes)}" for folder, found in islice(lost.items(), FOLDERS)]
        if len(lost) > FOLDERS:
            more = sum(len(found) for found in islice(lost.values(), FOLDERS, None))
            clauses.append(f"{more} more {kind}s in {len(lost) - FOLDERS} other folders")
        return clauses

    def _describe(self, folder: str, lost: Sequence[str], suffixes: Sequence[str]) -> str:
        place = self.root / folder
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        text = ", ".join(os.path.basename(os.path.splitext(path)[0]) for path in lost[:SHOWN]) + more
        if not place.is_dir():
            return f"for {text}: the folder {place} does not exist"
        others = (name for path in lost for name in self.names(os.path.splitext(path)[0]))
        if other := next(others, None):
            return f"for {text} in {place}, which has {other}: expected {', '.join(suffixes)}"
        example = next((name for names in self.by_stem(folder).values() for name in names if not name.startswith(".")), None)
        return f"for {text} in {place}" + (f", which has files such as {example}" if example else ", which is empty")
