"""Make the augmented PASCAL VOC 2012 set (10,582 training images) from VOC 2012 and SBD.

    python scripts/prepare_voc.py                                # SBD from data/SBD, unpacked or as benchmark.tgz
    python scripts/prepare_voc.py --aug SegmentationClassAug.zip # masks that are already converted

Writes SegmentationClassAug/<id>.png (class indices with the VOC palette) and the lists
ImageSets/SegmentationAug/{train_aug,trainval_aug,val}.txt to --data-dir. If VOC and SBD both have a mask, VOC's is used: only
VOC's has the border that is ignored ("void"). Existing masks and lists are checked: correct ones are kept in any format, wrong
ones are moved to SegmentationClassAug_replaced/. So the same command resumes an interrupted run, and after a complete run it
changes nothing.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator
from itertools import chain, count
from operator import methodcaller
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DatasetError, read_ids, read_list
from scripts.data.causes import few
from scripts.data.masks import AUG_DIR, VOC_DIR, agrees, convert, read_ready, read_sbd, ready_masks, sbd_ids, set_aside
from scripts.data.parallel import add_workers_option, parallel_map
from utils.argtypes import Parser, target
from utils.command import run_command
from utils.files import remove_torn_files, write_atomically
from utils.options import DATA_DIR

SBD_FOLDER, SBD_ARCHIVE = Path("data/SBD/benchmark_RELEASE"), Path("data/SBD/benchmark.tgz")
SBD_COUNT = 11355  # ids on SBD's train (8498) and val (2857) lists together

PUBLISHED = {  # number of ids and MD5 (see ids_md5()) of the lists that the DeepLab authors published
    "train": (1464, "223101833d3a86c8a837814f3e7afe88"),
    "val": (1449, "5510db06bbb92848a0bf6109eba6d646"),
    "train_aug": (10582, "215992f6fd958f89800449fdb4bbabe6"),
    "trainval_aug": (12031, "7110923167de0332931c8d4dc9b949bc"),
}


# ---- the lists


def ids_md5(ids: set[str]) -> str:
    """MD5 of the sorted ids, one per line, each followed by a line feed: independent of the order of a list."""
    return hashlib.md5("".join(f"{image_id}\n" for image_id in sorted(ids)).encode()).hexdigest()


def augmented_lists(train: set[str], val: set[str], extra: set[str]) -> dict[str, set[str]]:
    """The three lists from VOC's train and val and the ids of further masks: no id of val is in train_aug."""
    train_aug = (train | extra) - val
    return {"train_aug": train_aug, "trainval_aug": train_aug | val, "val": val}


def difference(name: str, ids: set[str], data_dir: Path) -> str | None:
    """How ``ids`` differ from the published list ``name``, in one sentence; None if they do not.

    The checksum only shows that they differ. If ImageSets has a copy of the published list, the differing ids are named.
    """
    count, md5 = PUBLISHED[name]
    if ids_md5(ids) == md5:
        return None
    gap = len(ids) - count
    text = f"{name}: {len(ids)} ids, " + (
        f"{abs(gap)} {'more' if gap > 0 else 'fewer'} than the published {count}" if gap else "as many as published, but others"
    )
    strange = {image_id for image_id in ids if not re.fullmatch(r"\d{4}_\d{6}", image_id)}
    if strange:
        text += f"; {len(strange)} not in VOC's format (2007_000032): {few(sorted(strange))}"
    for path in sorted(data_dir.glob("ImageSets/Segmentation*/*.txt")):
        published = set(read_ids(path))
        if ids_md5(published) == md5:
            for word, part in (("too many", ids - published), ("missing", published - ids)):
                text += f"; {len(part)} {word}: {few(sorted(part))}" if part else ""
            break
    return text


def locate_sbd(given: str | None) -> Path:
    """The SBD folder or archive: the given path, else the unpacked folder in data/SBD, else the archive there."""
    if given is not None:
        if not Path(given).exists():
            raise DatasetError(f"--sbd {given} does not exist; pass SBD's benchmark_RELEASE folder or benchmark.tgz")
        return Path(given)
    found = next((path for path in (SBD_FOLDER, SBD_ARCHIVE) if path.exists()), None)
    if found is None:
        raise DatasetError(
            f"neither {SBD_FOLDER} nor {SBD_ARCHIVE} exists: get SBD with `python scripts/download.py sbd`, "
            "or pass a ready SegmentationClassAug folder or zip with --aug"
        )
    return found


