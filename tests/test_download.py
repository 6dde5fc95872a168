"""Downloads from a local server that misbehaves in every way a server can."""

import contextlib
import dataclasses
import hashlib
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts import download
from scripts.data import download as fetching
from scripts.data.catalogue import CATALOGUE, Item
from scripts.data.download import ChecksumError, DownloadError, check, fetch, is_text
from tests.helpers import ROOT, hear_ctrl_c
from tests.helpers_archives import archive_item, names, tar_of

PAYLOAD = random.Random(7).randbytes(300_001)
SUM = hashlib.sha256(PAYLOAD).hexdigest()
HTML = b"<!DOCTYPE html><html><body>Quota exceeded</body></html>"
NOT_THERE = {"status": 404}


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files[path]``; each request uses up one step of ``server.plan[path]``, which breaks that request."""

    def do_GET(self):
        server, path = self.server, self.path
        byte_range = self.headers.get("Range")
        server.log.append((path, byte_range))
        step = server.plan[path].pop(0) if server.plan.get(path) else {}
        body, headers = step.get("body", server.files.get(path)), dict(step.get("headers", {}))
        start = 0
        if body is None or "status" in step:
            return self.reply(step.get("status", 404), body or b"sorry", headers)
        if byte_range and not step.get("ignore_range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1])
            if start >= len(body):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            headers.setdefault("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.reply(206 if start else 200, body[start:], headers, step.get("cut"), step.get("stall"), step.get("framing"))

    def reply(self, status, body, headers, cut=None, stall=None, framing="length"):
        """``framing``: "length" (default); "close": up to the end of the connection; "chunked": one chunk; "endless"."""
        self.send_response(status)
        chunked = {"Transfer-Encoding": "chunked"}
        lengths = {"chunked": chunked, "endless": chunked, "close": {}}.get(framing, {"Content-Length": len(body)})
        for name, value in {"Content-Type": "application/octet-stream", **lengths, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if framing == "endless":
            return self.endless(body)
        if framing == "chunked":
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body if cut is None else body[:cut])
            if stall:
                time.sleep(stall)

    def endless(self, body):
        """Send ``body`` again and again until the client disconnects."""
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
                self.server.sent += len(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.plan, server.log, server.sent = {"/a.bin": PAYLOAD}, {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def item(server, *paths, **changes):
    urls = tuple(server.url + path for path in paths or ("/a.bin",))
    fields = {"sha256": SUM, "size": len(PAYLOAD), "after": "python train.py --restore-from {path}"} | changes
    return Item("thing", "a.bin", "weights", "MIT", urls, **fields)


def unsummed(server, *paths, **changes):
    return item(server, *paths, **{"sha256": "", "size": None} | changes)


def quick(thing, target, tries=3, timeout=5.0):
    return fetch(thing, target, tries, timeout)


# ---- checksums


def test_check_against_sums_of_other_programs(tmp_path, capsys):
    """The checksums of one million zero bytes by md5sum, sha1sum and sha256sum."""
    path = tmp_path / "zeros"
    path.write_bytes(bytes(1_000_000))
    sums = {
        "md5": "879f4bba57ed37c9ec5e5aedf9864698",
        "sha1": "bef3595266a65a2ff36b700a75e8ed95c68210b6",
        "sha256": "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025",
    }
    good = {"size": 1_000_000, "sha256_prefix": "d29751f2"} | sums
    assert check(Item("x", "zeros", "data", "", **good), path) == sums["sha256"]
    for name, value in good.items():
        wrong = value + 1 if name == "size" else ("0" if value[0] != "0" else "1") + value[1:]
        with pytest.raises(ChecksumError, match="bytes" if name == "size" else name):
            check(Item("x", "zeros", "data", "", **good | {name: wrong}), path)
        if name != "size":
            capsys.readouterr()
            check(Item("x", "zeros", "data", "", **good | {name: wrong, "sum_certain": False}), path)
            assert "WARNING" in capsys.readouterr().out
    check(Item("x", "zeros", "data", ""), path)
    assert re.search(f"no checksum is known.*{sums['sha256']}", capsys.readouterr().out)


def test_a_file_much_smaller_than_known(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1_000_000))
    for about, fits in (("1.2 MB", True), ("1 MB", True), ("1.3 MB", False), ("over 1 GB", False), ("1.1 MiB", True)):
        thing = Item("x", "a", "weights", "", about=about)
        with contextlib.nullcontext() if fits else pytest.raises(ChecksumError, match=f"1000000 bytes, expected {about} for x"):
            check(thing, tmp_path / "a")


def test_text_is_distinguished_from_files_of_the_catalogue():
    for head in (
        HTML,
        b"\n  <html lang=en>",
        b'{"error": "quota"}',
        b"<?xml version='1.0'?><Error/>",
        "gr\u00fc\u00dfe".encode(),
    ):
        assert is_text(head)
    tar, package = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as tar_file:
        tar_file.addfile(tarfile.TarInfo("name"))
    with zipfile.ZipFile(package, "w") as zip_file:
        zip_file.writestr("name", "text")
    for head in (tar.getvalue(), package.getvalue(), b"\x1f\x8b\x08", b"\x80\x02}q\x00", PAYLOAD[:512]):
        assert not is_text(head[:512])


def test_an_endless_response_is_stopped(server, tmp_path):
    """With an exact or approximate known size, with and without a checksum; the next URL is tried."""
    endless = {"framing": "endless"}
    for known in ({}, {"sha256": ""}, {"size": None, "about": "0.4 MB"}, {"size": None, "sha256": "", "about": "0.4 MB"}):
        server.plan, server.sent = {"/a.bin": [endless] * 9}, 0
        thing = item(server, "/a.bin", **known)
        with pytest.raises(DownloadError, match=f"sends more than .* bytes, expected {thing.size or '0.4 MB'}"):
            quick(thing, tmp_path / "a.bin")
        assert server.sent < 20_000_000  # a few socket buffers more than the limit
        assert not list(tmp_path.iterdir())
    server.files["/b.bin"] = PAYLOAD
    server.plan = {"/a.bin": [endless] * 9}
    assert quick(item(server, "/a.bin", "/b.bin"), tmp_path / "a.bin") == SUM


# ---- downloading


def test_plain(server, tmp_path):
    target = tmp_path / "sub" / "a.bin"
    assert quick(item(server), target) == SUM
    assert target.read_bytes() == PAYLOAD
    assert names(target.parent) == ["a.bin"]
    assert server.log == [("/a.bin", None)]


def test_cut_connection_is_resumed_if_a_checksum_is_known(server, tmp_path, capsys):
    cuts = [{"cut": 30_000}] * 4  # more than the number of tries, but each makes progress
    server.plan["/a.bin"] = list(cuts)
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert server.log == [("/a.bin", f"bytes={30_000 * n}-" if n else None) for n in range(5)]
    assert "resuming" in capsys.readouterr().err

    for certain in ({}, {"sha256": SUM, "sum_certain": False}, {"sha256_prefix": SUM[:8]}):  # otherwise it starts over
        server.plan["/a.bin"], server.log[:] = cuts[:2], []
        quick(unsummed(server, **certain), tmp_path / "b.bin")
        assert (tmp_path / "b.bin").read_bytes() == PAYLOAD
        assert server.log == [("/a.bin", None)] * 3
        (tmp_path / "b.bin").unlink()


def test_gives_up_and_resumes_in_a_later_call(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 100_000}, {"cut": 0}, {"cut": 0}]
    with pytest.raises(DownloadError, match=r"3 attempts in a row.*--from FILE"):
        quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").read_bytes() == PAYLOAD[:100_000]
    server.log.clear()
    quick(item(server), tmp_path / "a.bin")
    assert server.log == [("/a.bin", "bytes=100000-")]
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_truncated_response_never_gets_the_name(server, tmp_path, framing):
    """Only the response gives the size of this file; the end of the connection does not count."""
    server.plan["/a.bin"] = [{"cut": 200_000, "framing": framing}] * 3
    with pytest.raises(
        DownloadError, match="does not give the length of the file" if framing == "close" else "3 attempts in a row"
    ):
        quick(unsummed(server), tmp_path / "a.bin")
    assert names(tmp_path) == []
    server.plan["/a.bin"] = [{"framing": framing}]
    if framing != "close":
        quick(unsummed(server), tmp_path / "a.bin")
    else:
        quick(item(server), tmp_path / "a.bin")  # here the checksum shows that it is complete
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD


def test_slow_response_times_out_and_is_resumed(server, tmp_path, capsys):
    server.plan["/a.bin"] = [{"cut": 200_000, "stall": 1.5}]
    quick(item(server), tmp_path / "a.bin", timeout=0.3)
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert server.log[1][1] in ("bytes=196608-", "bytes=200000-")  # at least the complete blocks
    assert "timed out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("begun", "requests"), [(PAYLOAD, 1), (PAYLOAD + b"more", 2), (b"x" * 300_000, 2), (b"x" * 300_001, 2)]
)
def test_part_that_is_complete_too_long_or_wrong(server, tmp_path, begun, requests):
    """The complete one is used (status 416); the others have a wrong checksum and are downloaded from the start."""
    (tmp_path / "a.bin.part").write_bytes(begun)
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert len(server.log) == requests


def test_range_ignored_starts_over(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 100_000}, {"ignore_range": True}]
    quick(item(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD


def test_wrong_sum_never_gets_the_name(server, tmp_path):
    server.files["/a.bin"] = PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1])
    with pytest.raises(DownloadError, match=f"sha256 is .*, expected {SUM}"):
        quick(item(server), tmp_path / "a.bin")
    assert names(tmp_path) == []
    assert len(server.log) == 1


def test_wrong_sum_on_an_unreliable_connection_ends(server, tmp_path):
    """A wrong checksum after resuming causes one more transfer, not an endless loop."""
    server.files["/a.bin"] = PAYLOAD[::-1]
    server.plan["/a.bin"] = [{"cut": 200_000}, {}] * 20
    with pytest.raises(DownloadError, match=r"sha256 is .*, expected"):
        quick(item(server), tmp_path / "a.bin")
    assert len(server.log) == 4
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "answer",
    [
        NOT_THERE,
        {"body": HTML},
        {"body": b"x" * 300_001, "ignore_range": True},
        {"body": PAYLOAD[::-1] + b"more"},
        {"body": PAYLOAD[::-1]},
        {"headers": {"Content-Range": "bytes 0-9/10"}},
        {"body": b""},
    ],
)
def test_second_mirror_never_deletes_good_bytes(server, tmp_path, answer):
    server.plan["/a.bin"] = [{"cut": 100_000}, NOT_THERE]
    server.plan["/b.bin"] = [answer] * 3
    with pytest.raises(DownloadError):
        quick(item(server, "/a.bin", "/b.bin"), tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").read_bytes() == PAYLOAD[:100_000]
    assert "a.bin" not in names(tmp_path)
    server.log.clear()
    quick(item(server), tmp_path / "a.bin")
    assert server.log == [("/a.bin", "bytes=100000-")]


def test_mirrors_are_tried_in_order(server, tmp_path, capsys):
    server.files["/b.bin"] = PAYLOAD
    server.plan["/a.bin"] = [{"cut": 100_000}, NOT_THERE]
    quick(item(server, "/a.bin", "/b.bin"), tmp_path / "a.bin")
    assert [entry[0] for entry in server.log] == ["/a.bin", "/a.bin", "/b.bin"]
    assert "HTTP 404" in capsys.readouterr().err
    assert names(tmp_path) == ["a.bin"]


def test_another_size_is_refused_before_the_transfer(server, tmp_path):
    with pytest.raises(DownloadError, match="offers 300001 bytes, expected 5"):
        quick(item(server, size=5), tmp_path / "a.bin")
    assert names(tmp_path) == []


def test_busy_server(server, tmp_path, capsys):
    server.plan["/a.bin"] = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}]
    start = time.monotonic()
    quick(item(server), tmp_path / "a.bin")
    assert time.monotonic() - start >= 1
    assert "HTTP 429; retrying" in capsys.readouterr().err
    server.plan["/a.bin"] = [{"status": 503, "headers": {"Retry-After": "7200"}}]
    with pytest.raises(DownloadError, match="retry after 7200 seconds"):
        quick(item(server), tmp_path / "b.bin")
    server.plan["/a.bin"], server.log[:] = [{"status": 500}] * 3, []
    with pytest.raises(DownloadError, match="HTTP 500"):
        quick(item(server), tmp_path / "b.bin")
    assert len(server.log) == 3


def test_redirects(server, tmp_path, monkeypatch):
    """A redirect keeps the Range header, and never leads from https to http."""
    server.plan["/old"] = [{"status": 302, "headers": {"Location": "/a.bin"}}] * 2
    server.plan["/a.bin"] = [{"cut": 100_000}]
    quick(item(server, "/old"), tmp_path / "a.bin")
    assert server.log[2:] == [("/old", "bytes=100000-"), ("/a.bin", "bytes=100000-")]

    real = fetching.requests.Session.get
    plain = server.url + "/a.bin"
    monkeypatch.setattr(fetching.requests.Session, "get", lambda self, url, **options: real(self, plain, **options))
    with pytest.raises(DownloadError, match="from https to an unencrypted"):
        quick(dataclasses.replace(item(server), urls=("https://a.example/a.bin",)), tmp_path / "b.bin")


def test_no_server(server, tmp_path, capsys):
    thing = Item("thing", "a.bin", "weights", "", ("http://127.0.0.1:9/a.bin",))
    with pytest.raises(DownloadError, match=r"\(http://127.0.0.1:9/a.bin: [^(]*refused\); .*--from FILE"):
        quick(thing, tmp_path / "a.bin")
    assert capsys.readouterr().err.count("refused; retrying") == 2


@pytest.mark.parametrize("step", [{"body": HTML}, {"body": b'{"error": 1}'}, {"headers": {"Content-Type": "text/html"}}])
def test_page_or_message_in_place_of_the_file(server, tmp_path, step):
    server.plan["/a.bin"] = [step]
    with pytest.raises(DownloadError, match="web page or a message"):
        quick(unsummed(server), tmp_path / "a.bin")
    assert names(tmp_path) == []


# ---- the command


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(item, option, ...)`` runs the command with a catalogue of only that item; returns the exit status."""

    def call(thing, *options, name=None):
        monkeypatch.setattr(download, "CATALOGUE", (thing,))
        folders = ["--data-dir", tmp_path / "data", "--weights-dir", tmp_path / "weights", "--timeout", 5, "--tries", 2]
        return download.main([str(part) for part in (name or thing.name, *folders, *options)])

    return call


