"""The program behind ``scripts/gpu_check.sh``: the tests that need a GPU, the benchmark, 200 training steps, and a table."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

from deeplab import single_scale_loss
from scripts.bench.inputs import make_images, random_net
from scripts.bench.memory import step_memory
from scripts.bench.training import our_step
from utils.command import UserError, run_command
from utils.training.monitor import MUCH_WAITING

ROOT = Path(__file__).resolve().parent.parent.parent
MINUTES = 8.0
# on a CPU: tests that count the kernels that a GPU would launch
TESTS = {
    "cuda": ["-m", "cuda", "tests"],
    "cpu": ["tests/test_device.py", "-k", "launches or stale"],
}
# (options, parts) of each run of the benchmark; on a CPU only float32
RUNS = {
    "cuda": [
        ("", ["train", "msc", "evaluate", "data", "crf"]),
        (" --amp bf16", ["train", "msc", "evaluate"]),
        (" --amp fp16", ["train", "msc", "evaluate"]),
        (" --amp bf16 --compile", ["train", "msc"]),
    ],
    "cpu": [("", ["train", "data"])],
}


class Check:
    """The device, the end time, and the lines of the table."""

    def __init__(self, folder: Path) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(self.kind)
        self.folder, self.end = folder, time.monotonic() + 60 * MINUTES
        small = self.kind == "cpu"
        self.net, self.batch, self.crop, self.steps = ("resnet18", 2, 129, 20) if small else ("resnet101", 10, 321, 200)
        self.data_wait = 0.0
        self.table: dict[str, str] = {}

    def run(self, title: str, command: list[str]) -> bool:
        """Run a command of this project in the remaining time; returns whether it succeeded (status 0)."""
        left = self.end - time.monotonic()
        print(f"\n=== {title} ({left / 60:.1f} minutes left)", flush=True)
        try:
            status = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=max(left, 1)).returncode
        except subprocess.TimeoutExpired:
            self.table[title] = "not finished in time"
            return False
        if status:
            self.table[title] = f"failed, status {status}"
        return status == 0

    def tests(self) -> None:
        if not importlib.util.find_spec("pytest"):
            self.table["tests"] = "not run: pytest is not installed"
        elif self.run("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS[self.kind]]):
            self.table["tests"] = "passed"

    def benchmark(self) -> None:
        common = ["--backbone", self.net, "--batch-size", str(self.batch), "--input-size", f"{self.crop},{self.crop}"]
        for options, parts in RUNS[self.kind]:
            file = self.folder / "speed.json"
            less = ["--no-memory", *([] if "--compile" in options else ["--no-compile"])]
            command = ["scripts/benchmark.py", *parts, *common, *options.split(), *less, "--json", str(file)]
            if self.run(f"benchmark{options}", command):
                for part, entry in json.loads(file.read_text())["parts"].items():
                    if part == "crf":  # pydensecrf on all cores, and torch
                        self.table |= {f"crf, {name}": described(row) for name, row in entry["rows"].items() if "ours" in name}
                        continue
                    row = entry["rows"].get(f"ours{options}") or entry["rows"]["ours, 1 worker"]
                    self.table[f"{part}{options}"] = described(row)

    def real_steps(self) -> None:
        """Run train.py, with data loading, and report the utilisation of the GPU."""
        command = real_steps_command(self.folder, self.net, self.batch, self.crop, self.steps)
        with utilisation() as used:
            succeeded = self.run("real steps", command + (["--amp", "bf16"] if self.kind == "cuda" else []))
        if not succeeded:
            return
        lines = [json.loads(line) for line in (self.folder / "snapshots/log.jsonl").read_text().splitlines()]
        steady = lines[len(lines) // 2 :]
        speed, self.data_wait = median(x["images_per_s"] for x in steady), mean(x["data_wait"] for x in steady)
        self.table["real steps"] = f"{speed:.1f} images/s, {self.data_wait:.0%} of the time waiting for data"
        if used:
            self.table["real steps"] += f", GPU utilisation {mean(used[len(used) // 2 :]):.0f} %"

    def step(self, crop: int, batch: int, amp: str) -> Callable[[], object]:
        """A training step, after three warm-up runs."""
        torch.backends.cudnn.benchmark = True  # as in training: all crops have one size
        args = Namespace(backbone=self.net, num_classes=21, batch_size=batch, input_size=(crop, crop))
        run = our_step(args, self.device, single_scale_loss, amp=amp).run
        for _ in range(3):
            run()
        return run

    def limits(self) -> None:
        """Measure how long a step takes and how long the host takes to launch it, and so what limits the speed."""
        amp = "bf16" if self.kind == "cuda" else "off"
        run = self.step(self.crop, self.batch, amp)
        start = timer()  # synchronises with the device
        for _ in range(5):
            run()
        took = (timer() - start) / 5
        self.table[f"a step, {amp}"] = f"{1000 * took:.1f} ms"
        if self.kind == "cpu":
            return
        peak = torch.cuda.max_memory_allocated()
        computed = step_memory(self.net, 21, (self.crop, self.crop), self.batch, amp=True).peak
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        events = profiler.events() or []
        kernels = sum(event.device_type == DeviceType.CUDA for event in events)  # the other events are CUDA runtime calls
        launch = self.step(33, 1, amp)  # so little work that the host never waits for the device
        start = timer()
        for _ in range(5):
            launch()
        launched = (time.perf_counter() - start) / 5
        self.table[f"a step, {amp}"] += f", launched by the host in {1000 * launched:.1f} ms, {kernels} kernels and copies"
        self.table[f"its memory, {amp}"] = f"{peak / 1e6:.0f} MB peak, computed {computed / 1e6:.0f} MB"
        limit = "kernel launches: see --compile" if launched > 0.9 * took else "arithmetic"
        self.table["limited by"] = "data loading: see --num-workers" if self.data_wait > MUCH_WAITING else limit

    def all(self) -> None:
        """Run every part; a failure becomes a line of the table, and the next part runs."""
        for part in (self.tests, self.real_steps, self.limits, self.benchmark):
            try:
                part()
            except Exception as error:
                traceback.print_exc()
                self.table[part.__name__.replace("_", " ")] = f"failed: {type(error).__name__}: {str(error)[:200]}"

    def advice(self) -> str:
        """What the user should do with the table."""
        if failed := [name for name, text in self.table.items() if "failed" in text]:
            return f"{', '.join(failed)} failed: please open an issue with this table and the output above it"
        if self.kind == "cpu":
            return "no CUDA device found; run the same command on a machine that has one"
        return (
            "all parts ran: please send us this table; training is `python train.py --random-mirror --random-scale --amp bf16`"
        )


def real_steps_command(folder: Path, net: str, batch: int, crop: int, steps: int) -> list[str]:
    """The command of a short training run; its synthetic images and its moderate initial weights are written to ``folder``.

    With purely random weights and frozen batch norm, activations grow from block to block and the loss diverges.
    """
    make_images(folder / "images", 60, 21)
    args = Namespace(backbone=net, num_classes=21)
    torch.save(random_net(args).state_dict(), folder / "start.pth")
    sizes = ["--batch-size", str(batch), "--input-size", f"{crop},{crop}", "--num-steps", str(steps), "--learning-rate", "1e-8"]
    places = ["--data-dir", str(folder / "images"), "--snapshot-dir", str(folder / "snapshots"), "--save-num-images", "0"]
    return ["train.py", "--restore-from", str(folder / "start.pth"), "--random-scale", "--random-mirror", *sizes, *places]


def first_card() -> str:
    """The index of torch's device 0 for nvidia-smi, which ignores CUDA_VISIBLE_DEVICES."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


