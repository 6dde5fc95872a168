"""Outputs never replace the user's files: every file that a command writes is checked here first."""

import gzip
import mmap
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.command import UserError
from utils.files import LONGEST_PATH, DiskError, check_writable, remove_torn_files

OUTPUT_MARK = "DeepLab-ResNet prediction"  # in every file that a command writes; only files with it may be replaced
_MARK = OUTPUT_MARK.encode()
_JPEG_COMMENT = b"\xff\xfe" + (2 + len(_MARK)).to_bytes(2, "big") + _MARK  # a COM segment (ITU-T T.81, B.2.4.5)
_ZIP_COMMENT = len(_MARK).to_bytes(2, "little") + _MARK  # at the end of an archive (PKWARE APPNOTE, 4.3.16)
_MP4_BOX = (8 + len(_MARK)).to_bytes(4, "big") + b"free" + _MARK  # free space (ISO/IEC 14496-12, 8.1.2)
_HEAD, _ALL = (0, 4096), (0,)
_KINDS: dict[str, tuple[bytes, bytes, tuple[int, ...]]] = {  # suffix: start of a file, bytes with the mark, and where
    ".png": (rb"\x89PNG\r\n\x1a\n", b"tEXtSoftware\0" + _MARK, _HEAD),
    ".jpg": (rb"\xff\xd8", _JPEG_COMMENT, _HEAD),
    ".html": (rb"<!doctype html>", b'<meta name="generator" content="%s">' % _MARK, _HEAD),
    ".svg": (rb"<\?xml", b"<dc:title>%s</dc:title>" % _MARK, _HEAD),
    ".pdf": (rb"%PDF", b"/Creator (%s)" % _MARK, _ALL),
    ".onnx": (rb"\x08", b"\n\x07made_by\x12%c%s" % (len(_MARK), _MARK), _ALL),  # an entry of metadata_props
    ".zip": (rb"PK", _ZIP_COMMENT, (-len(_ZIP_COMMENT),)),
    ".tgz": (rb"\x1f\x8b\x08\x10.{6}%s\0" % _MARK, b"", _ALL),  # a header with only a comment (RFC 1952)
    ".mp4": (rb".{4}ftyp", _MP4_BOX, (-len(_MP4_BOX),)),
}
_KINDS |= {".jpeg": _KINDS[".jpg"], ".npz": _KINDS[".zip"], ".pt2": _KINDS[".zip"], ".gz": _KINDS[".tgz"]}

_JSON = rb'\s*\{\s*"made_by"\s*:\s*"%s"' % _MARK  # for all other suffixes


@dataclass(frozen=True)
class Output:
    """A file that a command is going to write.

    Attributes:
        option: the option that sets its path, such as ``"--save-dir"``.
        folder: the folder that the option names, or the folder of the file that it names.
        name: the path of the file below ``folder``.
        content: its future content, such as ``"the mask of JPEGImages/a.jpg"``.
    """

    option: str
    folder: Path
    name: str
    content: str

    @property
    def path(self) -> Path:
        return self.folder / self.name