def test_command_downloads_once(server, tmp_path, run, capsys):
    thing = item(server)
    assert run(thing) == 0
    assert f"next:\n  python train.py --restore-from {tmp_path / 'weights/a.bin'}" in capsys.readouterr().out
    assert run(thing) == 0
    assert "already exists" in capsys.readouterr().out
    assert len(server.log) == 1
    assert run(thing, "--force") == 0
    assert len(server.log) == 2


def test_command_does_not_overwrite_another_file(server, tmp_path, run, capsys):
    target = tmp_path / "weights/a.bin"
    target.parent.mkdir()
    target.write_bytes(b"mine")
    assert run(item(server)) == 2
    assert "4 bytes, expected 300001 for thing" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert run(item(server), "--force") == 0
    assert target.read_bytes() == PAYLOAD


def test_command_failure_has_status_1(server, run, capsys):
    assert run(item(server, "/gone")) == 1
    assert "HTTP 404" in capsys.readouterr().err


def test_disk_errors(server, tmp_path, run, monkeypatch, capsys):
    """Each gives one sentence with status 2, and the downloaded bytes are kept."""

    class Usage:
        free = 10

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage)
        assert run(item(server)) == 2
    assert re.search("MiB free and .* are needed", capsys.readouterr().err)
    (tmp_path / "weights").rmdir()
    (tmp_path / "weights").write_text("")
    assert run(item(server)) == 2
    assert f"{tmp_path / 'weights'} cannot be read or written (File exists)" in capsys.readouterr().err
    (tmp_path / "weights").unlink()

    def refusing(number):
        def refuse(*arguments, **options):
            raise OSError(number, "in other words")

        return refuse

    for number, text in ((28, "no space is left"), (122, "no space is left"), (13, "no permission"), (5, "cannot be read or")):
        with monkeypatch.context() as patch:
            patch.setattr(fetching.os, "fsync", refusing(number))
            assert run(item(server)) == 2
        assert text in capsys.readouterr().err
    server.log.clear()
    assert run(item(server)) == 0
    assert server.log == [("/a.bin", f"bytes={len(PAYLOAD)}-")]


