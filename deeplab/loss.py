"""The training losses: the only place that decides how labels and logits are brought to one size.

As published, labels are shrunk to the logits. ``size="input"`` enlarges the logits to the labels instead.

Each picture's loss is the mean over its own labelled pixels, and a batch's loss is the mean over its pictures. That is what the
published Caffe net computes (batch 1, ten accumulated iterations a step), and it makes ten accumulated batches of one picture,
one batch of ten, and a batch split over several processes the same step; a mean over the pixels of a batch would not.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab.multiscale import TRAIN_SCALES, fuse_max, multiscale_logits

LOSS_SIZES = ("output", "input")
IGNORE_LABEL = 255


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour sampling of labels on a grid whose corner pixels are those of the input (``align_corners``).

    Row i of the result is row ``i * (H - 1) / (h - 1)``, rounded with halves up, and a single row is row 0; so 321 -> 41 is
    exactly every 8th pixel.

    Args:
        labels: (N, H, W), any integer type.
        size: (h, w).

    Returns:
        (N, h, w) of the same type.
    """
    rows, columns = (  # floor(i * (side - 1) / last + 1 / 2) in whole numbers
        (torch.arange(n, device=labels.device) * (2 * (side - 1)) + last) // (2 * last)
        for n, side, last in ((n, side, max(n - 1, 1)) for n, side in zip(size, labels.shape[-2:]))
    )
    return labels[..., rows[:, None], columns]


def cross_entropy(logits: Tensor, labels: Tensor, size: str = "output") -> Tensor:
    """Mean over pictures of the mean cross entropy over each picture's labelled pixels, in float32.

    A picture without a labelled pixel counts 0, with a gradient of 0.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) int64; pixels of 255 have no part in the loss.
        size: ``"output"`` shrinks the labels to (h, w), ``"input"`` enlarges the logits to (H, W).

    Returns:
        A scalar.
    """
    logits = logits.float()  # also under mixed precision
    if size == "output":
        labels = resize_labels(labels, logits.shape[-2:])
    elif size == "input":
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)
    else:
        raise ValueError(f"the loss size {size!r} is unknown; choose one of {', '.join(LOSS_SIZES)}")
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="none")  # N h w, 0 where ignored
    counts = (labels != IGNORE_LABEL).sum(dim=(1, 2)).clamp(min=1)
    return (losses.sum(dim=(1, 2)) / counts).mean()


def single_scale_loss(
    net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, size: str = "output"
) -> dict[str, Tensor]:
    """The loss of ``train.py``.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w) logits.
        images: (N, 3, H, W) mean-subtracted BGR.
        labels: (N, H, W) int64, 255 void.
        size: see :func:`cross_entropy`.

    Returns:
        ``{"loss": scalar}``.
    """
    return {"loss": cross_entropy(net(images), labels, size)}


def multi_scale_loss(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    size: str = "output",
    scales: Sequence[float] = TRAIN_SCALES,
    one_scale_at_a_time: bool = False,
) -> dict[str, Tensor]:
    """The loss of ``train_msc.py``: that of each scale's logits and that of their pixel-wise maximum, summed.

    Arguments as in :func:`single_scale_loss` and :func:`deeplab.multiscale.multiscale_logits`; the maximum is taken at the size
    of the first of ``scales``.

    Returns:
        ``{"loss": their sum, "loss_max": ..., "loss_1x": ..., "loss_0.75x": ..., "loss_0.5x": ...}``, scalars.
    """
    logits = multiscale_logits(net, images, scales, one_scale_at_a_time)
    parts = {"loss_max": cross_entropy(fuse_max(logits), labels, size)}
    for scale, scale_logits in zip(scales, logits):
        parts[f"loss_{scale:g}x"] = cross_entropy(scale_logits, labels, size)
    return {"loss": reduce(torch.add, parts.values()), **parts}
