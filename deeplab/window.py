"""Prediction of large pictures in overlapping tiles of the size that the net was trained on, as published for Cityscapes."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from deeplab.multiscale import canvas_size, check_input, enlarge, fused, pad, predict_grid, resize, scaled_size

OVERLAP = Fraction(1, 3)


def tile_starts(side: int, window: int, overlap: Fraction = OVERLAP) -> list[int]:
    """Where the tiles begin along a side: ceil(window * (1 - overlap)) apart, the last one pushed back to the border.

    2048 pixels in tiles of 769 give 0, 513, 1026 and 1279; a side that is not longer than the window gives 0 alone.
    """
    stride = ceil(window * (1 - overlap))
    last = max(side - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def predict_windows(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    overlap: Fraction = OVERLAP,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    fuse: str = "max",
) -> Tensor:
    """Logits at the picture's size: those of each tile enlarged to the tile, and averaged where tiles overlap.

    The tiles begin at any pixel, not only at those of the stride-8 grid, so they are summed at full size. A picture at another
    scale is cut into tiles of the same size, so the net takes the same memory at every scale. Sides of tiles are rounded up to
    8k + 1, as the net's grid wants; only where the picture is smaller than that, the mean colour is beside it.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w); it sees tiles of one size only.
        images: (N, 3, H, W) mean-subtracted BGR, all pictures of exactly this size.
        window: (height, width) of a tile in pixels; 768 is taken as 769.
        overlap: share of a tile that the next one covers, at least 0 and below 1.
        scales, mirror, fuse: see :func:`deeplab.multiscale.predict_grid`.

    Returns:
        (N, C, H, W) float32.
    """
    check_input(images)
    size, window = images.shape[-2:], canvas_size(window)

    def at(scale: float) -> Tensor:
        return resize(_tiled(net, resize(images, scaled_size(size, scale)), window, overlap, mirror), size)

    return fused(map(at, scales), len(scales), fuse)


def _tiled(net: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], overlap: Fraction, mirror: bool) -> Tensor:
    """One scale of :func:`predict_windows`."""
    height, width = images.shape[-2:]
    tops, lefts = (tile_starts(side, length, overlap) for side, length in zip((height, width), window))
    total: Tensor | None = None
    for top in tops:
        for left in lefts:
            tile = images[..., top : top + window[0], left : left + window[1]]
            logits = predict_grid(net, pad(tile, window), mirror=mirror).float()
            total = logits.new_zeros(*logits.shape[:2], height, width) if total is None else total
            part = total[..., top : top + window[0], left : left + window[1]]
            part += enlarge(logits, part.shape[-2:])
    assert total is not None  # there is a tile at least
    for dim, starts in ((-2, tops), (-1, lefts)):
        count = torch.zeros(images.shape[dim], device=total.device)  # tiles that cover a row, or a column
        for start in starts:
            count[start : start + window[dim]] += 1
        total /= count[:, None] if dim == -2 else count
    return total
