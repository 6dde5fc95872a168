"""Downloads against a server on the loopback address that misbehaves in every way a server can."""

import contextlib
import dataclasses
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.data.archive import unpack, unpacked
from scripts.data.download import (
    ChecksumError,
    DownloadError,
    Item,
    _Redirects,
    check,
    disk_errors,
    fetch,
    looks_like_html,
    take,
)
from scripts.download import CATALOGUE, main
from tests.conftest import hear_ctrl_c
from utils.command import UserError

ROOT = Path(__file__).resolve().parent.parent
PAYLOAD = random.Random(7).randbytes(300_001)
SUM = hashlib.sha256(PAYLOAD).hexdigest()
HTML = b"<!DOCTYPE html><html><body>Quota exceeded</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files[path]``; the steps in ``server.plan[path]`` are used up one a request and break that request."""

    def do_GET(self):
        server, path = self.server, self.path
        byte_range = self.headers.get("Range")
        server.log.append((path, byte_range, self.headers.get("If-Range")))
        step = server.plan[path].pop(0) if server.plan.get(path) else {}
        body = server.files.get(path)
        if "status" in step or body is None:
            return self.reply(step.get("status", 404), b"sorry", step.get("headers", {}))
        body, headers = step.get("body", body), {"ETag": server.etags.get(path, '"one"'), **step.get("headers", {})}
        start = 0
        unchanged = self.headers.get("If-Range") in (None, headers["ETag"])
        if byte_range and unchanged and not step.get("ignore_range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1])
            if start >= len(body):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if start else 200, body[start:], headers, step.get("cut"), step.get("stall"))

    def reply(self, status, body, headers, cut=None, stall=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body if cut is None else body[:cut])
            if stall:
                time.sleep(stall)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.plan, server.etags, server.log = {"/a.bin": PAYLOAD}, {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def item(server, *paths, **changes):
    urls = tuple(server.url + path for path in paths or ("/a.bin",))
    fields = {"sha256": SUM, "size": len(PAYLOAD), "after": "python train.py --restore-from {path}"} | changes
    return Item("thing", "a.bin", "weights", "MIT", urls, **fields)


def quick(thing, target, **options):
    return fetch(thing, target, **{"tries": 3, "timeout": 5.0, "pause": 0.01} | options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- check sums


def test_check_against_published_test_vectors(tmp_path, capsys):
    """FIPS 180 and RFC 1321: the digests of one million letters 'a'."""
    path = tmp_path / "a"
    path.write_bytes(b"a" * 1_000_000)
    sums = {
        "md5": "7707d6ae4e027c70eea2a935c2296f21",
        "sha1": "34aa973cd4c4daa4f61eeb2bdbad27316534016f",
        "sha256": "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
    }
    good = {"size": 1_000_000, "sha256_prefix": "cdc76e5c"} | sums
    assert check(Item("x", "a", "data", "", **good), path) == sums["sha256"]
    for name, value in good.items():
        wrong = value + 1 if name == "size" else ("0" if value[0] != "0" else "1") + value[1:]
        with pytest.raises(ChecksumError, match="bytes" if name == "size" else name.replace("_", " ")):
            check(Item("x", "a", "data", "", **good | {name: wrong}), path)
        if name != "size":
            capsys.readouterr()
            check(Item("x", "a", "data", "", **good | {name: wrong, "sum_certain": False}), path)
            assert "WARNING" in capsys.readouterr().out
    check(Item("x", "a", "data", ""), path)
    assert re.search(f"no check sum is known.*{sums['sha256']}", capsys.readouterr().out)


# ---- fetching


def test_plain(server, tmp_path):
    target = tmp_path / "sub" / "a.bin"
    assert quick(item(server), target) == SUM
    assert target.read_bytes() == PAYLOAD
    assert names(target.parent) == ["a.bin"]
    assert server.log == [("/a.bin", None, None)]


def test_cut_connection_is_resumed(server, tmp_path, capsys):
    server.plan["/a.bin"] = [{"cut": 100_000}, {"cut": 50_000}]
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert server.log == [("/a.bin", None, None), ("/a.bin", "bytes=100000-", '"one"'), ("/a.bin", "bytes=150000-", '"one"')]
    assert "cut after 100000 of 300001 bytes" in capsys.readouterr().err


def test_many_cuts_are_no_failure_while_bytes_come(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 30_000}] * 9
    quick(item(server), tmp_path / "a.bin", tries=2)
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert len(server.log) == 10


def test_gives_up_and_goes_on_in_a_later_call(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 100_000}, {"cut": 0}, {"cut": 0}]
    with pytest.raises(DownloadError, match=r"cut after 100000 of 300001 bytes \(3 attempts in a row\)"):
        quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").read_bytes() == PAYLOAD[:100_000]
    server.log.clear()
    quick(item(server), tmp_path / "a.bin")
    assert server.log == [("/a.bin", "bytes=100000-", '"one"')]
    assert names(tmp_path) == ["a.bin"]


