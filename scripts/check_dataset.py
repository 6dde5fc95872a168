"""Read every picture and label mask of a list, as training does, and say in one table what is wrong with them.

    python scripts/check_dataset.py --data-dir data/mine --data-list data/mine/train.txt --num-classes 5

Ends with status 0 where all is well, 1 where something is wrong, 2 where the check could not be made.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import TRAIN_LISTS, VOC_CLASSES, VOCSegmentation, read_class_names
from dataset.classes import IGNORE_LABEL, Color
from scripts.data.causes import few, likely_causes
from scripts.data.inspection import Inspection, inspect
from scripts.data.parallel import parallel_map
from utils.command import class_count, default_processes, label_value, not_negative, run_command
from utils.files import save_json
from utils.loader import open_dataset
from utils.options import DATA_DIR

KINDS = (
    "missing picture",
    "unreadable picture",
    "damaged picture",
    "EXIF orientation",
    "missing label",
    "unreadable label",
    "colour label",
    "re-ordered palette",
    "palettes differ",
    "wrong values",
    "other size",
    "duplicate id",
)
SHOWN = 5  # examples of each kind
DARK = 64  # of 256 levels: what 12-bit data in a 16-bit file come to, and less


def differing_palettes(entries: list[Inspection]) -> list[str]:
    """Where palettes give one index several colours: a sentence an index. Grey labels have no palette."""
    users: dict[int, dict[Color, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in sorted(entries, key=lambda entry: entry.image_id):
        for index, color in entry.palette.items():
            users[index][color].append(entry.image_id)
    return [
        f"index {index}: " + "; ".join(f"{color} in {len(ids)}, as {ids[0]}" for color, ids in list(colors.items())[:SHOWN])
        for index, colors in sorted(users.items())
        if len(colors) > 1
    ]


def summarize(entries: list[Inspection], data: VOCSegmentation) -> dict:
    """All that is found, as JSON can hold it."""
    examples: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for entry in sorted(entries, key=lambda entry: entry.image_id):
        for kind, found in entry.problems:
            examples[kind].append(found)
    examples["duplicate id"] = [f"{image_id} ({n} times)" for image_id, n in sorted(Counter(data.ids).items()) if n > 1]
    examples["palettes differ"] = differing_palettes(entries)
    labels = [entry.counts for entry in entries if entry.counts is not None]
    with_wrong = [entry.counts for entry in entries if entry.counts is not None and "wrong values" in dict(entry.problems)]
    none = np.zeros(256, dtype=np.int64)
    counts = sum(labels, start=none)
    in_pictures = sum((c > 0 for c in labels), start=none)
    void = sorted({data.ignore_label, IGNORE_LABEL})
    is_class = [value for value in range(data.num_classes) if value not in void]
    known = int(counts[is_class].sum())

    colours = Counter(entry.colours for entry in entries)
    causes = likely_causes(counts, sum(with_wrong, start=none), colours, data.num_classes, data.ignore_label)
    if examples["palettes differ"]:
        causes.append(
            "palettes that differ were re-ordered by a tool, and their indices are wrong, or come from several programs: with "
            "the colours in classes.txt (`name r g b` a line), each file that was re-ordered is named"
        )
    if dark := sorted(entry.image_id for entry in entries if entry.brightest < DARK):
        causes.append(
            f"{len(dark)} pictures have no value above {DARK - 1} of 255 ({few(dark)}): 10, 12 or 14-bit data in 16-bit files "
            "come out nearly black; stretch them to the whole range"
        )
    for kind, folder in (("missing picture", data.image_dir), ("missing label", data.label_dirs[0])):
        if len(examples[kind]) == len(entries) and (other := next(folder.glob("*"), None) if folder.is_dir() else None):
            causes.append(f"no id of the list has its {kind[8:]}: expected {examples[kind][0]}, the folder has {other.name}")
    sizes = [entry.size for entry in entries if entry.size]
    absent = [c for c in is_class if not counts[c]]
    few_classes = len(labels) > 0 and len(is_class) - len(absent) < 2
    return {
        "ids": len(data),
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
    parser.add_argument("--num-classes", type=class_count, default=21, help="classes with the background (%(default)s)")
    parser.add_argument("--ignore-label", type=label_value, default=IGNORE_LABEL, help="a label that means void, beside 255")
    parser.add_argument("--image-dir", default="JPEGImages", help="folder of the pictures in --data-dir (%(default)s)")
    parser.add_argument("--label-dir", help="folder of the masks (SegmentationClassAug, else SegmentationClass)")
    parser.add_argument(
        "--workers", type=not_negative, default=default_processes(64), help="processes; 0 reads in this one (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="save the report as JSON, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    data, data_list = open_dataset(args, TRAIN_LISTS, args.num_classes)
    names = read_class_names(args.data_dir, args.num_classes)
    if names is None and args.num_classes == len(VOC_CLASSES):
        names = [row.name for row in VOC_CLASSES]
    print(f"{data_list}: {len(data)} ids, {args.num_classes} classes")

    options = (args.num_classes, args.ignore_label, data.colors)
    tasks = [(i, data.image_path(i), data.label_path(i), *options) for i in data.entries]
    entries = list(tqdm(parallel_map(inspect, tasks, args.workers), "read", len(tasks), unit="pair", disable=None))
    report = summarize(entries, data)
    print_table(report, names)
    if args.json:
        save_json(args.json, {"data_dir": str(data.root), "data_list": str(data_list), "names": names, **report})
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    run_command(main)
