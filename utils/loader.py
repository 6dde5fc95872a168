"""From the command line's data options to a data set and its loader."""

import signal
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader

from dataset import VOCSegmentation, find_list, read_list


def open_dataset(args: Namespace, candidates: Iterable[str], num_classes: int, transform=None) -> tuple[VOCSegmentation, Path]:
    """The data set of ``--data-dir`` and ``--data-list``, and the list that was used."""
    data_list = find_list(args.data_dir, args.data_list, candidates)
    entries = read_list(data_list, args.image_dir)
    data = VOCSegmentation(args.data_dir, entries, args.image_dir, args.label_dir, num_classes, args.ignore_label, transform)
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