@contextmanager
def utilisation() -> Iterator[list[float]]:
    """Collect the GPU utilisation in percent from nvidia-smi, twice per second; an empty list without nvidia-smi."""
    found: list[float] = []
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        yield found
        return
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--id={first_card()}", "--loop-ms=500"]
    command = ["nvidia-smi", *query]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reporter:
        try:
            yield found
        finally:
            reporter.terminate()
            assert reporter.stdout is not None
            found += [float(line) for line in reporter.stdout if line.strip().isdecimal()]


def described(row: dict[str, Any]) -> str:
    text = f"{row['items_per_s']:.1f} images/s, {row['speedup']:.2f}x the reference"
    text += f", {row['gemm_ratio']:.2f} of GEMM" if "gemm_ratio" in row else ""
    return text + (f", {row['difference']:.1e} from pydensecrf" if "difference" in row else "")


def card() -> str:
    if not torch.cuda.is_available():
        return "none: no CUDA device found, only the checks for a CPU run"
    properties = torch.cuda.get_device_properties(0)
    driver = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={first_card()}"]
        driver = ", driver " + subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB{driver}"


def main() -> int:
    if len(sys.argv) > 1:
        raise UserError(f"gpu_check has no arguments, found {' '.join(sys.argv[1:])}")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        check = Check(Path(scratch))
        check.table["card"] = card()
        check.table["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} cores"
        print(*(f"{name}: {text}" for name, text in check.table.items()), sep="\n")
        check.all()
    check.table["next"] = check.advice()
    width = max(map(len, check.table))
    print("\n" + "\n".join(f"{name:{width}}  {text}" for name, text in check.table.items()))
    return 1 if any("failed" in text for text in check.table.values()) else 0


if __name__ == "__main__":
    run_command(main)
