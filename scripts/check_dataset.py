"""Read every picture and label mask of a list, as training does, and say in one table what is wrong with them.

    python scripts/check_dataset.py --data-dir data/mine --data-list data/mine/train.txt --num-classes 5

Ends with status 0 where all is well, 1 where something is wrong, 2 where the check could not be made.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.classes import IGNORE_LABEL, VOC_CLASSES, voc_palette
from dataset.voc import (
    TRAIN_LISTS,
    DatasetError,
    VOCSegmentation,
    find_list,
    read_class_names,
    read_ids,
    read_image,
    read_label,
)
from scripts.data.parallel import parallel_map
from utils.command import not_negative, positive, run_command
from utils.files import save_json
from utils.options import DATA_DIR

KINDS = (
    "missing picture",
    "unreadable picture",
    "missing label",
    "unreadable label",
    "colour label",
    "wrong values",
    "other size",
    "duplicate id",
)
VOID_GREY = {220}  # of the colour (224, 224, 192) of VOC's void
SHOWN = 5  # examples of each kind


@dataclass
class Entry:
    """What one id's two files look like."""

    image_id: str
    problems: list[tuple[str, str]] = field(default_factory=list)  # (kind, what was found)
    size: tuple[int, int] | None = None  # width, height of the picture
    counts: np.ndarray | None = None  # (256,) pixels of each value in a single-channel label
    colours: str = ""  # of a colour label: "VOC", "grey" or "other"


def few(values) -> str:
    """The first values, separated by commas, and dots where there are more."""
    values = list(values)
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def inspect(image_id: str, image_path: Path, label_path: Path, num_classes: int, ignore_label: int) -> Entry:
    """Read the two files of one id; runs in the worker processes."""
    entry = Entry(image_id)
    if not image_path.exists():
        entry.problems.append(("missing picture", str(image_path)))
    else:
        try:
            height, width = read_image(image_path).shape[:2]
            entry.size = width, height
        except DatasetError as error:
            entry.problems.append(("unreadable picture", str(error)))
    if not label_path.exists():
        entry.problems.append(("missing label", str(label_path)))
        return entry
    try:
        with Image.open(label_path) as image:
            mode, label = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        entry.problems.append(("unreadable label", f"{label_path}: {error}"))
        return entry
    if entry.size and (label.shape[1], label.shape[0]) != entry.size:
        turned = ", sides swapped: turned by an EXIF tag?" if label.shape[:2] == entry.size else ""
        found = f"label {label.shape[1]}x{label.shape[0]}, picture {entry.size[0]}x{entry.size[1]}{turned}"
        entry.problems.append(("other size", f"{image_id}: {found}"))
    if mode in ("RGB", "RGBA"):
        colours, entry.colours = np.unique(label[..., :3].reshape(-1, 3), axis=0), "other"
        palette = voc_palette()[[*range(num_classes), IGNORE_LABEL]] if num_classes <= IGNORE_LABEL else voc_palette()
        if {tuple(c) for c in colours.tolist()} <= {tuple(c) for c in palette.tolist()}:
            entry.colours = "VOC"
        elif (colours == colours[:, :1]).all():
            entry.colours = "grey"
        shown = few(str(tuple(c)) for c in colours.tolist())
        entry.problems.append(("colour label", f"{image_id}: mode {mode}, {len(colours)} colours {shown}"))
        return entry
    if mode in ("P", "L"):
        entry.counts = np.bincount(label.ravel(), minlength=256)
        wrong = [v for v in np.flatnonzero(entry.counts).tolist() if v >= num_classes and v not in (ignore_label, IGNORE_LABEL)]
        if wrong:
            entry.problems.append(("wrong values", f"{image_id}: {few(wrong)}"))
            return entry
    try:  # the last word is that of the code that trains
        read_label(label_path, num_classes, ignore_label)
    except DatasetError as error:
        entry.problems.append(("unreadable label", str(error)))
    return entry


