"""The dense CRF on a net's logits, in helper processes that work while the net continues."""

import ctypes
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from deeplab.crf import dense_crf, find_densecrf
from deeplab.inference import OUTPUT_STRIDE, enlarge_rows
from utils.command import UserError
from utils.evaluation.images import AnyImage, NamedImage
from utils.processes import start_helper


def refine(image: np.ndarray, logits: Tensor, prune: float = 0.0, stride: int = OUTPUT_STRIDE) -> np.ndarray:
    """The class of each pixel after the dense CRF with its published settings.

    Args:
        image: (H, W, 3) uint8 BGR.
        logits: (C, k_h + 1, k_w + 1) float32 on the CPU, on the stride-8 grid.
        prune: see :func:`deeplab.dense_crf`.
        stride: the stride of the logits, see :func:`deeplab.inference.enlarge`.

    Returns:
        (H, W) uint8.
    """
    size = image.shape[:2]
    probabilities = np.empty((len(logits), *size), dtype=np.float32)
    for rows, block in enlarge_rows(logits[None], size, stride=stride):
        probabilities[:, rows] = block[0].softmax(dim=0).numpy()
    refined = dense_crf(np.ascontiguousarray(image[:, :, ::-1]), probabilities, prune=prune)
    return refined.argmax(axis=0).astype(np.uint8)


class CRFPool:
    """Processes that refine predictions: pydensecrf holds the GIL, so threads of one process could not run in parallel.

    Each process has a thread here that sends it an image and its logits and waits for the classes. They go through a pipe,
    because containers have little shared memory; the logits are sent on their small grid. Use the pool as a context manager;
    its exit kills the processes at once.

    Args:
        workers: the number of processes; each needs about 0.5 GB for PASCAL VOC.
        prune, stride: see :func:`refine`.

    Raises:
        CRFUnavailable: pydensecrf is not installed.
    """

    on_host = True

    def __init__(self, workers: int, prune: float = 0.0, stride: int = OUTPUT_STRIDE) -> None:
        find_densecrf()
        self.capacity = workers + 2  # images in flight
        self.idle: SimpleQueue[Connection] = SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)
        self.processes: list[multiprocessing.Process] = []
        try:
            for _ in range(workers):
                self._start_process(prune, stride)
        except BaseException:  # also a stop request: Python's exit would wait for the processes already started
            self.close()
            raise

    def _start_process(self, prune: float, stride: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_serve, args=(theirs, prune, stride), daemon=True)
        process.start()
        theirs.close()  # so that a read from ours fails once the process is gone
        self.processes.append(process)
        self.idle.put(ours)

    def __enter__(self) -> "CRFPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()  # it ignores the signal of terminate()
        for process in self.processes:
            process.join()

    def refine(self, items: Iterable[tuple[AnyImage, Tensor]]) -> Iterator[tuple[AnyImage, np.ndarray]]:
        """(image, (C, k_h + 1, k_w + 1) logits) -> (image, (H, W) uint8 classes), in order; see :func:`refine`.

        Raises:
            UserError: a process was killed.
        """
        running: deque[tuple[AnyImage, Future[np.ndarray]]] = deque()
        for item, logits in items:
            running.append((item, self.threads.submit(self._refine, item, logits.numpy())))
            while running and (len(running) > self.capacity or running[0][1].done()):
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()

    def _refine(self, item: NamedImage, logits: np.ndarray) -> np.ndarray:
        connection = self.idle.get()
        try:
            connection.send((item.image, logits))
            return connection.recv()
        except (EOFError, OSError):
            advice = "if memory ran out, lower --crf-workers"
            raise UserError(f"a process of the CRF was killed at image {item.id}; {advice}") from None
        finally:
            self.idle.put(connection)


def logits_stride(window: tuple[int, int] | None) -> int:
    """The stride of a prediction's logits in pixels: 8, or 1 with a sliding window, which sums its tiles at full size."""
    return 1 if window else OUTPUT_STRIDE


def _serve(connection: Connection, prune: float, stride: int) -> None:
    """The loop of a pool process. It imports torch anyway (through ``deeplab.crf``), so it also enlarges the logits."""
    start_helper()
    torch.set_num_threads(1)
    _keep_memory()
    while True:
        try:
            image, logits = connection.recv()
            connection.send(refine(image, torch.from_numpy(logits), prune, stride))
        except (EOFError, OSError, MemoryError):  # the main process is gone, or notices that this one exits
            return


def _keep_memory() -> None:
    """Make glibc keep the large blocks that the CRF allocates again for each image.

    Otherwise they return to the system each time and are mapped and zeroed again, which takes a sixth of the time
    (mallopt(3): M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)
