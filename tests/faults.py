"""Kill programs at random moments and check that nothing is lost. Run by hand; test_faults.py runs a few kills.

    python tests/faults.py [--kills 200] [--minutes 60] [--seed N]   kills, also during writes; status 1 if anything is lost
    python tests/faults.py --long                                    memory and open files of long runs; status 1 if they grow

A kill is SIGKILL to a whole process group. After each kill a training run is resumed with --resume, and must end exactly like
an undisturbed run. Other programs are started again, and must write the same files.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import HTTPServer
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import deeplab  # noqa: F401  (imported once here, not in every child)
import train
from deeplab.weights import check_sums
from tests.helpers import ROOT, make_toy_voc
from tests.helpers_fault_programs import (
    Lost,
    Slow,
    bytes_of,
    fork,
    kill,
    make_archive,
    multiply,
    tools,
    undisturbed,
    unfinished,
)
from tests.helpers_runs import SCRATCH, SMALL, log_lines
from utils.checkpoint import load_checkpoint
from utils.evaluation import run as evaluation  # noqa: F401
from utils.training import loop as training  # noqa: F401

STEPS = 8
RUN = [*SCRATCH, "--num-steps", str(STEPS), "--save-pred-every", "2", "--keep", "2", "--val-every", "4",
       "--save-num-images", "1"]  # fmt: skip
TIMES = {"images_per_s", "data_wait", "seconds", "memory_mb"}
MOST_GROWTH = 1.02


class Killer:
    """Kills running programs, half of them at a random moment and half of them during a write."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.inside: Counter[str] = Counter()  # kills during a write

    @property
    def total(self) -> int:
        return self.kills.total()

    def disturb(self, kind: str, pids: list[int], folder: Path, seconds: float) -> bool:
        """Kill processes that were just started; returns False if they finished before."""
        begun, seen = time.monotonic(), 0.0
        writes = self.random.random() < 0.5
        wait = self.random.uniform(0, 0.06 if writes else seconds)
        skip = self.random.uniform(0, 0.8 * seconds) if writes else 0.0  # not always the first write
        victim, before = self.random.choice(pids), unfinished(folder)
        while True:
            if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids[:1]):
                kill(*pids[1:])
                return False
            now = time.monotonic()
            if writes and not seen and now - begun > skip and unfinished(folder) - before:
                seen = now
            if (seen and now - seen > wait) if writes else now - begun > wait:
                break
            if now - begun > 20 * seconds + 60:
                raise Lost(f"{kind}: a run hangs")
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.killpg(victim, signal.SIGKILL)
        if len(pids) > 1:
            time.sleep(self.random.uniform(0, 0.2))  # the launcher needs a moment to stop the others
        kill(*pids)
        self.kills[kind] += 1
        self.inside[kind] += bool(unfinished(folder) - before)
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


def check_whole(folder: Path) -> None:
    """Every snapshot with its final name must be complete."""
    try:
        if (folder / "last.ckpt").exists():
            load_checkpoint(folder / "last.ckpt")
        for path in folder.glob("*.pth"):
            check_sums(path)
    except Exception as error:  # any error of a reader
        raise Lost(f"{type(error).__name__}: {error}") from error


