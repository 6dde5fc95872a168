"""Turn masks that are drawn in colours into masks of class indices, the PNGs that training reads.

    python scripts/masks_to_indices.py data/mine/ColourMasks data/mine/SegmentationClass

The first folder is read with its sub-folders, the second one gets a PNG of the same name for each PNG there. A mask may be RGB,
RGBA or have a palette in any order: what counts is the colour that a pixel is shown in. Grey masks of class indices stay what
they are. Which class has which colour says classes.txt beside or in the first folder (`name r g b` a line, in the order of the
classes), or --classes; without one, the colours are PASCAL VOC's. A colour of no class is refused. Files that are there already
are never changed.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.classes import IGNORE_LABEL, VOC_CLASSES, VOID_COLOR, Color, is_voc, read_classes, voc_palette
from dataset.labels import BadLabel, decode_label, read_png
from scripts.data.parallel import parallel_map
from utils.command import UserError, default_processes, not_negative, run_command
from utils.visualize import save_indexed_png

SHOWN = 50  # files in a message
VOC = ({row.color: row.id for row in VOC_CLASSES}, len(VOC_CLASSES), "PASCAL VOC")


def color(text: str) -> Color:
    """An argparse type: ``"224,224,192"`` -> (224, 224, 192), red, green, blue."""
    try:
        red, green, blue = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour; write RED,GREEN,BLUE, as in 224,224,192") from None
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour; expected numbers from 0 to 255")
    return red, green, blue


def find_classes(masks: Path, given: Path | None) -> tuple[dict[Color, int], int, str]:
    """The label of each class's colour, the number of classes, and where both come from."""
    folder = masks if masks.is_dir() else masks.parent
    path = given or next((path for path in (folder / "classes.txt", folder.parent / "classes.txt") if path.is_file()), None)
    if path is None:
        return VOC
    rows = read_classes(path)
    if len(rows) > IGNORE_LABEL:
        raise UserError(f"{path} names {len(rows)} classes; expected at most {IGNORE_LABEL}: that label means void")
    table: dict[Color, int] = {}
    for index, (name, own) in enumerate(rows):
        if own is not None and (first := table.setdefault(own, index)) != index:
            raise UserError(f"{path} gives {rows[first][0]} and {name} one colour, {own}; expected a colour for each class")
    if table:
        return table, len(rows), str(path)
    if is_voc([name for name, _ in rows]):
        return VOC
    raise UserError(f"{path} gives no colours; expected `name r g b` a line, as in `road 128 64 128`")


def find_masks(masks: Path, out: Path) -> list[tuple[Path, Path]]:
    """The masks and their places in the folder ``out``; UserError where the two cannot be told apart, or there are none."""
    if not masks.exists():
        raise UserError(f"{masks} does not exist; expected a folder of masks, or one PNG")
    folder = masks if masks.is_dir() else masks.parent
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise UserError(f"{out} is in the folder that is read, {folder}; choose another folder for the indices")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder to write to")
    files = sorted(path for path in masks.rglob("*") if path.is_file()) if masks.is_dir() else [masks]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    pngs = [path for path in files if path.suffix.lower() == ".png"]
    if not pngs:
        raise UserError(f"{masks} holds no PNG; masks in other formats have to be saved as PNG without loss first")
    if len(pngs) < len(files):
        print(f"{len(files) - len(pngs)} files that are no .png are left out")
    pairs = [(path, out / path.relative_to(folder).with_suffix(".png")) for path in pngs]
    if len({target for _, target in pairs}) < len(pairs):
        raise UserError(f"{masks} holds files whose names differ in .png and .PNG alone; they would share one place")
    return pairs


def read_labels(data: bytes, table: Mapping[Color, int], num_classes: int) -> np.ndarray:
    """The labels of a PNG by the colours that its pixels are shown in, (H, W) uint8; see :func:`to_indices`.

    Raises:
        BadLabel: no PNG, a damaged one, colours of no class, half transparent pixels, an index without a colour, or grey values
            that can be read as colours and as class indices.
    """
    pixels, palette, mode = read_png(data)
    if mode == "P":
        if pixels.max() >= len(palette):
            raise BadLabel(f"holds the index {pixels.max()}, and its palette has {len(palette)} colours")
        return to_indices(palette[pixels], table)
    if pixels.dtype != np.uint8:
        raise BadLabel("is grey of 16 bits; expected colours")
    if mode in ("LA", "RGBA") and (half := int(((pixels[..., -1] > 0) & (pixels[..., -1] < 255)).sum())):
        raise BadLabel(f"holds {half} half transparent pixels; expected whole colours")
    if mode in ("RGB", "RGBA"):
        return to_indices(pixels[..., :3], table)
    values = pixels[..., 0] if mode == "LA" else pixels
    stretch = 255 // (2 ** min(data[24], 8) - 1)  # grey of fewer than 8 bits is shown from black to white, too
    indices = bool(((values < num_classes) | (values == IGNORE_LABEL)).all())
    try:
        labels = to_indices(np.repeat((values * stretch)[..., None], 3, axis=2), table)
    except BadLabel:
        if indices:
            return values
        raise
    if indices and not np.array_equal(labels, values):
        raise BadLabel(
            "is grey, and its values are colours of classes as well as class indices; save it as RGB if they are colours"
        )
    return labels