def test_command_unpacks(server, tmp_path, run, capsys):
    data = tmp_path / "data"
    tar_of(tmp_path / "set.tgz", [("d/x.txt", b"good"), ("d/y.txt", b"also")])
    server.files["/set.tgz"] = packed = (tmp_path / "set.tgz").read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    thing = archive_item("set.tgz", urls=(server.url + "/set.tgz",), sha256=digest, after="see {path}")
    assert run(thing) == 0
    assert (data / "out/d/x.txt").read_bytes() == b"good"
    assert f"see {data / 'out/d/x.txt'}" in capsys.readouterr().out
    assert run(thing, name="SET.tgz") == 0  # by the file name, in upper or lower case
    assert "complete; nothing to do" in capsys.readouterr().out
    (data / "out/d/y.txt").unlink()  # restored from the archive
    assert run(thing) == 0
    assert (data / "out/d/y.txt").read_bytes() == b"also"
    assert len(server.log) == 1
    assert run(thing, "--remove-archive") == 0
    assert run(thing) == 0  # complete without the archive
    assert names(data) == ["out", "set.tgz.unpacked"]
    assert len(server.log) == 1
    (data / "out/d/y.txt").write_text("spoilt")
    assert run(thing, "--from", tmp_path / "set.tgz") == 0  # a given file is never ignored
    assert (data / "out/d/y.txt").read_bytes() == b"also"


