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
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from utils.command import usable_cores

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
PACKAGES = ("torchvision", "numpy", "opencv-python-headless", "opencv-python", "pydensecrf2", "pydensecrf")


@dataclass
class Runner:
    """A variant that is ready to run. ``run`` does the work once, and may return the seconds to count in place of its own."""

    run: Callable[[], float | None]
    net: nn.Module | None = None  # whose weights it holds
    training: bool = False  # gradients and momentum are held as well
    close: Callable[[], None] = lambda: None  # ends what it started


@dataclass
class Variant:
    """A row: one way of doing a part's work."""

    name: str
    build: Callable[[], Runner]
    items: int  # pictures a call
    amp: str = "off"  # the precision, whose GEMM rate it is held against
    flops_of: str | None = ""  # the row with the same arithmetic, for compiled nets; "" counts its own; None: there is none
    memory: bool = True  # its peak memory is measured
    base: str = ""  # the row that it is compared with; "" is the part's first


@dataclass
class Part:
    """A table. ``remarks(rows)`` gives the lines below it and may add entries to the rows."""

    title: str
    variants: list[Variant]
    remarks: Callable[[dict[str, dict]], Iterable[str]] = lambda rows: ()
    repeats: int | None = None  # in place of --repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, with the device's work done at both ends, or the seconds that it returns."""
    synchronize(device)
    start = time.perf_counter()
    seconds = run()
    synchronize(device)
    return seconds if isinstance(seconds, float) else time.perf_counter() - start


class Gemm:
    """The machine's rate for a product of two square matrices, measured again and again since machines drift.

    float32 products on CUDA may use TF32, as cuDNN's convolutions do unless told otherwise.
    """

    def __init__(self, device: torch.device, amps: Iterable[str]) -> None:
        self.device = device
        self.side = GEMM_SIDE[device.type]
        self.tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        self.matrices = {amp: torch.rand(self.side, self.side, device=device).to(DTYPES[amp]) for amp in dict.fromkeys(amps)}
        self.seconds: dict[str, list[float]] = {}
        self.measure()  # warm-up
        self.seconds.clear()

    def measure(self) -> None:
        """Take one more sample of each precision: the median of three products."""
        precision = torch.get_float32_matmul_precision()
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        for amp, matrix in self.matrices.items():
            times = [timed(partial(torch.mm, matrix, matrix), self.device) for _ in range(3)]
            self.seconds.setdefault(amp, []).append(median(times))
        torch.set_float32_matmul_precision(precision)

    def rate(self, amp: str) -> float:
        """FLOP/s, two a multiply-add: the median of the samples."""
        return 2 * self.side**3 / median(self.seconds[amp])

    def as_dict(self) -> dict[str, dict]:
        return {
            str(DTYPES[amp]).removeprefix("torch."): {
                "side": self.side,
                "flops_per_s": self.rate(amp),
                "samples": len(times),
                "tf32": self.tf32 and amp == "off",
            }
            for amp, times in self.seconds.items()
        }


def count_flops(run: Callable[[], object]) -> int:
    """The floating-point operations of one call, two a multiply-add: convolutions and matrix products, forward and backward."""

    def conv2d(inputs: torch.Size, weight: torch.Size, *rest: Any, out_shape: torch.Size, **options: Any) -> int:
        return conv_flop_count(list(inputs), list(weight), list(out_shape))

    # under inference_mode, torch before 2.5 meets conv2d itself, which its own table lacks
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.conv2d: conv2d}) as counter:
        run()
    return counter.get_total_flops()


def run_part(part: Part, repeats: int, gemm: Gemm, device: torch.device, say: Callable[[str], None]) -> dict[str, dict]:
    """Warm every variant up once, counting its arithmetic, and then time them in turns: A B C, A B C, ...

    Returns:
        {name: row}: seconds (list), median_s, min_s, max_s, items, items_per_s, speedup (over ``Variant.base``), first_s, amp
        and, where there is arithmetic to count, flops, flops_per_s, gemm_ratio.
    """
    runners: dict[str, Runner] = {}
    rows: dict[str, dict] = {}
    try:
        for variant in part.variants:
            say(f"warm-up of {variant.name}")
            run = (runners.setdefault(variant.name, variant.build())).run
            row = rows[variant.name] = {"items": variant.items, "amp": variant.amp, "flops": 0, "seconds": []}
            start = time.perf_counter()
            if variant.flops_of == "":
                row["flops"] = count_flops(run)
            else:
                run()
            synchronize(device)
            row["first_s"] = time.perf_counter() - start
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
    for variant in part.variants:
        row = rows[variant.name]
        row.update(median_s=median(row["seconds"]), min_s=min(row["seconds"]), max_s=max(row["seconds"]))
        row["items_per_s"] = variant.items / row["median_s"]
        if flops := rows[variant.flops_of or variant.name]["flops"]:
            rate = flops / row["median_s"]
            row.update(flops=flops, flops_per_s=rate, gemm_ratio=rate / gemm.rate(variant.amp))
    for variant in part.variants:
        base = rows[variant.base or part.variants[0].name]
        rows[variant.name]["speedup"] = rows[variant.name]["items_per_s"] / base["items_per_s"]
    return rows


def _status(name: str) -> int:
    """An entry of Linux's /proc/self/status in bytes; elsewhere the peak of the resident set so far."""
    with suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_peak(variant: Variant, device: torch.device) -> dict[str, int]:
    """Peak memory of the second call of one variant, in a process of its own (see :func:`peak_in_child`).

    Returns:
        peak_bytes; beyond_bytes, what is left of it without the process after its imports (on a CPU), the weights and
        buffers and, in training, gradients and momentum.
    """
    base = 0 if device.type == "cuda" else _status("VmRSS")
    runner = variant.build()
    try:
        runner.run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again at what is resident now
        runner.run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    finally:
        runner.close()
    held = 0
    if runner.net is not None:
        held = sum(tensor.nbytes for tensor in (*runner.net.parameters(), *runner.net.buffers()))
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


def describe(device: torch.device) -> dict[str, Any]:
    """The device's name, the number of threads, and the versions of what does the work."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if device.type == "cuda":
        versions.update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        name += f", {usable_cores()} of {os.cpu_count()} cores"
    return {"device": f"{device}: {name}", "threads": torch.get_num_threads(), "versions": versions}
