"""The ruler of ``scripts/benchmark.py``: time in turns, arithmetic, peak memory, and the machine's own GEMM rate."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Runner:
    """A variant that is ready to run.

    Attributes:
        run: does the work once. It may return the seconds to count, where those are not the seconds of the call.
        net: the net whose weights it holds.
        training: gradients and momentum are held as well.
        close: ends what it started.
        warm_up: the first call, where ``run`` would take long for that.
    """

    run: Callable[[], float | None]
    net: nn.Module | None = None
    training: bool = False
    close: Callable[[], None] = lambda: None
    warm_up: Callable[[], object] | None = None


@dataclass
class Variant:
    """One way of doing a part's work; the first of a part is its reference.

    Attributes:
        name: of the row.
        build: makes its runner.
        items: pictures (or starts) a call.
        amp: the precision, whose GEMM rate it is held against.
        flops_of: the variant with the same arithmetic, where its own cannot be counted (compiled nets); "" counts its own.
        counted: whether there is arithmetic to count.
        memory: whether its peak memory is measured.
    """

    name: str
    build: Callable[[], Runner]
    items: int
    amp: str = "off"
    flops_of: str = ""
    counted: bool = True
    memory: bool = True


@dataclass
class Part:
    """A table: variants of one piece of work. ``remarks(rows)`` gives the lines below it and may add entries to the rows."""

    title: str
    variants: list[Variant]
    unit: str = "images"
    remarks: Callable[[dict[str, dict]], Iterable[str]] = lambda rows: ()
    repeats: int | None = None  # in place of --repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], float | None], device: torch.device) -> float:
    """The seconds of one call, with the device's work done at both ends."""
    synchronize(device)
    start = time.perf_counter()
    seconds = run()
    synchronize(device)
    return time.perf_counter() - start if seconds is None else seconds


class Gemm:
    """The machine's rate for a product of two square matrices, measured again and again since machines drift.

    float32 products on CUDA may use TF32, as cuDNN's convolutions do unless told otherwise.
    """

    def __init__(self, device: torch.device, amps: Iterable[str]) -> None:
        self.device = device
        self.side = 8192 if device.type == "cuda" else 2048
        self.tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        self.matrices = {amp: torch.rand(self.side, self.side, device=device).to(DTYPES[amp]) for amp in dict.fromkeys(amps)}
        self.seconds: dict[str, list[float]] = {amp: [] for amp in self.matrices}
        self.measure()  # warm-up
        for seconds in self.seconds.values():
            seconds.clear()

    def measure(self) -> None:
        """Take one more sample of each precision: the median of three products."""
        precision = torch.get_float32_matmul_precision()
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        for amp, matrix in self.matrices.items():
            times = []
            for _ in range(3):
                synchronize(self.device)
                start = time.perf_counter()
                torch.mm(matrix, matrix)
                synchronize(self.device)
                times.append(time.perf_counter() - start)
            self.seconds[amp].append(median(times))
        torch.set_float32_matmul_precision(precision)

    def rate(self, amp: str) -> float:
        """FLOP/s, two a multiply-add: the median of the samples."""
        return 2 * self.side**3 / median(self.seconds[amp])

    def as_dict(self) -> dict[str, dict]:
        names = {amp: str(DTYPES[amp]).removeprefix("torch.") for amp in self.matrices}
        return {
            names[amp]: {"side": self.side, "flops_per_s": self.rate(amp), "samples": len(times), "tf32": self.tf32}
            for amp, times in self.seconds.items()
        }


def count_flops(run: Callable[[], object]) -> int:
    """The floating-point operations of one call, two a multiply-add: convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def run_part(part: Part, repeats: int, gemm: Gemm, device: torch.device, say: Callable[[str], None]) -> dict[str, dict]:
    """Warm every variant up once, counting its arithmetic, and then time them in turns: A B C, A B C, ...

    Returns:
        {name: row}: seconds (list), median_s, min_s, max_s, items, items_per_s, speedup (over the first variant), first_s,
        amp and, where there is arithmetic to count, flops, flops_per_s, gemm_share.
    """
    runners: dict[str, Runner] = {}
    rows: dict[str, dict] = {}
    try:
        for variant in part.variants:
            say(f"warm-up of {variant.name}")
            runner = runners[variant.name] = variant.build()
            row = rows[variant.name] = {"items": variant.items, "amp": variant.amp, "flops": 0}
            start = time.perf_counter()
            first = runner.warm_up or runner.run
            if variant.counted and not variant.flops_of:
                row["flops"] = count_flops(first)
            else:
                first()
            synchronize(device)
            row["first_s"] = time.perf_counter() - start
            row["seconds"] = []
        repeats = part.repeats or repeats
        for number in range(repeats):
            say(f"round {number + 1} of {repeats}")
            gemm.measure()
            for name, runner in runners.items():
                rows[name]["seconds"].append(timed(runner.run, device))
    finally:
        for runner in runners.values():
            runner.close()
        runners.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    base = median(rows[part.variants[0].name]["seconds"])
    for variant in part.variants:
        row = rows[variant.name]
        seconds = median(row["seconds"])
        row.update(median_s=seconds, min_s=min(row["seconds"]), max_s=max(row["seconds"]))
        row.update(items_per_s=variant.items / seconds, speedup=base / part.variants[0].items * variant.items / seconds)
        if flops := rows[variant.flops_of or variant.name]["flops"]:
            row.update(flops=flops, flops_per_s=flops / seconds, gemm_share=flops / seconds / gemm.rate(variant.amp))
    return rows


def resident() -> int:
    """The resident set of this process in bytes; where the system does not tell, its peak so far."""
    return _status("VmRSS") or _peak_so_far()


def _status(name: str) -> int:
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak_so_far() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_peak(variant: Variant, device: torch.device) -> dict[str, int]:
    """Peak memory of the second call of one variant, in a process of its own (see :func:`peak_in_child`).

    Returns:
        peak_bytes; beyond_bytes, what is left of it without the process after its imports (on a CPU), the weights and
        buffers and, in training, gradients and momentum.
    """
    base = 0 if device.type == "cuda" else resident()
    runner = variant.build()
    try:
        runner.run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again at what is resident now
        runner.run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") or _peak_so_far()
    finally:
        runner.close()
    held = 0
    if runner.net is not None:
        tensors = [*runner.net.parameters(), *runner.net.buffers()]
        held = sum(tensor.nbytes for tensor in tensors)
        if runner.training:
            held += 2 * sum(parameter.nbytes for parameter in runner.net.parameters() if parameter.requires_grad)
    return {"peak_bytes": peak, "beyond_bytes": peak - base - held}


def peak_in_child(command: list[str]) -> dict[str, int] | str:
    """Run ``command``, whose last line is the JSON of :func:`measure_peak`; returns that, or what went wrong in words."""
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"its process ended with status {child.returncode}: {last}"
    return json.loads(child.stdout.strip().splitlines()[-1])


@dataclass
class Machine:
    """What was measured on."""

    device: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)


def describe(device: torch.device) -> Machine:
    """The device's name, the number of threads, and the versions of what does the work."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "numpy", "opencv-python-headless", "opencv-python", "pydensecrf2", "pydensecrf"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if device.type == "cuda":
        versions.update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        with suppress(OSError), open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
        name += f", {os.cpu_count()} cores"
    return Machine(f"{device}: {name}", torch.get_num_threads(), versions)
