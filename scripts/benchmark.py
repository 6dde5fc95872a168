"""Measure training, prediction, evaluation, reading and CRF against the published way of doing them.

    python scripts/benchmark.py                                   # everything, with made-up pictures and weights
    python scripts/benchmark.py train msc --batch-size 4 --amp bf16 --compile
    python scripts/benchmark.py evaluate crf --data-dir data/VOCdevkit/VOC2012 --restore-from net.pth --json speed.json

Each part is one table. Its first row is the reference (``scripts/bench/reference.py``; for ``--net deeplabv3`` and ``pspnet``
the same net unfolded and in NCHW). All rows of a table are measured in one
process and in turns, A B C A B C, after one call each to warm up, so that a drift of the machine meets all alike. The columns:

    seconds    the median of a call, with the fastest and the slowest; compiling belongs to the warm-up
    images/s   pictures a second
    x ref      images/s as a multiple of the reference's
    GFLOP      the convolutions and matrix products of a call, forward and backward, two operations a multiply-add, as
               torch.utils.flop_counter counts them in one call; what is computed twice counts twice
    GFLOP/s    that divided by the seconds
    x GEMM     GFLOP/s as a multiple of what this machine reaches, between the same rounds, in a product of two large square
               matrices of the row's precision; above 1 where its convolutions are faster than that product
    peak       on CUDA the peak of allocated memory, on a CPU the peak resident set of the whole process; each row has a
               process of its own for this, and its second call is measured
    beyond     the peak without what has to be there: the process after its imports (on a CPU), weights and buffers and, in
               training, one gradient and one momentum a learnable weight. What is left is activations and work space

The part ``memory`` runs nothing: it computes what a training step of ``--batch-size`` crops takes, for usual settings.

Without ``--data-dir`` pictures of the usual VOC sizes are made in a temporary folder, without ``--restore-from`` the weights
are random; neither changes the arithmetic, but for the CRF, whose speed depends on the picture and the probabilities.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command import default_processes, not_negative, numbers, positive, run_command, size
from utils.options import BACKBONE_NAMES, NET_NAMES, add_device_options

if TYPE_CHECKING:  # the parts bring torch, which --help need not wait for
    from scripts.bench.measure import Part

PART_NAMES = ("train", "msc", "predict", "evaluate", "data", "crf", "memory")
TOO_SHORT = 0.01  # seconds of a call below which a ratio says little


def part_name(text: str) -> str:
    if text not in PART_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; choose from {', '.join(PART_NAMES)}")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", type=part_name, metavar="PART", help=f"{', '.join(PART_NAMES)} (default: all)")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds after the warm-up (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="save everything here, after each part")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory, which takes a process a row")

    group = parser.add_argument_group("what is measured")
    group.add_argument("--net", choices=NET_NAMES, help="default: that of --restore-from, else deeplabv2")
    group.add_argument("--backbone", choices=BACKBONE_NAMES, help="default: that of --restore-from, else resnet101")
    group.add_argument("--num-classes", type=positive, help="default: that of --restore-from, else 21")
    group.add_argument("--restore-from", metavar="FILE", help="a snapshot or published weights (default: random weights)")
    group.add_argument("--batch-size", type=positive, default=2, help="pictures a training step (default: %(default)s)")
    group.add_argument("--input-size", type=size, default=(321, 321), metavar="H,W", help="training crop (default: 321,321)")
    group.add_argument(
        "--canvas", type=size, default=(505, 505), metavar="H,W", help="of the reference's prediction (default: 505,505)"
    )
    group.add_argument("--data-dir", help="folder in the VOC layout (default: made-up pictures)")
    group.add_argument("--data-list", metavar="FILE", help="image ids (default: the lists of train.py and evaluate.py)")
    group.add_argument("--pictures", type=positive, default=3, help="pictures to evaluate (default: %(default)s)")
    group.add_argument(
        "--num-workers",
        type=not_negative,
        help="processes that read pictures; adds a training row that reads, as on CUDA by default (evaluation: 0 by default, "
        "as in the reference)",
    )
    group.add_argument("--crf-pictures", type=positive, help="pictures a round of the CRF (default: three a process)")
    group.add_argument("--crf-repeats", type=positive, default=1, help="rounds of the CRF (default: %(default)s)")
    group.add_argument(
        "--crf-workers",
        type=partial(numbers, int),
        default=(1, default_processes(32)),
        metavar="N,N",
        help="processes for the CRF, the reference's and ours (default: 1 and the cores, at most 32)",
    )
    add_device_options(parser)
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="no compiled rows; by default prediction and evaluation have one, and --compile adds one to training",
    )
    parser.set_defaults(compile=None)
    parser.add_argument("--child", nargs=2, metavar=("PART", "ROW"), help=argparse.SUPPRESS)  # measures the memory of one row
    args = parser.parse_args(argv)
    args.parts = list(dict.fromkeys(args.parts)) or list(PART_NAMES)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        args.scratch = scratch
        return run(args, argv)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    from scripts.bench import PARTS
    from scripts.bench.inputs import make_pictures, open_pictures
    from scripts.bench.measure import Gemm, describe, measure_peak, run_part
    from scripts.bench.memory import memory_rows, print_memory
    from utils import distributed
    from utils.checkpoint import load_init
    from utils.files import OUTPUT_MARK, Output, check_outputs, save_json

    if args.child:
        part, row = args.child
        device = distributed.select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
        variants = {variant.name: variant for variant in PARTS[part](args, device).variants}
        print(json.dumps(measure_peak(variants[row], device)))
        return 0

    device = distributed.select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    if args.restore_from:
        config = load_init(args.restore_from, net=args.net, backbone=args.backbone, num_classes=args.num_classes)[0].config
        args.net, args.backbone, args.num_classes = config["net"], config["backbone"], config["num_classes"]
    args.net, args.backbone, args.num_classes = args.net or "deeplabv2", args.backbone or "resnet101", args.num_classes or 21
    measured = [name for name in args.parts if name != "memory"]
    if args.json:
        path = Path(args.json)
        read = [name for name in (args.restore_from, args.data_list) if name]
        check_outputs([Output("--json", path.parent, path.name, "the figures")], read)
    result: dict[str, Any] = {"made_by": OUTPUT_MARK, "options": {**vars(args)}, "parts": {}}
    if "memory" in args.parts:  # computed, whatever the machine
        steps = memory_rows(args)
        print_memory(args, steps)
        result["parts"]["memory"] = {"rows": {name: {**asdict(step), "card": step.card} for name, step in steps.items()}}
        if args.json:
            save_json(args.json, result)
    if not measured:
        return 0
    if not args.data_dir:
        args.data_dir = str(Path(args.scratch) / "pictures")
        make_pictures(Path(args.data_dir), args.pictures, args.num_classes)
    open_pictures(args).load(0)  # a wrong folder is told now, not minutes later

    machine = describe(device)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['device']}, {machine['threads']} threads; {versions}", flush=True)
    result.update(machine)
    if args.json:
        save_json(args.json, result)
    gemm = Gemm(device, ["off", args.amp])
    for name in measured:
        part = PARTS[name](args, device)
        say = partial(progress, name)
        rows = run_part(part, args.repeats, gemm, device, say)
        notes = [] if args.no_memory else add_memory(name, part, rows, args, argv, say)
        notes += part.remarks(rows)
        short = [row_name for row_name, row in rows.items() if row["median_s"] < TOO_SHORT]
        notes += [f"too short to mean anything, under {TOO_SHORT} s a call: {', '.join(short)}"] if short else []
        print_table(part.title, rows, notes)
        result["parts"][name] = {"title": part.title, "rows": rows, "notes": notes}
        result["gemm"] = gemm.as_dict()
        if args.json:
            save_json(args.json, result)
    for dtype, entry in result["gemm"].items():
        name = f"{dtype} (TF32)" if entry["tf32"] else dtype
        rate, side = entry["flops_per_s"] / 1e9, entry["side"]
        print(f"\nGEMM, {name}: {rate:.1f} GFLOP/s, {side}x{side}, median of {entry['samples']} samples", end="")
    print()
    print("beyond: the peak without the process after its imports, weights, buffers and, in training, gradients and momentum")
    peaks = {name: {key: row.get("peak_bytes") for key, row in result["parts"][name]["rows"].items()} for name in measured}
    one, alone = peaks.get("train", {}).get("ours"), peaks.get("msc", {}).get("ours --one-scale-at-a-time")
    if one and alone:
        print(f"peak of three scales, one at a time: {alone / one:.2f}x that of a single scale")
    return 0


def progress(part: str, text: str) -> None:
    print(f"{part}: {text}", file=sys.stderr, flush=True)


def add_memory(
    name: str, part: "Part", rows: dict[str, dict], args: argparse.Namespace, argv: list[str], say: Callable[[str], None]
) -> list[str]:
    """Measure the peak memory of each row in a process of its own; returns a line for each row where that failed."""
    from scripts.bench.measure import peak_in_child

    settled = [
        "--data-dir",
        args.data_dir,
        "--net",
        args.net,
        "--backbone",
        args.backbone,
        "--num-classes",
        str(args.num_classes),
    ]
    settled += ["--pictures", str(min(args.pictures, 2))]
    notes = []
    for variant in part.variants:
        if not variant.memory:
            continue
        say(f"memory of {variant.name}")
        peak = peak_in_child([sys.executable, __file__, *argv, *settled, "--child", name, variant.name])
        if isinstance(peak, str):
            notes.append(f"the memory of {variant.name} was not measured: {peak}")
        else:
            rows[variant.name].update(peak)
    return notes


def cells(row: dict) -> dict[str, str]:
    """{column: text} of one row; a column that was not measured is not there."""
    found = {"seconds": f"{row['median_s']:.3f}", "(min-max)": f"({row['min_s']:.3f}-{row['max_s']:.3f})"}
    found.update({"images/s": f"{row['items_per_s']:.3f}", "x ref": f"{row['speedup']:.2f}"})
    if row["flops"]:
        found.update({"GFLOP": f"{row['flops'] / 1e9:.1f}", "GFLOP/s": f"{row['flops_per_s'] / 1e9:.1f}"})
        found["x GEMM"] = f"{row['gemm_ratio']:.2f}"
    if "peak_bytes" in row:
        found.update({"peak MB": f"{row['peak_bytes'] / 1e6:.0f}", "beyond MB": f"{row['beyond_bytes'] / 1e6:.0f}"})
    return found


def print_table(title: str, rows: dict[str, dict], notes: list[str]) -> None:
    """One line a row, ``-`` where a row lacks what others have, and the notes."""
    table = {name: cells(row) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for found in table.values() for column in found))
    widths = [max(len(column), *(len(found.get(column, "-")) for found in table.values())) for column in columns]
    first = max(map(len, rows))
    print(f"\n{title}\n{'':{first}}", *(f"{column:>{width}}" for column, width in zip(columns, widths)), sep="  ")
    for name, found in table.items():
        print(f"{name:{first}}", *(f"{found.get(column, '-'):>{width}}" for column, width in zip(columns, widths)), sep="  ")
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
