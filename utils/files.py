"""Files that are written whole or not at all, and never over what the user brought."""

import json
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils.command import UserError

OUTPUT_MARK = "DeepLab-ResNet prediction"  # in every picture, net and archive that a command here writes


class DiskError(UserError):
    """A file cannot be written: no space, no permission, no folder. What was there before is there still."""


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and rename it: ``path`` is the old file or the whole new one.

    Missing folders are made.

    Raises:
        DiskError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps a full disk in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise DiskError(f"{path} cannot be written ({cause.strerror or cause}); free space or choose another folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_torn(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete what writers that were killed have left of files in ``folder`` of whose names ``ours(name)`` is true."""
    for path in folder.glob(".*.tmp"):
        torn = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if torn and ours(torn[1]):
            path.unlink(missing_ok=True)


def remove_torn_files(paths: Iterable[Path]) -> None:
    """:func:`remove_torn` for files that are going to be written."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, ours in names.items():
        remove_torn(folder, ours.__contains__)


def save_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class Output:
    """A file that a command is going to write.

    Attributes:
        option: by which its place was chosen, such as ``"--save-dir"``.
        folder: the folder that the option names, or that of the file that it names.
        name: the path of the file below ``folder``.
        content: what it will hold, such as ``"the mask of JPEGImages/a.jpg"``.
    """

    option: str
    folder: Path
    name: str
    content: str

    @property
    def path(self) -> Path:
        return self.folder / self.name


def check_outputs(outputs: Iterable[Output], inputs: Iterable[str | Path], data_folders: Iterable[str | Path] = ()) -> None:
    """Make sure, before any work is done, that every output can be written and destroys nothing; makes missing folders.

    What an earlier run left under the same names may be written over, and nothing else; what one that was killed left half
    written is removed.

    Args:
        inputs: files that the command reads.
        data_folders: folders of pictures and labels, which take no outputs: a prediction there would be read as a label.

    Raises:
        UserError: an output is an input (by whatever name or link), lies in one of ``data_folders`` or outside its own folder,
            would replace a file of other origin, is another output too, or cannot be written.
    """
    outputs = list(outputs)
    read = {_identity(path): path for path in inputs}
    data = {_identity(folder): folder for folder in data_folders}
    parents = dict.fromkeys(output.path.parent for output in outputs)
    real = {folder: folder.resolve() for folder in {*parents, *(output.folder for output in outputs)}}
    taken = {
        folder: next((data[key] for place in (path, *path.parents) if (key := _identity(place)) in data), None)
        for folder, path in real.items()
    }
    for output in outputs:
        path, folder = output.path, output.folder
        refused = f"{output.option}: {output.content} would be written to {path}"
        if not real[path.parent].is_relative_to(real[folder]):
            raise UserError(f"{refused}, outside {folder}; mend its name or the links in {folder}")
        if place := taken[folder] or taken[path.parent]:
            raise UserError(f"{refused}, among the data of {place}; choose a folder of its own")
        if source := read.get(_identity(path)):
            raise UserError(f"{refused}, over {source}, which is read; choose another folder")
        if path.is_dir():
            raise UserError(f"{refused}, which is a folder; choose another place")
        if path.exists() and output.option != "--report" and not _is_output(path):  # a report's folder is told by its own mark
            raise UserError(f"{refused}, over a file that is no earlier output; choose another place, or move that file")
    _refuse_shared(outputs, real, {folder: _ignores_case(folder) for folder in parents})
    for folder in parents:
        check_writable(folder)
    remove_torn_files(output.path for output in outputs)


def check_writable(folder: Path) -> None:
    """Make ``folder`` if it is missing; raise :class:`DiskError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DiskError(f"nothing can be written to {folder} ({error.strerror}); choose another folder") from None


def _refuse_shared(outputs: Iterable[Output], real: dict[Path, Path], ignores_case: dict[Path, bool]) -> None:
    """Raise :class:`UserError` if two outputs of different content are one file."""
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


def _is_output(path: Path) -> bool:
    """Whether a file can be an earlier output: most carry a mark, JSON the name of the weights; of some kinds only we write."""
    try:
        if path.suffix.lower() in (".png", ".svg", ".pdf", ".onnx", ".pt2", ".zip"):
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(OUTPUT_MARK.encode()) >= 0
        if path.suffix.lower() in (".npz", ".mp4", ".html", ".jpg", ".jpeg", ".tgz"):
            return True
        return "restore_from" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _identity(path: str | Path) -> object:
    """What two paths have in common exactly if they lead to one file or folder: by other spellings, links, or not there yet."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _ignores_case(folder: Path) -> bool:
    """Whether A.png and a.png are one file in ``folder``, judged by the name of the nearest folder that exists."""
    place = folder.resolve()
    while not place.exists() or place.name.swapcase() == place.name:
        if place == place.parent:
            return False
        place = place.parent
    return _identity(place) == _identity(place.with_name(place.name.swapcase()))