def read_voc_lists(data_dir: Path) -> tuple[set[str], set[str]]:
    """VOC's train and val ids; raises DatasetError if ``data_dir`` is not the VOC2012 folder."""
    lists = [data_dir / "ImageSets/Segmentation" / f"{name}.txt" for name in ("train", "val")]
    if not all(path.is_file() for path in lists) or not (data_dir / "JPEGImages").is_dir():
        inner = next((str(path) for name in ("VOC2012", "VOCdevkit/VOC2012") if (path := data_dir / name).is_dir()), None)
        advice = f"pass --data-dir {inner}" if inner else "get it with `python scripts/download.py voc2012`, or pass --data-dir"
        raise DatasetError(
            f"{data_dir} is not a VOC2012 folder (JPEGImages/, ImageSets/Segmentation/train.txt, val.txt): {advice}"
        )
    return set(read_ids(lists[0])), set(read_ids(lists[1]))


def copy_missing_images(ids: set[str], sbd: Path | None, data_dir: Path) -> set[str]:
    """Copy images that JPEGImages lacks from SBD, which has the same images; returns the ids that are still missing."""
    missing = {image_id for image_id in ids if not (data_dir / "JPEGImages" / f"{image_id}.jpg").exists()}
    if missing and sbd is not None:
        wanted = {f"img/{image_id}.jpg" for image_id in missing}
        for name, data in tqdm(read_sbd(sbd, wanted), "images from SBD", len(wanted), unit="file", disable=None):
            write_atomically(data_dir / "JPEGImages" / Path(name).name, methodcaller("write", data))
            missing.remove(Path(name).stem)
    return missing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=target, default=Path(DATA_DIR), help="the VOC2012 folder (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--sbd", help=f"SBD's folder or benchmark.tgz (default: {SBD_FOLDER}, else {SBD_ARCHIVE})")
    source.add_argument("--aug", type=Path, help="a ready SegmentationClassAug folder or zip, instead of SBD")
    add_workers_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="write every mask again, also correct existing ones")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if the result differs from the published set")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> int:
    data_dir: Path = args.data_dir
    train, val = read_voc_lists(data_dir)
    notes = [difference("train", train, data_dir), difference("val", val, data_dir)]
    ready: dict[str, str] = {}
    if args.aug:
        source, sbd = args.aug, None
        ready = ready_masks(source)
        extra = set(ready)
        print(f"VOC: {len(train)} train, {len(val)} val; {source}: {len(ready)} masks")
    else:
        source = sbd = locate_sbd(args.sbd)
        sbd_lists = sbd_ids(sbd)
        extra = sbd_lists["train"] | sbd_lists["val"]
        print(f"VOC: {len(train)} train, {len(val)} val; SBD: {len(sbd_lists['train'])} train, {len(sbd_lists['val'])} val")
        if len(extra) != SBD_COUNT:
            notes.append(f"SBD: its lists name {len(extra)} images, expected {SBD_COUNT} as published")
    lists = augmented_lists(train, val, extra)
    ids = lists["trainval_aug"]
    if unsafe := {image_id for image_id in ids if not re.fullmatch(r"[\w-]+", image_id)}:
        raise DatasetError(f"{len(unsafe)} ids cannot be file names: {few(sorted(unsafe))}; expected ids such as 2007_000032")

    own = {image_id for image_id in train | val if (data_dir / VOC_DIR / f"{image_id}.png").exists()}
    remove_torn_files(data_dir / "JPEGImages" / f"{image_id}.jpg" for image_id in ids)
    missing = copy_missing_images(ids, sbd, data_dir)
    bad = [f"{image_id}: no image in JPEGImages" for image_id in sorted(missing)]
    bad += [f"{image_id}: no mask in {VOC_DIR}" for image_id in sorted((train | val) - own - extra)]
    if borrowed := (train | val) & extra - own:
        notes.append(f"{len(borrowed)} VOC ids lack a mask in {VOC_DIR}; that of {source} is used: {few(sorted(borrowed))}")
    if ready:
        notes.append(compare_with_voc(source, ready, own & extra, data_dir, args.workers))

    # Masks are read here, one file after the other; the worker processes compare and write them.
    aside = next(path for n in count(1) if not (path := data_dir / f"{AUG_DIR}_replaced{'' if n == 1 else n}").exists())
    (data_dir / AUG_DIR).mkdir(exist_ok=True)
    remove_torn_files(data_dir / AUG_DIR / f"{image_id}.png" for image_id in ids)  # left by a run that was killed
    from_voc, from_extra = own - missing, extra - own - missing
    masks = chain(voc_masks(from_voc, data_dir), extra_masks(source, ready, from_extra))
    tasks = ((image_id, kind, data, data_dir, aside, args.overwrite) for image_id, kind, data in masks)
    converted = parallel_map(convert, tasks, args.workers)
    outcomes = dict(tqdm(converted, "masks", len(from_voc) + len(from_extra), unit="mask", disable=None))
    by_outcome = {name: {i for i, outcome in outcomes.items() if outcome == name} for name in ("there", "new", "replaced")}
    bad += [f"{i}: {outcome}" for i, outcome in sorted(outcomes.items()) if outcome not in by_outcome]
    bad += [f"{image_id}: no mask in {source}" for image_id in sorted(from_extra - outcomes.keys())]
    written = by_outcome["new"] | by_outcome["replaced"]
    print(
        f"masks: {len(by_outcome['there'])} already there, {len(written & from_voc)} written from VOC, "
        f"{len(written & from_extra)} from {source}"
    )
    if replaced := by_outcome["replaced"]:
        text = f"moved to {aside}/: {few(sorted(replaced))}"
        print(f"{len(replaced)} existing masks differ from those of VOC or {source}: {text}")
    if bad:
        print("\n".join(bad[:50]), file=sys.stderr)
        more = f" (and {len(bad) - 50} more)" if len(bad) > 50 else ""
        raise DatasetError(
            f"{len(bad)} file{'s' * (len(bad) > 1)} cannot be used, see above{more}; no list was written: repair or download "
            "them again and run the same command, finished masks are kept"
        )

    notes += [difference(name, lists[name], data_dir) for name in ("train_aug", "trainval_aug")]
    write_lists(lists, own, data_dir, aside)
    notes = [note for note in notes if note]
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if notes:
        print("warning: this is not the published set; results on it are not comparable with published ones", file=sys.stderr)
    return 1 if notes and args.strict else 0


