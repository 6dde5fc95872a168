"""Files that are written completely or not at all."""

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from utils.command import UserError

LONGEST_PATH = 4095  # bytes, on Linux
_KEPT = 100  # bytes of a file name that its temporary file keeps
# .<end of a name>.<hash>.<random>.tmp, and .<name>.<process>.tmp of earlier versions
_TORN = re.compile(r"\.(.+?)\.(?:([0-9a-f]{8})\.[0-9a-f]{8}|\d+)\.tmp(?:\.mp4)?", re.DOTALL)


class DiskError(UserError):
    """A file cannot be written: no space, no permission, no folder. The old file is unchanged."""


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any], sync: bool = True) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and rename it: ``path`` is the old file or the complete new one.

    Missing folders are created.

    Args:
        sync: wait until the data is on the disk, so that this also holds after a power failure.

    Raises:
        DiskError: the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:  # always a new file, never through a link
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps a full disk in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        advice = "choose a shorter name" if cause.errno == errno.ENAMETOOLONG else "free space or choose another folder"
        raise DiskError(f"{path} cannot be written ({cause.strerror or cause}); {advice}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """The name of a file that becomes ``path``: ``.<end of its name>.<hash>.<random>.tmp``, valid if ``path`` is.

    Args:
        suffix: appended for writers that need it, such as ``".mp4"``.
    """
    return path.with_name(f".{'.'.join(_short(path.name))}.{secrets.token_hex(4)}.tmp{suffix}")


def _short(name: str) -> tuple[str, str]:
    """The end of a file name that its temporary file keeps, and a hash of the whole name."""
    return end_of(name, _KEPT), hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def end_of(name: str, most: int) -> str:
    """The last characters of a file name that fit into ``most`` bytes."""
    return os.fsencode(name)[-most:].decode(errors="ignore")


def _torn(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """The files that killed writers left in ``folder``: path, end of the name, and hash ("" in earlier versions)."""
    for path in folder.glob(".*.tmp*"):
        if torn := _TORN.fullmatch(path.name):
            yield path, torn[1], torn[2] or ""


def remove_torn(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete the temporary files that killed writers left in ``folder``, if ``ours`` accepts the last 100 bytes of the name."""
    for path, name, _ in _torn(folder):
        if ours(name):
            path.unlink(missing_ok=True)


def remove_torn_files(paths: Iterable[Path]) -> None:
    """:func:`remove_torn` for files that will be written."""
    names: dict[Path, set[tuple[str, str]]] = {}
    for path in paths:  # earlier versions kept the whole name, without the suffix for videos
        names.setdefault(path.parent, set()).update([_short(path.name), (path.name, ""), (path.name.removesuffix(".mp4"), "")])
    for folder, ours in names.items():
        for path, *name in _torn(folder):
            if tuple(name) in ours:
                path.unlink(missing_ok=True)


def save_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def check_writable(folder: Path) -> None:
    """Create ``folder`` if it is missing; raise :class:`DiskError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DiskError(f"nothing can be written to {folder} ({error.strerror}); choose another folder") from None