def check_outputs(outputs: Iterable[Output], inputs: Iterable[str | Path], data_folders: Iterable[str | Path] = ()) -> None:
    """Check, before any work is done, that every output can be written and destroys nothing; creates missing folders.

    Only outputs of earlier runs may be overwritten. Incomplete files that a killed run left are removed.

    Args:
        inputs: files that the command reads.
        data_folders: folders of images and labels, where no output is allowed: a prediction there would be read as a label.

    Raises:
        UserError: an output is an input (by whatever name or link), is in one of ``data_folders`` or outside its own folder,
            would replace a file that is not an earlier output, has the path of another output, or cannot be written.
    """
    outputs = list(outputs)
    for output in outputs:
        if len(os.fsencode(output.path)) > LONGEST_PATH:  # resolving it, folder by folder, would take minutes
            raise DiskError(
                f"{output.option}: {output.content} would be written to {str(output.path)[:100]}...: File name too long"
            )
    read = {_identity(path): path for path in inputs}
    data = {_identity(folder): folder for folder in data_folders}
    parents = dict.fromkeys(output.path.parent for output in outputs)
    real = {folder: Path(os.path.realpath(folder)) for folder in {*parents, *(output.folder for output in outputs)}}
    taken = {
        folder: next((data[key] for place in (path, *path.parents) if (key := _identity(place)) in data), None)
        for folder, path in real.items()
    }
    for output in outputs:
        path, folder = output.path, output.folder
        refused = f"{output.option}: {output.content} would be written to {path}"
        if not real[path.parent].is_relative_to(real[folder]):
            raise UserError(f"{refused}, outside {folder}; correct its name or the links in {folder}")
        if place := taken[folder] or taken[path.parent]:
            raise UserError(f"{refused}, among the data of {place}; choose a folder of its own")
        if source := read.get(_identity(path)):
            raise UserError(f"{refused}, over {source}, which is read; choose another folder")
        if os.path.isdir(path):
            raise UserError(f"{refused}, which is a folder; choose another place")
        if os.path.lexists(path) and not is_output(path):
            raise UserError(f"{refused}, over a file that is no earlier output; choose another place, or move that file")
    _refuse_shared(outputs, real, {folder: _ignores_case(folder) for folder in parents})
    for folder in parents:
        check_writable(folder)
    for output in outputs:
        try:
            with suppress(FileNotFoundError):
                os.lstat(output.path)
        except OSError as error:  # the file system refuses the name
            text = f"{output.option}: {output.path} cannot be written ({error.strerror}); choose another name"
            raise DiskError(text) from None
    remove_torn_files(output.path for output in outputs)


def _refuse_shared(outputs: Iterable[Output], real: dict[Path, Path], ignores_case: dict[Path, bool]) -> None:
    """Raise :class:`UserError` if two outputs with different content are the same file."""
    written: dict[str, Output] = {}
    for output in outputs:
        parent = output.path.parent
        place = str(real[parent] / output.path.name)
        other = written.setdefault(place.casefold() if ignores_case[parent] else place, output)
        if other.content != output.content:
            raise UserError(
                f"{other.content} ({other.option}) and {output.content} ({output.option}) would both be written to "
                f"{output.path}; choose different folders, or names that differ"
            )


def is_output(path: Path) -> bool:
    """Whether a file is an earlier output: it has :data:`OUTPUT_MARK` in the place for files of its suffix."""
    begins, marked, place = _KINDS.get(path.suffix.lower(), (_JSON, b"", _ALL))
    if not os.path.isfile(path):  # a pipe or a device may block its reader
        return False
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return re.match(begins, content, re.DOTALL) is not None and content.find(marked, *place) >= 0
    except (OSError, ValueError):  # unreadable or empty
        return False


def mark_zip(file: IO[bytes]) -> None:
    """Add the mark as the comment of the zip archive (by any suffix) that was written to ``file`` without a comment."""
    file.seek(-2, os.SEEK_END)
    file.write(_ZIP_COMMENT)


def marked_gzip(data: bytes) -> bytes:
    """``data`` compressed, with the mark as the comment; always the same bytes."""
    packed = gzip.compress(data, mtime=0)  # no flags: a header of 10 bytes
    return packed[:3] + b"\x10" + packed[4:10] + _MARK + b"\0" + packed[10:]


def marked_jpeg(data: bytes) -> bytes:
    """A JFIF file with the mark in a comment after its first segment."""
    end = 4 + int.from_bytes(data[4:6], "big")
    return data[:end] + _JPEG_COMMENT + data[end:]


def mark_mp4(path: Path) -> None:
    """Append the mark to an MPEG-4 file, in a box that players skip."""
    with open(path, "ab") as file:
        file.write(_MP4_BOX)
        file.flush()
        os.fsync(file.fileno())


def _identity(path: str | Path) -> object:
    """A value that two paths share exactly if they lead to the same file or folder, by other spellings or links or not."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _ignores_case(folder: Path) -> bool:
    """Whether A.png and a.png are one file in ``folder``, judged by the name of the nearest folder that exists."""
    place = Path(os.path.realpath(folder))  # which survives loops of links
    while not os.path.exists(place) or place.name.swapcase() == place.name:
        if place == place.parent:
            return False
        place = place.parent
    return _identity(place) == _identity(place.with_name(place.name.swapcase()))
