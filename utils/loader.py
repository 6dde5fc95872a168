"""From the command line's data options to a data set and its loader."""

import signal
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader

from dataset import VOCSegmentation, read_ids
from utils.command import UserError
from utils.options import DATA_DIR

TRAIN_LISTS = ("ImageSets/SegmentationAug/train_aug.txt", "ImageSets/Segmentation/train.txt")
VAL_LISTS = ("ImageSets/SegmentationAug/val.txt", "ImageSets/Segmentation/val.txt")


def find_list(data_dir: str | Path, data_list: str | None, candidates: Iterable[str]) -> Path:
    """The file of image ids: ``data_list`` as given, else the first of ``candidates`` that ``data_dir`` has.

    Raises:
        UserError: no such folder or file.
    """
    root = Path(data_dir)
    if not root.is_dir():
        advice = "get PASCAL VOC with `python scripts/download.py voc2012 sbd` and `python scripts/prepare_voc.py`"
        raise UserError(f"the data set folder {root} does not exist; {advice}, or pass --data-dir")
    if data_list:
        return Path(data_list)
    paths = [root / name for name in candidates]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        advice = "run `python scripts/prepare_voc.py`" if str(data_dir) == DATA_DIR else "write one"
        raise UserError(f"no list of image ids: neither {' nor '.join(map(str, paths))} exists; {advice}, or pass --data-list")
    return found


def open_dataset(args: Namespace, candidates: Iterable[str], num_classes: int, transform=None) -> tuple[VOCSegmentation, Path]:
    """The data set of ``--data-dir`` and ``--data-list``, and the list that was used."""
    data_list = find_list(args.data_dir, args.data_list, candidates)
    ids = read_ids(data_list)
    data = VOCSegmentation(args.data_dir, ids, args.image_dir, args.label_dir, num_classes, args.ignore_label, transform)
    return data, data_list


def make_loader(data, batch_sampler: Iterable, num_workers: int, device: torch.device, collate_fn=None) -> DataLoader:
    """A loader whose workers use one thread each and leave Ctrl-C to the main process."""
    return DataLoader(
        data,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
