"""Make the augmented PASCAL VOC 2012 set (10,582 training pictures) from VOC 2012 and SBD.

    python scripts/prepare_voc.py                                # SBD from data/SBD, unpacked or as benchmark.tgz
    python scripts/prepare_voc.py --aug SegmentationClassAug.zip # masks that somebody has converted already

Into --data-dir go SegmentationClassAug/<id>.png (class indices under the VOC palette) and the lists
ImageSets/SegmentationAug/{train_aug,trainval_aug,val}.txt. Where VOC and SBD both have a mask, VOC's is taken: only that one
has the void border. An interrupted run goes on where it stopped; a finished one changes nothing.
"""

import argparse
import hashlib
import os
import re
import sys
from itertools import chain
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.voc import DatasetError, read_ids
from scripts.data.masks import AUG_DIR, convert, finished, read_ready, read_sbd, ready_masks, sbd_ids
from scripts.data.parallel import parallel_map
from utils.command import not_negative, run_command
from utils.files import write_atomically
from utils.options import DATA_DIR

SBD_FOLDER, SBD_ARCHIVE = Path("data/SBD/benchmark_RELEASE"), Path("data/SBD/benchmark.tgz")
SBD_COUNT = 11355  # ids on SBD's train (8498) and val (2857) lists together
SHOWN = 5  # examples in a message

PUBLISHED = {  # number of ids and MD5 of the lists as the DeepLab authors published them, see ids_md5()
    "train": (1464, "223101833d3a86c8a837814f3e7afe88"),
    "val": (1449, "5510db06bbb92848a0bf6109eba6d646"),
    "train_aug": (10582, "215992f6fd958f89800449fdb4bbabe6"),
    "trainval_aug": (12031, "7110923167de0332931c8d4dc9b949bc"),
}


# ---- the lists


def ids_md5(ids: set[str]) -> str:
    """MD5 of the sorted ids, one a line, each with a line feed: independent of the order of a published list."""
    return hashlib.md5("".join(f"{image_id}\n" for image_id in sorted(ids)).encode()).hexdigest()


def augmented_lists(train: set[str], val: set[str], extra: set[str]) -> dict[str, set[str]]:
    """The three lists from VOC's own two and the ids of further masks: no id of val may be trained on."""
    train_aug = (train | extra) - val
    return {"train_aug": train_aug, "trainval_aug": train_aug | val, "val": val}


