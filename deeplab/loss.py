"""The training losses: the only place that decides how labels and logits are brought to one size.

As published, labels are shrunk to the logits. ``size="input"`` enlarges the logits to the labels instead.

Each picture's loss is the mean over its own labelled pixels, and a batch's loss is the mean over its pictures. That is what the
published Caffe net computes (batch 1, ten accumulated iterations a step), and it makes ten accumulated batches of one picture,
one batch of ten, and a batch split over several processes the same step; a mean over the pixels of a batch would not.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab.multiscale import TRAIN_SCALES, fuse_max, multiscale_logits, resize, scaled_size

LOSS_SIZES = ("output", "input")
IGNORE_LABEL = 255


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour sampling of labels on a grid whose corner pixels are those of the input (``align_corners``).

    Row i of the result is row ``i * (H - 1) / (h - 1)``, rounded with halves up, and a single row is row 0; so 321 -> 41 is
    exactly every 8th pixel.

    Args:
        labels: (N, H, W), any integer type.
        size: (h, w).

    Returns:
        (N, h, w) of the same type.
    """
    rows, columns = (
        torch.arange(n, device=labels.device) * 2 * (side - 1) // max(n - 1, 1) + 1 for n, side in zip(size, labels.shape[-2:])
    )
    return labels[..., (rows // 2)[:, None], columns // 2]


def cross_entropy(logits: Tensor, labels: Tensor, ignore_label: int = IGNORE_LABEL, size: str = "output") -> Tensor:
    """Mean over pictures of the mean cross entropy over each picture's labelled pixels, in float32.

    A picture without a labelled pixel counts 0, with a gradient of 0.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) int64.
        ignore_label: pixels of this label have no part in the loss.
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
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_label, reduction="none")  # N h w, 0 where ignored
    counts = (labels != ignore_label).sum(dim=(1, 2)).clamp(min=1)
    return (losses.sum(dim=(1, 2)) / counts).mean()


def single_scale_loss(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ignore_label: int = IGNORE_LABEL,
    size: str = "output",
) -> dict[str, Tensor]:
    """The loss of ``train.py``.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w) logits.
        images: (N, 3, H, W) mean-subtracted BGR.
        labels: (N, H, W) int64.
        ignore_label, size: see :func:`cross_entropy`.

    Returns:
        ``{"loss": scalar}``.
    """
    return {"loss": cross_entropy(net(images), labels, ignore_label, size)}


def multi_scale_loss(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ignore_label: int = IGNORE_LABEL,
    size: str = "output",
    scales: Sequence[float] = TRAIN_SCALES,
) -> dict[str, Tensor]:
    """The loss of ``train_msc.py``: that of each scale's logits and that of their pixel-wise maximum, summed.

    Arguments as in :func:`single_scale_loss`; the first of ``scales`` is the size at which the maximum is taken.

    Returns:
        ``{"loss": their sum, "loss_max": ..., "loss_1x": ..., "loss_0.75x": ..., "loss_0.5x": ...}``, scalars.
    """
    return sum_losses(multiscale_logits(net, images, scales), labels, ignore_label, size, scales)


def multi_scale_backward(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ignore_label: int = IGNORE_LABEL,
    size: str = "output",
    scales: Sequence[float] = TRAIN_SCALES,
    probe: Callable[[Tensor], Tensor] | None = None,
    scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss,
    around: Callable[[bool], AbstractContextManager] = lambda last: nullcontext(),
) -> dict[str, Tensor]:
    """:func:`multi_scale_loss` and its backward pass, holding the activations of one scale at a time.

    The losses need the logits of all scales, their gradient needs each scale's activations. So the smaller scales first run
    without a graph, the losses are differentiated with respect to the logits, and then each scale runs with a graph and is
    back-propagated alone. The gradients are those of ``multi_scale_loss(...)["loss"].backward()``. At scales 1, 0.75 and 0.5
    the second forward pass of the two smaller ones adds (0.75^2 + 0.5^2) / (3 * (1 + 0.75^2 + 0.5^2)) = 15 % arithmetic.

    Args:
        forward: the net, (N, 3, H, W) -> (N, C, h, w).
        images, labels, ignore_label, size, scales: see :func:`multi_scale_loss`.
        probe: the net for the pass without a graph, where it differs from ``forward``.
        scale_loss: applied to the loss before it is differentiated: accumulation, loss scaling.
        around: ``around(last)`` is entered around each scale's forward and backward pass; ``last`` is true for the last one.

    Returns:
        The losses of :func:`multi_scale_loss`, detached.
    """
    inputs = [resize(images, scaled_size(images.shape[-2:], scale)) for scale in scales]
    with torch.no_grad():
        others = [(probe or forward)(x) for x in inputs[1:]]
    with around(len(inputs) == 1):
        first = forward(inputs[0])
        leaves = [logits.detach().requires_grad_() for logits in (first, *others)]
        losses = sum_losses(leaves, labels, ignore_label, size, scales)
        gradients = torch.autograd.grad(scale_loss(losses["loss"]), leaves)
        first.backward(gradients[0])
    del first
    for number, (x, gradient) in enumerate(zip(inputs[1:], gradients[1:]), start=2):
        with around(number == len(inputs)):
            forward(x).backward(gradient)
    return {name: loss.detach() for name, loss in losses.items()}


def sum_losses(
    logits: Sequence[Tensor], labels: Tensor, ignore_label: int, size: str, scales: Sequence[float]
) -> dict[str, Tensor]:
    """The losses of :func:`multi_scale_loss`, from the logits of each scale."""
    parts = {"loss_max": cross_entropy(fuse_max(logits), labels, ignore_label, size)}
    for scale, scale_logits in zip(scales, logits):
        parts[f"loss_{scale:g}x"] = cross_entropy(scale_logits, labels, ignore_label, size)
    return {"loss": sum(parts.values()), **parts}