def to_indices(colors: np.ndarray, table: Mapping[Color, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8 labels; BadLabel where a colour is not in the table, with its number of pixels."""
    codes = colors.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    keys, labels = zip(*sorted((red * 65536 + green * 256 + blue, label) for (red, green, blue), label in table.items()))
    places = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    known = np.array(keys, dtype=np.uint32)[places] == codes
    if not known.all():
        unknown, counts = np.unique(codes[~known], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:8]
        shown = [f"({c >> 16}, {c >> 8 & 255}, {c & 255}) on {n} pixels" for c, n in zip(unknown[order], counts[order])]
        hint = "; colours between those of the classes come from resizing or from JPEG" if len(unknown) > 8 else ""
        raise BadLabel(f"holds {len(unknown)} colours of no class: {', '.join(shown)}{', ...' * (len(unknown) > 8)}{hint}")
    return np.array(labels, dtype=np.uint8)[places]


def convert(path: Path, target: Path, table: Mapping[Color, int], num_classes: int, palette: np.ndarray) -> tuple[Path, str]:
    """Write the indices of one mask; returns its path and "new", "there", or what is wrong. Runs in the worker processes."""
    try:
        labels = read_labels(path.read_bytes(), table, num_classes)
    except (BadLabel, OSError) as error:
        return path, str(error) if isinstance(error, BadLabel) else f"cannot be read ({error.strerror or error})"
    if os.path.lexists(target):
        try:
            same = np.array_equal(decode_label(target.read_bytes())[0], labels)
        except (BadLabel, OSError):
            same = False
        return path, "there" if same else f"would replace {target}, which holds something else: choose another folder"
    save_indexed_png(target, labels, palette)
    return path, "new"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", type=Path, help="folder of colour masks, or one PNG")
    parser.add_argument("out", type=Path, help="folder for the indices; made if it is missing")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="classes and colours, `name r g b` a line")
    parser.add_argument(
        "--void", type=color, action="append", default=[], metavar="R,G,B", help="a colour that means void, beside 224,224,192"
    )
    parser.add_argument(
        "--workers", type=not_negative, default=default_processes(64), help="processes; 0 works in this one (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    pairs = find_masks(args.masks, args.out)
    table, num_classes, origin = find_classes(args.masks, args.classes)
    if taken := [own for own in args.void if own in table]:
        text = ",".join(map(str, taken[0]))
        raise UserError(f"--void {text} is the colour of class {table[taken[0]]} in {origin}; leave it out")
    palette = voc_palette()
    for own, label in table.items():
        palette[label] = own
    # Void gets a colour of its own, by which a re-ordered palette is told.
    palette[IGNORE_LABEL] = next(own for own in (VOID_COLOR, (255, 255, 255), (1, 1, 1)) if own not in table)
    table = table | {own: IGNORE_LABEL for own in (VOID_COLOR, *args.void) if own not in table}

    print(f"{len(pairs)} masks; the colours are those of {origin}")
    tasks = ((path, target, table, num_classes, palette) for path, target in pairs)
    done = dict(tqdm(parallel_map(convert, tasks, args.workers), "masks", len(pairs), unit="mask", disable=None))
    bad = [f"{path} {outcome}" for path, outcome in sorted(done.items()) if outcome not in ("new", "there")]
    new = sum(outcome == "new" for outcome in done.values())
    print(f"{new} masks written to {args.out}/, {len(pairs) - len(bad) - new} were there already")
    if bad:
        print("\n".join(bad[:SHOWN]), file=sys.stderr)
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        raise UserError(
            f"{len(bad)} of {len(pairs)} masks could not be turned, see above{more}; mend them, or name their colours with "
            "--classes or --void, and run the same command"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