def test_slow_reply_times_out_and_is_resumed(server, tmp_path, capsys):
    server.plan["/a.bin"] = [{"cut": 200_000, "stall": 1.5}]
    quick(item(server), tmp_path / "a.bin", timeout=0.3)
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert [entry[1] for entry in server.log] == [None, "bytes=200000-"]
    assert "no answer for 0.3 s" in capsys.readouterr().err


def test_range_ignored_starts_over(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 100_000}, {"ignore_range": True}]
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD


def test_file_changed_between_two_calls(server, tmp_path):
    """Same size, other ETag: If-Range keeps the old beginning from being joined to the new end, also without a sum."""
    server.plan["/a.bin"] = [{"cut": 100_000}] + [{"cut": 0}] * 2
    free = item(server, sha256="", size=None)
    with pytest.raises(DownloadError):
        quick(free, tmp_path / "a.bin")
    server.files["/a.bin"], server.etags["/a.bin"] = PAYLOAD[::-1], '"two"'
    quick(free, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD[::-1]


def test_content_range_of_another_file_starts_over(server, tmp_path):
    """A server that answers 206 although the file has changed (it does not know If-Range)."""
    server.plan["/a.bin"] = [
        {"cut": 100_000},
        {"status": 206, "headers": {"Content-Range": "bytes 100000-100004/100005", "ETag": '"one"'}},
        {},
    ]
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert [entry[1] for entry in server.log] == [None, "bytes=100000-", None]


@pytest.mark.parametrize(
    ("begun", "requests"), [(PAYLOAD, 1), (PAYLOAD + b"more", 2), (b"x" * 300_000, 2), (b"x" * 300_001, 2)]
)
def test_partial_file_that_is_whole_too_long_or_spoilt(server, tmp_path, begun, requests):
    """The whole one is taken (status 416), the others are fetched from the start: after 416, or after the wrong sum."""
    (tmp_path / "a.bin.part").write_bytes(begun)
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert len(server.log) == requests


def test_wrong_sum_never_gets_the_name(server, tmp_path):
    server.files["/a.bin"] = PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1])
    with pytest.raises(DownloadError, match=f"sha256 is .* and should be {SUM}"):
        quick(item(server), tmp_path / "a.bin")
    assert names(tmp_path) == []
    assert len(server.log) == 1


def test_wrong_sum_over_a_bad_line_comes_to_an_end(server, tmp_path):
    """A wrong sum after a resumption is worth one more transfer, not endless ones."""
    server.files["/a.bin"] = PAYLOAD[::-1]
    server.plan["/a.bin"] = [{"cut": 200_000}, {}] * 20
    with pytest.raises(DownloadError, match="should be"):
        quick(item(server), tmp_path / "a.bin")
    assert len(server.log) == 4
    assert names(tmp_path) == []


def test_wrong_size_is_refused_before_the_transfer(server, tmp_path):
    with pytest.raises(DownloadError, match="offers 300001 bytes where 5 are expected"):
        quick(item(server, size=5), tmp_path / "a.bin")
    assert names(tmp_path) == []


