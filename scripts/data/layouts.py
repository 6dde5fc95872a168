"""What the tools that people label with leave: which masks there are, whose pictures they are, which lists."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.lists import IMAGE_DIR, PICTURE_SUFFIXES, Listing, read_ids
from utils.command import UserError
from utils.files import write_atomically

LISTS = "ImageSets/Segmentation"
MASK_DIRS = {"SegmentationClassPNG": IMAGE_DIR, "SegmentationClass": IMAGE_DIR}
"""Folders of masks -> of their pictures, as labelme2voc and CVAT write them; of labelme's two, the first holds the PNGs."""
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


class Labelled(NamedTuple):
    """The masks of a folder.

    Attributes:
        masks: id -> mask; an id is a path below the folder of the masks, without suffix.
        pictures: id -> its picture, for those that have one; None where the folder is one of masks alone.
        others: how many files there are that are no PNG, where it is one of masks alone.
        lists: the folder with the lists of ids, which need not exist.
    """

    masks: dict[str, Path]
    pictures: dict[str, Path] | None
    lists: Path
    others: int = 0


def find_labelled(root: Path, suffix: str) -> Labelled:
    """What is in the folder ``root``, or in the folder of the one mask ``root``.

    Args:
        suffix: by which the names of masks differ from those of their pictures in the same folder: ``"_mask"``; "" where masks
            have a folder of their own.

    Raises:
        UserError: no masks, or two of one name.
    """
    if not root.exists():
        raise UserError(f"{root} does not exist; expected a folder of masks, or one PNG")
    if root.is_file():
        return Labelled(_some(_by_id([root], root.parent, ""), root, ""), None, root.parent / LISTS)
    files = _files(root)
    if suffix:
        masks = _by_id(files, root, suffix)
        return Labelled(_some(masks, root, suffix), _pictures(root, "", masks), root / LISTS)
    for name, pictures in MASK_DIRS.items():
        if (folder := root / name).is_dir() and (masks := _by_id(_files(folder), folder, "")):
            return Labelled(masks, _pictures(root, f"{pictures}/", masks), root / LISTS)
    masks = _some(_by_id(files, root, ""), root, "")
    return Labelled(masks, None, root.parent / LISTS, len(files) - len(masks))


def _files(folder: Path) -> list[Path]:
    """The files in a folder and its sub-folders, without hidden ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _by_id(paths: Iterable[Path], folder: Path, suffix: str) -> dict[str, Path]:
    """{id: mask} of the PNGs whose name ends in ``suffix``; UserError for two of one id."""
    masks: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() != ".png" or not path.stem.endswith(suffix) or path.stem == suffix:
            continue
        image_id = path.relative_to(folder).with_name(path.stem.removesuffix(suffix)).as_posix()
        if (first := masks.setdefault(image_id, path)) != path:
            raise UserError(f"{first} and {path} would share one place; rename one of them")
    return masks


def _some(masks: dict[str, Path], root: Path, suffix: str) -> dict[str, Path]:
    if not masks:
        which = f"PNG whose name ends in {suffix}.png" if suffix else "PNG"
        raise UserError(f"{root} holds no {which}; masks in other formats have to be saved as PNG without loss first")
    return masks


def _pictures(root: Path, folder: str, masks: dict[str, Path]) -> dict[str, Path]:
    listing = Listing(root)
    found = {image_id: listing.find(folder + image_id, PICTURE_SUFFIXES) for image_id in masks}
    return {image_id: root / name for image_id, name in found.items() if name}


def choose_lists(ids: Sequence[str], lists: Path, val_share: float, seed: int) -> tuple[dict[str, list[str]], str]:
    """{"train": ids, "val": ids}, each sorted or in the order of its list, and where they come from.

    Args:
        ids: that have all their files.
        lists: a folder that may hold lists for training and validation, which are kept; others (CVAT's ``default.txt``) say
            which ids there are.
        val_share: of the ids, if they are to be split here.
        seed: of the split.
    """
    files = sorted(lists.glob("*.txt")) if lists.is_dir() else []
    named = {_SPLITS[path.stem.lower()]: path for path in files if path.stem.lower() in _SPLITS}
    have = set(ids)
    if "train" in named:
        return {name: [i for i in read_ids(path) if i in have] for name, path in named.items()}, f"as {lists} has them"
    if (default := lists / "default.txt") in files:
        have &= set(read_ids(default))
    kept = sorted(have)
    count = min(len(kept) - 1, max(1, round(val_share * len(kept)))) if val_share else 0
    held_out = set(np.random.default_rng(seed).permutation(len(kept))[:count].tolist())
    split = {"train": [kept[i] for i in range(len(kept)) if i not in held_out], "val": [kept[i] for i in sorted(held_out)]}
    return {name: found for name, found in split.items() if found}, f"drawn with seed {seed}"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, a line an entry; UserError for what would be read back as something else."""
    lines = list(lines)
    if wrong := next((line for line in lines if re.search(r"[\r\n]|^[ \t]|[ \t]$", line)), None):
        raise UserError(f"{wrong!r} cannot be a line of {path}; rename it without line ends, and blanks around it")
    write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
