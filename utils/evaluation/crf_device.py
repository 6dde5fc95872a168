"""The dense CRF on the net's device: no helper processes, and the logits are not copied to the host."""

import importlib.util
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, groupby, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deeplab.crf import dense_crf
from deeplab.inference import OUTPUT_STRIDE, enlarge
from utils import distributed
from utils.command import UserError, put
from utils.device import to_host
from utils.evaluation.crf_pool import CRFPool, logits_stride
from utils.evaluation.images import AnyImage

MOST = 1e-3  # the largest allowed difference from pydensecrf's probabilities; rounding alone causes 1e-4


class DeviceCRF:
    """Refines predictions by torch operations on the net's device, with the interface of :class:`CRFPool`.

    Args:
        batch_size: the number of images of one size refined at once; each needs about 0.4 GB for PASCAL VOC.
        prune, stride: see :func:`utils.evaluation.crf_pool.refine`.
        check: compute the first image with pydensecrf as well; if the two differ, print a warning and let pydensecrf
            compute all images, in ``workers`` processes.
    """

    on_host = False

    def __init__(
        self, batch_size: int = 1, prune: float = 0.0, stride: int = OUTPUT_STRIDE, check: bool = False, workers: int = 1
    ) -> None:
        self.batch_size, self.prune, self.stride, self.check, self.workers = batch_size, prune, stride, check, workers

    def refine(self, items: Iterable[tuple[AnyImage, Tensor]]) -> Iterator[tuple[AnyImage, np.ndarray]]:
        """(image, (C, k_h + 1, k_w + 1) logits on the device) -> (image, (H, W) uint8 classes on the host), in order.

        Raises:
            UserError: the images do not fit into the device's memory.
        """
        if self.check:
            first = list(islice(items := iter(items), 1))
            items = chain(first, items)
            if first and (difference := self.difference(*first[0])) > MOST:
                text = (
                    f"warning: the CRF on this device differs from pydensecrf's by {difference:.2g} in image {first[0][0].id}"
                )
                put(sys.stderr, f"{text}; pydensecrf computes it, in {self.workers} processes")
                with CRFPool(self.workers, self.prune, self.stride) as pool:
                    yield from pool.refine((item, logits.cpu()) for item, logits in items)
                return
        ahead: deque[tuple[list[tuple[AnyImage, Tensor]], Callable[[], Tensor]]] = deque()  # on their way to the host
        for _, same in groupby(items, key=lambda pair: pair[0].image.shape):
            while batch := list(islice(same, self.batch_size)):
                ahead.append((batch, to_host(self.classes(batch))))
                if len(ahead) > 1:
                    yield from _arrived(*ahead.popleft())
        for entry in ahead:
            yield from _arrived(*entry)

    def classes(self, batch: list[tuple[AnyImage, Tensor]]) -> Tensor:
        """The class of each pixel of images of one size, (N, H, W) uint8 on the device."""
        images, probabilities = self._inputs(batch)
        try:
            refined = dense_crf(images, probabilities, prune=self.prune, backend="torch")
        except torch.cuda.OutOfMemoryError:
            count, classes, height, width = probabilities.shape
            raise UserError(
                f"the CRF of {count} images of {width}x{height} pixels and {classes} classes does not fit into the memory of "
                f"{images.device}; lower --batch-size, or use --crf-backend pydensecrf"
            ) from None
        return refined.argmax(dim=1).byte()

    def difference(self, item: AnyImage, logits: Tensor) -> float:
        """The largest difference between the probabilities of torch and of pydensecrf for one image."""
        images, probabilities = self._inputs([(item, logits)])
        refined = dense_crf(images, probabilities, prune=self.prune, backend="torch")
        return float((refined - dense_crf(images, probabilities, prune=self.prune)).abs().max())

    def _inputs(self, batch: list[tuple[AnyImage, Tensor]]) -> tuple[Tensor, Tensor]:
        """(N, H, W, 3) uint8 RGB and (N, C, H, W) probabilities, on the device."""
        images = np.stack([item.image[:, :, ::-1] for item, _ in batch])
        logits = torch.stack([logits for _, logits in batch])
        probabilities = enlarge(logits, images.shape[1:3], self.stride).softmax(dim=1)
        return torch.from_numpy(images).to(logits.device, non_blocking=True), probabilities


def _arrived(batch: list[tuple[AnyImage, Tensor]], classes: Callable[[], Tensor]) -> Iterator[tuple[AnyImage, np.ndarray]]:
    return zip((item for item, _ in batch), classes().numpy())


CRF: TypeAlias = CRFPool | DeviceCRF


def open_crf(args: Namespace, stack: ExitStack) -> CRF | None:
    """Open the CRF of ``--crf``, then join the other processes. Forked first, the processes of a pool are small copies.

    Args:
        stack: closes the pool.
    """
    stride = logits_stride(args.window)
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())

    def make() -> CRF | None:
        if not args.crf:
            return None
        auto, installed = args.crf_backend == "auto", importlib.util.find_spec("pydensecrf") is not None
        if auto and not installed and distributed.rank() == 0:
            put(sys.stderr, "pydensecrf is not installed, so torch computes the CRF")
        if args.crf_backend == "torch" or (auto and (on_gpu or not installed)):
            return DeviceCRF(args.batch_size, args.crf_prune, stride, auto and installed, args.crf_workers)
        return stack.enter_context(CRFPool(args.crf_workers, args.crf_prune, stride))

    crf: Any = distributed.start(make)  # of one type or the other
    return crf