def test_404_goes_to_the_mirror_at_once(server, tmp_path, capsys):
    quick(item(server, "/gone.bin", "/a.bin"), tmp_path / "a.bin", pause=60)
    assert [entry[0] for entry in server.log] == ["/gone.bin", "/a.bin"]
    assert "HTTP 404" in capsys.readouterr().err


def test_mirror_continues_only_where_a_sum_tells(server, tmp_path):
    server.files["/b.bin"] = PAYLOAD
    for changes, expected in (({}, "bytes=100000-"), ({"sha256": ""}, None)):
        server.plan["/a.bin"] = [{"cut": 100_000}, {"status": 404}]
        server.log.clear()
        quick(item(server, "/a.bin", "/b.bin", **changes), tmp_path / "a.bin")
        assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
        assert server.log[-1] == ("/b.bin", expected, None)


def test_busy_server_and_retry_after(server, tmp_path):
    server.plan["/a.bin"] = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}]
    start = time.monotonic()
    quick(item(server), tmp_path / "a.bin")
    assert 1.0 <= time.monotonic() - start < 4
    server.plan["/a.bin"] = [{"status": 503, "headers": {"Retry-After": "7200"}}]
    with pytest.raises(DownloadError, match="come back in 7200 seconds"):
        quick(item(server), tmp_path / "b.bin")
    server.plan["/a.bin"] = [{"status": 500}] * 3
    server.log.clear()
    with pytest.raises(DownloadError, match=r"HTTP 500 .*3 attempts"):
        quick(item(server), tmp_path / "b.bin")
    assert len(server.log) == 3


def test_redirects(server, tmp_path):
    """A redirect keeps the Range header, and never leads from https to http."""
    server.plan["/old"] = [{"status": 302, "headers": {"Location": "/a.bin"}}] * 2
    server.plan["/a.bin"] = [{"cut": 100_000}]
    quick(item(server, "/old"), tmp_path / "a.bin")
    assert [entry[:2] for entry in server.log[2:]] == [("/old", "bytes=100000-"), ("/a.bin", "bytes=100000-")]
    request = urllib.request.Request("https://a.example/x")
    assert _Redirects().redirect_request(request, None, 302, "", {}, "https://b.example/").full_url == "https://b.example/"
    with pytest.raises(urllib.error.HTTPError, match="unprotected"):
        _Redirects().redirect_request(request, None, 302, "", {}, "http://a.example/x")


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thing = Item("thing", "a.bin", "weights", "", ("http://127.0.0.1:9/a.bin",))
    with pytest.raises(DownloadError, match=r"refused.*--from FILE"):
        quick(thing, tmp_path / "a.bin")


@pytest.mark.parametrize("step", [{"body": HTML}, {"headers": {"Content-Type": "text/html; charset=utf-8"}}, {"body": b""}])
def test_web_page_or_nothing_in_place_of_the_file(server, tmp_path, step):
    """It is refused in words, and does not spoil what has come before."""
    (tmp_path / "a.bin.part").write_bytes(PAYLOAD[:1000])
    server.plan["/a.bin"] = [step | {"ignore_range": True}]
    with pytest.raises(DownloadError, match=r"web page|empty file"):
        quick(item(server, size=None), tmp_path / "a.bin")
    assert names(tmp_path) == ["a.bin.part"]
    assert (tmp_path / "a.bin.part").read_bytes() == PAYLOAD[:1000]


def test_html_is_told_from_other_files():
    for head in (HTML, b"\n  <html lang=en>", b"<!-- saved --> <HEAD>", b"<!doctype HTML PUBLIC"):
        assert looks_like_html(head)
    for head in (b"PK\x03\x04", b"\x1f\x8b\x08", b"<?xml version", b"htm<html>", b"", PAYLOAD[:512]):
        assert not looks_like_html(head)


