"""DeepLabv3 (Chen et al., arXiv:1706.05587) as published by pytorch-segmentation-toolbox."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deeplab.batch_norm import Folded
from deeplab.toolbox import DROPOUT, FEATURES, ChannelDropout, NetWithAuxiliary, conv_bn_leaky

RATES = (12, 24, 36)  # at output stride 8


class ASPPv3(nn.Module):
    """Atrous spatial pyramid pooling with global average pooling: five parallel branches, then a 1x1 convolution."""

    def __init__(self, in_channels: int, norm: Callable[[int], nn.Module], negative_slope: float, channels: int = 256) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.conv1: Any = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels)
        )
        self.conv2: Any = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))
        self.conv3, self.conv4, self.conv5 = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate, bias=False), norm(channels))
            for rate in RATES
        )
        self.bottleneck: Any = nn.Sequential(
            nn.Conv2d(5 * channels, FEATURES, 1, bias=False), norm(FEATURES), ChannelDropout(DROPOUT)
        )

    def forward(self, x: Tensor, folded: Folded) -> Tensor:
        """(N, in_channels, h, w) -> (N, 512, h, w)"""
        pool, conv, bn = self.conv1
        pooled = conv_bn_leaky(pool(x), conv, bn, folded, self.negative_slope)  # N 256 1 1
        branches: Any = (self.conv2, self.conv3, self.conv4, self.conv5)
        features = [conv_bn_leaky(x, conv, bn, folded, self.negative_slope) for conv, bn in branches]
        x = torch.cat([pooled.expand(-1, -1, *x.shape[-2:]), *features], dim=1)  # N 1280 h w
        conv, bn, dropout = self.bottleneck
        return dropout(conv_bn_leaky(x, conv, bn, folded, self.negative_slope))


class DeepLabV3(NetWithAuxiliary):
    __doc__ = f"DeepLabv3. {NetWithAuxiliary.__doc__}"
    name = "deeplabv3"
    context = ASPPv3
