"""Helpers of tests/faults.py: programs forked from a process that has imported torch, a server, and small data."""

import atexit
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import evaluate
from scripts import download, prepare_voc
from scripts.data.catalogue import Item
from tests.helpers_data import jpeg_bytes, mat_bytes, png_bytes, sbd_mask, voc_mask, write
from utils.command import run_command


class Lost(Exception):
    """A killed program lost something that it should have kept."""


def fork(name: str, main: Callable, words: list, log: Path, **environment: str) -> int:
    """Run ``main(words)`` as a command in a forked process with its own process group; returns the process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    atexit._clear()  # the child must not run the parent's exit handlers
    status = 1
    try:
        os.setsid()
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [name]
        run_command(lambda: main([str(word) for word in words]))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def kill(*pids: int) -> None:
    """Send SIGKILL to the process groups, then wait for the processes."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def undisturbed(pids: list[int], log: Path) -> None:
    """Wait for processes that nobody kills; raises Lost if one fails."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(statuses):
        raise Lost(f"status {statuses}:\n{log.read_text()[-2000:]}")


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """Temporary and partial files, with their sizes."""
    found = set()
    for pattern in (".*.tmp", "*.part*", ".*.unpacking"):
        with suppress(OSError):  # a file was just renamed
            found |= {(str(path), path.stat().st_size) for path in folder.rglob(pattern)}
    return found


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


class Slow(BaseHTTPRequestHandler):
    """Serves one file in small blocks, from the requested offset."""

    content = b""

    def do_GET(self) -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        size = len(self.content)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size - start))
        self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        with suppress(ConnectionError):
            for place in range(start, size, 1 << 16):
                self.wfile.write(self.content[place : place + (1 << 16)])
                time.sleep(0.01)

    def log_message(self, *args: object) -> None:
        pass


def make_archive(path: Path) -> None:
    noise = random.Random(5)
    with tarfile.open(path, "w") as tar:
        for number in range(40):
            (piece := path.with_name("piece")).write_bytes(noise.randbytes(100_000))
            tar.add(piece, f"set/{number}.bin")


def make_voc(root: Path, count: int = 60) -> tuple[Path, Path]:
    """Make miniature VOC and SBD sets; returns their folders."""
    ids = [f"2008_{number:06d}" for number in range(count)]
    voc, sbd = root / "voc", root / "sbd"
    kinds = {"train": ids[: count // 3], "val": ids[count // 3 : count // 2]}
    for name, own in kinds.items():
        write(voc / f"ImageSets/Segmentation/{name}.txt", "\n".join(own) + "\n")
        for image_id in own:
            write(voc / f"SegmentationClass/{image_id}.png", png_bytes(voc_mask("2007_000032")))
            write(voc / f"JPEGImages/{image_id}.jpg", jpeg_bytes("2007_000032"))
    for name, extra in {"train": ids[count // 2 :], "val": ids[:3]}.items():
        write(sbd / f"dataset/{name}.txt", "\n".join(extra) + "\n")
        for image_id in extra:
            write(sbd / f"dataset/cls/{image_id}.mat", mat_bytes(sbd_mask("2007_000032")))
            write(sbd / f"dataset/img/{image_id}.jpg", jpeg_bytes("2007_000032"))
    return voc, sbd


def multiply(toy: Path, times: int) -> list[str]:
    """Link each image of the val list in ``toy`` under ``times`` new names; returns their ids."""
    ids = (toy / "ImageSets/Segmentation/val.txt").read_text().split()
    for image_id, number in itertools.product(ids, range(times)):
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
            os.link(toy / folder / f"{image_id}.{suffix}", toy / folder / f"{image_id}_{number}.{suffix}")
    return [f"{image_id}_{number}" for image_id, number in itertools.product(ids, range(times))]


def tools(root: Path, toy: Path, snapshot: Path, port: int) -> dict[str, tuple[Callable[[Path], None], Callable[[Path], int]]]:
    """{program: (function that prepares a folder, function that starts the program there and returns its process id)}"""
    voc, sbd = make_voc(root)
    (toy / "many.txt").write_text("\n".join(multiply(toy, 20)) + "\n")
    tar = root / "set.tar"
    digest = hashlib.sha256(tar.read_bytes()).hexdigest()
    url = (f"http://127.0.0.1:{port}/set.tar",)
    thing = Item("set", "set.tar", "data", "MIT", url, sha256=digest, unpack="out", holds="out/set", after="echo {path}")

    def run_evaluate(folder: Path) -> int:
        words = ["--data-dir", toy, "--data-list", toy / "many.txt", "--restore-from", snapshot, "--device", "cpu"]
        words += ["--save-dir", folder / "m", "--save-panels", folder / "p", "--save-json", folder / "scores.json"]
        words += ["--report", folder / "report"]
        return fork("evaluate.py", evaluate.main, [*words, "--num-workers", "0"], root / "log.txt")

    def run_prepare(folder: Path) -> int:
        words = ["--data-dir", folder / "voc", "--sbd", sbd, "--workers", "2"]
        return fork("prepare_voc.py", prepare_voc.main, words, root / "log.txt")

    def run_download(folder: Path) -> int:
        download.CATALOGUE = (thing,)
        return fork("download.py", download.main, ["set", "--data-dir", folder], root / "log.txt", no_proxy="127.0.0.1")

    def copy_voc(folder: Path) -> None:
        shutil.copytree(voc, folder / "voc")

    return {
        "evaluate.py": (lambda folder: None, run_evaluate),
        "prepare_voc.py": (copy_voc, run_prepare),
        "download.py": (lambda folder: None, run_download),
    }