def compare_with_voc(source: Path, ready: dict[str, str], ids: set[str], data_dir: Path, workers: int) -> str | None:
    """How many ready masks differ from VOC's own, which the published set uses, in one sentence; None if no mask differs."""
    tasks = ((image_id, data, data_dir) for image_id, data in read_ready(source, ready, ids))
    compared = tqdm(parallel_map(agrees, tasks, workers), "compared with VOC", len(ids), unit="mask", disable=None)
    other = {image_id for image_id, same in compared if not same}
    if not other:
        return None
    return f"{len(other)} of the {len(ids)} masks in {source} that VOC also has differ from VOC's: {few(sorted(other))}"


def voc_masks(ids: set[str], data_dir: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (id, "png", content) of VOC's own masks."""
    for image_id in sorted(ids):
        yield image_id, "png", (data_dir / VOC_DIR / f"{image_id}.png").read_bytes()


def extra_masks(source: Path, ready: dict[str, str], ids: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yield (id, "png", content) of ready masks, or (id, "mat", content) of SBD's."""
    if ready:
        yield from ((image_id, "png", data) for image_id, data in read_ready(source, ready, ids))
    else:
        yield from ((Path(name).stem, "mat", data) for name, data in read_sbd(source, {f"cls/{i}.mat" for i in ids}))


def write_lists(lists: dict[str, set[str]], own: set[str], data_dir: Path, aside: Path) -> None:
    """Write the lists, one id per line; a file that already lists the same ids and masks, in any format, is left unchanged."""
    folder = data_dir / "ImageSets/SegmentationAug"
    folder.mkdir(exist_ok=True)
    remove_torn_files(folder / f"{name}.txt" for name in lists)
    for name, listed in lists.items():
        path = folder / f"{name}.txt"
        if not is_current(path, listed, own):
            if path.exists():
                set_aside(path, aside)
                print(f"{path} listed other ids or masks: moved to {aside}/")
            text = "".join(f"{image_id}\n" for image_id in sorted(listed)).encode()
            write_atomically(path, methodcaller("write", text))
        published = " (ids as published)" if ids_md5(listed) == PUBLISHED[name][1] else ""
        print(f"{path}: {len(listed)} ids{published}")


def is_current(path: Path, listed: set[str], own: set[str]) -> bool:
    """Whether a list names each of ``listed`` once, with existing masks; those of VOC's ``own`` are in two folders."""
    try:
        entries = read_list(path)
    except DatasetError:  # missing, empty or not text
        return False
    ids = [entry.id for entry in entries]
    folders = {entry.id: (AUG_DIR, VOC_DIR) if entry.id in own else (AUG_DIR,) for entry in entries}
    right = all(e.label is None or e.label in [f"{folder}/{e.id}.png" for folder in folders[e.id]] for e in entries)
    return right and len(ids) == len(listed) and set(ids) == listed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return prepare(args)
    except BrokenPipeError:
        raise
    except OSError as error:  # no permission, disk full, I/O error
        raise DatasetError(f"{error.filename or args.data_dir}: {error.strerror or error}") from error


if __name__ == "__main__":
    run_command(main)
