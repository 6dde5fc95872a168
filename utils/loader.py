"""The data loader, and the start and end of its workers."""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from utils.command import UserError
from utils.processes import start_helper

SHARED_MEMORY = Path("/dev/shm")
MORE_SHARED_MEMORY = "give it more with `docker run --shm-size=1g` or `--ipc=host`"


def make_loader(
    data: Any, batch_sampler: Iterable, num_workers: int, device: torch.device, collate_fn: Callable | None = None
) -> DataLoader:
    """A loader of a map-style data set, to be used in :func:`running`. Each worker uses one thread and ignores stop signals."""
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
    """A context over the batches of ``loader``. Its workers end with the context, also after an exception.

    The workers ignore SIGTERM, so that a signal to the whole process group does not end them while the main process still
    finishes its step and saves. torch and multiprocessing end workers by SIGTERM; stuck workers are killed here.

    Raises:
        UserError: the data set cannot be pickled, the workers ran out of shared memory, or one was killed.
    """
    before = multiprocessing.active_children()
    try:
        batches = iter(loader)
    except BaseException as error:
        _kill([process for process in multiprocessing.active_children() if process not in before])
        if "pickle" in str(error) or "local object" in str(error):
            advice = "define its class at the top of a module, keep no open files in it, or add --num-workers 0"
            raise UserError(f"the data set cannot be sent to workers ({error}): {advice}") from None
        if not isinstance(error, OSError):
            raise
        # The semaphores of the workers' queues are in shared memory, too.
        text = f"no workers can be started ({error.strerror or error}): {MORE_SHARED_MEMORY}, or add --num-workers 0"
        raise UserError(text) from None
    workers = [process for process in multiprocessing.active_children() if process not in before]
    try:
        yield batches
    except RuntimeError as error:
        raise _users_error(error) or error from None
    finally:
        try:
            # Private. torch calls it when the iterator is collected, but a traceback may still refer to it. It ends the thread
            # that pins memory, then the workers that feed it, and waits 5 to 10 seconds for each worker.
            with suppress(RuntimeError):  # a worker was killed in the meantime
                if workers:
                    batches._shutdown_workers()  # type: ignore[attr-defined]
        finally:
            _kill(workers)


def fitting_workers(num_workers: int, batch_bytes: int) -> tuple[int, str]:
    """The number of workers whose batches fit in /dev/shm, through which they are passed; at most ``num_workers``.

    Each worker prepares two batches, and two more are in use. Docker gives a container 64 MB.

    Args:
        num_workers: the requested number.
        batch_bytes: the size of one batch of this process.

    Returns:
        The number, and a sentence if it is lower than requested, else "".
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return num_workers, ""
    free = shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    fitting = max(0, min(num_workers, (free // batch_bytes - 2) // 2))
    if fitting == num_workers:
        return num_workers, ""
    return fitting, (
        f"--num-workers {num_workers} -> {fitting}: {SHARED_MEMORY} has {free / 1e6:.0f} MB free and a batch needs "
        f"{batch_bytes / 1e6:.1f} MB; in a container, {MORE_SHARED_MEMORY}"
    )


def _users_error(error: RuntimeError) -> UserError | None:
    """The user's error behind a RuntimeError of a loader; None if there is none."""
    text = str(error)
    if not any(sign in text for sign in ("DataLoader worker", "shared memory object", "shared memory file", "/torch_", "shm")):
        return None  # "shared memory" alone may be that of a GPU
    if "Bus error" in text or "DataLoader worker" not in text:
        return UserError(
            f"the workers ran out of shared memory ({SHARED_MEMORY}): {MORE_SHARED_MEMORY}, or add --num-workers 0"
        )
    if "killed by signal" in text or "exited unexpectedly" in text:
        return UserError(
            "a worker process that reads images was killed: memory ran out, or a file crashes its decoder; lower "
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
