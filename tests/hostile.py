"""Read damaged files with the real readers: only the project's own errors, no crash, no hang, no wrong content.

    python tests/hostile.py --files 20000 --seed 1      # the suite runs a few hundred
    python tests/hostile.py --seed 1 --only 4711        # one file again

Each file is a specimen (tests/helpers_specimens.py) with one to three changes. A forked process with limited memory reads it,
so that crashes, hangs and huge allocations are detected. If the format has checksums, a damaged file must be refused or
give the original content.
"""

import argparse
import errno
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DatasetError
from deeplab.weights import WeightsError
from tests.helpers_specimens import Refused, Specimen, specimens
from utils.command import UserError

SECONDS = 10  # a reader that needs longer counts as a hang
MEMORY = 4 * 2**30  # an image may have 2^30 pixels, which need 3 GiB
OWN = (DatasetError, WeightsError, UserError)
KINDS = ("bits", "cut", "insert", "remove", "zeros", "swap", "huge")


def mutate(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes with one to three changes, and a description of the changes."""
    out, done = bytearray(data), []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        kind = str(rng.choice(KINDS))
        near = int(rng.choice([64, 1024, 1 << 40]))  # headers are at the start, the directory of a zip at the end
        at = int(rng.integers(min(len(out), near) + 1))
        at = len(out) - at if rng.random() < 0.4 else at
        length = int(2 ** rng.uniform(0, 10))
        if kind == "bits":
            for place in rng.integers(at, min(at + 8, len(out)), int(rng.integers(1, 4))) if at < len(out) else ():
                out[place] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del out[at:]
        elif kind == "insert":
            out[at:at] = rng.bytes(length) if rng.random() < 0.5 else out[at // 2 : at // 2 + length]
        elif kind == "remove":
            del out[at : at + length]
        elif kind == "zeros":
            out[at : at + length] = bytes(len(out[at : at + length]))
        elif kind == "swap":
            other = int(rng.integers(len(out) + 1))
            a, b = out[at : at + 4], out[other : other + 4]
            if len(a) == len(b) == 4 and abs(at - other) > 4:
                out[at : at + 4], out[other : other + 4] = b, a
        else:
            width = int(rng.choice([1, 2, 4, 8]))
            value = (256**width - 1) >> int(rng.integers(4))
            out[at : at + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))
        done.append(f"{kind} at {at}")
    return bytes(out), ", ".join(done)


def same(a: Any, b: Any) -> bool:
    """Whether two results of a reader are equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return a.dtype == b.dtype and np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def judge(specimen: Specimen, expected: Any, data: bytes, path: Path) -> tuple[str, str]:
    """The outcome of reading a damaged file, and a detail: "refused", "same", "other", or a fault in capitals."""
    path.write_bytes(specimen.wrap(data))
    try:
        found = specimen.read(path)
    except OWN as error:
        outcome, detail, cause = "refused", str(error), error.__context__
        if "\n" in detail or len(detail) > 1000:
            return "LONG", detail
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate" in str(cause) or getattr(cause, "errno", 0) == errno.ENOMEM:
                return "MEMORY", f"{cause!r:.200} <- {detail}"
            cause = cause.__context__
        return outcome, detail
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "OTHER ERROR", f"{error!r:.300} in {where.filename}:{where.lineno}"
    parts = found.values() if isinstance(found, dict) else [found]
    if any(isinstance(part, Refused) for part in parts):
        return "refused", str(found)
    if same(found, expected):
        return "same", ""
    return ("WRONG CONTENT" if specimen.sums else "other"), ""


def child(every: dict[str, Specimen], files: range, seed: int, write: int) -> None:
    """Read the files with these numbers; write half a line to the pipe before each, and the rest after it."""
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    cv2.setNumThreads(0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    names = list(every)
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in files:
            name = names[number % len(names)]
            specimen = every[name]
            place, whole = Path(folder) / str(number), Path(folder) / name
            place.mkdir()
            if name not in expected:
                whole.mkdir()  # not removed: tensors are mapped from it
                (whole / specimen.filename).write_bytes(specimen.wrap(specimen.data))
                expected[name] = specimen.read(whole / specimen.filename)
            data, how = mutate(specimen.data, np.random.default_rng((seed, number)))
            os.write(write, f"{number}\t{name}\t{how}\t".encode())
            outcome, detail = judge(specimen, expected[name], data, place / specimen.filename)
            os.write(write, f"{outcome}\t{' '.join(detail.split())[:500]}\n".encode())
            shutil.rmtree(place)


def run(every: dict[str, Specimen], files: range, seed: int) -> tuple[Counter, list[str]]:
    """Damage and read the files with these numbers, which cycle through the specimens.

    Returns:
        {(specimen, outcome): count}, and one line per fault.
    """
    counts: Counter = Counter()
    faults = []
    while files:
        read, write = os.pipe()
        if not (process := os.fork()):
            status = 1
            try:
                child(every, files, seed, write)
                status = 0
            except BaseException:
                os.write(write, f"\n{traceback.format_exc()}".encode())
            finally:
                os._exit(status)
        os.close(write)
        text, hung = "", False
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while not (hung := not select.select([pipe], [], [], SECONDS if text else 60)[0]) and (part := pipe.read(65536)):
                text += part.decode()
                *lines, text = text.split("\n")
                for line in lines:
                    number, name, how, outcome, detail = line.split("\t")
                    counts[name, outcome] += 1
                    if outcome.isupper():
                        faults.append(f"{outcome}: file {number} ({name}; {how}): {detail}")
                text = text or " "
        if hung:
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if not status:
            break
        number, name, how, *_ = f"{text.strip()}\t\t".split("\t")
        if not number.isdigit():
            raise RuntimeError(f"the harness itself failed: {text}")
        outcome = "HANG" if hung else f"CRASH {status}"
        counts[name, outcome] += 1
        faults.append(f"{outcome}: file {number} ({name}; {how})")
        files = files[files.index(int(number)) + 1 :]
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="number of files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (default: %(default)s)")
    parser.add_argument("--only", type=int, help="read only the file with this number")
    parser.add_argument("--kind", default="", help="use only specimens with this in their name (changes the numbers)")
    args = parser.parse_args()
    files = range(args.files) if args.only is None else range(args.only, args.only + 1)
    every = {name: specimen for name, specimen in specimens().items() if args.kind in name}
    counts, faults = run(every, files, args.seed)
    totals = Counter(outcome for _, outcome in counts.elements())
    outcomes = sorted(totals, key=lambda outcome: (outcome.isupper(), outcome))
    for name in every:
        print(f"{name:26}", *(f"{counts[name, outcome]:6} {outcome}" for outcome in outcomes))
    print(f"{counts.total():<26}", *(f"{totals[outcome]:6} {outcome}" for outcome in outcomes))
    print(*faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