def test_disk_full_and_no_permission(server, tmp_path, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"MiB free and .* are needed"):
        quick(item(server), tmp_path / "a.bin")
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        quick(item(server), tmp_path / "file" / "a.bin")
    real, written = io.FileIO.write, []

    class Full(io.FileIO):
        def write(self, data):
            if written:
                raise OSError(28, "No space left on device")
            written.append(real(self, data))
            return written[0]

    monkeypatch.setattr("scripts.data.download._Part.open", lambda self, *args: Full(self.path, "wb"))
    with pytest.raises(UserError, match=r"no space is left for .*a\.bin\.part; .* goes on from there"):
        quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").stat().st_size == written[0] > 0


def test_disk_errors_in_words(tmp_path):
    for number, text in (
        (13, "no permission for"),
        (30, "no permission for"),
        (122, "no space is left"),
        (5, "cannot be written"),
    ):
        with pytest.raises(UserError, match=text), disk_errors(tmp_path):
            raise OSError(number, "in other words")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        quick(item(server), tmp_path / "a.bin")
    tmp_path.chmod(0o700)


# ---- archives


def tar_of(path, members, mode="w:gz"):
    """A tar of (name, content or (type, link target))."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as package:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            package.writestr(info, content)


def archive_item(filename, **changes):
    return Item("set", filename, "data", "", **{"unpack": "out", "holds": "out/d/x.txt"} | changes)


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", b"x"),
        ("d/../../evil", b"x"),
        ("/evil", b"x"),
        ("..\\evil", b"x"),
        ("C:/evil", b"x"),
        ("link", (tarfile.SYMTYPE, "/etc")),
        ("d/link", (tarfile.SYMTYPE, "../../evil")),
        ("link", (tarfile.LNKTYPE, "../evil")),
        ("null", (tarfile.CHRTYPE, "")),
        ("pipe", (tarfile.FIFOTYPE, "")),
    ],
)
def test_hostile_tar(tmp_path, member):
    """Nothing is unpacked, not even the harmless member before it."""
    data = tmp_path / "data"
    data.mkdir()
    tar_of(data / "set.tgz", [("d/x.txt", b"good"), member])
    with pytest.raises(UserError, match="do not trust it"):
        unpack(archive_item("set.tgz"), data)
    assert names(tmp_path) == ["data"]
    assert names(data) == ["out", "set.tgz"]
    assert names(data / "out") == []


def test_tar_member_behind_a_link(tmp_path):
    tar_of(tmp_path / "set.tgz", [("real/y", b"1"), ("d", (tarfile.SYMTYPE, "real")), ("d/x.txt", b"2")])
    with pytest.raises(UserError, match="behind a link"):
        unpack(archive_item("set.tgz"), tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old_python", [False, True])
def test_harmless_tar_with_a_link_inside(tmp_path, monkeypatch, old_python):
    if old_python:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    tar_of(tmp_path / "set.tgz", [("d/x.txt", b"good"), ("d/l", (tarfile.SYMTYPE, "x.txt")), ("./d/y", b"1")])
    unpack(archive_item("set.tgz"), tmp_path)
    assert (tmp_path / "out/d/l").read_bytes() == b"good"
    assert names(tmp_path) == ["out", "set.tgz", "set.tgz.unpacked"]


@pytest.mark.parametrize(
    "member", [("../evil", b"x", 0o100644), ("/evil", b"x", 0o100644), ("l", b"/etc", 0o120777), ("d/..\\..\\e", b"", 0)]
)
def test_hostile_zip(tmp_path, member):
    zip_of(tmp_path / "set.zip", [("d/x.txt", b"good", 0o100644), member])
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack(archive_item("set.zip"), tmp_path)
    assert names(tmp_path) == ["out", "set.zip"]
    assert names(tmp_path / "out") == []


def test_damaged_or_other_archives(tmp_path):
    tar_of(tmp_path / "set.tgz", [("d/x.txt", random.Random(1).randbytes(50_000))])
    (tmp_path / "set.tgz").write_bytes((tmp_path / "set.tgz").read_bytes()[:20_000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(archive_item("set.tgz"), tmp_path)
    (tmp_path / "set.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(archive_item("set.zip"), tmp_path)
    zip_of(tmp_path / "other.zip", [("readme", b"", 0)])
    with pytest.raises(UserError, match=r"does not hold d/x\.txt, only readme"):
        unpack(archive_item("other.zip"), tmp_path)
    assert names(tmp_path / "out") == []


def test_unpacking_leaves_other_files_alone(tmp_path):
    (tmp_path / "out/d").mkdir(parents=True)
    (tmp_path / "out/d/mine.txt").write_text("mine")
    (tmp_path / "out/d/x.txt").write_text("old")
    zip_of(tmp_path / "set.zip", [("d/x.txt", b"new", 0), ("e/z", b"", 0), ("__MACOSX/d/._x.txt", b"", 0)])
    unpack(archive_item("set.zip"), tmp_path)
    assert {p.name: p.read_text() for p in (tmp_path / "out/d").iterdir()} == {"mine.txt": "mine", "x.txt": "new"}
    assert names(tmp_path / "out") == ["d", "e"]


def test_cut_unpacking(tmp_path, monkeypatch, capsys):
    """Ctrl-C or a full disk while unpacking leaves nothing; while moving, it is seen and mended by the next call."""
    thing = archive_item("set.tgz")
    tar_of(tmp_path / "set.tgz", [("d/x.txt", b"good"), ("e/y", b"also")])
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), UserError)):
        with monkeypatch.context() as patch:
            patch.setattr(tarfile.TarFile, "extract", raising(error))
            with pytest.raises(raised):
                unpack(thing, tmp_path)
        assert names(tmp_path / "out") == []
    assert "set.tgz is kept" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", raising(KeyboardInterrupt(), after=1))
        with pytest.raises(KeyboardInterrupt):
            unpack(thing, tmp_path)
    assert names(tmp_path / "out") == ["d"]
    assert not unpacked(thing, tmp_path)
    unpack(thing, tmp_path)
    assert names(tmp_path / "out") == ["d", "e"]
    assert unpacked(thing, tmp_path)


def raising(error, after=0, real=shutil.move):
    calls = []

    def call(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise error
        return real(*args)

    return call


# ---- the command


def run(server_item, tmp_path, *options, name="thing"):
    folders = [
        "--data-dir",
        str(tmp_path / "data"),
        "--weights-dir",
        str(tmp_path / "weights"),
        "--timeout",
        "5",
        "--tries",
        "2",
    ]
    return main([name, *folders, *map(str, options)], (server_item,))


def test_command_fetches_once(server, tmp_path, capsys):
    thing = item(server)
    assert run(thing, tmp_path) == 0
    assert f"next:\n  python train.py --restore-from {tmp_path / 'weights/a.bin'}" in capsys.readouterr().out
    assert run(thing, tmp_path) == 0
    assert "is there" in capsys.readouterr().out
    assert len(server.log) == 1
    assert run(thing, tmp_path, "--force") == 0
    assert len(server.log) == 2


def test_command_does_not_overwrite_another_file(server, tmp_path, capsys):
    target = tmp_path / "weights/a.bin"
    target.parent.mkdir()
    target.write_bytes(b"mine")
    assert run(item(server), tmp_path) == 2
    assert "4 bytes and thing has 300001" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert run(item(server), tmp_path, "--force") == 0
    assert target.read_bytes() == PAYLOAD


def test_command_failure_has_status_1(server, tmp_path, capsys):
    assert run(item(server, "/gone"), tmp_path) == 1
    assert "HTTP 404" in capsys.readouterr().err


def test_command_unpacks(server, tmp_path, capsys):
    data = tmp_path / "data"
    tar_of(tmp_path / "set.tgz", [("d/x.txt", b"good"), ("d/y.txt", b"also")])
    packed = (tmp_path / "set.tgz").read_bytes()
    server.files["/set.tgz"] = packed
    thing = archive_item(
        "set.tgz", urls=(server.url + "/set.tgz",), sha256=hashlib.sha256(packed).hexdigest(), after="see {path}"
    )
    assert run(thing, tmp_path, name="set") == 0
    assert (data / "out/d/x.txt").read_bytes() == b"good"
    assert f"see {data / 'out/d/x.txt'}" in capsys.readouterr().out
    assert run(thing, tmp_path, name="SET.tgz") == 0  # by the name of the file, in any case
    assert "complete; nothing to do" in capsys.readouterr().out
    (data / "out/d/y.txt").unlink()  # mended from the archive
    assert run(thing, tmp_path, name="set") == 0
    assert (data / "out/d/y.txt").read_bytes() == b"also"
    assert len(server.log) == 1
    assert run(thing, tmp_path, "--remove-archive", name="set") == 0
    assert run(thing, tmp_path, name="set") == 0  # complete without its archive
    assert names(data) == ["out", "set.tgz.unpacked"]
    assert len(server.log) == 1


def test_voc_and_sbd_go_where_the_next_command_looks(server, tmp_path, capsys):
    """The catalogue's own entries, with toy archives of the published layout."""
    toys, data = [], tmp_path / "data"
    for thing, member in ((0, "VOCdevkit/VOC2012/JPEGImages/a.jpg"), (1, "benchmark_RELEASE/dataset/cls/a.mat")):
        toy = CATALOGUE[thing]
        tar_of(tmp_path / toy.filename, [(member, b"x")], "w" if toy.filename.endswith("tar") else "w:gz")
        server.files["/" + toy.filename] = packed = (tmp_path / toy.filename).read_bytes()
        sums = {name: hashlib.new(name, packed).hexdigest() for name in ("md5", "sha1", "sha256")}
        toys.append(dataclasses.replace(toy, urls=(f"{server.url}/{toy.filename}",), size=len(packed), **sums))
    (data / "VOCdevkit/VOC2012/Mine").mkdir(parents=True)
    assert main(["VOC2012", "sbd", "--data-dir", str(data)], tuple(toys)) == 0
    assert names(data / "VOCdevkit/VOC2012") == ["JPEGImages", "Mine"]
    assert (data / "SBD/benchmark_RELEASE/dataset/cls/a.mat").exists()
    assert (data / "SBD/benchmark.tgz").exists()
    command = f"python scripts/prepare_voc.py --data-dir {data}/VOCdevkit/VOC2012 --sbd {data}/SBD/benchmark_RELEASE"
    assert capsys.readouterr().out.endswith(f"next:\n  {command}\n")