def test_voc_and_sbd_are_where_the_next_command_expects_them(server, tmp_path, monkeypatch, capsys):
    """The entries of the catalogue, with toy archives in the published layout."""
    toys, data = [], tmp_path / "data"
    for thing, member in ((0, "VOCdevkit/VOC2012/JPEGImages/a.jpg"), (1, "benchmark_RELEASE/dataset/cls/a.mat")):
        toy = CATALOGUE[thing]
        tar_of(tmp_path / toy.filename, [(member, b"x")], "w" if toy.filename.endswith("tar") else "w:gz")
        server.files["/" + toy.filename] = packed = (tmp_path / toy.filename).read_bytes()
        sums = {name: hashlib.new(name, packed).hexdigest() for name in ("md5", "sha1", "sha256")}
        toys.append(dataclasses.replace(toy, urls=(f"{server.url}/{toy.filename}",), size=len(packed), **sums))
    monkeypatch.setattr(download, "CATALOGUE", tuple(toys))
    (data / "VOCdevkit/VOC2012/Mine").mkdir(parents=True)
    assert download.main(["VOC2012", "sbd", "--data-dir", str(data)]) == 0
    assert names(data / "VOCdevkit/VOC2012") == ["JPEGImages", "Mine"]
    assert (data / "SBD/benchmark_RELEASE/dataset/cls/a.mat").exists()
    assert (data / "SBD/benchmark.tgz").exists()
    command = f"python scripts/prepare_voc.py --data-dir {data}/VOCdevkit/VOC2012 --sbd {data}/SBD/benchmark_RELEASE"
    assert capsys.readouterr().out.endswith(f"next:\n  {command}\n")


