"""Unpacking a fetched archive: nothing lands outside its folder, and a cut unpacking leaves nothing half."""

import errno
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from scripts.data.catalogue import Item
from utils.command import UserError
from utils.files import save_json

# OSErrors that are not the disk's: positions and names that make no sense
_SENSELESS = (None, errno.EINVAL, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


def damage(error: Exception) -> str:
    """What is wrong with an archive, in a line: by where it is broken, tarfile and zipfile raise a dozen kinds.

    Raises:
        OSError: ``error`` itself, where the disk is to blame and not the archive.
    """
    if isinstance(error, OSError) and error.errno not in _SENSELESS:
        raise error
    text = str(error).partition("\n- method bz2")[0]  # tarfile tells of every compression that it tried
    return " ".join(text.split())[:200] or type(error).__name__


def tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file. At its end it is read to the last byte, where gzip has its check sum.

    Raises:
        ValueError: the members do not end with zeros (POSIX, pax): tarfile stops silently where a header is damaged.
    """
    yield from archive
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    rest = blocks = 0
    while block := file.read(1 << 20):
        blocks, rest = blocks + 1, rest + len(block.strip(b"\0"))
    if rest or not blocks:
        raise ValueError(f"its list of members breaks off at byte {archive.offset}")


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip file whose directory is whole: zipfile reads it as far as it can, does not count, and believes its names.

    Raises:
        BadZipFile: it is not, or this is no zip file; damage to it may raise others.
    """
    package = zipfile.ZipFile(path)
    assert package.fp is not None
    package.fp.seek(package.start_dir)  # the directory, its end mark and, 6 bytes on, the number of entries
    count = int.from_bytes(package.fp.read().rpartition(b"PK\5\6")[2][6:8], "little")
    if count not in (len(package.infolist()), 0xFFFF):  # which stands for 65,535 and more
        raise zipfile.BadZipFile(f"its directory has {len(package.infolist())} of {count} entries")
    for info in package.infolist():
        package.open(info).close()  # compares its name with the one in front of its bytes
        package.fp.seek(info.header_offset + 14)
        if package.fp.read(4) != info.CRC.to_bytes(4, "little") and not info.flag_bits & 8:  # the sum stands behind the bytes
            raise zipfile.BadZipFile(f"{info.filename} has two check sums")
    return package


def record_of(archive: Path) -> Path:
    """Where :func:`unpack` notes what an archive gave."""
    return archive.with_name(archive.name + ".unpacked")


def unpacked(item: Item, directory: Path) -> bool:
    """Whether every file that unpacking the item's archive gave is there with its size."""
    try:
        sizes = json.loads(record_of(item.path(directory)).read_text())
        return bool(sizes) and all(os.lstat(directory / name).st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def unpack(item: Item, directory: Path) -> None:
    """Unpack the item's archive into its folder, through a temporary folder beside the final place.

    Files that are already there under the same names are replaced, others are left alone.

    Raises:
        UserError: an unsafe member, a damaged archive, or other contents than expected.
    """
    archive, destination = item.path(directory), directory / item.unpack
    holding = destination / f".{archive.name}.unpacking"
    shutil.rmtree(holding, ignore_errors=True)
    holding.mkdir(parents=True)
    try:
        try:
            (_unzip if archive.suffix == ".zip" else _untar)(archive, holding)
        except Exception as error:
            raise UserError(
                f"{archive} is damaged or unsafe ({damage(error)}); nothing was unpacked, fetch it anew with --force"
            ) from error
        wanted = os.path.relpath(item.holds, item.unpack)
        if not (holding / wanted).exists():
            top = ", ".join(sorted(path.name for path in holding.iterdir())[:8]) or "nothing"
            raise UserError(f"{archive} does not hold {wanted}, only {top}; it is another file")
        files = [path for path in holding.rglob("*") if path.is_symlink() or not path.is_dir()]
        sizes = {os.path.normpath(item.unpack / path.relative_to(holding)): path.lstat().st_size for path in files}
        save_json(record_of(archive), sizes)  # before the move: a cut move is then seen as incomplete
        _merge(holding, destination)
    finally:
        shutil.rmtree(holding, ignore_errors=True)


def _merge(source: Path, target: Path) -> None:
    """Move the files in ``source`` to ``target``, whose folders may be there already."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _merge(entry, target / entry.name)
            continue
        try:
            os.replace(entry, target / entry.name)
        except OSError:  # another disk, behind a link
            shutil.copyfile(entry, target / entry.name)


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        members = tqdm(tar_members(tar), unit=" files", desc=f"unpacking {archive.name}", disable=None)
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, members, filter="data")
            return
        for member in members:  # Python before 3.10.12 and 3.11.4, as Debian 12 has it
            _check_name(member.name)
            if not (member.isreg() or member.isdir()):
                raise ValueError(f"{member.name!r} is neither a file nor a folder")
            tar.extract(member, folder, set_attrs=False)


def _unzip(archive: Path, folder: Path) -> None:
    with open_zip(archive) as package:
        names = [name for name in package.namelist() if not name.startswith("__MACOSX/")]
        for name in names:
            _check_name(name)
        for name in tqdm(names, unit=" files", desc=f"unpacking {archive.name}", disable=None):
            package.extract(name, folder)


def _check_name(name: str) -> None:
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"{name!r} would land outside its folder")
