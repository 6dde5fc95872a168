"""Unpacking: hostile, damaged, truncated and foreign archives; existing files stay."""

import contextlib
import itertools
import os
import random
import tarfile
import zipfile

import pytest

from scripts.data import archive
from scripts.data.archive import unpack, unpacked
from tests.helpers_archives import archive_item, names, tar_of
from utils.command import UserError


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as package:
        for name, content in members:
            package.writestr(zipfile.ZipInfo(name), content)


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", b"x"),
        ("d/../../evil", b"x"),
        ("link", (tarfile.SYMTYPE, "/etc")),
        ("d/link", (tarfile.SYMTYPE, "../../evil")),
        ("link", (tarfile.LNKTYPE, "../evil")),
        ("null", (tarfile.CHRTYPE, "")),
        ("pipe", (tarfile.FIFOTYPE, "")),
    ],
)
@pytest.mark.parametrize("old_python", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hostile_tar(tmp_path, monkeypatch, member, old_python):
    """Nothing is unpacked, not even the harmless member before it."""
    if old_python:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    data = tmp_path / "data"
    data.mkdir()
    tar_of(data / "set.tgz", [("d/x.txt", b"good"), member])
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack(archive_item("set.tgz"), data)
    assert names(tmp_path) == ["data"]
    assert names(data) == ["out", "set.tgz"]
    assert names(data / "out") == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "d/..\\..\\e", "C:/evil", "\\evil"])
def test_hostile_zip(tmp_path, name):
    zip_of(tmp_path / "set.zip", [("d/x.txt", b"good"), (name, b"x")])
    with pytest.raises(UserError, match=r"would be written outside its folder\); nothing was unpacked"):
        unpack(archive_item("set.zip"), tmp_path)
    assert names(tmp_path) == ["out", "set.zip"]
    assert names(tmp_path / "out") == []


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="Python before 3.11.4 has no filter, and links are refused")
def test_absolute_names_and_links_inside_a_tar_stay_inside(tmp_path):
    tar_of(tmp_path / "set.tgz", [("/d/x.txt", b"good"), ("d/l", (tarfile.SYMTYPE, "x.txt")), ("./d/y", b"1")])
    unpack(archive_item("set.tgz"), tmp_path)
    assert (tmp_path / "out/d/l").read_bytes() == b"good"
    assert names(tmp_path) == ["out", "set.tgz", "set.tgz.unpacked"]


@pytest.mark.parametrize("suffix", ["tar", "tgz", "zip"])
def test_every_damage_gives_one_sentence(tmp_path, suffix):
    """A truncated archive is refused. No checksum may cover random damage, but it never gives a traceback."""
    rng = random.Random(1)
    members = [("d/x.txt", rng.randbytes(5_000)), ("e/z", b"text" * 500)]
    path = tmp_path / f"set.{suffix}"
    if suffix == "zip":
        zip_of(path, members)
    else:
        tar_of(path, members, "w" if suffix == "tar" else "w:gz")
    whole = path.read_bytes()
    for n in range(11):  # truncated inside the first file
        path.write_bytes(whole[: len(whole) * n // 21])
        with pytest.raises(UserError, match=r"nothing was unpacked|does not hold d/x\.txt, only nothing"):
            unpack(archive_item(path.name), tmp_path)
        assert names(tmp_path / "out") == []
    for _ in range(60):
        holes = bytearray(whole)
        del holes[rng.randrange(len(whole)) :: rng.choice((1, 7, 600))]
        position = rng.choice((rng.randrange(len(whole)), len(whole) - 1 - rng.randrange(120)))
        for content in (holes, whole[:position] + rng.randbytes(4) + whole[position + 4 :]):
            path.write_bytes(content)
            with contextlib.suppress(UserError):
                unpack(archive_item(path.name), tmp_path)


def test_another_archive(tmp_path):
    zip_of(tmp_path / "set.zip", [("readme", b"")])
    with pytest.raises(UserError, match=r"does not hold d/x\.txt, only readme"):
        unpack(archive_item("set.zip"), tmp_path)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("how", ["zip", "tar", "tar of an old Python"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unpacking_keeps_other_files(tmp_path, monkeypatch, how):
    (tmp_path / "out/d").mkdir(parents=True)
    (tmp_path / "out/d/mine.txt").write_text("mine")
    (tmp_path / "out/d/x.txt").write_text("old")
    if how == "zip":
        zip_of(tmp_path / "set.zip", [("d/x.txt", b"new"), ("e/z", b""), ("__MACOSX/d/._x.txt", b"")])
    else:
        tar_of(tmp_path / "set.tar", [("./d/x.txt", b"new"), ("e/z", b"")], "w")
    if how == "tar of an old Python":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    unpack(archive_item(f"set.{how[:3]}"), tmp_path)
    assert {p.name: p.read_text() for p in (tmp_path / "out/d").iterdir()} == {"mine.txt": "mine", "x.txt": "new"}
    assert names(tmp_path / "out") == ["d", "e"]


def test_interrupted_unpacking(tmp_path, monkeypatch):
    """Ctrl-C or a full disk while unpacking leaves no files; while moving, the next call finds and repairs it."""
    thing = archive_item("set.tgz")
    tar_of(tmp_path / "set.tgz", [("d/x.txt", b"good"), ("e/y", b"also")])

    def raising(error, real, after=0):
        calls = itertools.count()

        def call(*arguments, **options):
            if next(calls) >= after:
                raise error
            return real(*arguments, **options)

        return call

    for error in (KeyboardInterrupt(), OSError(28, "full")):
        with monkeypatch.context() as patch:
            patch.setattr(tarfile.TarFile, "makefile", raising(error, tarfile.TarFile.makefile, after=1))
            with pytest.raises(type(error)):
                unpack(thing, tmp_path)
        assert names(tmp_path / "out") == []
    with monkeypatch.context() as patch:
        patch.setattr(archive.os, "replace", raising(KeyboardInterrupt(), os.replace, after=2))  # after the record and a file
        with pytest.raises(KeyboardInterrupt):
            unpack(thing, tmp_path)
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*")) == 1
    assert not unpacked(thing, tmp_path)
    unpack(thing, tmp_path)
    assert names(tmp_path / "out") == ["d", "e"]
    assert unpacked(thing, tmp_path)