def test_command_keeps_a_folder_of_other_origin(server, tmp_path, run, capsys):
    (tmp_path / "data/out/d").mkdir(parents=True)
    (tmp_path / "data/out/d/x.txt").write_text("mine")
    assert run(archive_item("set.tgz", urls=(server.url + "/set.tgz",))) == 0
    assert "not checked; nothing done" in capsys.readouterr().out
    assert server.log == []


def test_file_downloaded_by_hand(tmp_path, run, capsys):
    manual = Item("thing", "a.bin", "weights", "", sha256=SUM, manual="https://drive.example/a", after="go {path}")
    assert run(manual) == 2
    error = capsys.readouterr().err
    assert "https://drive.example/a" in error
    assert "python scripts/download.py thing --from FILE" in error
    for content, message in ((HTML, "web page"), (b"", "empty"), (PAYLOAD[1:], "not the published")):
        (tmp_path / "bad").write_bytes(content)
        assert run(manual, "--from", tmp_path / "bad") == 2
        assert message in capsys.readouterr().err
    assert run(manual, "--from", tmp_path / "none") == 2
    assert run(manual, "--from", tmp_path) == 2
    assert not (tmp_path / "weights").exists()
    (tmp_path / "saved (1).bin").write_bytes(PAYLOAD)
    assert run(manual, "--from", tmp_path / "saved (1).bin") == 0
    assert (tmp_path / "weights/a.bin").read_bytes() == PAYLOAD == (tmp_path / "saved (1).bin").read_bytes()


