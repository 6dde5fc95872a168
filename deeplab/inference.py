"""Prediction on images of any size: whole or with a sliding window, over scales and horizontal flips; logits to classes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import reduce
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab.multiscale import resize, scaled_size

FUSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max": torch.maximum, "mean": torch.add}
OVERLAP = Fraction(1, 3)
OUTPUT_STRIDE = 8
NO_CLASS = 255  # the ignore label


def fused(logits: Iterable[Tensor], count: int, fuse: str) -> Tensor:
    """The pixel-wise ``"max"`` or ``"mean"`` of ``count`` tensors of one size; at most two are held at a time."""
    result = reduce(FUSIONS[fuse], logits)
    return result / count if fuse == "mean" and count > 1 else result


def canvas_size(size: Sequence[int], stride: int = OUTPUT_STRIDE) -> tuple[int, int]:
    """Each side rounded up to 8k + 1: there the logits are exactly 8 pixels apart, and the last one is on the last pixel."""
    height, width = (-(-(side - 1) // stride) * stride + 1 for side in size)
    return height, width


def pad(images: Tensor, size: Sequence[int]) -> Tensor:
    """Pad at the bottom and the right with 0, the mean colour after mean subtraction."""
    return F.pad(images, (0, size[1] - images.shape[-1], 0, size[0] - images.shape[-2]))


def _sample(logits: Tensor, side: int, scaled: int, dim: int) -> Tensor:
    """Sample the logits of an image scaled from ``side`` pixels (8k + 1) to ``scaled`` on the grid of the unscaled image.

    Linear interpolation along ``dim`` at k + 1 positions: i * (scaled - 1) / (side - 1). The positions are computed in
    integers, so they are exact without float64, which some devices lack.
    """
    if scaled == side:
        return logits
    span = max(side - 1, 1)
    position = torch.arange(side // OUTPUT_STRIDE + 1, device=logits.device) * (scaled - 1)  # in steps of 1 / span
    low = position // span
    weight = ((position - low * span) / span).to(logits.dtype)
    weight = weight[:, None] if dim == 2 else weight
    high = (low + 1).clamp(max=logits.shape[dim] - 1)
    return logits.index_select(dim, low) * (1 - weight) + logits.index_select(dim, high) * weight


def check_input(images: object) -> None:
    """Raise :class:`TypeError` if ``images`` is no input for a net, for example an image as read from its file."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = f"{type(images).__name__} of {getattr(images, 'dtype', 'no numbers')}"
        raise TypeError(
            f"the net was given a {kind}; expected a float tensor (N, 3, H, W) of mean-subtracted BGR: "
            "dataset.to_input(dataset.read_image(path))"
        )


def predict_grid(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    fuse: str = "max",
) -> Tensor:
    """Logits on the stride-8 grid of the image, fused over ``scales`` and averaged over horizontal flips.

    Each side of the image is padded to 8k + 1. A scaled image is padded to 8k + 1 again, and its logits are sampled at the
    positions of the unscaled image's logits, so the scales stay aligned for every image size.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w).
        images: (N, 3, H, W) mean-subtracted BGR.
        scales: at least one factor; 1.0 may be missing.
        mirror: also predict the horizontally flipped image and average the two.
        fuse: how to fuse the scales: ``"max"``, as in DeepLab-v2, or ``"mean"``.

    Returns:
        (N, C, k_h + 1, k_w + 1): logit (i, j) is at pixel (8i, 8j). :func:`enlarge` and :func:`enlarge_to_classes` resize to
        the size of the image.
    """
    check_input(images)
    images = pad(images, canvas_size(images.shape[-2:]))
    height, width = images.shape[-2:]
    grids = []
    for scale in scales:
        scaled = resize(images, scaled_size((height, width), scale))
        scaled_height, scaled_width = scaled.shape[-2:]
        scaled = pad(scaled, canvas_size(scaled.shape[-2:]))
        logits = net(torch.cat([scaled, scaled.flip(-1)]) if mirror else scaled)
        if mirror:
            straight, flipped = logits.chunk(2)
            logits = (straight + flipped.flip(-1)) / 2
        logits = _sample(logits, height, scaled_height, dim=2)
        grids.append(_sample(logits, width, scaled_width, dim=3))
    return fused(grids, len(grids), fuse)