def same(one: object, other: object) -> bool:
    """Whether two values are equal bit for bit, also in dicts and lists."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_end(folder: Path, expected: Path) -> None:
    """A killed and resumed run must equal the undisturbed one; no file of the kills may be left."""
    for path in [*sorted(expected.glob("*.pth")), expected / "last.ckpt"]:
        one, other = (torch.load(place, weights_only=True) for place in (path, folder / path.name))
        for content in (one, other):
            content["meta"].pop("args")  # --resume
            content["meta"].pop("run", None)  # differs between runs
            content["meta"]["given"] = set(content["meta"].get("given", ())) - {"resume"}
        if not same(one, other):
            raise Lost(f"{folder / path.name} differs from the undisturbed run")
    lines = [[{k: v for k, v in line.items() if k not in TIMES} for line in log_lines(place)] for place in (expected, folder)]
    if lines[0] != lines[1]:
        raise Lost(f"{folder}/log.jsonl differs from the undisturbed run")
    numbered = [{path.name for path in place.glob("VOC12*")} for place in (expected, folder)]
    if numbered[0] != numbered[1]:
        raise Lost(f"{folder} holds {numbered[1]}")
    if left := [*unfinished(folder), *folder.glob(".*")]:
        raise Lost(f"{folder} still holds {left[0]}")


def chain(killer: Killer, toy: Path, folder: Path, expected: Path, ranks: int, seconds: float, most: int) -> None:
    """One run, killed up to ``most`` times and then completed."""
    kind, log = f"training, {ranks} process{'es' if ranks > 1 else ''}", folder.with_suffix(".txt")
    for _ in range(most):
        workers = str(killer.random.randrange(2))
        pids = start_training(toy, folder, ranks, "--resume", "--num-workers", workers)
        if not killer.disturb(kind, pids, folder, seconds):
            break
        check_whole(folder)
    undisturbed(start_training(toy, folder, ranks, "--resume"), log)
    check_end(folder, expected)
    if "Traceback" in (text := log.read_text()) and ranks == 1:  # of two processes, the other reports that its peer is gone
        raise Lost(text[-3000:])
    shutil.rmtree(folder.parent)


# ---- the other programs


def disturb_tool(killer: Killer, name: str, make: Callable, run: Callable, root: Path, expected: dict, seconds: float) -> None:
    """One program, killed up to three times and then completed: it must write the files of an undisturbed run."""
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
    """Kill until ``args.kills`` kills or ``args.minutes`` minutes are reached; print the counts."""
    begun, killer = time.monotonic(), Killer(args.seed)
    toy = make_toy_voc(root / "toy")
    expected: dict[int, Path] = {}
    seconds: dict[object, float] = {}
    for ranks in [1] if args.quick else [1, 2]:
        since, expected[ranks] = time.monotonic(), root / f"undisturbed {ranks}"
        undisturbed(start_training(toy, expected[ranks], ranks), root / f"undisturbed {ranks}.txt")
        seconds[ranks] = time.monotonic() - since
    make_archive(root / "set.tar")
    Slow.content = (root / "set.tar").read_bytes()
    server = HTTPServer(("127.0.0.1", 0), Slow)
    serving = fork("server", lambda words: server.serve_forever(), [], root / "server.txt")
    try:
        snapshot, port = expected[1] / f"VOC12_scenes_{STEPS}.pth", server.server_address[1]
        programs = {} if args.quick else tools(root, toy, snapshot, port)
        whole = {}
        for name, (make, run) in programs.items():
            since, folder = time.monotonic(), root / "tool"
            folder.mkdir()
            make(folder)
            undisturbed([run(folder)], root / "log.txt")
            whole[name], seconds[name] = bytes_of(folder), time.monotonic() - since
            shutil.rmtree(folder)
        names = itertools.cycle(programs)
        while killer.total < args.kills and time.monotonic() - begun < 60 * args.minutes:
            for ranks in expected:
                chain(killer, toy, root / "runs/run", expected[ranks], ranks, seconds[ranks], min(6, args.kills))
            if programs:
                disturb_tool(killer, name := next(names), *programs[name], root, whole[name], seconds[name])
            print(f"{killer.total} kills, {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        kill(serving)
    for kind, number in sorted(killer.kills.items()):
        print(f"{kind}: {number} kills, {killer.inside[kind]} of them during a write")
    print(
        f"nothing was lost in {killer.total} kills ({killer.inside.total()} during a write), {time.monotonic() - begun:.0f} s"
    )


def long_runs(root: Path) -> None:
    """2,000 training steps with all outputs of a run, and 5,000 predictions."""
    toy = make_toy_voc(root / "toy")
    words = ["--data-dir", toy, "--snapshot-dir", root / "run", *SMALL, *SCRATCH, "--num-steps", 2000, "--keep", 2]
    words += ["--save-pred-every", 200, "--val-every", 200, "--save-num-images", 1, "--num-workers", 1, "--tensorboard"]
    words += ["--input-size", "17,17", "--log-every", 10]
    log = root / "run/log.jsonl"
    run = start("train.py", words, root / "run.txt")
    watch(
        "2,000 training steps", run, lambda: log_lines(log.parent)[-1]["step"] / 2000 if log.exists() else 0, root / "run.txt"
    )
    many = multiply(toy, 834)[:5000]
    (toy / "many.txt").write_text("\n".join(many) + "\n")
    words = ["--data-dir", toy, "--data-list", toy / "many.txt", "--restore-from", root / "run/VOC12_scenes_2000.pth"]
    words += ["--device", "cpu", "--num-workers", 1, "--batch-size", 2, "--save-dir", root / "masks"]
    run = start("evaluate.py", words, root / "evaluate.txt")
    watch("5,000 predictions", run, lambda: sum(1 for _ in (root / "masks").glob("*.png")) / 5000, root / "evaluate.txt")


def start(script: str, words: list, log: Path) -> subprocess.Popen:
    """Start a command that returns large freed blocks to the system, so that resident memory is memory in use."""
    given = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}  # glibc's
    with open(log, "w") as file:
        line = [sys.executable, str(ROOT / script), *map(str, words)]
        return subprocess.Popen(line, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **given})


def watch(what: str, process: subprocess.Popen, progress: Callable[[], float], log: Path) -> None:
    """Compare the memory and open files of a process after a fifth of its work with those in the last tenth.

    Raises:
        Lost: they have grown by more than 2 %, or the process failed.
    """
    found: list[tuple[float, float, int]] = []
    while process.poll() is None:
        with suppress(OSError, IndexError, ValueError):
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            found.append((progress(), resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
        time.sleep(0.5)
    if process.returncode:
        raise Lost(f"{what}: status {process.returncode}:\n{log.read_text()[-2000:]}")
    early, late = ([row for row in found if low <= row[0] < high] for low, high in ((0.2, 0.3), (0.9, 1.01)))
    memory, files = ([median(row[k] for row in rows) for rows in (early, late)] for k in (1, 2))
    print(
        f"{what}: {memory[0]:.1f} MB and {files[0]:g} open files after a fifth, {memory[1]:.1f} MB and {files[1]:g} at the end"
    )
    print(f"    {memory[1] / memory[0] - 1:+.2%}; at most {max(row[1] for row in found if row[0] >= 0.2):.1f} MB", flush=True)
    if memory[1] > MOST_GROWTH * memory[0] or files[1] > MOST_GROWTH * files[0]:
        raise Lost(f"{what}: memory or open files grow")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of kills (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="time limit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only training in one process")
    parser.add_argument("--long", action="store_true", help="long runs instead of kills")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that started processes are ended
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        long_runs(root) if args.long else kills(args, root)
    except Lost as lost:
        print(f"LOST: {lost}\nthe files are in {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
