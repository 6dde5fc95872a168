"""From the command line's data options to a data set, its loader, and the life of that loader's workers."""

import multiprocessing
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset import DATASETS, IGNORE_LABEL, VOCSegmentation, find_list
from dataset.classes import ClassFile
from utils.command import UserError
from utils.options import AnyOptions
from utils.processes import start_helper

SHARED_MEMORY = Path("/dev/shm")
MORE_SHARED_MEMORY = "give it more with `docker run --shm-size=1g` or `--ipc=host`"


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
    advice = _check_command(args, data_list, num_classes, ignore_label)
    data = DATASETS[args.dataset](args.data_dir, entries, *options, advice, classes)
    data.check_files()
    return data, data_list


def what_is_compared(data: VOCSegmentation) -> dict[str, Any]:
    """The classes and the files of a data set, for :func:`utils.distributed.check_same`."""
    files = [f"{data.entries[id].image} {data.entries[id].label}" for id in data.ids]
    return {"classes": list(data.names or ()), "colours": dict(data.colors), "pictures": files}


def crop_warning(data: VOCSegmentation, crop: tuple[int, int]) -> str:
    """The sentence where crops (height, width) are more padding than image, told by the sizes of some images; else ""."""
    filled = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large ones
        for image_id in data.ids[:: max(1, len(data) // 20)]:
            with suppress(Exception), Image.open(data.image_path(image_id)) as image:  # a broken one is told when it is read
                filled.append(min(image.height, crop[0]) * min(image.width, crop[1]) / (crop[0] * crop[1]))
    if not filled or (share := sum(filled) / len(filled)) > 0.5:
        return ""
    return (
        f"warning: {1 - share:.0%} of the crops of {crop[0]}x{crop[1]} will be padding, for the pictures are smaller; "
        "lower --input-size"
    )


def _check_command(args: AnyOptions, data_list: Path, num_classes: int, ignore_label: int) -> str:
    """The command that finds all that is wrong with a data set."""
    words = ["python", "scripts/check_dataset.py", "--data-dir", args.data_dir, "--data-list", data_list]
    words += ["--num-classes", num_classes]
    words += ["--ignore-label", ignore_label] if ignore_label != IGNORE_LABEL else []
    return f"to find all such files, run {shlex.join(map(str, words + layout_words(args)))}"


def layout_words(args: AnyOptions) -> list[str]:
    """The options by which another command reads the same data in ``--data-dir``."""
    words = ["--dataset", args.dataset] if args.dataset != "voc" else []
    words += ["--image-dir", args.image_dir] if args.image_dir != DATASETS[args.dataset].IMAGE_DIR else []
    return words + (["--label-dir", args.label_dir] if args.label_dir else [])


def make_loader(
    data: Any, batch_sampler: Iterable, num_workers: int, device: torch.device, collate_fn: Callable | None = None
) -> DataLoader:
    """A loader of a map-style data set; its workers use one thread each and leave signals to the main process, see
    :func:`running`."""
    return DataLoader(
        data,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )


@contextmanager
def running(loader: DataLoader) -> Iterator[Iterator]:
    """The batches of ``loader``, as a context whose end, by whatever way, is also the end of its workers.

    The workers ignore SIGTERM, so that a signal to the whole process group does not take them from a main process that still
    wants to finish its step and save. torch and multiprocessing end workers by SIGTERM; those that are stuck are killed here.

    Raises:
        UserError: the workers ran out of shared memory, or one was killed.
    """
    before = multiprocessing.active_children()
    try:
        batches = iter(loader)
    except BaseException as error:
        _kill([process for process in multiprocessing.active_children() if process not in before])
        if not isinstance(error, OSError):
            raise
        # The semaphores of the workers' queues lie in shared memory, too.
        text = f"no workers can be started ({error.strerror or error}): {MORE_SHARED_MEMORY}, or add --num-workers 0"
        raise UserError(text) from None
    workers = [process for process in multiprocessing.active_children() if process not in before]
    try:
        yield batches
    except RuntimeError as error:
        raise _users_error(error) or error from None
    finally:
        try:
            # Private: what torch does once the iterator is garbage, which it is not while a traceback refers to it. It ends the
            # thread that pins memory before the workers that this reads from, and then waits 5 to 10 seconds for each worker.
            with suppress(RuntimeError):  # a worker was killed meanwhile
                if workers:
                    batches._shutdown_workers()  # type: ignore[attr-defined]
        finally:
            _kill(workers)


def fitting_workers(num_workers: int, batch_bytes: int) -> tuple[int, str]:
    """How many workers have room for their batches in /dev/shm, where they hand them over, at most ``num_workers``.

    A worker has two batches under way, and two more are in use. Docker gives a container 64 MB.

    Args:
        num_workers: as asked for.
        batch_bytes: of one batch of this process.

    Returns:
        The number, and a sentence where it is lower than asked for, else "".
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return num_workers, ""
    free = shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    fitting = max(0, min(num_workers, (free // batch_bytes - 2) // 2))
    if fitting == num_workers:
        return num_workers, ""
    return fitting, (
        f"--num-workers {num_workers} -> {fitting}: {SHARED_MEMORY} has {free / 1e6:.0f} MB free and a batch takes "
        f"{batch_bytes / 1e6:.1f} MB; in a container, {MORE_SHARED_MEMORY}"
    )


def _users_error(error: RuntimeError) -> UserError | None:
    """What a RuntimeError out of a loader means to the user; None where it is something else."""
    text = str(error)
    if not any(sign in text for sign in ("DataLoader worker", "shared memory object", "shared memory file", "/torch_", "shm")):
        return None  # a GPU has "shared memory", too
    if "Bus error" in text or "DataLoader worker" not in text:
        return UserError(
            f"the workers ran out of shared memory ({SHARED_MEMORY}): {MORE_SHARED_MEMORY}, or add --num-workers 0"
        )
    if "killed by signal" in text or "exited unexpectedly" in text:
        return UserError(
            "a worker process that reads pictures was killed: memory ran out, or a file crashes its decoder; lower "
            "--num-workers, or find the file with scripts/check_dataset.py"
        )
    return None


def _kill(workers: list) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _start_worker(_: int) -> None:
    start_helper()
    cv2.setNumThreads(0)
