"""The training losses: the only place that decides how labels and logits are brought to one size.

As published, labels are shrunk to the logits. ``size="input"`` enlarges the logits to the labels instead.

Each image's loss is the mean over its own labelled pixels; a batch's loss is the mean over its images. The published Caffe
net computes the same (batch 1, ten iterations accumulated per step). So ten accumulated batches of one image, one batch of
ten, and a batch split over several processes give the same step; a mean over all pixels of a batch would not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab.multiscale import TRAIN_SCALES, fuse_max, multiscale_logits, resize

LOSS_SIZES = ("output", "input")
IGNORE_LABEL = 255
LEAST_WEIGHT = 1e-12  # the least divisor: a weighted mean over no pixels is 0 / 1e-12 = 0


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Resize labels by nearest neighbour on a grid with aligned corner pixels (``align_corners``).

    Row i of the result is row ``i * (H - 1) / (h - 1)``, halves rounded up; a single row is row 0. So 321 -> 41
    takes exactly every 8th pixel.

    Args:
        labels: (N, H, W), any integer type.
        size: (h, w).

    Returns:
        (N, h, w) of the same type.
    """
    rows, columns = (  # floor(i * (side - 1) / last + 1 / 2) in integers
        (torch.arange(n, device=labels.device) * (2 * (side - 1)) + last) // (2 * last)
        for n, side, last in ((n, side, max(n - 1, 1)) for n, side in zip(size, labels.shape[-2:]))
    )
    return labels[..., rows[:, None], columns]


