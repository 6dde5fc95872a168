"""PSPNet (Zhao et al., arXiv:1612.01105) as pytorch-segmentation-toolbox publishes it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deeplab.auxiliary import DROPOUT, FEATURES, NetWithAuxiliary, conv_bn_leaky
from deeplab.batch_norm import Folded, Pair
from deeplab.multiscale import resize

BINS = (1, 2, 3, 6)  # a side


class PyramidPooling(nn.Module):
    """The features beside their means over 1, 4, 9 and 36 parts of the picture, and a 3x3 over all of them."""

    def __init__(self, in_channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stages: Any = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(in_channels, FEATURES, 1, bias=False), norm(FEATURES))
            for bins in BINS
        )
        channels = in_channels + len(BINS) * FEATURES
        self.bottleneck: Any = nn.Sequential(
            nn.Conv2d(channels, FEATURES, 3, padding=1, bias=False), norm(FEATURES), nn.Dropout2d(DROPOUT)
        )

    def pairs(self) -> list[Pair]:
        return [*((conv, bn) for _, conv, bn in self.stages), (self.bottleneck[0], self.bottleneck[1])]

    def forward(self, x: Tensor, folded: Sequence[Folded | None]) -> Tensor:
        """(N, in_channels, h, w) -> (N, 512, h, w); ``folded``: :func:`deeplab.batch_norm.fold` of :meth:`pairs`."""
        features = []
        for (pool, conv, bn), weights in zip(self.stages, folded):
            features.append(resize(conv_bn_leaky(pool(x), conv, bn, weights), x.shape[-2:]))
        x = torch.cat([*features, x], dim=1)  # N 4096 h w
        conv, bn, dropout = self.bottleneck
        return dropout(conv_bn_leaky(x, conv, bn, folded[-1]))


class PSPNet(NetWithAuxiliary):
    __doc__ = f"PSPNet. {NetWithAuxiliary.__doc__}"
    name = "pspnet"
    context = PyramidPooling
