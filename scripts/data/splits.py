"""The lists of a converted data set: its ids for training, validation and test."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dataset.folders import split_of
from dataset.lists import is_bare, read_ids
from utils.command import UserError
from utils.files import write_atomically

LISTS = "ImageSets/Segmentation"
_COPY = re.compile(r"(.+)\.rf\.[^./]+")  # Roboflow: <source>.rf.<hash>, for each augmented copy of a source


def choose_lists(ids: Sequence[str], lists: Path, val_share: float, seed: int) -> tuple[dict[str, list[str]], str]:
    """The lists {"train": ids, "val": ids, "test": ids} that hold ids, and a note on their origin.

    They come from the lists of the export, else from its folders named train, valid, test and so on, else from a random split.

    Args:
        ids: ids with all their files.
        lists: folder of lists. Those for training and validation are kept; CVAT's ``default.txt`` only limits the ids.
        val_share: share for validation in a random split. Augmented copies of one source stay together.
        seed: seed of that split.
    """
    lists = lists if lists.is_dir() else lists.parents[1]  # train.txt and val.txt beside the folders
    files = sorted(lists.glob("*.txt"))
    named = {name: path for path in files if (name := split_of(path.stem))}
    have = set(ids)
    if "train" in named:
        read = {name: [i for i in read_ids(path) if i in have] for name, path in named.items()}
        if read["train"]:
            return read, f"as in {lists}"
    if (default := lists / "default.txt") in files:
        have &= set(read_ids(default))
    found = defaultdict(list)
    for image_id in sorted(have):
        found[next(filter(None, map(split_of, image_id.split("/")[:-1])), "")].append(image_id)
    rest = found.pop("", [])
    if (rest and [*found] == ["train"]) or (not rest and "train" not in found):  # a single folder train may be a class
        found, rest = defaultdict(list), sorted(have)
    origin = "by the names of the folders" if found else ""
    train = found.get("train", rest)
    if "val" not in found:
        train, found["val"] = _draw(train, val_share, seed)
        origin = f"{origin}, val drawn from train with seed {seed}" if origin else f"drawn with seed {seed}"
    found["train"] = train
    return {name: found[name] for name in ("train", "val", "test") if found.get(name)}, origin


def _draw(ids: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split sorted ids into two parts, the second with this share; copies of one source are in one part."""
    source = {image_id: copy[1] if (copy := _COPY.fullmatch(image_id)) else image_id for image_id in ids}
    names = sorted(set(source.values()))
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share else 0
    held_out = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    return [i for i in ids if source[i] not in held_out], [i for i in ids if source[i] in held_out]


def check_ids(ids: Iterable[str]) -> None:
    """Raise :class:`UserError` for an id that cannot be in a list because its line would be read differently."""
    for image_id in ids:
        if not is_bare(image_id):
            raise UserError(
                f"{image_id!r} cannot be a line of a list of ids; rename that file without line ends, without blanks at "
                "either end, and without image suffixes in the middle"
            )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, a line per entry."""
    write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