def test_command_leaves_a_folder_of_other_origin(server, tmp_path, capsys):
    (tmp_path / "data/out/d").mkdir(parents=True)
    (tmp_path / "data/out/d/x.txt").write_text("mine")
    thing = archive_item("set.tgz", urls=(server.url + "/set.tgz",))
    assert run(thing, tmp_path, name="set") == 0
    assert "not checked; nothing done" in capsys.readouterr().out
    assert server.log == []


def test_file_fetched_by_hand(server, tmp_path, capsys):
    manual = Item("thing", "a.bin", "weights", "", sha256=SUM, manual="https://drive.example/a", after="go {path}")
    assert run(manual, tmp_path) == 2
    error = capsys.readouterr().err
    assert "https://drive.example/a" in error
    assert "python scripts/download.py thing --from FILE" in error
    for content, message in ((HTML, "web page"), (b"", "empty"), (PAYLOAD[1:], "not the published")):
        (tmp_path / "bad").write_bytes(content)
        assert run(manual, tmp_path, "--from", tmp_path / "bad") == 2
        assert message in capsys.readouterr().err
    assert run(manual, tmp_path, "--from", tmp_path / "none") == 2
    assert run(manual, tmp_path, "--from", tmp_path) == 2
    assert not (tmp_path / "weights").exists()
    (tmp_path / "saved (1).bin").write_bytes(PAYLOAD)
    assert run(manual, tmp_path, "--from", tmp_path / "saved (1).bin") == 0
    assert (tmp_path / "weights/a.bin").read_bytes() == PAYLOAD == (tmp_path / "saved (1).bin").read_bytes()
    assert take(manual, tmp_path / "weights/a.bin", tmp_path / "weights/a.bin") == SUM  # in its place already


