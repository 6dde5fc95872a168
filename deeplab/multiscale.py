"""Several scales through one net: functions for training and prediction.

All resizing keeps the corner pixels in place (``align_corners=True``), and a side of n pixels becomes round((n - 1) * s) + 1,
as in the published Caffe net: 321 -> 241 -> 161. So pixel p of the image moves to p * s, and logit k is at pixel 8 * k.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplab.batch_norm import fold, kept_statistics
from deeplab.resnet import DilatedResNet

TRAIN_SCALES = (1.0, 0.75, 0.5)


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(H, W) at another scale on an aligned grid: round((n - 1) * scale) + 1."""
    height, width = (round((side - 1) * scale) + 1 for side in size)
    return height, width


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing of (N, C, H, W) that keeps the corner pixels in place; x itself if it has that size already."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def multiscale_logits(
    net: nn.Module,
    images: Tensor,
    scales: Sequence[float] = TRAIN_SCALES,
    one_scale_at_a_time: bool = False,
    auxiliary: bool = True,
) -> list[Any]:
    """The logits of each scale at that scale's own size.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w).
        images: (N, 3, H, W) mean-subtracted BGR.
        scales: at least one factor.
        one_scale_at_a_time: to save memory, keep the activations of the first scale only and recompute those of the others in
            the backward pass. At scales 1, 0.75 and 0.5 this adds (0.75^2 + 0.5^2) / (3 (1 + 0.75^2 + 0.5^2)) = 15 %
            arithmetic.
        auxiliary: whether to compute an auxiliary head, if the net has one; it runs at the first scale only.

    Returns:
        (N, C, h_s, w_s) per scale, in the order of ``scales``; with an auxiliary head the first is a pair (main, auxiliary).
    """
    inputs = [resize(images, scaled_size(images.shape[-2:], scale)) for scale in scales]
    folded = fold(net) if isinstance(net, DilatedResNet) else None  # once for all scales
    forward = partial(net, folded=folded) if folded else net
    plain = partial(forward, auxiliary=False) if hasattr(net, "dsn") else forward
    first = forward if auxiliary else plain
    if not one_scale_at_a_time:
        return [first(inputs[0]), *map(plain, inputs[1:])]
    if folded:
        folded.multiply(net)
    # The backward pass starts with what was computed last: the first scale. Its activations are freed before those of the
    # other scales are recomputed, one scale after another. The running statistics of the others move in their second pass, so
    # the order is the same as without this option: first scale, second, third.
    dropout = plain is not forward  # nets with auxiliary heads have dropout, which must draw the same numbers again
    contexts = lambda: (kept_statistics(net), nullcontext())  # noqa: E731 (for the first and the second pass)
    others = [
        checkpoint(plain, x, use_reentrant=False, preserve_rng_state=dropout, context_fn=contexts) for x in reversed(inputs[1:])
    ]
    return [first(inputs[0]), *reversed(others)]


def fuse_max(logits: Sequence[Tensor]) -> Tensor:
    """The pixel-wise maximum over the scales, at the size of the first: (N, C, h, w)."""
    fused = logits[0]
    for other in logits[1:]:
        fused = torch.maximum(fused, resize(other, fused.shape[-2:]))
    return fused
