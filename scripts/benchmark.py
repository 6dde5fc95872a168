"""Measure training, evaluation, data loading and the CRF against the published implementation.

    python scripts/benchmark.py                                   # everything, with synthetic images and weights
    python scripts/benchmark.py train msc --batch-size 4 --amp bf16 --compile
    python scripts/benchmark.py crf --crf-repeats 3 --json speed.json

Each part is one table. Its first row is the reference (``scripts/bench/reference.py``). After one warm-up run each, all rows of
a table are measured alternately in one process, A B C A B C, so that a drift of the machine affects all equally. The columns:

    seconds    median time of a run; compilation is part of the warm-up
    s/image    seconds per image
    x ref      speed relative to the reference
    x GEMM     FLOP/s of convolutions and matrix products (forward and backward, counted by torch.utils.flop_counter), relative
               to the row "matrix product": two large square matrices in the precision of the row
    beyond MB  peak memory (allocated on CUDA; resident on a CPU, Linux only) of the second run in its own process, without
               imports, weights, buffers and, in training, gradients and momentum: what is left are activations and workspace

The part ``memory`` runs nothing: it computes the memory of a training step of ``--batch-size`` crops for common settings.

Images (in common VOC sizes) and weights are synthetic. This does not change the arithmetic; only the speed of the CRF depends
on the image and the probabilities.
"""

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.argtypes import Parser, backbone_name, net_name, positive, size, target_text
from utils.command import UserError, run_command
from utils.options import add_device_options

if TYPE_CHECKING:  # the parts import torch, which would slow down --help
    from scripts.bench.measure import Table

PART_NAMES = ("train", "msc", "evaluate", "data", "crf", "memory")


def part_name(text: str) -> str:
    if text not in PART_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part; choose from {', '.join(PART_NAMES)}")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, epilog=details, formatter_class=formatter)
    parser.add_argument("parts", nargs="*", type=part_name, metavar="PART", help=f"{', '.join(PART_NAMES)} (default: all)")
    parser.add_argument("--repeats", type=positive, default=3, help="runs per row after the warm-up (default: %(default)s)")
    parser.add_argument("--crf-repeats", type=positive, default=1, help="runs per row of the CRF (default: %(default)s)")
    parser.add_argument("--json", type=target_text, metavar="FILE", help="save all figures to FILE, after each part")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory (needs one process per row)")

    group = parser.add_argument_group("what is measured")
    group.add_argument("--net", type=net_name, help="others only for memory (default: deeplabv2)")
    group.add_argument("--backbone", type=backbone_name, help="default: resnet101")
    group.add_argument("--num-classes", type=positive, default=21, help="number of classes (default: %(default)s)")
    group.add_argument("--batch-size", type=positive, default=2, help="crops per training step (default: %(default)s)")
    group.add_argument("--input-size", type=size, default=(321, 321), metavar="H,W", help="training crop (default: 321,321)")
    group.add_argument(
        "--pictures", type=positive, default=3, help="images to evaluate, and CRF images per process (default: %(default)s)"
    )
    add_device_options(parser)
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="no compiled rows; by default only evaluation has one, and --compile adds one to training",
    )
    parser.set_defaults(compile=None)
    args = parser.parse_args(argv)
    args.net, args.backbone = args.net or "deeplabv2", args.backbone or "resnet101"  # not looked up, which loads torch
    args.parts = list(dict.fromkeys(args.parts)) or list(PART_NAMES)
    if args.net != "deeplabv2" and args.parts != ["memory"]:
        parser.error(f"--net {args.net}: the published implementation is a deeplabv2; give only the part memory")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        return run(args, Path(scratch))


def run(args: argparse.Namespace, scratch: Path) -> int:
    from scripts.bench import measure
    from scripts.bench.inputs import make_images
    from scripts.bench.memory import memory_rows, print_memory
    from scripts.bench.prediction import crf, evaluate
    from scripts.bench.training import data, msc, train
    from utils.device import select_device
    from utils.files import save_json
    from utils.outputs import OUTPUT_MARK, Output, check_outputs

    if "crf" in args.parts and importlib.util.find_spec("pydensecrf") is None:
        others = " ".join(name for name in PART_NAMES if name != "crf")
        raise UserError(f"the part crf measures pydensecrf, which is not installed; install it, or name other parts: {others}")
    if args.json:
        path = Path(args.json)
        check_outputs([Output("--json", path.parent, path.name, "the figures")], [])
    device = select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    result: dict[str, Any] = {"made_by": OUTPUT_MARK, "options": dict(vars(args)), "device": measure.describe(device)}
    result["parts"] = {}
    args.device, args.data_dir = str(device), str(scratch / "images")  # for the processes that measure memory
    if "memory" in args.parts:  # computed on any machine
        steps = memory_rows(args)
        print_memory(args, steps)
        result["parts"]["memory"] = {"rows": {name: {**asdict(step), "card": step.card} for name, step in steps.items()}}
    if args.json:
        save_json(args.json, result)
    if args.parts == ["memory"]:
        return 0
    print(result["device"], flush=True)
    make_images(Path(args.data_dir), args.pictures, args.num_classes)
    for make_table in (train, msc, evaluate, data, crf):
        if make_table.__name__ in args.parts:
            table = make_table(args, device)
            rows = measure.run_table(table, args.repeats, device)
            notes = add_memory(make_table, table, rows, args) if table.nets and not args.no_memory else []
            notes += table.remarks(rows)
            if unsteady := [name for name, row in rows.items() if not row["steady"]]:
                notes.append(f"interquartile range above a tenth of the median: {', '.join(unsteady)}")
            print_table(table.title, rows, notes)
            result["parts"][make_table.__name__] = {"title": table.title, "rows": rows, "notes": notes}
            if args.json:
                save_json(args.json, result)
    return 0


def add_memory(make_table: Callable, table: "Table", rows: dict[str, dict], args: argparse.Namespace) -> list[str]:
    """Measure the peak memory of each row that is not compiled, each in its own process; returns a line for each failure."""
    from scripts.bench.measure import measure_peak, progress

    notes = []
    for row in table.rows:
        if not row.compiled:
            progress(f"memory of {row.name}")
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rows[row.name].update(pool.submit(measure_peak, make_table, row.name, args).result())
            except (OSError, RuntimeError) as error:  # e.g. the process was killed
                notes.append(f"the memory of {row.name} was not measured: {error}")
    return notes


def cells(row: dict) -> dict[str, str]:
    """{column: text} of one row, only for the columns that were measured."""
    found = {"seconds": f"{row['median_s']:.3f}"}
    if row["items"]:
        found |= {"s/image": f"{1 / row['items_per_s']:.3f}", "x ref": f"{row['speedup']:.2f}"}
    if "gemm_ratio" in row:
        found["x GEMM"] = f"{row['gemm_ratio']:.2f}"
    if "beyond_bytes" in row:
        found["beyond MB"] = f"{row['beyond_bytes'] / 1e6:.0f}"
    return found


def print_table(title: str, rows: dict[str, dict], notes: list[str]) -> None:
    """Print one line per row, ``-`` for what was not measured, then the notes."""
    table = {name: cells(row) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for found in table.values() for column in found))
    first = max(map(len, rows))
    print(f"\n{title}\n{'':{first}}", *(f"{column:>9}" for column in columns), sep="  ")
    for name, found in table.items():
        print(f"{name:{first}}", *(f"{found.get(column, '-'):>9}" for column in columns), sep="  ")
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