def likely_causes(
    counts: np.ndarray, wrong_counts: np.ndarray, colours: Counter, num_classes: int, ignore_label: int = IGNORE_LABEL
) -> list[str]:
    """What the found values point to, one sentence each.

    Args:
        counts: (256,) pixels of each value over all single-channel labels.
        wrong_counts: the same over those labels that hold a wrong value.
        colours: number of colour labels by kind, see :class:`Entry`.
    """
    causes = []
    if colours["VOC"]:
        causes.append(
            f"{colours['VOC']} labels look like a colour rendering of the VOC palette: convert each colour to its class index"
        )
    if colours["grey"]:
        causes.append(f"{colours['grey']} labels are grey pictures saved with three channels: keep one channel")
    if colours["other"]:
        causes.append(f"{colours['other']} labels are colour pictures: convert each colour to its class index")
    present = set(np.flatnonzero(counts).tolist())
    values = present - {IGNORE_LABEL, ignore_label}
    wrong = {value for value in values if value >= num_classes}
    if not wrong:
        if num_classes > 1 and values == {0} and IGNORE_LABEL in present:
            causes.append("the labels are binary masks 0/255, and 255 means void, so only class 0 is learnt: write 1 for 255")
        elif num_classes > 1 and len(values) == 1:
            causes.append(f"nothing but class {values.pop()} occurs")
        elif values and 0 not in present and num_classes - 1 in values:
            causes.append(
                f"class 0 never occurs: if the labels count from 1, subtract 1 and pass --num-classes {num_classes - 1}"
            )
        return causes
    grey = voc_palette()[: len(VOC_CLASSES)] @ (0.299, 0.587, 0.114)
    level_of = {
        int(level): row.name
        for levels in (np.floor(grey), np.rint(grey))
        for row, level in zip(VOC_CLASSES[::-1], levels[::-1])
    }
    if (
        set(np.flatnonzero(wrong_counts).tolist()) - VOID_GREY - {IGNORE_LABEL, ignore_label} <= level_of.keys()
    ):  # OpenCV rounds down where it reads a PNG as grey, and to the nearest elsewhere
        example = min(wrong)
        causes.append(
            f"the values are the grey levels of the VOC palette ({example} = {level_of.get(example, 'void')}): palette PNGs "
            "were read as grey, as OpenCV does; go back to the palette PNGs"
        )
    elif wrong == {num_classes} and 0 not in present:
        causes.append(f"the labels count from 1 to {num_classes}: subtract 1 from each")
    elif wrong == {num_classes}:
        causes.append(
            f"{num_classes} is one more than the last class: pass --num-classes {num_classes + 1} if it is a class, "
            f"--ignore-label {num_classes} if it is void; if 0 is void, subtract 1 and write 255 for 0"
        )
    elif len(wrong) > 40:
        causes.append(
            f"{len(values)} different values: labels that were resized with interpolation or saved as JPEG, or ordinary "
            "pictures; resize labels by nearest neighbour and save PNGs"
        )
    else:
        causes.append(f"the largest label is {max(wrong)}: pass --num-classes {max(wrong) + 1} if all of them are classes")
    return causes


def summarize(entries: list[Entry], ids: list[str], data: VOCSegmentation) -> dict:
    """All that is found, as JSON can hold it."""
    examples: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for entry in sorted(entries, key=lambda entry: entry.image_id):
        for kind, found in entry.problems:
            examples[kind].append(found)
    examples["duplicate id"] = [f"{image_id} ({n} times)" for image_id, n in sorted(Counter(ids).items()) if n > 1]
    labels = [entry.counts for entry in entries if entry.counts is not None]
    with_wrong = [entry.counts for entry in entries if "wrong values" in dict(entry.problems)]
    none = np.zeros(256, dtype=np.int64)
    counts = sum(labels, start=none)
    in_pictures = sum((c > 0 for c in labels), start=none)
    void = sorted({data.ignore_label, IGNORE_LABEL})
    is_class = [value for value in range(data.num_classes) if value not in void]
    known = int(counts[is_class].sum())

    colours = Counter(entry.colours for entry in entries)
    causes = likely_causes(counts, sum(with_wrong, start=none), colours, data.num_classes, data.ignore_label)
    for kind, folder in (("missing picture", data.image_dir), ("missing label", data.label_dirs[0])):
        if len(examples[kind]) == len(entries) and (other := next(folder.glob("*"), None) if folder.is_dir() else None):
            causes.append(f"no id of the list has its {kind[8:]}: expected {examples[kind][0]}, the folder has {other.name}")
    sizes = [entry.size for entry in entries if entry.size]
    absent = [c for c in is_class if not counts[c]]
    few_classes = len(labels) > 0 and data.num_classes > 1 and len(is_class) - len(absent) < 2
    return {
        "ids": len(ids),
        "good": sum(not entry.problems for entry in entries),
        "wrong": any(examples.values()) or few_classes,
        "problems": {kind: {"count": len(found), "examples": found[:SHOWN]} for kind, found in examples.items()},
        "likely_causes": causes,
        "width": [min(w for w, _ in sizes), max(w for w, _ in sizes)] if sizes else None,
        "height": [min(h for _, h in sizes), max(h for _, h in sizes)] if sizes else None,
        "classes": [
            {"class": c, "pixels": int(counts[c]), "share": int(counts[c]) / max(known, 1), "pictures": int(in_pictures[c])}
            for c in is_class
        ],
        "void": {"pixels": int(counts[void].sum()), "share": int(counts[void].sum()) / max(int(counts.sum()), 1)},
        "only_void": sum(int(c[void].sum() == c.sum()) for c in labels),
        "absent": absent,
    }


