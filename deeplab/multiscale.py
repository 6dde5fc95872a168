"""Several scales through one net: the functions that training and prediction share.

All resizing keeps the corner pixels in place (``align_corners=True``), and a side of n pixels becomes round((n - 1) * s) + 1,
as in the published Caffe net: 321 -> 241 -> 161. Pixel p of the image then lies at p * s, and logit k at pixel 8 * k.
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
    """(H, W) at another scale, with the grid kept aligned: round((n - 1) * scale) + 1."""
    height, width = (round((side - 1) * scale) + 1 for side in size)
    return height, width


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing of (N, C, H, W) that keeps the corner pixels in place; x itself where it has that size."""
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
        net: (N, 3, H, W) -> (N, C, h, w); an auxiliary head answers at the first scale alone, so that is a pair then.
        images: (N, 3, H, W) mean-subtracted BGR.
        scales: factors, at least one.
        one_scale_at_a_time: keep only the activations of the first scale, and compute those of the others again in the
            backward pass, for memory. At scales 1, 0.75 and 0.5 this adds (0.75^2 + 0.5^2) / (3 (1 + 0.75^2 + 0.5^2)) = 15 %
            arithmetic.
        auxiliary: whether an auxiliary head answers at all.

    Returns:
        One (N, C, h_s, w_s) a scale, in the order of ``scales``.
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
    # Backward goes through what was computed last first: the first scale, whose activations are then gone before those of the
    # others come back, one scale after another. Running statistics move in the second pass of the others, which makes it the
    # order in which they move without this option: first scale, second, third.
    dropout = plain is not forward  # the nets with auxiliary heads draw numbers, and must draw the same ones again
    contexts = lambda: (kept_statistics(net), nullcontext())  # noqa: E731 (of the first pass, of the second)
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
