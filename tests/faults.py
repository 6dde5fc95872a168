"""Kills programs at random moments, and looks whether anything is lost; by hand, as test_faults.py does it in small.

    python tests/faults.py [--kills 200] [--minutes 60] [--seed N]   kills, inside writes too; a table, status 1 for a loss
    python tests/faults.py --long                                   memory and open files of long runs

Each program is forked from this process, which has imported torch already. A kill is SIGKILL to the whole process group. A
training run goes on with --resume after each kill, and must end as one that nobody disturbed; the other programs are started
again and must leave the same files.
"""

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import deeplab  # noqa: F401  (what is imported here costs no child any time)
import evaluate
import train
from deeplab.weights import check_sums
from scripts import download, prepare_voc
from scripts.data.catalogue import Item
from tests.conftest import make_toy_voc
from tests.test_prepare_voc import jpeg_bytes, mat_bytes, png_bytes, sbd_mask, voc_mask, write
from tests.test_training import SCRATCH, SMALL, log_lines
from utils import evaluation, training  # noqa: F401
from utils.checkpoint import load_checkpoint
from utils.command import run_command

STEPS, EVERY, KEEP = 8, 2, 2
RUN = [*SCRATCH, "--num-steps", str(STEPS), "--save-pred-every", str(EVERY), "--keep", str(KEEP), "--val-every", "4",
       "--save-num-images", "1"]  # fmt: skip
TIMES = {"images_per_s", "data_wait", "seconds", "memory_mb"}


class Lost(Exception):
    """Something that a killed program should have kept."""


# ---- processes


def fork(name: str, main: Callable, words: list, log: Path, **environment: str) -> int:
    """Start ``main(words)`` as a command of its own, in a process group of its own; returns its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
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
    """SIGKILL to the process groups, and an end to the processes themselves."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def unfinished(folder: Path) -> list[Path]:
    """Files that a writer has begun, or has left behind."""
    found = itertools.chain(folder.rglob(".*.tmp"), folder.rglob("*.part*"), folder.rglob(".*.unpacking"))
    return [path for path in found if path.exists()]


class Killer:
    """Lets programs run, and kills them: half of them at any moment, half of them as soon as they are seen writing."""

    def __init__(self, seed: int) -> None:
        self.random, self.counts = random.Random(seed), Counter()

    def disturb(self, kind: str, pids: list[int], folder: Path, seconds: float) -> bool:
        """Kill what was just started, or find that it was faster; whether it was killed."""
        begun, seen = time.monotonic(), 0.0
        writes = self.random.random() < 0.5
        wait = self.random.uniform(0, 0.15 if writes else seconds)
        skip = self.random.uniform(0, 0.8 * seconds) if writes else 0.0  # not always the first write
        victim = self.random.choice(pids)
        while True:
            if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids[:1]):
                kill(*pids[1:])
                return False
            now = time.monotonic()
            if writes and not seen and now - begun > skip and unfinished(folder):
                seen = now
            if (seen and now - seen > wait) if writes else now - begun > wait:
                break
            if now - begun > 20 * seconds + 60:
                raise Lost(f"{kind}: a run hangs")
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.killpg(victim, signal.SIGKILL)
        if len(pids) > 1:
            time.sleep(self.random.uniform(0, 0.2))  # the launcher needs a moment to end the others
        kill(*pids)
        self.counts[kind] += 1
        self.counts[f"{kind}, inside a write"] += bool(unfinished(folder))
        return True


# ---- training