def print_table(report: dict, names: list[str] | None) -> None:
    """The report for people: problems, sizes, classes, likely causes."""
    for kind, found in report["problems"].items():
        print(f"{kind:<20}{found['count']:>8}")
        for example in found["examples"]:
            print(f"    {example}")
        if found["count"] > SHOWN:
            print(f"    and {found['count'] - SHOWN} more")
    if report["width"]:
        (narrow, wide), (low, high) = report["width"], report["height"]
        print(f"{'picture width':<20}{narrow:>8} to {wide} pixels\n{'picture height':<20}{low:>8} to {high} pixels")
    print(f"\n{'class':>5}  {'name':<16}{'share':>9}{'pictures':>10}")
    for row in report["classes"]:
        name = names[row["class"]] if names else ""
        print(f"{row['class']:>5}  {name:<16}{row['share']:>9.3%}{row['pictures']:>10}")
    print(f"{'void':>5}  {'(of all pixels)':<16}{report['void']['share']:>9.3%}")
    if report["only_void"]:
        print(f"labels with nothing but void: {report['only_void']}")
    print(f"classes that never occur: {few(report['absent']) or 'none'}\n")
    for cause in report["likely_causes"]:
        print(f"likely cause: {cause}")
    print(f"{'WRONG' if report['wrong'] else 'OK'}: {report['good']} good pairs, {report['ids']} lines in the list")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=DATA_DIR, help="folder in the VOC layout (%(default)s)")
    parser.add_argument(
        "--data-list", help="file of ids (ImageSets/SegmentationAug/train_aug.txt in --data-dir, else Segmentation/train.txt)"
    )
    parser.add_argument("--num-classes", type=positive, default=21, help="classes with the background (%(default)s)")
    parser.add_argument("--ignore-label", type=int, default=IGNORE_LABEL, help="a label that means void, beside 255")
    parser.add_argument("--image-dir", default="JPEGImages", help="folder of the pictures in --data-dir (%(default)s)")
    parser.add_argument("--label-dir", help="folder of the masks (SegmentationClassAug, else SegmentationClass)")
    parser.add_argument(
        "--workers", type=not_negative, default=os.cpu_count() or 1, help="processes; 0 reads in this one (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="save the report as JSON, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    data_list = find_list(args.data_dir, args.data_list, TRAIN_LISTS)
    ids = read_ids(data_list)
    data = VOCSegmentation(args.data_dir, ids, args.image_dir, args.label_dir, args.num_classes, args.ignore_label)
    names = read_class_names(args.data_dir, args.num_classes)
    if names is None and args.num_classes == len(VOC_CLASSES):
        names = [row.name for row in VOC_CLASSES]
    print(f"{data_list}: {len(ids)} ids, {args.num_classes} classes")

    tasks = [(i, data.image_path(i), data.label_path(i), args.num_classes, args.ignore_label) for i in dict.fromkeys(ids)]
    entries = list(tqdm(parallel_map(inspect, tasks, args.workers), "read", len(tasks), unit="pair", disable=None))
    report = summarize(entries, ids, data)
    print_table(report, names)
    if args.json:
        save_json(args.json, {"data_dir": str(data.root), "data_list": str(data_list), "names": names, **report})
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    run_command(main)
