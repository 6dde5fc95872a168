"""Unpacking a fetched archive: nothing lands outside its folder, and a cut unpacking leaves nothing half."""

import gzip
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from scripts.data.download import Item, disk_errors, need_space
from utils.command import UserError


def unpacked(item: Item, directory: Path) -> bool:
    """Whether every file that unpacking the item's archive gave is there with its size (recorded in ``NAME.unpacked``)."""
    try:
        sizes = json.loads(_record(item, directory).read_text())
        return bool(sizes) and all(os.lstat(directory / name).st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _record(item: Item, directory: Path) -> Path:
    path = item.path(directory)
    return path.with_name(path.name + ".unpacked")


def unpack(item: Item, directory: Path) -> None:
    """Unpack the item's archive into its folder, through a temporary folder beside the final place.

    A member that is absolute, climbs with ``..``, lies behind a link, links to the outside, or is neither file, folder nor
    link, refuses the whole archive. Files that are already there under the same names are replaced, others are left alone.

    Raises:
        UserError: an unsafe member, a damaged archive, other contents than expected, or the disk refused.
    """
    archive, destination = item.path(directory), directory / item.unpack
    holding = destination / f".{archive.name}.unpacking"
    try:
        with disk_errors(destination):
            shutil.rmtree(holding, ignore_errors=True)
            holding.mkdir(parents=True)
            try:
                (_unzip if archive.suffix == ".zip" else _untar)(archive, holding)
            except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
                raise UserError(f"{archive} cannot be unpacked ({error}); fetch it again with --force") from error
            files = [path for path in holding.rglob("*") if path.is_symlink() or not path.is_dir()]
            sizes = {os.path.relpath(path, holding): path.lstat().st_size for path in files}
            prefix = os.path.normpath(item.unpack)
            if item.holds and not (holding / os.path.relpath(item.holds, prefix)).exists():
                top = ", ".join(sorted(path.name for path in holding.iterdir())[:8]) or "nothing"
                raise UserError(
                    f"{archive} does not hold {os.path.relpath(item.holds, prefix)}, only {top}; it is another file"
                )
            record = _record(item, directory)  # written before the move: a cut move is then seen as incomplete
            draft = record.with_name(record.name + ".part")
            draft.write_text(json.dumps({os.path.normpath(f"{prefix}/{name}"): size for name, size in sizes.items()}, indent=0))
            os.replace(draft, record)
            _move(holding, destination)
    except KeyboardInterrupt:
        print(f"\n{archive} is kept; the same command unpacks it from the start", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(holding, ignore_errors=True)


def _move(source: Path, destination: Path) -> None:
    """Move what is in ``source`` into ``destination``: whole folders where there are none yet, else file by file."""
    for entry in sorted(source.iterdir()):
        to = destination / entry.name
        if to.is_dir() and entry.is_dir() and not entry.is_symlink():
            _move(entry, to)
        elif to.is_dir():
            raise UserError(f"{to} is a folder and the archive has a file of that name; move it away")
        else:
            shutil.move(entry, to)


def _safe(name: str, archive: Path) -> None:
    """Refuse a member name or link target that does not stay below the place where it is read."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or re.match("[A-Za-z]:", name) or "\0" in name:
        raise UserError(f"{archive} holds {name!r}, which would land outside its folder; nothing was unpacked, do not trust it")


def _untar(archive: Path, folder: Path) -> None:
    need_space(folder, archive.stat().st_size)
    with tarfile.open(archive) as tar:
        for member in tqdm(tar, unit=" files", desc=f"unpacking {archive.name}", disable=None):
            _safe(member.name, archive)
            if any((folder / parent).is_symlink() for parent in Path(member.name).parents):
                raise UserError(
                    f"{archive} holds {member.name!r}, which lies behind a link; nothing was unpacked, do not trust it"
                )
            if member.issym() or member.islnk():
                _safe(member.linkname, archive)
            elif not (member.isreg() or member.isdir()):
                raise UserError(f"{archive} holds {member.name!r}, a device or pipe; nothing was unpacked, do not trust it")
            if hasattr(tarfile, "data_filter"):
                tar.extract(member, folder, filter="data")
            else:  # Python before 3.10.12 and 3.11.4
                tar.extract(member, folder, set_attrs=False)


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as package:
        members = [info for info in package.infolist() if not info.filename.startswith("__MACOSX/")]
        for info in members:
            _safe(info.filename, archive)
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
                raise UserError(
                    f"{archive} holds {info.filename!r}, a link, a device or an encrypted file; nothing was unpacked"
                )
        need_space(folder, sum(info.file_size for info in members))
        for info in tqdm(members, unit=" files", desc=f"unpacking {archive.name}", disable=None):
            package.extract(info, folder)
