"""Several scales through one net: the functions that training and prediction share.

All resizing keeps the corner pixels in place (``align_corners=True``), and a side of n pixels becomes round((n - 1) * s) + 1,
as in the published Caffe net: 321 -> 241 -> 161. Pixel p of the picture then lies at p * s, and logit k at pixel 8 * k.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deeplab.resnet import kept_statistics

TRAIN_SCALES = (1.0, 0.75, 0.5)
OUTPUT_STRIDE = 8


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(H, W) at another scale, with the grid kept aligned: round((n - 1) * scale) + 1."""
    height, width = (round((side - 1) * scale) + 1 for side in size)
    return height, width


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing of (N, C, H, W) that keeps the corner pixels in place; x itself where it has that size."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def multiscale_logits(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = TRAIN_SCALES,
    one_scale_at_a_time: bool = False,
) -> list[Tensor]:
    """The logits of each scale at that scale's own size.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w).
        images: (N, 3, H, W) mean-subtracted BGR.
        scales: factors, at least one.
        one_scale_at_a_time: keep only the activations of the first scale, and compute those of the others again in the
            backward pass, for memory. At scales 1, 0.75 and 0.5 this adds (0.75^2 + 0.5^2) / (3 (1 + 0.75^2 + 0.5^2)) = 15 %
            arithmetic. ``net`` must be a module then.

    Returns:
        One (N, C, h_s, w_s) a scale, in the order of ``scales``.
    """
    inputs = [resize(images, scaled_size(images.shape[-2:], scale)) for scale in scales]
    if not one_scale_at_a_time:
        return [net(x) for x in inputs]
    # Backward goes through what was computed last first: the first scale, whose activations are then gone before those of the
    # others come back, one scale after another. Running statistics move in the second pass of the others, which makes it the
    # order in which they move without this option: first scale, second, third.
    contexts = lambda: (kept_statistics(net), nullcontext())  # noqa: E731 (of the first pass, of the second)
    others = [
        checkpoint(net, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts) for x in reversed(inputs[1:])
    ]
    return [net(inputs[0]), *reversed(others)]


def fuse_max(logits: Sequence[Tensor]) -> Tensor:
    """The pixel-wise maximum over the scales, at the size of the first: (N, C, h, w)."""
    fused = logits[0]
    for other in logits[1:]:
        fused = torch.maximum(fused, resize(other, fused.shape[-2:]))
    return fused


def canvas_size(size: Sequence[int]) -> tuple[int, int]:
    """Each side rounded up to 8k + 1, where the net's logits lie exactly 8 pixels apart and end on the last pixel."""
    height, width = (-(-(side - 1) // OUTPUT_STRIDE) * OUTPUT_STRIDE + 1 for side in size)
    return height, width


def _pad(images: Tensor, size: Sequence[int]) -> Tensor:
    """Pad at the bottom and the right with 0, the mean colour after mean subtraction."""
    return F.pad(images, (0, size[1] - images.shape[-1], 0, size[0] - images.shape[-2]))


def _sample(logits: Tensor, extent: float, count: int, dim: int) -> Tensor:
    """Linear interpolation of ``logits`` along ``dim`` at ``count`` positions from 0 to ``extent``."""
    if extent == logits.shape[dim] - 1 and count == logits.shape[dim]:
        return logits
    position = torch.linspace(0, extent, count, device=logits.device, dtype=torch.float64)
    low = position.floor().long().clamp(max=logits.shape[dim] - 1)
    weight = (position - low).to(logits.dtype)
    weight = weight[:, None] if dim == 2 else weight
    high = (low + 1).clamp(max=logits.shape[dim] - 1)
    return logits.index_select(dim, low) * (1 - weight) + logits.index_select(dim, high) * weight


def predict_grid(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    canvas: Sequence[int] | None = None,
) -> Tensor:
    """Logits on the picture's stride-8 grid: the maximum over ``scales``, the mean over the picture and its mirror image.

    The picture is padded to 8k + 1 a side. A scaled picture is padded to 8k + 1 again and its logits are sampled where the
    unscaled picture's logits lie, so the scales stay aligned whatever the picture's size.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w).
        images: (N, 3, H, W) mean-subtracted BGR.
        scales: factors, at least one; 1.0 need not be among them.
        mirror: also predict the mirrored picture.
        canvas: (H, W) to pad to, instead of the picture's own size; rounded up to 8k + 1.

    Returns:
        (N, C, k_h + 1, k_w + 1): logit (i, j) lies at pixel (8i, 8j). Use :func:`enlarge` to get to the picture's size.
    """
    images = _pad(images, canvas_size(canvas or images.shape[-2:]))
    height, width = images.shape[-2:]
    fused = None
    for scale in scales:
        scaled = resize(images, scaled_size((height, width), scale))
        extent_h, extent_w = ((side - 1) / OUTPUT_STRIDE for side in scaled.shape[-2:])
        scaled = _pad(scaled, canvas_size(scaled.shape[-2:]))
        views = [net(scaled), net(scaled.flip(-1)).flip(-1)] if mirror else [net(scaled)]
        logits = sum(views) / len(views)
        logits = _sample(logits, extent_h, (height - 1) // OUTPUT_STRIDE + 1, dim=2)
        logits = _sample(logits, extent_w, (width - 1) // OUTPUT_STRIDE + 1, dim=3)
        fused = logits if fused is None else torch.maximum(fused, logits)
    return fused


def enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits on the stride-8 grid -> logits at the picture's size: (N, C, k_h + 1, k_w + 1) -> (N, C, H, W)."""
    canvas = [(side - 1) * OUTPUT_STRIDE + 1 for side in logits.shape[-2:]]
    return resize(logits, canvas)[..., : size[0], : size[1]]


def enlarge_rows(logits: Tensor, size: Sequence[int], max_elements: int = 2**25) -> Iterator[tuple[slice, Tensor]]:
    """:func:`enlarge` in blocks of rows, for pictures whose full-size logits would not fit.

    The block borders lie on rows of the stride-8 grid, so the blocks together are what :func:`enlarge`
    gives, to rounding.

    Args:
        logits: (N, C, k_h + 1, k_w + 1).
        size: (H, W) of the picture.
        max_elements: how many elements a block may have, as far as single grid rows allow.

    Yields:
        The block's rows as a slice, and its (N, C, rows, W) logits.
    """
    height, width = size
    grid_rows = logits.shape[-2]
    step = max(1, max_elements // (logits.shape[0] * logits.shape[1] * OUTPUT_STRIDE * width))
    for top in range(0, max(grid_rows - 1, 1), step):
        bottom = min(top + step, grid_rows - 1)
        first = top * OUTPUT_STRIDE
        last = height if bottom == grid_rows - 1 else bottom * OUTPUT_STRIDE  # the bottom row opens the next block
        yield slice(first, last), enlarge(logits[..., top : bottom + 1, :], (last - first, width))


def predict(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    canvas: Sequence[int] | None = None,
) -> Tensor:
    """Logits at the picture's own size, see :func:`predict_grid`.

    Args:
        image: (N, 3, H, W) or (3, H, W) mean-subtracted BGR, of any size.

    Returns:
        (N, C, H, W), or (C, H, W) for a single picture; float32.
    """
    images = image if image.dim() == 4 else image[None]
    logits = enlarge(predict_grid(net, images, scales, mirror, canvas).float(), images.shape[-2:])
    return logits if image.dim() == 4 else logits[0]
