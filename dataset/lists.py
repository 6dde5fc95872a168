"""Lists of image ids: which pictures, and which files stand for them."""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dataset.files import DatasetError, read_lines
from dataset.listing import PICTURE_SUFFIXES

IMAGE_DIR = "JPEGImages"
_PAIR = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, PICTURE_SUFFIXES))}))(?:[ \t]+(.+))?", re.IGNORECASE)


class Entry(NamedTuple):
    """A line of a list: an id and, where the line names them, the two files below the data set's folder."""

    id: str
    image: str | None = None
    label: str | None = None


def read_ids(path: str | Path) -> list[str]:
    """The image ids of a list file, in its order; see :func:`read_list`."""
    return [entry.id for entry in read_list(path)]


def read_list(path: str | Path, image_dir: str = IMAGE_DIR) -> list[Entry]:
    """The entries of a list file, in its order.

    A line holds a bare id (``2007_000032``), which may hold spaces, or a picture, told by its suffix, and its label:
    ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``, as in the official Caffe lists. Both paths are below the data set's
    folder, with or without the leading ``/``. A line with a picture alone is that picture, below ``image_dir`` unless it begins
    with that or with ``/``. The id of a picture is its path below ``image_dir``, or below the one other folder that all
    pictures of the list are in, without suffix. Blank lines are skipped, backslashes read as slashes.

    Raises:
        DatasetError: the file is missing, is no UTF-8 text, holds no id, or a line leads out of the data set's folder.
    """
    entries = []
    for number, line in enumerate(read_lines(path, "the list of image ids"), start=1):
        if not (line := line.replace("\\", "/")):
            continue
        if any(len(part.encode()) > 255 for part in line.split("/")):
            raise DatasetError(
                f"the list of image ids {path} holds {line[:40]!r}... in line {number}, which is too long for a file name; "
                "expected one id a line"
            )
        image, label = pair.groups() if (pair := _PAIR.fullmatch(line)) else (None, None)
        paths = [image, label] if image else [line]
        if any(_leads_out(text, bare=not image) for text in paths if text):
            raise DatasetError(
                f"the list of image ids {path} holds {line!r} in line {number}, which leads out of the data set's folder; "
                "expected an id such as 2007_000032, or paths in that folder such as /JPEGImages/x.jpg /SegmentationClass/x.png"
            )
        if image and not label and not image.startswith("/") and not _inside(image, image_dir):
            image = f"{image_dir}/{image}"
        entries.append(Entry(_clean(line), image and _clean(image), label and _clean(label)))
    if not entries:
        raise DatasetError(f"the list of image ids {path} is empty; expected one id a line")
    return _with_ids(entries, image_dir)


def below(named: str | None, folder: str) -> str | None:
    """``named`` if it lies below ``folder``, else None."""
    return named if named and _inside(named, folder) else None


def _clean(text: str) -> str:
    return str(PurePosixPath(text.lstrip("/")))


def _inside(path: str, folder: str) -> bool:
    return _clean(path).startswith(_clean(folder) + "/")


def _leads_out(text: str, bare: bool) -> bool:
    """Whether a path is not below the folder it is read in; for a bare id, a leading slash counts as leading out."""
    return (
        ".." in text.split("/")
        or text.startswith("/" if bare else "//")
        or re.match("[A-Za-z]:", text) is not None
        or _clean(text) == "."
    )


def _with_ids(entries: list[Entry], image_dir: str) -> list[Entry]:
    """The entries, with the ids of those that name a picture made from its path."""
    pictures = [entry.image for entry in entries if entry.image]
    folders = {image_dir if _inside(image, image_dir) else image.rpartition("/")[0].split("/")[0] for image in pictures}
    shared = _clean(folders.pop() if len(folders) == 1 else image_dir) + "/"

    def with_id(entry: Entry) -> Entry:
        return entry._replace(id=str(PurePosixPath(entry.image.removeprefix(shared)).with_suffix(""))) if entry.image else entry

    return [with_id(entry) for entry in entries]
