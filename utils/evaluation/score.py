"""The one prediction loop."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset import VOCSegmentation
from utils import distributed
from utils.evaluation.crf_pool import CRFPool
from utils.evaluation.images import Sample, Samples, only_one
from utils.evaluation.predict import checked, predict, to_host
from utils.loader import make_loader, running
from utils.metrics import ConfusionMatrix


def score(
    net: Callable[[Tensor], Tensor],
    data: VOCSegmentation,
    device: torch.device,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    pool: CRFPool | None = None,
    finish: Callable[[Sample, np.ndarray], None] = lambda sample, prediction: None,
    add_up: bool = True,
    **options: Any,
) -> dict[str, ConfusionMatrix]:
    """Predict a data set and count; under torchrun each process takes its share of the pictures.

    Args:
        net: on ``device``, in eval mode.
        batch_size: pictures of one padded size at once.
        num_workers: processes that read pictures.
        pool: refines the predictions; they are counted before and after.
        finish: called with each picture and its (H, W) uint8 classes, refined where there is a pool.
        add_up: return the counts of all processes, and hear of what goes wrong in one of them; else those of this one's
            share, for a caller that brings the processes together itself.
        options: the others of :func:`utils.evaluation.predict.predict`.

    Returns:
        ``{"": matrix}``, or with a pool ``{"before CRF": matrix, "after CRF": matrix}``.

    Raises:
        UserError: a picture does not fit ``canvas``; the net's logits are not finite (:class:`NotFinite`).
    """
    before, after = (ConfusionMatrix(data.num_classes, where, data.ignore_label) for where in (device, "cpu"))
    loader = make_loader(Samples(data), [[index] for index in share(data)], num_workers, device, collate_fn=only_one)

    def predictions(samples: Iterator[Sample]) -> Iterator[tuple[Sample, Tensor]]:
        """Each picture, predicted and counted, with its (C, h, w) logits on the host for a pool, else none.

        The device is a batch ahead: it computes the next one while this one is copied, saved or refined.
        """
        under_way: deque[tuple[Sample, Callable[[], Tensor], Callable[[], Tensor]]] = deque()
        for sample, logits, classes in predict(net, samples, device, batch_size=batch_size, **options):
            before.update(torch.from_numpy(sample.label).to(device, non_blocking=True), classes)
            under_way.append((sample, to_host(logits) if pool else Tensor, to_host(classes)))
            if len(under_way) > batch_size:
                yield arrived(*under_way.popleft())
        yield from (arrived(*entry) for entry in under_way)

    def predict_share() -> None:
        with torch.inference_mode(), running(loader) as samples:
            if pool is None:
                for sample, _ in predictions(samples):
                    finish(sample, sample.prediction)
            else:
                for sample, refined in pool.refine(predictions(samples)):
                    after.update(torch.from_numpy(sample.label), torch.from_numpy(refined))
                    finish(sample, refined)

    distributed.everywhere(predict_share) if add_up else predict_share()
    matrices = {"before CRF": before, "after CRF": after} if pool else {"": before}
    for matrix in matrices.values() if add_up else ():
        distributed.sum_(matrix.counts)
    return matrices


def arrived(sample: Sample, logits: Callable[[], Tensor], classes: Callable[[], Tensor]) -> tuple[Sample, Tensor]:
    """A picture whose results are on their way (:func:`utils.evaluation.predict.to_host`), with them."""
    sample.prediction = checked(sample.id, classes())
    return sample, logits()


def share(data: VOCSegmentation) -> range:
    """The indices of the pictures that this process predicts."""
    return range(distributed.rank(), len(data), distributed.world_size())
