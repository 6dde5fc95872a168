"""The data set for the data options of the command line."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset import DATASETS, IGNORE_LABEL, VOCSegmentation, find_list
from dataset.classes import ClassFile
from dataset.folders import choose_folders
from utils.options import AnyOptions, Options


def list_of(args: AnyOptions, split: str, num_classes: int | None = None) -> Path:
    """The list of ``--data-list``, else the one of ``"train"``, ``"val"`` or ``"test"``; see :func:`dataset.find_list`."""
    kind, args = DATASETS[args.dataset], with_folders(args, split)
    source = other_dataset(args, num_classes) or kind.SOURCE
    return find_list(args.data_dir, args.data_list, kind.lists(split, args.image_dir), source)


def with_folders(args: AnyOptions, split: str) -> Options:
    """The options, completed with the folders and list of ``images/`` beside ``masks/`` if nothing names others.

    Raises:
        DatasetError: the folders are ambiguous, or there is no such split.
    """
    kind, root = DATASETS[args.dataset], Path(args.data_dir)
    own = (root / kind.IMAGE_DIR).is_dir() and any((root / name).is_dir() for name in kind.LABEL_DIRS)
    if kind.NAMES or own or args.label_dir or args.image_dir != kind.IMAGE_DIR or not root.is_dir():
        return Options(vars(args))
    lists = kind.lists(split, args.image_dir)
    data_list = find_list(root, args.data_list, lists) if args.data_list else None
    if not (found := choose_folders(root, split, data_list, lists)):
        return Options(vars(args))
    (image_dir, label_dir), path = found
    return Options({**vars(args), "image_dir": image_dir, "label_dir": label_dir, "data_list": path and str(path)})


def other_dataset(args: AnyOptions, num_classes: int | None) -> str:
    """The advice if VOC's layout is expected, but the number of classes, 19 or 182, is that of another data set; else ""."""
    kinds = {} if DATASETS[args.dataset].NAMES else DATASETS
    found = (
        f"for the {num_classes} classes of {kind.TITLE} pass --dataset {name}"
        for name, kind in kinds.items()
        if len(kind.NAMES) == num_classes
    )
    return next(found, "")


def open_dataset(
    args: AnyOptions,
    split: str,
    num_classes: int,
    transform: Callable | None = None,
    classes: ClassFile | None = None,
) -> tuple[VOCSegmentation, Path]:
    """The data set of ``--data-dir`` and ``--data-list``, with no file missing, and the list that was used.

    Args:
        split: ``"train"`` or ``"val"``; its list is used without ``--data-list``.
        classes: the contents of ``classes.txt`` if already read; None reads it.

    Raises:
        DatasetError: the folder, the list or files are missing, or ``classes.txt`` does not fit.
    """
    args = with_folders(args, split)
    data_list = list_of(args, split, num_classes)
    entries = DATASETS[args.dataset].read_list(data_list, args.image_dir)
    ignore_label = IGNORE_LABEL if args.ignore_label is None else args.ignore_label
    options = (args.image_dir, args.label_dir, num_classes, ignore_label, transform)
    words = ["python", "scripts/check_dataset.py", "--data-dir", args.data_dir, "--data-list", data_list]
    words += ["--num-classes", num_classes, *(["--ignore-label", ignore_label] if ignore_label != IGNORE_LABEL else [])]
    advice = f"to find all such files, run {shlex.join(map(str, [*words, *layout_words(args)]))}"
    data = DATASETS[args.dataset](args.data_dir, entries, *options, advice, classes)
    data.check_files()
    return data, data_list


def images_of(data: VOCSegmentation, data_list: Path) -> str:
    """A line about a data set: the number of images, the list, and the folders of its masks if unusual."""
    others = [str(path) for path in getattr(data, "label_dirs", ()) if path.name not in data.LABEL_DIRS]  # none for arrays
    masks = f", masks in {' and '.join(others)}" if others else ""
    return f"{len(data)} images of {data_list}{masks}"


def what_is_compared(data: VOCSegmentation) -> dict[str, Any]:
    """The classes and files of a data set, for :func:`utils.distributed.check_same`."""
    files = [f"{data.entries[id].image} {data.entries[id].label}" for id in data.ids]
    return {"classes": list(data.names or ()), "colours": dict(data.colors), "images": files}


def layout_words(args: AnyOptions) -> list[str]:
    """The options with which another command reads the same data in ``--data-dir``."""
    words = ["--dataset", args.dataset] if args.dataset != "voc" else []
    words += ["--image-dir", args.image_dir] if args.image_dir != DATASETS[args.dataset].IMAGE_DIR else []
    return words + (["--label-dir", args.label_dir] if args.label_dir else [])
