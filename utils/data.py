"""From the command line's data options to a data set."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset import DATASETS, IGNORE_LABEL, VOCSegmentation, find_list
from dataset.classes import ClassFile
from utils.options import AnyOptions


def list_of(args: AnyOptions, split: str, num_classes: int | None = None) -> Path:
    """The list of ``--data-list``, else the one of ``"train"``, ``"val"`` or ``"test"``; see :func:`dataset.find_list`."""
    kind = DATASETS[args.dataset]
    source = other_dataset(args, num_classes) or kind.SOURCE
    return find_list(args.data_dir, args.data_list, kind.lists(split, args.image_dir), source)


def other_dataset(args: AnyOptions, num_classes: int | None) -> str:
    """The advice where VOC's layout is to be read, but the 19 or 182 classes are those of another data set, else ""."""
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
    """The data set of ``--data-dir`` and ``--data-list``, all of whose files are there, and the list that was used.

    Args:
        split: ``"train"`` or ``"val"``, whose list is used where ``--data-list`` names none.
        classes: ``classes.txt`` where it was read before; None reads it.

    Raises:
        DatasetError: no such folder or list, files are missing, ``classes.txt`` does not fit.
    """
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


def what_is_compared(data: VOCSegmentation) -> dict[str, Any]:
    """The classes and the files of a data set, for :func:`utils.distributed.check_same`."""
    files = [f"{data.entries[id].image} {data.entries[id].label}" for id in data.ids]
    return {"classes": list(data.names or ()), "colours": dict(data.colors), "pictures": files}


def layout_words(args: AnyOptions) -> list[str]:
    """The options by which another command reads the same data in ``--data-dir``."""
    words = ["--dataset", args.dataset] if args.dataset != "voc" else []
    words += ["--image-dir", args.image_dir] if args.image_dir != DATASETS[args.dataset].IMAGE_DIR else []
    return words + (["--label-dir", args.label_dir] if args.label_dir else [])
