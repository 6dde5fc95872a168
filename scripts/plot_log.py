"""Draw the loss, the learning rate and the validation mean IoU of one or more training runs.

    python scripts/plot_log.py snapshots snapshots_msc -o curves.png

A RUN is a folder with a log.jsonl, or that file. Several runs share each plot; they are named after their folders.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.argtypes import Parser, target
from utils.command import UserError, run_command
from utils.files import write_atomically
from utils.outputs import OUTPUT_MARK, Output, check_outputs

CURVES = {"loss": ("loss", 1), "lr": ("learning rate", 1), "val_mean_iou": ("mean IoU %", 100)}  # label, factor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a --snapshot-dir, or a log.jsonl")
    text = ".png, .svg or .pdf (default: %(default)s)"
    parser.add_argument("-o", "--output", type=target, default=Path("curves.png"), help=text)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{args.output} ends in {args.output.suffix!r}; expected .png, .svg or .pdf")
    paths = [run / "log.jsonl" if run.is_dir() else run for run in args.runs]
    runs = dict(zip(short_names(paths), map(read_log, paths)))
    check_outputs([Output("--output", args.output.parent, args.output.name, "the curves")], paths)
    draw(runs, args.output)
    reached = ", ".join(f"{name} to step {lines[-1]['step']}" for name, lines in runs.items())
    print(f"wrote {args.output}: {reached}")
    return 0


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without an incomplete last line.

    Raises:
        UserError: the log is missing or empty.
    """
    from utils.training.log import log_entries

    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the log.jsonl of a training run") from None
    lines = [entry for _, entry in log_entries(text)]
    if not lines:
        raise UserError(f"{path} holds no step; expected the log.jsonl of a training run with at least one logged step")
    return lines


def short_names(paths: Sequence[Path]) -> list[str]:
    """A unique name for each log: its folder, with as many parent folders as needed."""
    places = [Path(os.path.abspath(path)) for path in paths]
    parts = [(place.parent if place.name == "log.jsonl" else place).parts for place in places]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        fewest = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append(str(Path(*own[-fewest:])))
    return names


def points(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps at which ``name`` was logged, and its values multiplied by the factor of its curve."""
    from utils.training.log import is_number

    known = [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
    return [step for step, _ in known], [CURVES[name][1] * value for _, value in known]


def draw(runs: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Draw one plot per curve that occurs in any run, one below the other.

    Raises:
        UserError: there is nothing to draw, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"the curves need matplotlib ({error}); pip install matplotlib") from None
    shown = [name for name in CURVES if any(points(lines, name)[0] for lines in runs.values())]
    if not shown:
        raise UserError(f"{', '.join(runs)}: the logs hold no loss, learning rate or mean IoU; expected logs of training runs")
    figure = Figure(figsize=(8, 2.8 * len(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0], shown):
        for run, lines in runs.items():
            steps, values = points(lines, name)
            label = " " + run.replace("$", r"\$")  # matplotlib hides labels that start with _ and parses $...$ as a formula
            axes.plot(steps, values, label=label, marker="." if len(steps) < 40 else "")
        axes.set_ylabel(CURVES[name][0])
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.axes[0].legend()
    mark = {"Software" if output.suffix == ".png" else "Creator": OUTPUT_MARK}
    write_atomically(output, lambda file: figure.savefig(file, format=output.suffix[1:], dpi=120, metadata=mark))


if __name__ == "__main__":
    run_command(main)