def start_training(toy: Path, folder: Path, ranks: int, *more: str) -> list[int]:
    words = ["--data-dir", toy, "--snapshot-dir", folder, *SMALL, *RUN, *more]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".txt")
    if ranks == 1:
        return [fork("train.py", train.main, words, log)]
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [fork("train.py", train.main, words, log, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(ranks)]


def undisturbed(pids: list[int], log: Path) -> None:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(statuses):
        raise Lost(f"status {statuses}:\n{log.read_text()[-2000:]}")


def check_whole(folder: Path) -> None:
    """Every snapshot that has its name is whole, whatever the moment of the kill."""
    if (folder / "last.ckpt").exists():
        load_checkpoint(folder / "last.ckpt")
    for path in folder.glob("*.pth"):
        check_sums(path)
        torch.load(path, weights_only=True, mmap=True)


def same(one: object, other: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_end(folder: Path, expected: Path) -> None:
    """A run that was killed and resumed is the run that nobody disturbed; nothing is left of the kills."""
    for path in [*sorted(expected.glob("*.pth")), expected / "last.ckpt"]:
        one, other = (torch.load(place, weights_only=True) for place in (path, folder / path.name))
        for content in (one, other):
            content["meta"].pop("args")  # --resume
        if not same(one, other):
            raise Lost(f"{folder / path.name} is not that of the undisturbed run")
    lines = [[{k: v for k, v in line.items() if k not in TIMES} for line in log_lines(place)] for place in (expected, folder)]
    if lines[0] != lines[1]:
        raise Lost(f"{folder}/log.jsonl is not that of the undisturbed run")
    numbered = [{path.name for path in place.glob("VOC12*")} for place in (expected, folder)]
    if numbered[0] != numbered[1]:
        raise Lost(f"{folder} holds {numbered[1]}")
    if left := [*unfinished(folder), *folder.glob(".*")]:
        raise Lost(f"{folder} still holds {left[0].name}")


def chain(killer: Killer, toy: Path, folder: Path, expected: Path, ranks: int, seconds: float, most: int) -> None:
    """One run, killed up to ``most`` times, to its end."""
    kind, log = f"training, {ranks} process{'es' if ranks > 1 else ''}", folder.with_suffix(".txt")
    for _ in range(most):
        workers = str(killer.random.randrange(2))
        pids = start_training(toy, folder, ranks, "--resume", "--num-workers", workers)
        if not killer.disturb(kind, pids, folder, seconds):
            break
        check_whole(folder)
    undisturbed(start_training(toy, folder, ranks, "--resume"), log)
    check_end(folder, expected)
    if "Traceback" in (text := log.read_text()) and ranks == 1:  # the other one of two says that its neighbour is gone
        raise Lost(text[-3000:])
    shutil.rmtree(folder.parent)


# ---- the other programs


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


class Slow(BaseHTTPRequestHandler):
    """Serves one file in small pieces, from where it is asked to."""

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
    """VOC and SBD in miniature: (the VOC folder, SBD's)."""
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


def tools(root: Path, toy: Path, snapshot: Path, port: int) -> dict[str, tuple[Callable[[Path], None], Callable[[Path], int]]]:
    """Each program's name -> how its folder is made, and how it is started there."""
    voc, sbd = make_voc(root)
    ids = (toy / "ImageSets/Segmentation/val.txt").read_text().split()
    many = [f"{image_id}_{number}" for number in range(20) for image_id in ids]
    for name in many:
        for part, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
            os.link(toy / part / f"{name.rsplit('_', 1)[0]}.{suffix}", toy / part / f"{name}.{suffix}")
    (toy / "many.txt").write_text("\n".join(many) + "\n")
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


def disturb_tool(killer: Killer, name: str, make: Callable, run: Callable, root: Path, expected: dict, seconds: float) -> None:
    """One program, killed up to three times, and then to its end: the files are those of an undisturbed run."""
    folder = root / "tool"
    folder.mkdir()
    make(folder)
    for _ in range(3):
        if not killer.disturb(name, [run(folder)], folder, seconds):
            break
    undisturbed([run(folder)], root / "log.txt")
    if (found := bytes_of(folder)) != expected:
        raise Lost(
            f"{name}: {sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))[:5]}"
        )
    shutil.rmtree(folder)


# ---- the two modes


def kills(args: argparse.Namespace, root: Path) -> None:
    """Kill until there were ``args.kills`` kills or ``args.minutes`` are over; print what happened."""
    begun, killer = time.monotonic(), Killer(args.seed)
    toy = make_toy_voc(root / "toy")
    make_archive(root / "set.tar")
    Slow.content = (root / "set.tar").read_bytes()
    server = HTTPServer(("127.0.0.1", 0), Slow)
    port = server.server_address[1]
    serving = fork("server", lambda words: server.serve_forever(), [], root / "server.txt")
    try:
        expected, seconds = {}, {}
        for ranks in (1, 2):
            since, expected[ranks] = time.monotonic(), root / f"undisturbed {ranks}"
            undisturbed(start_training(toy, expected[ranks], ranks), root / f"undisturbed {ranks}.txt")
            seconds[ranks] = time.monotonic() - since
        programs, whole = tools(root, toy, expected[1] / f"VOC12_scenes_{STEPS}.pth", port), {}
        for name, (make, run) in programs.items():
            since, folder = time.monotonic(), root / "tool"
            folder.mkdir()
            make(folder)
            undisturbed([run(folder)], root / "log.txt")
            whole[name] = (bytes_of(folder), time.monotonic() - since)
            shutil.rmtree(folder)
        done = lambda: sum(n for kind, n in killer.counts.items() if "inside" not in kind)  # noqa: E731
        for number in itertools.count():
            if done() >= args.kills or time.monotonic() - begun > 60 * args.minutes:
                break
            name = [*programs][number % len(programs)]
            for ranks in (1, 2):
                chain(killer, toy, root / "runs/run", expected[ranks], ranks, seconds[ranks], min(6, args.kills))
            disturb_tool(killer, name, *programs[name], root, *whole[name])
            print(f"{done()} kills, {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        kill(serving)
    for kind in sorted(kind for kind in killer.counts if "inside" not in kind):
        print(f"{kind}: {killer.counts[kind]} kills, {killer.counts[f'{kind}, inside a write']} of them inside a write")
    print(f"nothing was lost in {done()} kills, {time.monotonic() - begun:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60, help="at most; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        kills(args, root)
    except Lost as lost:
        print(f"LOST: {lost}\nthe files are in {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
