"""Evaluation and validation: the prediction loop over labelled images, and its confusion matrices."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset import VOCSegmentation
from utils import distributed
from utils.evaluation.crf_pool import CRFPool
from utils.evaluation.images import Sample, Samples, reading
from utils.evaluation.predict import predictions
from utils.metrics import ConfusionMatrix


def score(
    net: Callable[[Tensor], Tensor],
    data: VOCSegmentation,
    device: torch.device,
    *,
    num_workers: int = 0,
    pool: CRFPool | None = None,
    finish: Callable[[Sample, np.ndarray], None] = lambda sample, mask: None,
    **options: Any,
) -> dict[str, ConfusionMatrix]:
    """Predict this process's share of a data set and count the pixels; the caller sums the counts over the processes.

    Args:
        net: on ``device``, in eval mode.
        num_workers: the number of processes that read images.
        pool: refines the predictions with the CRF; they are counted before and after.
        finish: called with each image and its (H, W) uint8 classes, after the CRF if there is a pool.
        options: the other options of :func:`utils.evaluation.predict.predictions`.

    Returns:
        ``{"": matrix}``, or with a pool ``{"before CRF": matrix, "after CRF": matrix}``.

    Raises:
        UserError: an image does not fit ``canvas``; the net's logits are not finite (:class:`NotFinite`).
    """
    before, after = (ConfusionMatrix(data.num_classes, where, data.ignore_label) for where in (device, "cpu"))
    with reading(Samples(data), share(len(data)), num_workers, device) as samples:
        for sample in predictions(net, samples, device, pool=pool, **options):
            label = torch.from_numpy(sample.label)
            before.update(label.to(device, non_blocking=True), sample.classes)
            if pool:
                after.update(label, torch.from_numpy(sample.mask))
            finish(sample, sample.mask)
    return {"before CRF": before, "after CRF": after} if pool else {"": before}


def share(count: int) -> range:
    """The indices of those of ``count`` images that this process predicts."""
    return range(distributed.rank(), count, distributed.world_size())
