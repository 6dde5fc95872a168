"""Turn masks that are drawn in colours into masks of class indices, the PNGs that training reads.

    python scripts/masks_to_indices.py data/mine/ColourMasks data/mine/SegmentationClass     a folder of masks
    python scripts/masks_to_indices.py cvat_export data/mine               CVAT's "Segmentation mask 1.1", unpacked
    python scripts/masks_to_indices.py labelme_export data/mine            what labelme2voc writes
    python scripts/masks_to_indices.py pairs data/mine --suffix _mask      x.jpg and x_mask.png in one folder
    python scripts/masks_to_indices.py annotations data/ade/SegmentationClass --zero-is-void     ADE20K and kin

A folder of masks is read with its sub-folders, and NEW gets a PNG of the same name for each PNG there. Of the other three, NEW
becomes a data set: SegmentationClass/, JPEGImages/ (copies), classes.txt and the lists in ImageSets/Segmentation/: those of the
export for training and validation, else all ids, split by --val-share. For a folder of masks, too, where NEW is named
SegmentationClass, the lists and classes.txt beside it are written if there are none.

A mask may be RGB, RGBA or have a palette in any order: what counts is the colour that a pixel is shown in. Grey masks of class
indices stay what they are. Which class has which colour says classes.txt (`name r g b` a line, in the order of the classes),
CVAT's labelmap.txt or labelme's class_names.txt in the first folder or beside it, or --classes; without one, the colours are
PASCAL VOC's. A colour of no class is refused. The first folder is only read, and files that are there already never change.
"""

import argparse
import filecmp
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.classes import IGNORE_LABEL, VOID_COLOR, Color, read_classes, voc_palette
from dataset.labels import BadLabel, decode_label
from dataset.lists import IMAGE_DIR
from dataset.voc import LABEL_DIRS, TRAIN_LISTS, VAL_LISTS
from scripts.data.colours import VOC, Table, find_table, read_labels
from scripts.data.layouts import LISTS, Labelled, choose_lists, find_labelled, write_lines
from scripts.data.parallel import add_workers_option, parallel_map
from utils.argtypes import Parser, below_one, not_negative, target
from utils.command import UserError, run_command
from utils.files import remove_torn_files, write_atomically
from utils.visualize import save_indexed_png

SHOWN = 50  # files in a message


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
    """Raise :class:`UserError` where ``out`` is no folder, or is in the one that is read."""
    folder = source if source.is_dir() else source.parent
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{out} is in the folder that is read, {folder}; choose another folder for the indices")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder to write to")


def choose_table(args: argparse.Namespace, home: Path | None) -> Table:
    """The classes as the masks are drawn; without rows where their values are to be taken as they are stored."""
    folder = args.masks if args.masks.is_dir() else args.masks.parent
    table = find_table([folder, folder.parent, *([home] if home else [])], args.classes)
    if table is None:
        return Table([], "") if args.zero_is_void else VOC
    if args.zero_is_void or any(own for _, own in table.rows):
        return table
    raise UserError(f"{table.origin} gives no colours; expected `name r g b` a line, as in `road 128 64 128`")


def convert(
    mask: Path,
    target: Path,
    picture: tuple[Path, Path] | None,
    colors: Mapping[Color, int],
    num_classes: int,
    zero_is_void: bool,
    palette: np.ndarray,
) -> tuple[Path, str]:
    """Write the indices of one mask, and copy its picture to its place; runs in the worker processes.

    Returns:
        The path of the mask, and "new", "there", or what is wrong.
    """
    try:
        labels = read_labels(mask.read_bytes(), colors, num_classes)
    except (BadLabel, OSError) as error:
        return mask, str(error) if isinstance(error, BadLabel) else f"cannot be read ({error.strerror or error})"
    if zero_is_void:
        labels = np.where((labels == 0) | (labels == IGNORE_LABEL), IGNORE_LABEL, labels - 1).astype(np.uint8)
    if picture and os.path.lexists(picture[1]) and not filecmp.cmp(*picture, shallow=False):
        return mask, f"has a picture that would replace {picture[1]}, which holds something else: choose another folder"
    if there := os.path.lexists(target):
        try:
            same = np.array_equal(decode_label(target.read_bytes())[0], labels)
        except (BadLabel, OSError):
            same = False
        if not same:
            return mask, f"would replace {target}, which holds something else: choose another folder"
    else:
        save_indexed_png(target, labels, palette)
    if picture and not picture[1].exists():
        with open(picture[0], "rb") as file:
            write_atomically(picture[1], lambda copy: shutil.copyfileobj(file, copy))
    return mask, "there" if there else "new"


def check_classes(home: Path, rows: list[tuple[str, Color | None]]) -> None:
    """Raise :class:`UserError` where the data set ``home`` has names for other classes already."""
    path = home / "classes.txt"
    if rows and path.exists() and (names := [name for name, _ in read_classes(path)]) != [name for name, _ in rows]:
        raise UserError(
            f"{path} names the classes {', '.join(names)}, but the masks have {', '.join(name for name, _ in rows)}; "
            "delete it, or choose another folder"
        )


