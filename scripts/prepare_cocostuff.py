"""Convert the .mat labels of COCO-Stuff 10k, version 1.1, to PNGs for training.

    python scripts/download.py cocostuff10k
    python scripts/prepare_cocostuff.py
    python train.py --dataset cocostuff --data-dir data/cocostuff10k --num-steps 20000 --random-mirror --random-scale

annotations/<id>.mat becomes annotations_png/<id>.png: class indices 0..181, 255 unlabelled, with the VOC colour map. The lists
in imageLists/ are used unchanged: train, and test for validation. The folder appears only when every label is in it; an
existing folder is compared with the .mat files and not changed. Images and labels keep their sizes, but the published scores
of the 10k are of images and labels warped to 513x513. COCO-Stuff 164k needs no preparation.
"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DatasetError, read_ids
from dataset.classes import COCO_NAMES, IGNORE_LABEL
from dataset.cocostuff import PREPARED
from dataset.labels import BadLabel, decode_label
from scripts.data.causes import few
from scripts.data.masks import checked, read_mat
from scripts.data.parallel import add_workers_option, parallel_map
from utils.argtypes import Parser, target
from utils.command import UserError, run_command
from utils.files import check_writable
from utils.visualize import save_indexed_png

PUBLISHED = {"train": 9000, "test": 1000}
OLD_NAMES = 172  # names in a file of version 1.0, where 1 is unlabelled and no number is skipped (cocostuff10k, README)
SHOWN = 20  # files listed in a message
LAYOUT = "images/<id>.jpg, annotations/<id>.mat and imageLists/{train,test,all}.txt"


def decode(data: bytes) -> np.ndarray:
    """The (H, W) int64 classes of a .mat file: its ``S`` holds 0 for unlabelled pixels and k + 1 for class k."""
    content = read_mat(data, "S", "S, as in version 1.1 of the 10k")
    values, names = content["S"], content.get("names")
    if names is not None and names.size == OLD_NAMES:
        raise BadLabel("is of version 1.0, whose classes have other numbers; expected version 1.1")
    if values.dtype.kind not in "uif":
        raise BadLabel(f"holds S of type {values.dtype}; expected numbers")
    known = np.isin(values, np.arange(len(COCO_NAMES) + 1))
    if not known.all():
        wrong = few(np.unique(values[~known]).tolist())
        raise BadLabel(f"holds {wrong}; expected 0..{len(COCO_NAMES)} in S, as in version 1.1 of the 10k")
    return np.where(values == 0, IGNORE_LABEL, values.astype(np.int64) - 1)


def convert(image_id: str, root: Path, folder: Path, write: bool) -> str:
    """Write the label of an image to ``folder``, or compare it with the one there; returns the fault in one sentence, or ""."""
    path, label = root / "annotations" / f"{image_id}.mat", folder / f"{image_id}.png"
    try:
        mask = checked(decode(path.read_bytes()), root / "images" / f"{image_id}.jpg", len(COCO_NAMES))
        if write:
            save_indexed_png(label, mask)
        elif not np.array_equal(decode_label(label.read_bytes())[0], mask):
            return f"{label} differs from {path}"
    except BadLabel as error:
        return f"{path} {error}"
    except FileNotFoundError as error:
        return f"{error.filename} does not exist"
    return ""


def read_lists(root: Path) -> dict[str, list[str]]:
    """The ids of imageLists/train.txt, test.txt and all.txt.

    Raises:
        DatasetError: this is not the folder of COCO-Stuff 10k, or the lists contradict each other.
    """
    if (root / "images/train2017").is_dir():
        raise DatasetError(
            f"{root} is COCO-Stuff 164k and needs no preparation: its labels are PNGs; use it with --dataset cocostuff"
        )
    paths = {name: root / "imageLists" / f"{name}.txt" for name in ("train", "test", "all")}
    if lost := next((path for path in (root / "images", root / "annotations", *paths.values()) if not path.exists()), None):
        raise DatasetError(
            f"{lost} does not exist; expected COCO-Stuff's 10k, {LAYOUT}: get it with `python scripts/download.py "
            "cocostuff10k`, or pass --data-dir"
        )
    lists = {name: read_ids(path) for name, path in paths.items()}
    train, test, every = (set(lists[name]) for name in paths)
    if train & test or train | test != every:
        raise DatasetError(
            f"{root / 'imageLists'} names {len(train)} ids in train.txt, {len(test)} in test.txt, {len(train & test)} in both "
            f"and {len(every)} in all.txt; expected each id of all.txt in one of the two: unpack the archive again"
        )
    return lists


def prepare(root: Path, workers: int) -> None:
    """Make ``root/annotations_png``, or compare an existing one.

    Raises:
        UserError: a label or image is missing or wrong; nothing is written then.
    """
    lists = read_lists(root)
    ids, place = sorted(lists["all"]), root / PREPARED
    new = not place.exists()
    folder = place.with_name(f".{PREPARED}.tmp") if new else place
    try:
        if new:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            check_writable(folder)
        work = parallel_map(partial(convert, root=root, folder=folder, write=new), ((image_id,) for image_id in ids), workers)
        bad = sorted(filter(None, tqdm(work, "labels", len(ids), unit="label", disable=None)))
        if bad:
            print("\n".join(bad[:SHOWN]), file=sys.stderr)
            more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
            advice = "nothing was written: unpack the archive again" if new else f"move {place} away, and run the same command"
            raise UserError(f"{len(bad)} of {len(ids)} labels cannot be used, see above{more}; {advice}")
        if new:
            folder.rename(place)
    finally:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{place}: {len(ids)} labels {'written' if new else 'already there'}")
    for name, count in PUBLISHED.items():
        if len(lists[name]) != count:
            print(f"warning: {name}.txt names {len(lists[name])} images, expected {count} as published", file=sys.stderr)
    print("images and labels keep their sizes; the published scores of the 10k are of both warped to 513x513")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=target, default="data/cocostuff10k", help=f"{LAYOUT} (default: %(default)s)")
    add_workers_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        prepare(args.data_dir, args.workers)
    except BrokenPipeError:
        raise
    except OSError as error:  # no permission, broken medium
        raise DatasetError(f"{error.filename or args.data_dir}: {error.strerror or error}") from error
    return 0


if __name__ == "__main__":
    run_command(main)
