"""Read every image and label mask of the train and val lists as training does, and print a table of what is wrong.

    python scripts/check_dataset.py --data-dir data/mine
    python scripts/check_dataset.py --data-dir data/mine --data-list more.txt --num-classes 5

The balanced class weights are those of the first list; save them to a file for train.py --class-weights FILE.
For several lists, images in two of them (same id or same bytes) and classes missing from one are named.
Exit status: 0 if all is well, 1 if something is wrong (with --strict also for a warning), 2 if the check failed.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DATASETS, VOC_CLASSES, DatasetError, VOCSegmentation, default_names
from dataset.classes import IGNORE_LABEL, Color, read_class_file
from dataset.lists import IMAGE_SUFFIXES, LABEL_SUFFIXES
from scripts.data.causes import few, likely_causes
from scripts.data.inspection import MOST, Inspection, inspect
from scripts.data.leaks import find_leaks, same_sizes
from scripts.data.parallel import add_workers_option, parallel_map
from utils.argtypes import GivenParser, class_count, label_value, target_text
from utils.command import run_command
from utils.data import images_of, list_of, with_folders
from utils.files import save_json
from utils.options import DATA_DIR, Options, add_dataset_option, dataset_defaults, elsewhere
from utils.outputs import OUTPUT_MARK, Output, check_outputs
from utils.training.class_weights import balanced_weights

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
DARK = 64  # of 256 levels; 12-bit data in a 16-bit file are below this


def differing_palettes(entries: Sequence[Inspection]) -> list[str]:
    """A sentence per index to which palettes give several colours. Grey labels have no palette."""
    users: dict[int, dict[Color, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in sorted(entries, key=lambda entry: entry.image_id):
        for index, color in entry.palette.items():
            users[index][color].append(entry.image_id)
    return [
        f"index {index}: " + "; ".join(f"{color} in {len(ids)}, as {ids[0]}" for color, ids in list(colors.items())[:SHOWN])
        for index, colors in sorted(users.items())
        if len(colors) > 1
    ]


def total(counts: Iterable[np.ndarray | None]) -> np.ndarray:
    """The sum of (256,) counts; None stands for an unreadable label."""
    return sum((c for c in counts if c is not None), start=np.zeros(256, dtype=np.int64))


def causes_of(entries: Sequence[Inspection], data: VOCSegmentation) -> list[str]:
    """Likely causes for the images and labels of one list, one sentence each."""
    counts = total(entry.counts for entry in entries)
    kinds = {kind for entry in entries for kind, _ in entry.problems}
    if data.NAMES:
        causes = data.causes(counts, "colour label" in kinds, "wrong values" in kinds)
    else:
        wrong = total(entry.counts for entry in entries if "wrong values" in dict(entry.problems))
        colours = Counter(entry.colours for entry in entries)
        causes = likely_causes(counts, wrong, colours, data.num_classes, data.ignore_label)
    if dark := sorted(entry.image_id for entry in entries if entry.brightest < DARK):
        causes.append(
            f"{len(dark)} images have hardly a value above {DARK - 1} of 255 ({few(dark)}): they are dark, or have at most "
            "14 bits in 16-bit files and so are read as nearly black; stretch those to the whole range"
        )
    for what, kind, suffixes in (("image", "picture", IMAGE_SUFFIXES), ("label", "label", LABEL_SUFFIXES)):
        lost = [Path(found) for entry in entries if (found := dict(entry.problems).get(f"missing {kind}"))]
        near = next((file for path in lost[:SHOWN] for file in path.parent.glob(f"{escape(path.stem)}.*")), None)
        if len(lost) == len(entries) and (other := near or next(lost[0].parent.glob("*"), None)):
            causes.append(f"no id of the list has its {what}: expected {lost[0]}, but the folder has {other.name}")
        elif near:
            causes.append(f"the {what} {near} has an unsupported format; expected {', '.join(suffixes)}")
    return causes


def summarize(
    entries: Sequence[Inspection], sets: Mapping[str, VOCSegmentation], lists: Mapping[str, Mapping[str, Inspection]]
) -> dict:
    """All findings, ready for JSON.

    Args:
        entries: each pair of files once.
        sets: name of a list -> its data.
        lists: name -> id -> one of ``entries``.
    """
    data = next(iter(sets.values()))
    examples: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for entry in sorted(entries, key=lambda entry: entry.image_id):
        for kind, found in entry.problems:
            examples[kind].append(found)
    examples["duplicate id"] = [
        f"{image_id} ({n} times)" for own in sets.values() for image_id, n in sorted(Counter(own.ids).items()) if n > 1
    ]
    examples["palettes differ"] = differing_palettes(entries)
    labels = [entry.counts for entry in entries if entry.counts is not None]
    counts, in_images = total(labels), total(c > 0 for c in labels)
    ignored = sorted({data.ignore_label, IGNORE_LABEL})
    is_class = [value for value in range(data.num_classes) if value not in ignored]
    used = [value for value in is_class if value not in data.UNUSED]
    known = int(counts[is_class].sum())
    drawn_from = total(next(iter(lists.values()))[image_id].counts for image_id in data.ids)
    drawn_from[ignored] = 0

    drawn: Counter[Color] = Counter()
    drawn_in: Counter[Color] = Counter()
    for entry in entries:
        drawn.update(entry.drawn)
        drawn_in.update(entry.drawn.keys())
    causes = {name: causes_of(list(found.values()), sets[name]) for name, found in lists.items()}
    if examples["palettes differ"]:
        text = (
            "palettes that differ were re-ordered by a tool, so their indices are wrong, or come from several programs: "
            "write the colours into classes.txt (`name r g b` per line) to find the re-ordered files"
        )
        causes = {name: [*found, text] for name, found in causes.items()}
    sizes = [entry.size for entry in entries if entry.size]
    present = {
        name: total(entry.counts > 0 for entry in found.values() if entry.counts is not None) for name, found in lists.items()
    }
    few_classes = any(n.any() and (n[is_class] > 0).sum() < 2 for n in present.values())
    shared, copies, warnings = find_leaks(lists)
    return {
        "ids": sum(map(len, sets.values())),
        "good": sum(not entry.problems for entry in entries),
        "wrong": any(examples.values()) or few_classes,
        "problems": {kind: {"count": len(found), "examples": found[:SHOWN]} for kind, found in examples.items()},
        "likely_causes": list(dict.fromkeys(cause for found in causes.values() for cause in found)),
        "warnings": warnings,
        "width": [min(w for w, _ in sizes), max(w for w, _ in sizes)] if sizes else None,
        "height": [min(h for _, h in sizes), max(h for _, h in sizes)] if sizes else None,
        "classes": [
            {"class": c, "pixels": int(counts[c]), "share": int(counts[c]) / max(known, 1), "pictures": int(in_images[c])}
            for c in is_class
        ],
        "class_weights": balanced_weights(drawn_from[: data.num_classes].tolist()),
        "void": {"pixels": int(counts[ignored].sum()), "share": int(counts[ignored].sum()) / max(int(counts.sum()), 1)},
        "only_void": sum(int(c[ignored].sum() == c.sum()) for c in labels),
        "absent": [c for c in used if not counts[c]],
        "colours": [{"colour": color, "pixels": n, "labels": drawn_in[color]} for color, n in drawn.most_common()],
        "lists": {
            "absent": {name: [c for c in used if not n[c]] for name, n in present.items()},
            "shared": shared,
            "copies": copies,
            "likely_causes": causes,
        }
        if len(lists) > 1
        else None,
    }


def print_table(report: dict, names: Sequence[str] | None) -> None:
    """Print the report: problems, sizes, classes, likely causes."""
    for kind, found in report["problems"].items():
        print(f"{kind.replace('picture', 'image'):<20}{found['count']:>8}")  # the JSON keys keep their names
        for example in found["examples"]:
            print(f"    {example}")
        if found["count"] > SHOWN:
            print(f"    and {found['count'] - SHOWN} more")
    if report["width"]:
        (narrow, wide), (low, high) = report["width"], report["height"]
        print(f"{'image width':<20}{narrow:>8} to {wide} pixels\n{'image height':<20}{low:>8} to {high} pixels")
    print(f"\n{'class':>5}  {'name':<16}{'share':>9}{'images':>10}")
    for row in report["classes"]:
        name = names[row["class"]] if names else ""
        print(f"{row['class']:>5}  {name:<16}{row['share']:>9.3%}{row['pictures']:>10}")
    print(f"{'':>5}  {'ignored (of all)':<16}{report['void']['share']:>9.3%}")
    if report["only_void"]:
        print(f"labels with only ignored pixels: {report['only_void']}")
    print(f"classes that never occur: {few(report['absent']) or 'none'}\n")
    if report["colours"]:
        print(f"{'colours of the colour labels':<28}{'pixels':>12}{'labels':>8}")
        for row in report["colours"][:MOST]:
            print(f"{' '.join(map(str, row['colour'])):<28}{row['pixels']:>12}{row['labels']:>8}")
        print(f"and {len(report['colours']) - MOST} more\n" if len(report["colours"]) > MOST else "")
    weights = " ".join(f"{weight:.6g}" for weight in report["class_weights"])
    print(f"balanced class weights of {next(iter(report['lists']['absent'])) if report['lists'] else 'the list'}: {weights}")
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    lists = report["lists"] or {"absent": {}, "likely_causes": {}}
    for name, absent in lists["absent"].items():
        print(f"classes that never occur in {name}: {few(absent) or 'none'}")
    for cause in report["likely_causes"]:
        where = [name for name, found in lists["likely_causes"].items() if cause in found]
        print(f"likely cause{f' ({where[0]})' if len(where) == 1 else ''}: {cause}")
    end = "lists" if report["lists"] else "list"
    print(f"{'WRONG' if report['wrong'] else 'OK'}: {report['good']} good pairs, {report['ids']} lines in the {end}")


def check_json(path: Path, sets: Mapping[str, VOCSegmentation]) -> None:
    """Raise :class:`UserError` if the report cannot be written to ``path``, or would replace a file that is no report."""
    read: list[str | Path] = list(sets)
    folders: list[Path] = []
    for data in sets.values():
        read += [data.root / "classes.txt", *(place(i) for i in data.ids for place in (data.image_path, data.label_path))]
        folders += [data.image_dir, *data.label_dirs]
    check_outputs([Output("--json", path.parent, path.name, "the report")], read, folders)


def find_lists(args: Options) -> list[tuple[Path, Options]]:
    """The lists of ``--data-list``, else those of train and, if there is one, val; each with the options to read it."""
    asked = [(args.replace(data_list=name), "train") for name in args.data_list or ()] or [(args, "train"), (args, "val")]
    lists = []
    for options, split in asked:
        try:
            options = with_folders(options, split)
            lists.append((list_of(options, split, args.num_classes), options))
        except DatasetError as error:
            if split == "train":
                raise
            names = " or ".join(DATASETS[args.dataset].lists("val", args.image_dir))
            reason = f"; {error}" if "no split" in str(error) else ""
            print(f"no val list ({names}): only train is checked{reason}")
    return lists


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = GivenParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dataset_option(parser)
    text = f"data set folder (%(default)s{elsewhere(lambda kind: kind.DATA_DIR)})"
    parser.add_argument("--data-dir", default=DATA_DIR, help=text)
    parser.add_argument(
        "--data-list",
        nargs="+",
        help="lists of ids, also relative to --data-dir; only these are read (default: the train and val lists, "
        "ImageSets/SegmentationAug/{train_aug,val}.txt there, else ImageSets/Segmentation/{train,val}.txt"
        f"{elsewhere(lambda kind: ' and '.join(kind.lists(split, kind.IMAGE_DIR)[0] for split in ('train', 'val')))})",
    )
    text = "number of classes with the background (that of classes.txt, else of --dataset, VOC 21)"
    parser.add_argument("--num-classes", type=class_count, help=text)
    parser.add_argument("--ignore-label", type=label_value, default=IGNORE_LABEL, help="a label to ignore, besides 255")
    text = f"folder of the images in --data-dir (%(default)s{elsewhere(lambda kind: kind.IMAGE_DIR)}; else images/ and masks/)"
    parser.add_argument("--image-dir", default=VOCSegmentation.IMAGE_DIR, help=text)
    text = "folder of the masks (SegmentationClassAug, else SegmentationClass"
    parser.add_argument("--label-dir", help=f"{text}{elsewhere(lambda kind: ' or '.join(kind.LABEL_DIRS))})")
    add_workers_option(parser)
    parser.add_argument("--strict", action="store_true", help="exit status 1 also for a warning: an image in two lists")
    parser.add_argument("--json", type=target_text, metavar="FILE", help="also save the report as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = dataset_defaults(parse_args(argv))
    kind = DATASETS[args.dataset]
    lists = find_lists(args)
    classes = None if kind.NAMES else read_class_file(args.data_dir)
    count = len(kind.NAMES) or args.num_classes or (classes and classes.count(args.ignore_label))
    num_classes, note = count or len(VOC_CLASSES), "" if count else " (VOC's: neither classes.txt nor --num-classes is given)"
    sets = {
        str(path): kind(
            args.data_dir,
            kind.read_list(path, own.image_dir),
            own.image_dir,
            own.label_dir,
            num_classes,
            args.ignore_label,
            classes=classes,
        )
        for path, own in lists
    }
    data = next(iter(sets.values()))
    names = data.names or (default_names(num_classes) if num_classes == 21 else None)
    print(f"{', '.join(sets)}: {sum(map(len, sets.values()))} ids, {num_classes} classes{note}")
    for own, (path, options) in zip(sets.values(), lists):
        if options.label_dir != args.label_dir:
            print(images_of(own, path))

    if args.json:
        check_json(Path(args.json), sets)
    hashed = same_sizes(sets)
    tasks: dict[tuple[Path, Path], tuple] = {}  # each pair of files once
    for own in sets.values():
        for i in own.entries:
            image, label = own.image_path(i), own.label_path(i)
            rest = (num_classes, args.ignore_label, own.colors, own.classes_of(label), image in hashed)
            tasks.setdefault((image, label), (i, image, label, *rest))
    found = tqdm(parallel_map(inspect, tasks.values(), args.workers), "read", len(tasks), unit="pair", disable=None)
    entries = {(entry.image_path, entry.label_path): entry for entry in found}
    inspected = {name: {i: entries[own.image_path(i), own.label_path(i)] for i in own.entries} for name, own in sets.items()}
    report = summarize(list(entries.values()), sets, inspected)
    report["wrong"] |= args.strict and bool(report["warnings"])
    print_table(report, names)
    if args.json:
        head = {"made_by": OUTPUT_MARK, "data_dir": str(data.root), "data_list": list(sets), "names": names}
        save_json(args.json, head | report)
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    run_command(main)