def test_ctrl_c_keeps_the_part(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 123_456, "stall": 20}]
    code = (
        "from scripts.data.download import Item; from utils.command import run_command; from scripts.download import main\n"
        f"thing = Item('thing', 'a.bin', 'weights', '', ({server.url + '/a.bin'!r},), sha256={SUM!r})\n"
        f"run_command(lambda: main(['thing', '--weights-dir', {str(tmp_path)!r}], (thing,)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    part, deadline = tmp_path / "a.bin.part", time.monotonic() + 20
    while not (part.exists() and part.stat().st_size == 123_456) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "keeps its 123456 bytes; the same command goes on from there" in error
    assert "Traceback" not in error
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert server.log[-1][1] == "bytes=123456-"


def script(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "scripts/download.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30)


def test_list(tmp_path):
    result = script("list", "--data-dir", "d", cwd=tmp_path)
    assert result.returncode == 0
    header, *rows = result.stdout.split("\n\n")[0].splitlines()
    assert header.split("  ")[0] == "name"
    assert [row.split()[0] for row in rows] == [thing.name for thing in CATALOGUE]
    assert re.search(r"^VOC2012 +2\.0 GB +.*sha256 e14f763270cf193d\.\.\. +d/VOCdevkit/VOC2012$", result.stdout, re.M)
    for thing in CATALOGUE:
        assert thing.unverified in result.stdout
    assert names(tmp_path) == []


def test_mistakes_in_the_command(tmp_path):
    for arguments, message in (
        (["resnet101"], "unknown name 'resnet101'; did you mean resnet101-v"),
        (["list", "SBD"], "list stands alone"),
        (["SBD", "VOC2012", "--from", "x"], "goes with one name"),
        (["SBD", "--tries", "0"], "at least 1"),
        ([], "NAME"),
    ):
        result = script(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert names(tmp_path) == []


def test_catalogue_is_sound():
    keys = [key.lower() for thing in CATALOGUE for key in (thing.name, thing.filename)]
    assert len(keys) == len(set(keys))
    assert len({thing.place(Path(thing.kind)) for thing in CATALOGUE}) == len(CATALOGUE)
    for thing in CATALOGUE:
        assert thing.kind in ("data", "weights")
        assert bool(thing.urls) != bool(thing.manual)
        assert thing.licence
        assert thing.after
        assert all(re.match(r"https?://[a-z0-9.]+/", url) for url in (*thing.urls, thing.manual) if url)
        for kind, digits in (("md5", 32), ("sha1", 40), ("sha256", 64), ("sha256_prefix", 8)):
            assert re.fullmatch(f"([0-9a-f]{{{digits}}})?", getattr(thing, kind))


def test_catalogue_agrees_with_torchvision():
    torchvision = pytest.importorskip("torchvision")
    ours = {thing.name: thing for thing in CATALOGUE if thing.name.startswith("resnet")}
    assert len(ours) == 8
    for name, thing in ours.items():
        depth, version = name.split("-")
        weights = torchvision.models.get_model_weights(depth)[f"IMAGENET1K_{version.upper()}"]
        assert thing.urls == (weights.url,)
        assert float(thing.about.split()[0]) == pytest.approx(weights.meta["_file_size"], abs=0.06)
    sets = {thing.name: thing for thing in CATALOGUE}
    assert sets["SBD"].md5 == torchvision.datasets.SBDataset.md5
    assert sets["SBD"].urls[0] == torchvision.datasets.SBDataset.url
    voc = torchvision.datasets.voc.DATASET_YEAR_DICT["2012"]
    assert (sets["VOC2012"].md5, sets["VOC2012"].filename) == (voc["md5"], voc["filename"])