def enlarge(logits: Tensor, size: Sequence[int], stride: int = OUTPUT_STRIDE) -> Tensor:
    """Logits on the stride-8 grid -> logits at the size of the image: (N, C, k_h + 1, k_w + 1) -> (N, C, H, W).

    The grid may extend past the image, as that of a padded image does; the part outside is not used. Logits of ``stride`` 1
    already have the size of the image.
    """
    canvas = canvas_size(size, stride)
    rows, columns = ((side - 1) // stride + 1 for side in canvas)
    return resize(logits[..., :rows, :columns], canvas)[..., : size[0], : size[1]]


def enlarge_rows(
    logits: Tensor, size: Sequence[int], max_elements: int = 2**25, stride: int = OUTPUT_STRIDE
) -> Iterator[tuple[slice, Tensor]]:
    """:func:`enlarge` in blocks of rows, for images whose full-size logits would not fit in memory.

    The blocks begin and end on rows of the stride-8 grid, so together they equal :func:`enlarge` to rounding.

    Args:
        logits: (N, C, k_h + 1, k_w + 1).
        size: (H, W) of the image.
        max_elements: the largest number of elements per block; a block has at least one row of the grid.
        stride: of the logits, see :func:`enlarge`.

    Yields:
        The rows of the block as a slice, and its (N, C, rows, W) logits.
    """
    height, width = size
    last_row = (canvas_size(size, stride)[0] - 1) // stride  # the last grid row that the image needs
    step = max(1, max_elements // (logits.shape[0] * logits.shape[1] * stride * width))
    for top in range(0, max(last_row, 1), step):
        bottom = min(top + step, last_row)
        first = top * stride
        last = height if bottom == last_row else bottom * stride  # the bottom row is the first of the next block
        yield slice(first, last), enlarge(logits[..., top : bottom + 1, :], (last - first, width), stride)


def enlarge_to_classes(logits: Tensor, size: Sequence[int], stride: int = OUTPUT_STRIDE) -> Tensor:
    """The class of each pixel, from the logits of one image on the stride-8 grid. Logits become classes only here.

    Works in blocks of rows, without a host sync.

    Args:
        logits: (C, k_h + 1, k_w + 1), at most 255 classes.
        size: (H, W) of the image.
        stride: of the logits, see :func:`enlarge`.

    Returns:
        (H, W) uint8 on the device of ``logits``; 255 (no class) everywhere if any logit is NaN or infinite.
    """
    classes = torch.empty(tuple(size), dtype=torch.uint8, device=logits.device)
    for rows, block in enlarge_rows(logits[None], size, stride=stride):
        classes[rows] = block[0].max(dim=0).indices.byte()  # on a CPU ten times as fast as argmax
    return classes.masked_fill_(~logits.isfinite().all(), NO_CLASS)


@torch.no_grad()
def predict_classes(
    net: Callable[[Tensor], Tensor], image: Tensor, scales: Sequence[float] = (1.0,), mirror: bool = False
) -> Tensor:
    """The class of each pixel, see :func:`predict_grid` and :func:`enlarge_to_classes`.

    Args:
        image: (N, 3, H, W) or (3, H, W) mean-subtracted BGR, of any size.

    Returns:
        (N, H, W), or (H, W) for a single image; uint8. An image with a logit that is not finite is 255 everywhere.
    """
    check_input(image)
    images = image if image.ndim == 4 else image[None]
    grids = predict_grid(net, images, scales, mirror).float()
    classes = torch.stack([enlarge_to_classes(logits, images.shape[-2:]) for logits in grids])
    return classes if image.ndim == 4 else classes[0]


def predict(net: Callable[[Tensor], Tensor], image: Tensor, scales: Sequence[float] = (1.0,), mirror: bool = False) -> Tensor:
    """Logits at the size of the image, see :func:`predict_grid`.

    Args:
        image: (N, 3, H, W) or (3, H, W) mean-subtracted BGR, of any size.

    Returns:
        (N, C, H, W), or (C, H, W) for a single image; float32.
    """
    check_input(image)
    images = image if image.ndim == 4 else image[None]
    logits = enlarge(predict_grid(net, images, scales, mirror).float(), images.shape[-2:])
    return logits if image.ndim == 4 else logits[0]


def predict_windows(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    overlap: Fraction = OVERLAP,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    fuse: str = "max",
) -> Tensor:
    """Logits at the size of the image from a sliding window: each tile's logits are enlarged and averaged where tiles overlap.

    Tiles begin at any pixel, not only on the stride-8 grid, so they are summed at full size. At every scale the tiles have the
    same size, so the net needs the same memory. The sides of a tile are rounded up to 8k + 1; an image smaller than a tile is
    padded with the mean colour.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w); all tiles have one size.
        images: (N, 3, H, W) mean-subtracted BGR, not padded.
        window: (height, width) of a tile in pixels; 768 becomes 769.
        overlap: the share of a tile that the next tile covers, at least 0 and below 1.
        scales, mirror, fuse: see :func:`deeplab.inference.predict_grid`.

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
    assert total is not None  # there is at least one tile
    for dim, starts in ((-2, tops), (-1, lefts)):
        count = torch.zeros(images.shape[dim], device=total.device)  # the number of tiles over each row, or column
        for start in starts:
            count[start : start + window[dim]] += 1
        total /= count[:, None] if dim == -2 else count
    return total


def tile_starts(side: int, window: int, overlap: Fraction = OVERLAP) -> list[int]:
    """The first pixels of the tiles along a side: ceil(window * (1 - overlap)) apart, the last moved back to fit the image.

    2048 pixels in tiles of 769 give 0, 513, 1026 and 1279; a side no longer than the window gives only 0.
    """
    stride = ceil(window * (1 - overlap))
    last = max(side - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]