def test_from_compares_or_replaces(tmp_path, run, capsys):
    """No checksum is known, so both files may be right: the existing one stays, unless --force is given."""
    thing = Item("thing", "a.bin", "weights", "", manual="https://drive.example/a", after="go {path}")
    target = tmp_path / "weights/a.bin"
    target.parent.mkdir()
    for path, content in ((target, PAYLOAD), (tmp_path / "same", PAYLOAD), (tmp_path / "other", PAYLOAD[::-1])):
        path.write_bytes(content)
    assert run(thing, "--from", tmp_path / "same") == 0
    assert "the same bytes" in capsys.readouterr().out
    assert run(thing, "--from", target) == 0
    assert run(thing, "--from", tmp_path / "other") == 2
    assert "differs from" in capsys.readouterr().err
    assert target.read_bytes() == PAYLOAD
    assert run(thing, "--from", tmp_path / "other", "--force") == 0
    assert target.read_bytes() == PAYLOAD[::-1]


def test_ctrl_c_keeps_the_part(server, tmp_path):
    server.plan["/a.bin"] = [{"cut": 123_456, "stall": 20}]
    code = (
        "from scripts import download; from scripts.data.catalogue import Item; from utils.command import run_command\n"
        f"thing = Item('thing', 'a.bin', 'weights', '', ({server.url + '/a.bin'!r},), sha256={SUM!r})\n"
        "download.CATALOGUE = (thing,)\n"
        f"run_command(lambda: download.main(['thing', '--weights-dir', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    part, deadline = tmp_path / "a.bin.part", time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    kept = part.stat().st_size
    assert kept > 0
    assert f"keeps its {kept} bytes; run the same command to resume" in error
    assert "Traceback" not in error
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0
    assert (tmp_path / "a.bin").read_bytes() == PAYLOAD
    assert server.log[-1][1] == f"bytes={kept}-"


def test_list_and_mistakes(tmp_path, capsys):
    assert download.main(["list", "--data-dir", "d"]) == 0
    printed = capsys.readouterr().out
    header, *rows = printed.split("\n\n")[0].splitlines()
    assert header.split("  ")[0] == "name"
    assert [row.split()[0] for row in rows] == [thing.name for thing in CATALOGUE]
    assert re.search(r"^VOC2012 +2\.0 GB +.*sha256 e14f763270cf193d\.\.\. +d/VOCdevkit/VOC2012$", printed, re.M)
    assert all(thing.unverified in printed for thing in CATALOGUE)
    for arguments, message in (
        (["list", "SBD"], "list cannot be combined"),
        (["SBD", "VOC2012", "--from", "x"], "needs one name"),
        (["SBD", "--tries", "0"], "at least 1"),
        ([], "NAME"),
    ):
        with pytest.raises(SystemExit, match="2"):
            download.main(arguments)
        assert message in capsys.readouterr().err


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/download.py"), "resnet101"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert "unknown name 'resnet101'; did you mean resnet101-v" in result.stderr
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
        assert not thing.about or fetching._bytes(thing.about) > 4e7
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
