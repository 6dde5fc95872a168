"""Measurements of the benchmark: time (rows alternate), FLOPs by torch's FLOP counter, and peak memory."""

import gc
import os
import platform
import sys
import timeit
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import Measurement, TaskSpec, timer
from torch.utils.flop_counter import FlopCounterMode

from utils.device import select_device
from utils.processes import usable_cores

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass
class Runner:
    """A row that is ready to run.

    Attributes:
        run: does the work once.
        setup: called before each run, outside the measured time.
        close: stops the processes that the row started.
        net: the net of the row.
        training: whether there are gradients and momentum.
    """

    run: Callable[[], object]
    setup: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None
    net: nn.Module | None = None
    training: bool = False


@dataclass
class Row:
    """One way to do the work of a table.

    Attributes:
        images: number of images per run.
        amp: the precision, also of the matrix product for ``x GEMM``.
        compiled: whether the net is compiled. The FLOP counter cannot read it, so the FLOPs of the row before are used.
        base: the row to compare with; "" is the first row of the table.
    """

    name: str
    build: Callable[[], Runner]
    images: int
    amp: str = "off"
    compiled: bool = False
    base: str = ""


@dataclass
class Table:
    """The rows of one part of the benchmark, the reference first.

    Attributes:
        nets: whether the rows run a net, so that FLOPs and memory are measured.
        repeats: number of rounds, instead of ``--repeats``.
        remarks: result of :func:`run_table` -> lines below the table; may add entries to the rows.
    """

    title: str
    rows: list[Row]
    nets: bool = True
    repeats: int | None = None
    remarks: Callable[[dict[str, dict]], Iterable[str]] = lambda rows: ()


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def matrix_product(amp: str, device: torch.device) -> Row:
    """Three products of two large square matrices: the practical peak speed in one precision."""

    def build() -> Runner:
        if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            torch.set_float32_matmul_precision("high")  # TF32, like the convolutions
        side = MATRIX_SIDE[device.type]
        matrix = torch.rand(side, side, device=device).to(DTYPES[amp])
        return Runner(lambda: [torch.mm(matrix, matrix) for _ in range(3)])

    return Row(f"matrix product, {str(DTYPES[amp]).removeprefix('torch.')}", build, 0, amp)


def run_table(table: Table, repeats: int, device: torch.device) -> dict[str, dict]:
    """Run each row once to warm up and count its FLOPs, then all rows alternately: A B C, A B C, ...

    Returns:
        {row: entries}: seconds (list), median_s, steady (bool), items (images), amp, flops; except for matrix products
        items_per_s and speedup (over ``Row.base``); with nets gemm_ratio, the FLOP/s relative to the matrix product.
    """
    rows = [*table.rows]
    if table.nets:
        rows += [matrix_product(amp, device) for amp in dict.fromkeys(row.amp for row in rows)]
    found: dict[str, dict] = {}
    runners: dict[str, Runner] = {}
    with ExitStack() as stack:
        flops = 0
        for row in rows:
            progress(f"warm-up of {row.name}")
            runner = runners[row.name] = row.build()
            stack.callback(runner.close)
            runner.setup()
            counter = FlopCounterMode(display=False) if table.nets and not row.compiled else None
            with counter or nullcontext():
                runner.run()
            flops = counter.get_total_flops() if counter else flops
            found[row.name] = {"items": row.images, "amp": row.amp, "flops": flops, "seconds": []}
        repeats = table.repeats or repeats
        for number in range(repeats):
            progress(f"round {number + 1} of {repeats}")
            for name, runner in runners.items():
                # torch.utils.benchmark.Timer has the same clock, but adds two runs before each measurement
                found[name]["seconds"].append(timeit.Timer(runner.run, runner.setup, timer).timeit(1))
    runners.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for name, entry in found.items():
        times = Measurement(1, entry["seconds"], TaskSpec(name, "", num_threads=torch.get_num_threads()))
        entry.update(median_s=times.median, steady=times.meets_confidence())
    for row in table.rows:
        entry, base = found[row.name], found[row.base or rows[0].name]
        entry["items_per_s"] = row.images / entry["median_s"]
        entry["speedup"] = entry["items_per_s"] / (base["items"] / base["median_s"])
    for row in rows if table.nets else ():
        entry, product = found[row.name], found[matrix_product(row.amp, device).name]
        entry["gemm_ratio"] = entry["flops"] / entry["median_s"] / (product["flops"] / product["median_s"])
    return found


def resident(name: str) -> int:
    """Resident bytes of this process, Linux only: now (``VmRSS``; of files, ``RssFile``) or at the peak (``VmHWM``)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def reset_peak() -> None:
    """Reset the peak of the resident set to its current size."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # not possible in every container
        file.write("5")


def measure_peak(make_table: Callable[[Namespace, torch.device], Table], name: str, args: Namespace) -> dict[str, int]:
    """The peak memory of the second run of one row; call it in a new process.

    Returns:
        peak_bytes: allocated on CUDA, else resident. beyond_bytes: without the imports (on a CPU), weights, buffers and, in
        training, gradients and momentum.

    Raises:
        OSError: the resident set cannot be read on this system.
        RuntimeError: memory was short, so the system dropped pages of libraries and the measured peak is too low.
    """
    device = select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    row = next(row for row in make_table(args, device).rows if row.name == name)
    cuda = device.type == "cuda"
    held, libraries = (0, 0) if cuda else (resident("VmRSS"), resident("RssFile"))
    runner = row.build()
    with ExitStack() as stack:
        stack.callback(runner.close)
        runner.run()
        reset_peak()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        runner.run()
        peak = torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")
        if not cuda and resident("RssFile") < 0.9 * libraries:
            raise RuntimeError("too little memory is free on this machine")
    if runner.net is not None:
        held += sum(tensor.nbytes for tensor in (*runner.net.parameters(), *runner.net.buffers()))
        if runner.training:
            held += 2 * sum(parameter.nbytes for parameter in runner.net.parameters() if parameter.requires_grad)
    return {"peak_bytes": peak, "beyond_bytes": peak - held}


def describe(device: torch.device) -> str:
    """The device, the number of threads and the version of torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        name += f", {usable_cores()} of {os.cpu_count()} cores"
    return f"{device}: {name}, {torch.get_num_threads()} threads; torch {torch.__version__}"