@dataclass(frozen=True)
class Ohem:
    """Online hard example mining (Shrivastava et al., arXiv:1604.03540) as in pytorch-segmentation-toolbox: a pixel counts if
    its true class has a probability of at most ``threshold``; the ``keep`` hardest pixels always count.

    The toolbox estimates the ``keep``-th hardest pixel on predictions and labels at an eighth of the size; here it is exact.
    The defaults are those of the toolbox's class; its command line has 0.6 and 200,000.
    """

    threshold: float = 0.7
    keep: int = 100_000

    def mean(self, losses: Tensor, labelled: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over the hard pixels of this process's batch, as published; not per image.

        Args:
            losses: (N, h, w) cross entropy, which falls as the true class's probability rises.
            labelled: (N, h, w) bool, False for the ignore label.
            weights: (N, h, w) float32, for a weighted mean; they do not change which pixels are hard.

        Returns:
            A scalar, computed without a host sync; 0 if no pixel is labelled.
        """
        hardness = losses.detach().masked_fill(~labelled, -1.0).flatten()
        # Not kthvalue: it has no deterministic CUDA kernel. Ignored pixels are last, so up to `keep` labelled pixels all count.
        limit = hardness.topk(min(self.keep, len(hardness)), sorted=False).values.amin()
        hard = hardness >= limit.clamp(min=0, max=-math.log(self.threshold))
        if weights is not None:
            hard = hard * weights.flatten()
        return (losses.flatten() * hard).sum() / hard.sum().clamp(min=1 if weights is None else LEAST_WEIGHT)


def cross_entropy(
    logits: Tensor, labels: Tensor, size: str = "output", ohem: Ohem | None = None, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over images of the mean cross entropy over each image's labelled pixels, in float32.

    An image without labelled pixels has loss 0 and gradient 0.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) int64; pixels of 255 are ignored.
        size: ``"output"`` shrinks the labels to (h, w), ``"input"`` enlarges the logits to (H, W).
        ohem: use the mean over the batch's hard pixels instead.
        class_weights: (C,) float32, at least 0; each mean becomes sum(weight * loss) / sum(weight).

    Returns:
        A scalar.
    """
    logits = logits.float()  # also under mixed precision
    if size == "output":
        labels = resize_labels(labels, logits.shape[-2:])
    elif size == "input":
        logits = resize(logits, labels.shape[-2:])
    else:
        raise ValueError(f"the loss size {size!r} is unknown; choose one of {', '.join(LOSS_SIZES)}")
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="none")  # N h w, 0 where ignored
    labelled = labels != IGNORE_LABEL
    weights = None if class_weights is None else F.pad(class_weights, (0, IGNORE_LABEL + 1 - len(class_weights)))[labels]
    if ohem:
        return ohem.mean(losses, labelled, weights)
    if weights is None:
        return (losses.sum(dim=(1, 2)) / labelled.sum(dim=(1, 2)).clamp(min=1)).mean()
    return ((losses * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp(min=LEAST_WEIGHT)).mean()


def single_scale_loss(
    net: Callable[..., Tensor | tuple[Tensor, Tensor]],
    images: Tensor,
    labels: Tensor,
    size: str = "output",
    ohem: Ohem | None = None,
    aux_weight: float = 0.0,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of ``train.py``.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w) logits, or a pair of logits: the head's and an auxiliary head's.
        images: (N, 3, H, W) mean-subtracted BGR.
        labels: (N, H, W) int64, 255 ignored.
        size, ohem, class_weights: see :func:`cross_entropy`; ``ohem`` does not apply to the auxiliary head.
        aux_weight: factor of the auxiliary head's loss; with 0 that head is not computed.

    Returns:
        ``{"loss": scalar}``; with an auxiliary head ``"loss_main"`` and ``"loss_aux"`` as well.
    """
    _check_sizes(images, labels)
    logits, auxiliary = _both(net(images) if aux_weight or not hasattr(net, "dsn") else net(images, auxiliary=False))
    loss = cross_entropy(logits, labels, size, ohem, class_weights)
    if auxiliary is None:
        return {"loss": loss}
    aux = cross_entropy(auxiliary, labels, size, class_weights=class_weights)
    return {"loss": loss + aux_weight * aux, "loss_main": loss, "loss_aux": aux}


def multi_scale_loss(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    size: str = "output",
    ohem: Ohem | None = None,
    aux_weight: float = 0.0,
    scales: Sequence[float] = TRAIN_SCALES,
    one_scale_at_a_time: bool = False,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of ``train_msc.py``: the losses of each scale's logits and of their pixel-wise maximum, summed.

    Arguments as in :func:`single_scale_loss` and :func:`deeplab.multiscale.multiscale_logits`; the maximum is taken at the size
    of the first scale. An auxiliary head contributes at the first scale only.

    Returns:
        ``{"loss": their sum, "loss_max": ..., "loss_1x": ..., "loss_0.75x": ..., "loss_0.5x": ...}``, scalars; with an
        auxiliary head ``"loss_aux"`` as well.
    """
    _check_sizes(images, labels)
    first, *others = multiscale_logits(net, images, scales, one_scale_at_a_time, auxiliary=aux_weight != 0)
    logits, auxiliary = _both(first)
    parts = {"loss_max": cross_entropy(fuse_max([logits, *others]), labels, size, ohem, class_weights)}
    for scale, scale_logits in zip(scales, [logits, *others]):
        parts[f"loss_{scale:g}x"] = cross_entropy(scale_logits, labels, size, ohem, class_weights)
    total = reduce(torch.add, parts.values())
    if auxiliary is None:
        return {"loss": total, **parts}
    aux = cross_entropy(auxiliary, labels, size, class_weights=class_weights)
    return {"loss": total + aux_weight * aux, **parts, "loss_aux": aux}


def _check_sizes(images: Tensor, labels: Tensor) -> None:
    """Raise :class:`ValueError` for labels that do not fit the images; the loss would silently resize them."""
    if labels.shape != (len(images), *images.shape[-2:]):
        found = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{found} do not match; expected (N, 3, H, W) and (N, H, W)")


def _both(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """A net's training output as (logits, the auxiliary head's logits or None)."""
    return output if isinstance(output, tuple) else (output, None)


LossFunction = Callable[..., dict[str, Tensor]]


class Objective(nn.Module):
    """The net and its loss as one module, so that DistributedDataParallel sees one forward pass for all scales."""

    def __init__(self, net: nn.Module, loss_function: LossFunction, **options: object) -> None:
        super().__init__()
        self.net, self.loss_function, self.options = net, loss_function, options

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) mean-subtracted BGR and (N, H, W) int64 -> the losses, scalars, ``"loss"`` among them."""
        return self.loss_function(self.net, images, labels, **self.options)
