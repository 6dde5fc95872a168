"""Unpack a downloaded archive: nothing is written outside its folder, and an interruption leaves no partial files."""

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

# OSErrors that the archive causes and not the disk: invalid offsets and names
_SENSELESS = (None, errno.EINVAL, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


def damage(error: Exception) -> str:
    """One line that says what is wrong with an archive: tarfile and zipfile raise a dozen types of errors.

    Raises:
        OSError: ``error`` itself, if the disk caused it and not the archive.
    """
    if isinstance(error, OSError) and error.errno not in _SENSELESS:
        raise error
    text = str(error).partition("\n- method bz2")[0]  # tarfile lists every compression that it tried
    return " ".join(text.split())[:200] or type(error).__name__


def tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, then read it to the last byte, so that gzip's checksum is verified.

    Raises:
        ValueError: the members do not end with zeros (POSIX, pax): tarfile stops silently at a damaged header.
    """
    yield from archive
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    rest = blocks = 0
    while block := file.read(1 << 20):
        blocks, rest = blocks + 1, rest + len(block.strip(b"\0"))
    if rest or not blocks:
        raise ValueError(f"its list of members ends early, at byte {archive.offset}")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file and check its directory: zipfile does not count the entries, and compares names only on reading.

    Raises:
        BadZipFile: the directory is damaged, or this is not a zip file; other damage may raise other errors.
    """
    package = zipfile.ZipFile(path)
    assert package.fp is not None
    package.fp.seek(package.start_dir)  # the directory, its end mark and, 6 bytes on, the number of entries
    count = int.from_bytes(package.fp.read().rpartition(b"PK\5\6")[2][6:8], "little")
    if count not in (len(package.infolist()), 0xFFFF):  # 0xFFFF means 65,535 or more
        raise zipfile.BadZipFile(f"its directory has {len(package.infolist())} of {count} entries")
    for info in package.infolist():
        package.open(info).close()  # compares its name with the one in its local header
        package.fp.seek(info.header_offset + 14)
        if package.fp.read(4) != info.CRC.to_bytes(4, "little") and not info.flag_bits & 8:  # bit 3: sum after the data
            raise zipfile.BadZipFile(f"{info.filename} has two checksums")
    return package


def record_of(archive: Path) -> Path:
    """The file in which :func:`unpack` records the unpacked files."""
    return archive.with_name(archive.name + ".unpacked")


def unpacked(item: Item, directory: Path) -> bool:
    """Whether every file unpacked from the item's archive exists with its recorded size."""
    try:
        sizes = json.loads(record_of(item.path(directory)).read_text())
        return bool(sizes) and all(os.lstat(directory / name).st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def unpack(item: Item, directory: Path) -> None:
    """Unpack the item's archive into its folder, through a temporary folder in it.

    Existing files with the same names are replaced, others are left unchanged.

    Raises:
        UserError: the archive is damaged, has an unsafe member, or does not hold what is expected.
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
                f"{archive} is damaged or unsafe ({damage(error)}); nothing was unpacked, download it again with --force"
            ) from error
        wanted = os.path.relpath(item.holds, item.unpack)
        if not (holding / wanted).exists():
            top = ", ".join(sorted(path.name for path in holding.iterdir())[:8]) or "nothing"
            raise UserError(f"{archive} does not hold {wanted}, only {top}; it is another file")
        files = [path for path in holding.rglob("*") if path.is_symlink() or not path.is_dir()]
        sizes = {os.path.normpath(item.unpack / path.relative_to(holding)): path.lstat().st_size for path in files}
        save_json(record_of(archive), sizes)  # before the move, so that an interrupted move counts as incomplete
        _merge(holding, destination)
    finally:
        shutil.rmtree(holding, ignore_errors=True)


def _merge(source: Path, target: Path) -> None:
    """Move the files in ``source`` to ``target``, which may already have the same folders."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _merge(entry, target / entry.name)
            continue
        try:
            os.replace(entry, target / entry.name)
        except OSError:  # a link leads to another disk
            shutil.copyfile(entry, target / entry.name)


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        members = tqdm(tar_members(tar), unit=" files", desc=f"unpacking {archive.name}", disable=None)
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, members, filter="data")
            return
        for member in members:  # Python before 3.10.12 and 3.11.4 (Debian 12)
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
        raise ValueError(f"{name!r} would be written outside its folder")
