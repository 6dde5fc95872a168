"""Several scales through one net: the functions that training and prediction share.

All resizing keeps the corner pixels in place (``align_corners=True``), and a side of n pixels becomes round((n - 1) * s) + 1,
as in the published Caffe net: 321 -> 241 -> 161. Pixel p of the picture then lies at p * s, and logit k at pixel 8 * k.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplab.batch_norm import kept_statistics
from deeplab.resnet import DilatedResNet

TRAIN_SCALES = (1.0, 0.75, 0.5)
FUSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max": torch.maximum, "mean": torch.add}
OUTPUT_STRIDE = 8
NO_CLASS = 255  # the void label


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
    forward = partial(net, folded=net.fold()) if isinstance(net, DilatedResNet) else net  # folded once for all scales
    plain = partial(forward, auxiliary=False) if hasattr(net, "dsn") else forward
    first = forward if auxiliary else plain
    if not one_scale_at_a_time:
        return [first(inputs[0]), *map(plain, inputs[1:])]
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


def fused(logits: Iterable[Tensor], count: int, fuse: str) -> Tensor:
    """The pixel-wise ``"max"`` or ``"mean"`` of ``count`` tensors of one size, of which two are held at a time."""
    result = reduce(FUSIONS[fuse], logits)
    return result / count if fuse == "mean" and count > 1 else result


def canvas_size(size: Sequence[int], stride: int = OUTPUT_STRIDE) -> tuple[int, int]:
    """Each side rounded up to 8k + 1, where the net's logits lie exactly 8 pixels apart and end on the last pixel."""
    height, width = (-(-(side - 1) // stride) * stride + 1 for side in size)
    return height, width


def pad(images: Tensor, size: Sequence[int]) -> Tensor:
    """Pad at the bottom and the right with 0, the mean colour after mean subtraction."""
    return F.pad(images, (0, size[1] - images.shape[-1], 0, size[0] - images.shape[-2]))


def _sample(logits: Tensor, side: int, scaled: int, dim: int) -> Tensor:
    """Logits of a picture whose side of ``side`` pixels (8k + 1) was scaled to ``scaled``, where the unscaled one's lie.

    Linear interpolation along ``dim`` at k + 1 positions: i * (scaled - 1) / (side - 1). The arithmetic is that of whole
    numbers, so it is exact without float64, which not every device has.
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
    """Raise :class:`TypeError` for what is no net input, such as a picture as it was read."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = f"{type(images).__name__} of {getattr(images, 'dtype', 'no numbers')}"
        raise TypeError(
            f"the net was given a {kind}; expected a float tensor (N, 3, H, W) of mean-subtracted BGR, which "
            "dataset.to_input(image) makes of a picture that dataset.read_image(path) read"
        )


def predict_grid(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    fuse: str = "max",
) -> Tensor:
    """Logits on the picture's stride-8 grid: fused over ``scales``, the mean over the picture and its mirror image.

    The picture is padded to 8k + 1 a side. A scaled picture is padded to 8k + 1 again and its logits are sampled where the
    unscaled picture's logits lie, so the scales stay aligned whatever the picture's size.

    Args:
        net: (N, 3, H, W) -> (N, C, h, w).
        images: (N, 3, H, W) mean-subtracted BGR.
        scales: factors, at least one; 1.0 need not be among them.
        mirror: also predict the mirrored picture.
        fuse: how to fuse the scales: ``"max"``, as in DeepLab-v2, or ``"mean"``.

    Returns:
        (N, C, k_h + 1, k_w + 1): logit (i, j) lies at pixel (8i, 8j). :func:`enlarge` and :func:`enlarge_to_classes` go on to
        the picture's size.
    """
    check_input(images)
    images = pad(images, canvas_size(images.shape[-2:]))
    height, width = images.shape[-2:]
    grids = []
    for scale in scales:
        scaled = resize(images, scaled_size((height, width), scale))
        scaled_height, scaled_width = scaled.shape[-2:]
        scaled = pad(scaled, canvas_size(scaled.shape[-2:]))
        logits = net(scaled)
        if mirror:
            logits = (logits + net(scaled.flip(-1)).flip(-1)) / 2
        logits = _sample(logits, height, scaled_height, dim=2)
        grids.append(_sample(logits, width, scaled_width, dim=3))
    return fused(grids, len(grids), fuse)


def enlarge(logits: Tensor, size: Sequence[int], stride: int = OUTPUT_STRIDE) -> Tensor:
    """Logits on the stride-8 grid -> logits at the picture's size: (N, C, k_h + 1, k_w + 1) -> (N, C, H, W).

    The grid may go on past the picture, as that of a canvas does; what lies there has no part in the result. Logits of
    ``stride`` 1 have the picture's size already.
    """
    canvas = canvas_size(size, stride)
    rows, columns = ((side - 1) // stride + 1 for side in canvas)
    return resize(logits[..., :rows, :columns], canvas)[..., : size[0], : size[1]]


def enlarge_rows(
    logits: Tensor, size: Sequence[int], max_elements: int = 2**25, stride: int = OUTPUT_STRIDE
) -> Iterator[tuple[slice, Tensor]]:
    """:func:`enlarge` in blocks of rows, for pictures whose full-size logits would not fit.

    The block borders lie on rows of the stride-8 grid, so the blocks together are what :func:`enlarge`
    gives, to rounding.

    Args:
        logits: (N, C, k_h + 1, k_w + 1).
        size: (H, W) of the picture.
        max_elements: how many elements a block may have, as far as single grid rows allow.
        stride: of the logits, see :func:`enlarge`.

    Yields:
        The block's rows as a slice, and its (N, C, rows, W) logits.
    """
    height, width = size
    last_row = (canvas_size(size, stride)[0] - 1) // stride  # of the grid rows that the picture needs
    step = max(1, max_elements // (logits.shape[0] * logits.shape[1] * stride * width))
    for top in range(0, max(last_row, 1), step):
        bottom = min(top + step, last_row)
        first = top * stride
        last = height if bottom == last_row else bottom * stride  # the bottom row opens the next block
        yield slice(first, last), enlarge(logits[..., top : bottom + 1, :], (last - first, width), stride)


def enlarge_to_classes(logits: Tensor, size: Sequence[int], stride: int = OUTPUT_STRIDE) -> Tensor:
    """The class of each pixel from one picture's logits on the stride-8 grid. Only here do logits become classes.

    Works in blocks of rows, and without making the host wait for the device.

    Args:
        logits: (C, k_h + 1, k_w + 1), at most 255 classes.
        size: (H, W) of the picture.
        stride: of the logits, see :func:`enlarge`.

    Returns:
        (H, W) uint8 on the device of ``logits``; 255, which is no class, everywhere if a logit is NaN or infinite.
    """
    classes = torch.empty(tuple(size), dtype=torch.uint8, device=logits.device)
    for rows, block in enlarge_rows(logits[None], size, stride=stride):
        classes[rows] = block[0].max(dim=0).indices.byte()  # on a CPU ten times as fast as argmax
    return classes.masked_fill_(~logits.isfinite().all(), NO_CLASS)


def predict_classes(
    net: Callable[[Tensor], Tensor], image: Tensor, scales: Sequence[float] = (1.0,), mirror: bool = False
) -> Tensor:
    """The class of each pixel, see :func:`predict_grid` and :func:`enlarge_to_classes`.

    Args:
        image: (N, 3, H, W) or (3, H, W) mean-subtracted BGR, of any size.

    Returns:
        (N, H, W), or (H, W) for a single picture; uint8, 255 all over a picture whose logits are not finite.
    """
    images = image if image.ndim == 4 else image[None]
    grids = predict_grid(net, images, scales, mirror).float()
    classes = torch.stack([enlarge_to_classes(logits, images.shape[-2:]) for logits in grids])
    return classes if image.ndim == 4 else classes[0]


def predict(net: Callable[[Tensor], Tensor], image: Tensor, scales: Sequence[float] = (1.0,), mirror: bool = False) -> Tensor:
    """Logits at the picture's own size, see :func:`predict_grid`.

    Args:
        image: (N, 3, H, W) or (3, H, W) mean-subtracted BGR, of any size.

    Returns:
        (N, C, H, W), or (C, H, W) for a single picture; float32.
    """
    images = image if image.ndim == 4 else image[None]
    logits = enlarge(predict_grid(net, images, scales, mirror).float(), images.shape[-2:])
    return logits if image.ndim == 4 else logits[0]
