"""Read every picture and label mask of a list, as training does, and say in one table what is wrong with them.

    python scripts/check_dataset.py --data-dir data/mine
    python scripts/check_dataset.py --data-dir data/mine --data-list train.txt val.txt --num-classes 5

Of several lists, the ids that are on two of them are named, and the classes that one of them lacks.
Ends with status 0 where all is well, 1 where something is wrong, 2 where the check could not be made.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DATASETS, VOC_CLASSES, VOCSegmentation, default_names, find_list
from dataset.classes import IGNORE_LABEL, Color, read_class_file
from scripts.data.causes import cityscapes_causes, few, likely_causes
from scripts.data.inspection import MOST, Inspection, inspect
from scripts.data.parallel import add_workers_option, parallel_map
from utils.argtypes import GivenParser, class_count, label_value, target_text
from utils.command import run_command
from utils.files import save_json
from utils.options import DATA_DIR, add_dataset_option, dataset_defaults
from utils.outputs import OUTPUT_MARK, Output, check_outputs

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


def compare_lists(lists: dict[str, list[str]], entries: list[Inspection], classes: list[int]) -> dict:
    """What several lists have in common, and which classes one of them lacks.

    Args:
        lists: name -> ids.
    """
    counts = {entry.image_id: entry.counts for entry in entries if entry.counts is not None}
    absent = {}
    for name, ids in lists.items():
        present = sum((counts[image_id] > 0 for image_id in ids if image_id in counts), start=np.zeros(256, dtype=bool))
        absent[name] = [c for c in classes if not present[c]]
    shared = [
        {"lists": [one, other], "ids": both}
        for one, other in combinations(lists, 2)
        if (both := sorted(set(lists[one]) & set(lists[other])))
    ]
    return {"absent": absent, "shared": shared}


def summarize(entries: list[Inspection], data: VOCSegmentation, lists: dict[str, list[str]]) -> dict:
    """All that is found, as JSON can hold it."""
    examples: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for entry in sorted(entries, key=lambda entry: entry.image_id):
        for kind, found in entry.problems:
            examples[kind].append(found)
    examples["duplicate id"] = [
        f"{image_id} ({n} times)" for ids in lists.values() for image_id, n in sorted(Counter(ids).items()) if n > 1
    ]
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
    drawn: Counter[Color] = Counter()
    drawn_in: Counter[Color] = Counter()
    for entry in entries:
        drawn.update(entry.drawn)
        drawn_in.update(entry.drawn.keys())
    if data.NAMES:
        causes = cityscapes_causes(counts, bool(examples["colour label"]), bool(examples["wrong values"]))
    else:
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
    for kind in ("missing picture", "missing label"):
        lost = examples[kind]
        if len(lost) == len(entries) and (other := next(Path(lost[0]).parent.glob("*"), None)):
            causes.append(f"no id of the list has its {kind[8:]}: expected {lost[0]}, the folder has {other.name}")
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
        "colours": [{"colour": color, "pixels": n, "labels": drawn_in[color]} for color, n in drawn.most_common()],
        "lists": compare_lists(lists, entries, is_class) if len(lists) > 1 else None,
    }


def print_table(report: dict, names: Sequence[str] | None) -> None:
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
    if report["colours"]:
        print(f"{'colours of the colour labels':<28}{'pixels':>12}{'labels':>8}")
        for row in report["colours"][:MOST]:
            print(f"{' '.join(map(str, row['colour'])):<28}{row['pixels']:>12}{row['labels']:>8}")
        print(f"and {len(report['colours']) - MOST} more\n" if len(report["colours"]) > MOST else "")
    if report["lists"]:
        for shared in report["lists"]["shared"]:
            print(f"warning: {len(shared['ids'])} ids are on both {' and '.join(shared['lists'])}: {few(shared['ids'])}")
        for name, absent in report["lists"]["absent"].items():
            print(f"classes that never occur in {name}: {', '.join(map(str, absent)) or 'none'}")
    for cause in report["likely_causes"]:
        print(f"likely cause: {cause}")
    print(f"{'WRONG' if report['wrong'] else 'OK'}: {report['good']} good pairs, {report['ids']} lines in the list")


def check_json(path: Path, data: VOCSegmentation, lists: Sequence[Path]) -> None:
    """Raise :class:`UserError` where the report cannot be written to ``path``, or would replace what is no earlier report."""
    read = [*lists, data.root / "classes.txt", *(place(i) for i in data.ids for place in (data.image_path, data.label_path))]
    check_outputs([Output("--json", path.parent, path.name, "the report")], read, [data.image_dir, *data.label_dirs])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = GivenParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_option(parser)
    parser.add_argument("--data-dir", default=DATA_DIR, help="its folder (%(default)s, Cityscapes data/cityscapes)")
    parser.add_argument(
        "--data-list",
        nargs="+",
        help="files of ids, also looked for in --data-dir (ImageSets/SegmentationAug/train_aug.txt there, else "
        "ImageSets/Segmentation/train.txt; Cityscapes: leftImg8bit/train)",
    )
    text = "classes with the background (as many as classes.txt has lines, else 21 or 19)"
    parser.add_argument("--num-classes", type=class_count, help=text)
    parser.add_argument("--ignore-label", type=label_value, default=IGNORE_LABEL, help="a label that means void, beside 255")
    parser.add_argument(
        "--image-dir", default="JPEGImages", help="folder of the pictures in --data-dir (%(default)s, leftImg8bit)"
    )
    parser.add_argument("--label-dir", help="folder of the masks (SegmentationClassAug, else SegmentationClass; gtFine)")
    add_workers_option(parser)
    parser.add_argument("--json", type=target_text, metavar="FILE", help="save the report as JSON, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = dataset_defaults(parse_args(argv))
    kind = DATASETS[args.dataset]
    candidates = kind.lists("train", args.image_dir)
    lists = [find_list(args.data_dir, name, candidates, kind.SOURCE) for name in args.data_list or [None]]
    classes = None if kind.NAMES else read_class_file(args.data_dir)
    num_classes = len(kind.NAMES) or args.num_classes or (classes and classes.count(args.ignore_label)) or len(VOC_CLASSES)
    entries = {str(path): kind.read_list(path, args.image_dir) for path in lists}
    union = [entry for found in entries.values() for entry in found]
    data = kind(args.data_dir, union, args.image_dir, args.label_dir, num_classes, args.ignore_label, classes=classes)
    names = data.names or (default_names(num_classes) if num_classes == 21 else None)
    print(f"{', '.join(entries)}: {len(data)} ids, {num_classes} classes")

    if args.json:
        check_json(Path(args.json), data, lists)
    options = (num_classes, args.ignore_label, data.colors)
    tasks = [(i, data.image_path(i), path := data.label_path(i), *options, data.classes_of(path)) for i in data.entries]
    found = list(tqdm(parallel_map(inspect, tasks, args.workers), "read", len(tasks), unit="pair", disable=None))
    report = summarize(found, data, {path: [entry.id for entry in ids] for path, ids in entries.items()})
    print_table(report, names)
    if args.json:
        head = {"made_by": OUTPUT_MARK, "data_dir": str(data.root), "data_list": list(entries), "names": names}
        save_json(args.json, head | report)
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    run_command(main)
