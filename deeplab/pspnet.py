"""PSPNet (Zhao et al., arXiv:1612.01105) as published by pytorch-segmentation-toolbox."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab.batch_norm import Folded
from deeplab.toolbox import DROPOUT, FEATURES, ChannelDropout, NetWithAuxiliary, conv_bn_leaky

BINS = (1, 2, 3, 6)  # bins per side


def averages(bins: int, side: int, like: Tensor) -> Tensor:
    """(bins, side), type and device of ``like``: row i averages from floor(i * side / bins) to ceil((i + 1) * side / bins)."""
    start, position = torch.arange(bins, device=like.device)[:, None] * side, torch.arange(side, device=like.device) * bins
    inside = (position + bins > start) & (position < start + side)  # both in units of 1 / bins
    return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True)


def pyramid(x: Tensor) -> list[Tensor]:
    """``F.adaptive_avg_pool2d(x, bins)`` for each of ``BINS``, to rounding: (N, C, h, w) -> (N, C, bins, bins) each.

    All 50 means are one matrix product. It runs in float32 at least, also under mixed precision, which would round the factors
    to 8 or 11 bits. Torch's own pooling has no deterministic backward pass on CUDA, and exports to ONNX only with equal bins.
    """
    count, channels, height, width = x.shape
    positions = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(count, channels, height * width)
    sides = ((averages(bins, height, positions), averages(bins, width, positions)) for bins in BINS)
    matrix = torch.cat([(rows[:, None, :, None] * columns[:, None]).reshape(-1, height * width) for rows, columns in sides])
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        means = matrix.expand(count, -1, -1).bmm(positions.mT)  # N 50 C
    parts = means.to(x.dtype).mT.split([bins * bins for bins in BINS], dim=2)
    return [part.unflatten(2, (bins, bins)) for part, bins in zip(parts, BINS)]


class PyramidPooling(nn.Module):
    """The features and their means over 1, 4, 9 and 36 parts of the image, concatenated, then a 3x3 convolution."""

    def __init__(self, in_channels: int, norm: Callable[[int], nn.Module], negative_slope: float) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.stages: Any = nn.ModuleList(
            nn.Sequential(nn.Identity(), nn.Conv2d(in_channels, FEATURES, 1, bias=False), norm(FEATURES))  # 0: the pooling
            for _ in BINS
        )
        channels = in_channels + len(BINS) * FEATURES
        self.bottleneck: Any = nn.Sequential(
            nn.Conv2d(channels, FEATURES, 3, padding=1, bias=False), norm(FEATURES), ChannelDropout(DROPOUT)
        )

    def forward(self, x: Tensor, folded: Folded) -> Tensor:
        """(N, in_channels, h, w) -> (N, 512, h, w)"""
        features = []
        for means, (_, conv, bn) in zip(pyramid(x), self.stages):
            y = conv_bn_leaky(means, conv, bn, folded, self.negative_slope)  # N 512 bins bins
            # Not resize(): it compares sizes, so a program of torch.export would refuse maps with sides of 2, 3 or 6.
            features.append(F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True))
        x = torch.cat([*features, x], dim=1)  # N 4096 h w
        conv, bn, dropout = self.bottleneck
        return dropout(conv_bn_leaky(x, conv, bn, folded, self.negative_slope))


class PSPNet(NetWithAuxiliary):
    __doc__ = f"PSPNet. {NetWithAuxiliary.__doc__}"
    name = "pspnet"
    context = PyramidPooling