def write_set(
    home: Path, ids: list[str], labelled: Labelled, rows: list[tuple[str, Color | None]], args: argparse.Namespace
) -> None:
    """Write the lists and classes.txt of the data set ``home`` where it has none, and say what was done."""
    remove_torn_files([home / "classes.txt", home / LISTS / "train.txt", home / LISTS / "val.txt"])
    if rows and not (home / "classes.txt").exists():
        write_lines(home / "classes.txt", (" ".join(map(str, (name, *(own or ())))) for name, own in rows))
        print(f"{home / 'classes.txt'}: {len(rows)} classes")
    names = [name for name in (*TRAIN_LISTS, *VAL_LISTS) if (home / name).exists()]
    if names:
        print(f"the lists that are there stay as they are: {', '.join(names)}")
    else:
        lists, origin = choose_lists(ids, labelled.lists, args.val_share, args.seed)
        for name, found in lists.items():
            write_lines(home / LISTS / f"{name}.txt", found)
            print(f"{home / LISTS / name}.txt: {len(found)} ids, {origin}")
        names = [f"{LISTS}/{name}.txt" for name in lists]
    words = ["python", "scripts/check_dataset.py", "--data-dir", str(home), "--data-list", *names]
    print(f"next: {shlex.join(words)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", type=Path, help="folder of colour masks, one PNG, or what a labelling tool wrote")
    parser.add_argument("out", type=target, metavar="NEW", help="folder to write to; made if it is missing")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="classes.txt, labelmap.txt or class_names.txt to use")
    parser.add_argument("--suffix", default="", help="the masks lie beside their pictures, and this ends their names: _mask")
    parser.add_argument("--zero-is-void", action="store_true", help="0 becomes void (255), and 1..N become 0..N-1")
    parser.add_argument(
        "--void", type=color, action="append", default=[], metavar="R,G,B", help="a colour that means void, beside 224,224,192"
    )
    parser.add_argument("--val-share", type=below_one, default=0.2, help="of the ids, for validation (%(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the split (%(default)s)")
    add_workers_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.masks.is_dir():  # before it is gone through, which takes long for /
        check_out(args.masks, args.out)
    labelled = find_labelled(args.masks, args.suffix.removesuffix(".png"))
    check_out(args.masks, args.out)
    home = args.out if labelled.pictures is not None else None
    if home is None and args.out.name in LABEL_DIRS and args.masks.is_dir():
        home = args.out.parent
    table = choose_table(args, home)
    colors = table.colors()
    if taken := [own for own in args.void if own in colors]:
        text = ",".join(map(str, taken[0]))
        raise UserError(f"--void {text} is the colour of class {colors[taken[0]]} in {table.origin}; leave it out")
    rows = [] if table is VOC else table.rows[1 if args.zero_is_void and colors else 0 :]  # the classes as they will be
    if home:
        check_classes(home, rows)
    palette = voc_palette()
    for own, label in colors.items():
        palette[label - args.zero_is_void] = own
    # Void gets a colour of its own, by which a re-ordered palette is told.
    palette[IGNORE_LABEL] = next(own for own in (VOID_COLOR, (255, 255, 255), (1, 1, 1)) if own not in colors)
    num_classes = len(table.rows) + (args.zero_is_void and not colors) if table.rows else IGNORE_LABEL
    if colors:
        colors |= {own: IGNORE_LABEL for own in (VOID_COLOR, *args.void) if own not in colors}

    masks, pictures = labelled.masks, labelled.pictures
    folder = args.out if pictures is None else args.out / LABEL_DIRS[-1]
    copies = {i: (path, args.out / IMAGE_DIR / f"{i}{path.suffix}") for i, path in (pictures or {}).items()}
    print(f"{len(masks)} masks; " + (f"the colours are those of {table.origin}" if colors else "their values stay"))
    if labelled.others:
        print(f"{labelled.others} files that are no .png are left out")
    options = (colors, num_classes, args.zero_is_void, palette)
    tasks = ((path, folder / f"{i}.png", copies.get(i), *options) for i, path in masks.items())
    remove_torn_files([*(folder / f"{i}.png" for i in masks), *(copy for _, copy in copies.values())])
    done = dict(tqdm(parallel_map(convert, tasks, args.workers), "masks", len(masks), unit="mask", disable=None))
    bad = [f"{path} {outcome}" for path, outcome in sorted(done.items()) if outcome not in ("new", "there")]
    new = sum(outcome == "new" for outcome in done.values())
    print(f"{new} masks written to {folder}/, {len(masks) - len(bad) - new} were there already")
    if bad:
        print("\n".join(bad[:SHOWN]), file=sys.stderr)
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        raise UserError(
            f"{len(bad)} of {len(masks)} masks could not be turned, see above{more}; mend them, or name their colours with "
            "--classes or --void, and run the same command"
        )
    if lost := [image_id for image_id in masks if pictures is not None and image_id not in pictures]:
        print(f"{len(lost)} masks have no picture: put {lost[0]}.jpg or .png and so on into {args.out / IMAGE_DIR}/")
    if home:
        write_set(home, [i for i in masks if i in (pictures or masks)], labelled, rows, args)
    return 0


if __name__ == "__main__":
    run_command(main)
