"""Convert the exports of labelling tools to masks of class indices, the PNGs for training.

    python scripts/masks_to_indices.py data/mine/ColourMasks data/mine/SegmentationClass     a folder of masks
    python scripts/masks_to_indices.py cvat_export data/mine               CVAT's "Segmentation mask 1.1", unpacked
    python scripts/masks_to_indices.py labelme_folder data/mine            labelme's JSON and images, or what labelme2voc writes
    python scripts/masks_to_indices.py roboflow_export data/mine           Roboflow's "Semantic segmentation masks"
    python scripts/masks_to_indices.py project data/mine                   Supervisely's, SuperAnnotate's, images/ and masks/
    python scripts/masks_to_indices.py brush_export data/mine              Label Studio's "Brush labels to PNG"
    python scripts/masks_to_indices.py coco_export data/mine               COCO JSON with polygons, and its images
    python scripts/masks_to_indices.py pairs data/mine --suffix _seg       x.jpg and x_seg.png in one folder
    python scripts/masks_to_indices.py land data/mine --suffix _mask --image-suffix _sat     x_sat.jpg and x_mask.png
    python scripts/masks_to_indices.py --binary masks data/mine/SegmentationClass      black and white: 0 and 255 become 0 and 1
    python scripts/masks_to_indices.py annotations data/ade/SegmentationClass --zero-is-void     ADE20K and the like

A folder of masks is read with its sub-folders; NEW gets a PNG of the same name for each PNG (x.png for x.jpg.png). From the
other exports NEW becomes a data set: SegmentationClass/, JPEGImages/ (copies), classes.txt and lists in
ImageSets/Segmentation/. The lists come from the export, else from its folders named train, valid, test and so on, else from a
random split by --val-share; augmented copies of one source (Roboflow's x.rf.<hash>) stay together. For a folder of masks the
lists and classes.txt are written, too, if NEW is named SegmentationClass and there are none beside it.

A mask may be RGB, RGBA or have a palette in any order: its pixels are read by their displayed colour. Masks of class indices
are kept. The colour or value of each class is read from a file of classes in the first folder, in the folder of the masks or
beside it, or from --classes: classes.txt (`name r g b` or `name` per line, in the order of the classes), labelmap.txt,
class_names.txt, _classes.csv, class_dict.csv, label_colors.txt, labels.txt, or JSON with COCO's categories. Without such a
file, colours are PASCAL VOC's. A colour of no class is refused, and nothing is written. For Label Studio's masks, one per
label, and for polygons class 0 is the background: the pixels without a label. A pixel with two labels is ignored (255) in
masks; a later polygon covers an earlier one. A class with a colour named void, ignore or unlabelled is the ignore label
(255). If no images are found, a line says where to put them. The first folder is never changed, nor are existing files.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.classes import IGNORE_LABEL, VOID_COLOR, Color, name_the_classes, read_classes, voc_palette
from dataset.lists import IMAGE_DIR, IMAGE_SUFFIXES, Listing
from dataset.voc import LABEL_DIRS, TRAIN_LISTS, VAL_LISTS
from scripts.data.conversion import Options, Outcome, check_masks, convert
from scripts.data.layouts import Labelled, find_labelled
from scripts.data.parallel import add_workers_option, parallel_map
from scripts.data.polygons import IGNORED
from scripts.data.splits import LISTS, check_ids, choose_lists, write_lines
from scripts.data.tables import TABLES, VOC, Table, class_lines, find_table
from utils.argtypes import Parser, below_one, not_negative, target
from utils.command import UserError, run_command
from utils.files import remove_torn_files

BACKGROUND = re.compile("_?background_?", re.IGNORECASE)


def color(text: str) -> Color:
    """An argparse type: ``"224,224,192"`` -> (224, 224, 192), red, green, blue."""
    try:
        red, green, blue = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour; write RED,GREEN,BLUE, as in 224,224,192") from None
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour; expected numbers from 0 to 255")
    return red, green, blue


def check_out(source: Path, out: Path) -> None:
    """Raise :class:`UserError` if ``out`` is no folder, or is inside the source folder."""
    folder = source if source.is_dir() else source.parent
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{out} is inside the source folder {folder}; choose another folder for the indices")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder to write to")


def choose_table(args: argparse.Namespace, home: Path | None, labelled: Labelled) -> Table | None:
    """The classes in a file of classes; without one, for masks of one label each, the background and their labels."""
    root = args.masks if args.masks.is_dir() else args.masks.parent
    folders = {path.parent for path in labelled.masks.values()}
    below = {folder for each in folders for folder in (each, *each.parents) if folder.is_relative_to(root)}
    inside = sorted(below, key=lambda folder: (len(folder.parts), folder))
    beside = [root.parent, *([home] if home else [])]
    names = [name for name in TABLES if not labelled.layers or not name.endswith(".json")]  # their ids are no class indices
    table = find_table(inside, beside, args.classes, args.zero_is_void, names)
    if table or not labelled.layers:
        return table
    labels = labelled.labels
    background = [label for label in labels if BACKGROUND.fullmatch(label)][:1] or ["background"]
    return Table([(name, None) for name in dict.fromkeys([*background, *labels])], f"the labels in {args.masks}")


def binary_table(table: Table | None, labelled: Labelled) -> Table:
    """Two classes, black and white, with the names of ``table`` if there is one."""
    if labelled.layers:
        raise UserError("--binary is for black and white masks, but these are masks of one label each; leave it out")
    names = [name for name, _ in table.rows] if table else ["background", "object"]
    if len(names) != 2:
        raise UserError(f"--binary makes two classes, but {table and table.origin} names {len(names)}; give two names there")
    return Table([(names[0], (0, 0, 0)), (names[1], (255, 255, 255))], table.origin if table else "--binary")


def layer_classes(labelled: Labelled, table: Table) -> tuple[dict[str, int], int]:
    """The class of each label with its own masks, and that of pixels without a label: 255 if the background has masks.

    Raises:
        UserError: the table lacks a label.
    """
    named = {re.sub(r"[/\\\\]", "-", name): index for index, (name, _) in enumerate(table.rows)}  # as Label Studio writes files
    named |= {re.sub(r"[/\\\\]", "-", name): IGNORE_LABEL for name, _ in (*table.void, (IGNORED, None))}
    labels = {re.sub(r"[/\\]", "-", label): label for label in labelled.labels}
    if wrong := next((label for label in labels if label not in named), None):
        raise UserError(f"the export has the label {wrong}, but {table.origin} names {', '.join(named)}; add it there")
    rest = next((i for name, i in named.items() if BACKGROUND.fullmatch(name) and name not in labels), IGNORE_LABEL)
    return {label: named[name] for name, label in labels.items()} | {IGNORED: IGNORE_LABEL}, rest


def settle(args: argparse.Namespace, given: Table, table: Table | None, labelled: Labelled) -> Options:
    """How the masks become labels.

    Args:
        given: the classes of the masks, PASCAL VOC's without a ``table``.
        table: see :func:`choose_table`.
    """
    colors = given.colors()
    if taken := [own for own in args.void if own in colors]:
        text = ",".join(map(str, taken[0]))
        raise UserError(f"--void {text} is the colour of class {colors[taken[0]]} in {given.origin}; leave it out")
    palette = voc_palette()
    for own, label in colors.items():
        palette[label - args.zero_is_void] = own
    # The ignore label gets a colour of its own, so that a re-ordered palette can be detected.
    palette[IGNORE_LABEL] = next(own for own in (VOID_COLOR, (255, 255, 255), (1, 1, 1)) if own not in colors)
    num_classes = len(given.rows) + (args.zero_is_void and not colors) if given.rows else IGNORE_LABEL
    if colors:
        void = (VOID_COLOR, *args.void, *(color for _, color in given.void if color))
        colors |= {own: IGNORE_LABEL for own in void if own not in colors}
    classes, rest = layer_classes(labelled, given) if labelled.layers else ({}, 0)
    return Options(colors, num_classes, not table and not args.zero_is_void, args.zero_is_void, palette, classes, rest)


def check_classes(home: Path, rows: list[tuple[str, Color | None]]) -> None:
    """Raise :class:`UserError` if the data set ``home`` already has names of other classes."""
    path = home / "classes.txt"
    if rows and path.exists() and (names := [name for name, _ in read_classes(path)]) != [name for name, _ in rows]:
        raise UserError(
            f"{path} names the classes {', '.join(names)}, but the masks have {', '.join(name for name, _ in rows)}; "
            "delete it, or choose another folder"
        )


def write_set(home: Path, ids: list[str], labelled: Labelled, table: Table | None, args: argparse.Namespace) -> list[str]:
    """Write lists and classes.txt of the data set ``home`` if missing, and print what was done; returns the lists."""
    remove_torn_files([home / "classes.txt", *(home / LISTS / f"{name}.txt" for name in ("train", "val", "test"))])
    if table and not (home / "classes.txt").exists():
        write_lines(home / "classes.txt", class_lines(table.rows, table.origin))
        print(f"{home / 'classes.txt'}: {len(table.rows)} classes, from {table.origin}")
    names = [name for name in (*TRAIN_LISTS, *VAL_LISTS, f"{LISTS}/test.txt") if (home / name).exists()]
    if set(names) & {*TRAIN_LISTS, *VAL_LISTS}:
        print(f"the existing lists are kept: {', '.join(names)}")
        return names
    lists, origin = choose_lists(ids, labelled.lists, args.val_share, args.seed)
    for name, found in lists.items():
        write_lines(home / LISTS / f"{name}.txt", found)
        print(f"{home / LISTS / name}.txt: {len(found)} ids, {origin}")
    if left := len(set(ids).difference(*lists.values())):
        print(f"{left} ids are in no list")
    return [f"{LISTS}/{name}.txt" for name in lists]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", type=Path, help="folder of masks, one PNG, or the export of a labelling tool")
    parser.add_argument("out", type=target, metavar="NEW", help="output folder; created if missing")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="file of classes to use instead of the one found")
    parser.add_argument("--suffix", default="", help="end of the names of masks, which may be beside their images: _mask")
    parser.add_argument("--image-suffix", default="", help="end of the names of images, with --suffix: _sat")
    zero = parser.add_mutually_exclusive_group()
    zero.add_argument("--zero-is-void", action="store_true", help="0 becomes 255 (ignored), and 1..N become 0..N-1")
    text = "black becomes class 0, and white (or 1) class 1; named background and object without a file of classes"
    zero.add_argument("--binary", action="store_true", help=text)
    parser.add_argument(
        "--void", type=color, action="append", default=[], metavar="R,G,B", help="a colour to ignore (255), besides 224,224,192"
    )
    parser.add_argument("--val-share", type=below_one, default=0.2, help="share of the ids for validation (%(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the split (%(default)s)")
    add_workers_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.masks.is_dir():  # before it is searched, which takes long for /
        check_out(args.masks, args.out)
    labelled = find_labelled(args.masks, args.suffix.removesuffix(".png"), args.image_suffix)
    check_out(args.masks, args.out)
    home = args.out if labelled.images is not None else None
    if home is None and args.out.name in LABEL_DIRS and args.masks.is_dir():
        home = args.out.parent
    table = choose_table(args, home, labelled)
    table = binary_table(table, labelled) if args.binary else table
    given = table or (Table([], "") if args.zero_is_void else VOC)
    options = settle(args, given, table, labelled)
    if table and args.zero_is_void and (options.colors or labelled.layers):  # the classes after conversion
        table = table._replace(rows=table.rows[1:])
    if table:
        class_lines(table.rows, table.origin)
    if home:
        check_classes(home, table.rows if table else [])
        check_ids(labelled.masks)

    masks, images = labelled.masks, labelled.images
    folder = args.out if images is None else args.out / LABEL_DIRS[-1]
    copies = {i: (path, args.out / IMAGE_DIR / f"{i}{path.suffix}") for i, path in (images or {}).items()}
    unknown = "no file of classes: " + ("colours are read as PASCAL VOC's" if options.guessed else "values are kept")
    print(f"{len(masks)} masks; " + (f"{len(table.rows)} classes, from {table.origin}" if table else unknown))
    for name, color in table.void if table else ():
        print(f"{name}, {color}, is the ignore label (255), not a class; rename it to make it one")
    if labelled.layers:
        name = f"{IGNORE_LABEL} (ignored)" if options.rest == IGNORE_LABEL else given.rows[options.rest][0]
        print(f"the labels of each image are joined: pixels without a label become {name}")
    if labelled.others:
        print(f"{labelled.others} files other than PNGs are left out")
    remove_torn_files([*(folder / f"{i}.png" for i in masks), *(copy for _, copy in copies.values())])

    def convert_all(what: str, options: Options, write: bool) -> list[Outcome]:
        files = ((path, labelled.layers.get(i, ()), folder / f"{i}.png", copies.get(i)) for i, path in masks.items())
        tasks = ((*each, options, write) for each in files)
        found = tqdm(parallel_map(convert, tasks, args.workers), what, len(masks), unit="mask", disable=None)
        return sorted(found, key=lambda outcome: outcome.path)

    found = convert_all("read", options, write=False)
    sources = {outcome.source for outcome in found}
    if options.guessed and {"stored", "grey"} <= sources and "colours" not in sources:  # indices, also VOC's grey levels
        options = options._replace(colors={}, num_classes=IGNORE_LABEL, guessed=False)
        found = convert_all("read", options, write=False)
    if options.guessed and "colours" in sources:  # then the values of the others must be VOC's classes, too
        classes = {*range(len(VOC.rows)), IGNORE_LABEL}
        wrong = f"is grey and holds values above {len(VOC.rows) - 1}, while other masks have VOC's colours"
        grey = [outcome.source == "stored" and not outcome.palette for outcome in found]
        found = [o._replace(problem=wrong) if is_grey and not {*o.values} <= classes else o for o, is_grey in zip(found, grey)]
    check_masks(found, table, options)
    there = sum(outcome.there for outcome in found)
    convert_all("written", options, write=True)
    print(f"{len(masks) - there} masks written to {folder}/, {there} already existed")
    place = args.out / IMAGE_DIR if images is not None else home and home / IMAGE_DIR
    lost = [image_id for image_id in masks if image_id not in (images or {})]
    if images is None and home:
        listing = Listing(home)
        lost = [image_id for image_id in masks if not listing.find(f"{IMAGE_DIR}/{image_id}", IMAGE_SUFFIXES)]
    if place and lost:
        print(f"{len(lost)} masks have no image: put {lost[0]}.jpg, .png or the like into {place}/")
    if not home:
        print(
            f"no images were copied: {folder}/ holds only masks. A data set has them in SegmentationClass/ beside {IMAGE_DIR}/"
        )
    else:
        lists = write_set(home, [i for i in masks if i in (images or masks)], labelled, table, args)
        words = ["python", "scripts/check_dataset.py", "--data-dir", str(home), "--data-list", *lists]
        count = max((v for o in found for v in o.values if v != IGNORE_LABEL), default=0) + 1 - args.zero_is_void
        if not table and count > len(VOC.rows):
            words += ["--num-classes", str(count)]
        if not table and {outcome.source for outcome in found} == {"stored"} and count != len(VOC.rows):
            print(f"no file of classes: {name_the_classes(count)}")
        ready = len(lost) < len(masks) if images else not lost
        print(f"next: {shlex.join(words)}" if ready else f"no images were copied; once they are there: {shlex.join(words)}")
    return 0


if __name__ == "__main__":
    run_command(main)