def examples(ids: set[str]) -> str:
    return ", ".join(sorted(ids)[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def difference(name: str, ids: set[str], data_dir: Path) -> str | None:
    """What sets ``ids`` apart from the published list ``name``, in one sentence; None if nothing does.

    The check sum only tells that they differ. Which ids differ is told where a copy of the published list lies in ImageSets.
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
        text += f"; {len(strange)} not of the form of VOC's (2007_000032): {examples(strange)}"
    for path in sorted(data_dir.glob("ImageSets/Segmentation*/*.txt")):
        published = set(read_ids(path))
        if ids_md5(published) == md5:
            for word, part in (("too many", ids - published), ("missing", published - ids)):
                text += f"; {len(part)} {word}: {examples(part)}" if part else ""
            break
    return text


def locate_sbd(given: str | None) -> Path:
    """The SBD folder or archive: the one given, else the unpacked one in data/SBD, else the archive there."""
    if given is not None:
        if not Path(given).exists():
            raise DatasetError(f"--sbd {given} does not exist; pass SBD's benchmark_RELEASE folder or benchmark.tgz")
        return Path(given)
    found = next((path for path in (SBD_FOLDER, SBD_ARCHIVE) if path.exists()), None)
    if found is None:
        raise DatasetError(
            f"neither {SBD_FOLDER} nor {SBD_ARCHIVE} is there: get SBD with `python scripts/download.py sbd`, "
            "or pass a ready SegmentationClassAug folder or zip with --aug"
        )
    return found


def read_voc_lists(data_dir: Path) -> tuple[set[str], set[str]]:
    """VOC's own train and val ids; DatasetError where ``data_dir`` is not the VOC2012 folder."""
    lists = [data_dir / "ImageSets/Segmentation" / f"{name}.txt" for name in ("train", "val")]
    if not all(path.is_file() for path in lists) or not (data_dir / "JPEGImages").is_dir():
        inner = next((str(path) for name in ("VOC2012", "VOCdevkit/VOC2012") if (path := data_dir / name).is_dir()), None)
        advice = f"pass --data-dir {inner}" if inner else "get it with `python scripts/download.py voc2012`, or pass --data-dir"
        raise DatasetError(
            f"{data_dir} is not a VOC2012 folder (JPEGImages/, ImageSets/Segmentation/train.txt, val.txt): {advice}"
        )
    return set(read_ids(lists[0])), set(read_ids(lists[1]))


def fetch_missing_pictures(ids: set[str], sbd: Path | None, data_dir: Path) -> set[str]:
    """Copy pictures that JPEGImages lacks from SBD, whose pictures are VOC's; returns the ids that stay without one."""
    missing = {image_id for image_id in ids if not (data_dir / "JPEGImages" / f"{image_id}.jpg").exists()}
    if missing and sbd is not None:
        wanted = {f"img/{image_id}.jpg" for image_id in missing}
        for name, data in tqdm(read_sbd(sbd, wanted), "pictures from SBD", len(wanted), unit="file", disable=None):
            write_atomically(data_dir / "JPEGImages" / Path(name).name, lambda file, data=data: file.write(data))
            missing.remove(Path(name).stem)
    return missing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(DATA_DIR), help="the VOC2012 folder (%(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--sbd", help=f"SBD's folder or benchmark.tgz ({SBD_FOLDER}, else {SBD_ARCHIVE})")
    source.add_argument("--aug", type=Path, help="a ready SegmentationClassAug folder or zip, instead of SBD")
    parser.add_argument(
        "--workers", type=not_negative, default=os.cpu_count() or 1, help="processes; 0 works in this one (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write every mask anew, also those that are there and whole")
    parser.add_argument("--strict", action="store_true", help="end with status 1 where a list is not the published one")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> int:
    data_dir: Path = args.data_dir
    train, val = read_voc_lists(data_dir)
    notes = [difference("train", train, data_dir), difference("val", val, data_dir)]
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
            notes.append(f"SBD: its lists name {len(extra)} pictures, published are {SBD_COUNT}")
    lists = augmented_lists(train, val, extra)
    ids = lists["trainval_aug"]
    if unsafe := {image_id for image_id in ids if not re.fullmatch(r"[\w-]+", image_id)}:
        raise DatasetError(f"{len(unsafe)} ids cannot be file names: {examples(unsafe)}; expected ids such as 2007_000032")

    own = {image_id for image_id in train | val if (data_dir / "SegmentationClass" / f"{image_id}.png").exists()}
    missing = fetch_missing_pictures(ids, sbd, data_dir)
    bad = [f"{image_id}: JPEGImages has no picture of it" for image_id in sorted(missing)]
    bad += [f"{image_id}: SegmentationClass has no mask of it" for image_id in sorted((train | val) - own - extra)]
    if borrowed := (train | val) & extra - own:
        notes.append(
            f"{len(borrowed)} VOC ids lack a mask in SegmentationClass and take the one of {source}: {examples(borrowed)}"
        )

    # Masks that an earlier run finished stay.
    target = data_dir / AUG_DIR
    target.mkdir(exist_ok=True)
    for path in target.glob(".*.png.*.tmp"):  # left by a run that was killed
        path.unlink()
    there = set() if args.overwrite else {path.stem for path in target.glob("*.png")} & ids
    checks = parallel_map(finished, ((image_id, data_dir) for image_id in sorted(there)), args.workers)
    whole = set(tqdm(checks, "masks already there", len(there), unit="mask", disable=None)) - {None}
    from_voc, from_extra = own - whole - missing, extra - own - whole - missing
    print(f"masks: {len(whole)} already there, {len(from_voc)} to come from VOC, {len(from_extra)} from {source}")

    # The others are read here, one file after the other, and converted in the worker processes.
    own_masks = ((image_id, (data_dir / "SegmentationClass" / f"{image_id}.png").read_bytes()) for image_id in sorted(from_voc))
    if sbd is None:
        kind, extra_masks = "png", read_ready(source, ready, from_extra)
    else:
        kind, wanted = "mat", {f"cls/{image_id}.mat" for image_id in from_extra}
        extra_masks = ((Path(name).stem, data) for name, data in read_sbd(sbd, wanted))
    tasks = chain(
        ((image_id, "png", data, data_dir) for image_id, data in own_masks),
        ((image_id, kind, data, data_dir) for image_id, data in extra_masks),
    )
    converted = parallel_map(convert, tasks, args.workers)
    problems = dict(tqdm(converted, "masks", len(from_voc) + len(from_extra), unit="mask", disable=None))
    bad += [f"{image_id}: the mask {problem}" for image_id, problem in sorted(problems.items()) if problem]
    bad += [f"{image_id}: {source} has no mask of it" for image_id in sorted(from_extra - problems.keys())]
    if bad:
        print("\n".join(bad[:50]), file=sys.stderr)
        more = f" (and {len(bad) - 50} more)" if len(bad) > 50 else ""
        raise DatasetError(
            f"{len(bad)} file{'s' * (len(bad) > 1)} cannot be used, see above{more}; no list was written: mend or fetch "
            "them again and run the same command, the finished masks stay"
        )

    notes += [difference(name, lists[name], data_dir) for name in ("train_aug", "trainval_aug")]
    folder = data_dir / "ImageSets/SegmentationAug"
    folder.mkdir(exist_ok=True)
    for name, listed in lists.items():
        text = "".join(f"{image_id}\n" for image_id in sorted(listed)).encode()
        write_atomically(folder / f"{name}.txt", lambda file, text=text: file.write(text))
        agrees = " (as published)" if ids_md5(listed) == PUBLISHED[name][1] else ""
        print(f"{folder / name}.txt: {len(listed)} ids{agrees}")
    notes = [note for note in notes if note]
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if notes:
        print("warning: this is not the published set; results on it do not compare with published ones", file=sys.stderr)
    return 1 if notes and args.strict else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return prepare(args)
    except BrokenPipeError:
        raise
    except OSError as error:  # no permission, disk full, broken medium
        raise DatasetError(f"{error.filename or args.data_dir}: {error.strerror or error}") from error


if __name__ == "__main__":
    run_command(main)
