"""Images and masks in two folders side by side, ``images/`` and ``masks/``, perhaps split into train and val."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from dataset.classes import TO_INDICES
from dataset.images import DatasetError
from dataset.lists import IMAGE_DIR, IMAGE_SUFFIXES, LABEL_SUFFIXES, read_list

IMAGE_FOLDERS = f"images?|imgs?|{IMAGE_DIR}"
MASK_FOLDERS = "masks?|labels?|annotations?|segmentationclass(?:aug)?"
"""Regular expressions for the names of the two folders, in any case."""
_SPLITS = {"train": "train(ing)?", "val": "val(id(ation)?)?", "test": "test(ing)?"}  # names of lists and folders


class Folders(NamedTuple):
    """A folder of images and the folder of their masks, relative to the data set folder."""

    images: str
    masks: str


def split_of(name: str) -> str | None:
    """``"train"``, ``"val"`` or ``"test"`` from the name of a list or folder: ``Training``, ``valid``, ``val2017``."""
    return next((split for split, form in _SPLITS.items() if re.fullmatch(rf"{form}(\d{{4}})?", name, re.IGNORECASE)), None)


def choose_folders(root: Path, split: str, data_list: Path | None, lists: Sequence[str]) -> tuple[Folders, Path | None] | None:
    """The folders and the list of a split; None if ``root`` has no such folders, or if the list names images and labels.

    Args:
        data_list: the list that was given; None looks for ``train.txt`` and the like in ``root``, then for split folders.
        lists: other places of the list below ``root``; if one exists, it is used, and the returned list is None.

    Raises:
        DatasetError: the folders are ambiguous, or there is no such split.
    """
    found = find_folders(root)
    whole = found.pop("", None)
    if data_list and data_list.is_dir():
        place = data_list.resolve()
        pairs = [pair for pair in (*found.values(), whole) if pair and place.is_relative_to((root / pair.images).resolve())]
        return (pairs[0], data_list) if pairs else None
    if not found and not whole:
        return None
    texts = (path for path in sorted(root.glob("*.txt")) if split_of(path.stem) == split)
    ours = next((root / name for name in lists if (root / name).exists()), None)
    text = data_list or ours or (None if found else next(texts, None))
    if text:
        return (whole, None if text == ours else text) if whole and not any(e.label for e in read_list(text)) else None
    if pair := found.get(split) or (whole if split == "train" and not found else None):
        return pair, root / pair.images
    pairs = [*found.values(), *([whole] if whole and not found else [])]
    there = ", ".join(f"{pair.images}/ and {pair.masks}/" for pair in pairs)
    example = f", such as {root / found['test'].images}" if "test" in found else ""
    raise DatasetError(
        f"{root} has {there}, but no split for {split}: `python {TO_INDICES} {quote(str(root))} NEW` copies it with lists for "
        f"train and val; or pass --data-list, a file of ids or a folder of images{example}"
    )


def find_folders(root: Path) -> dict[str, Folders]:
    """The folders of each split: ``images/train`` and ``masks/train``, or ``train/images`` and ``train/masks``, or
    ``train_images`` and ``train_masks``; the images of the last may also be in ``train``.

    Returns:
        {split: its folders}; "" is the key of ``images`` and ``masks`` themselves. {} if there are no such folders.

    Raises:
        DatasetError: the folders are ambiguous.
    """
    found: dict[str, Folders] = {}

    def add(split: str | None, images: str, masks: str) -> None:
        if split and (first := found.setdefault(split, Folders(images, masks))) != (images, masks):
            raise DatasetError(
                f"{root} holds {first.images}/ with {first.masks}/, and {images}/ with {masks}/, for {split}; choose with, for "
                f"example, `--image-dir {images} --label-dir {masks} --data-list {quote(str(root / images))}`"
            )

    if whole := _pair(root):
        images, masks = ([path.name for path in _folders(root / name)] for name in whole)
        for image, mask in ((image, mask) for image in images for mask in masks if split_of(image) == split_of(mask)):
            add(split_of(image), f"{whole.images}/{image}", f"{whole.masks}/{mask}")
        return {"": whole, **found}
    for path in _folders(root):
        if split_of(path.name) and (pair := _pair(path)):
            add(split_of(path.name), *(f"{path.name}/{name}" for name in pair))
        elif (name := re.fullmatch(rf"(.+)[_-](?:{MASK_FOLDERS})", path.name, re.IGNORECASE)) and _holds(path, LABEL_SUFFIXES):
            form = rf"{re.escape(name[1])}([_-](?:{IMAGE_FOLDERS}))?"
            for image in (each.name for each in _folders(root) if re.fullmatch(form, each.name, re.IGNORECASE)):
                add(split_of(name[1]), image, path.name)
    return found


def what_to_do(root: Path) -> str:
    """The advice for a folder of a user's own data that has no list of ids."""
    for path in _folders(root):
        with suppress(DatasetError):
            if (path / "ImageSets").is_dir() or find_folders(path):
                return f"{path} looks like the data set: pass --data-dir {quote(str(path))}"
    holds = []
    for path in _folders(root)[:6]:
        names = next((names for _, _, names in os.walk(path) if names), [])
        kinds = sorted({os.path.splitext(name)[1].lower() for name in names} - {""})[:3]
        holds.append(f"{path.name}/" + (f" with {', '.join(kinds)} files" if kinds else ""))
    return (
        f"for data of your own, here {', '.join(holds) or 'without folders'}, `python {TO_INDICES} {quote(str(root))} NEW` "
        f"makes a data set of images and PNG masks; or pass, for example, `--image-dir images --label-dir masks --data-list "
        f"{quote(str(root / 'images'))}`"
    )


def _pair(folder: Path) -> Folders | None:
    """The folders of images and masks in ``folder``; None if one of them is missing."""
    found = [
        [path.name for path in _folders(folder) if re.fullmatch(names, path.name, re.IGNORECASE) and _holds(path, suffixes)]
        for names, suffixes in ((IMAGE_FOLDERS, IMAGE_SUFFIXES), (MASK_FOLDERS, LABEL_SUFFIXES))
    ]
    if not all(found):
        return None
    if max(map(len, found)) > 1:
        several = " and ".join(f"{name}/" for names in found if len(names) > 1 for name in names)
        images, masks = (names[0] for names in found)
        raise DatasetError(
            f"{folder} holds {several}, which is ambiguous; pass for example `--image-dir {images} "
            f"--label-dir {masks} --data-list {quote(str(folder / images))}`"
        )
    return Folders(found[0][0], found[1][0])


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(suffixes) for _, _, names in os.walk(folder) for name in names)
