"""DeepLabv3 (Chen et al., arXiv:1706.05587) as pytorch-segmentation-toolbox publishes it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deeplab.batch_norm import Folded, Pair
from deeplab.toolbox import DROPOUT, FEATURES, ChannelDropout, NetWithAuxiliary, conv_bn_leaky

RATES = (12, 24, 36)  # of output stride 8


class ASPPv3(nn.Module):
    """Atrous spatial pyramid pooling with the picture's mean: five branches side by side, and a 1x1 over them."""

    def __init__(self, in_channels: int, norm: Callable[[int], nn.Module], channels: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))
        self.conv2 = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))
        for number, rate in enumerate(RATES, start=3):
            conv = nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate, bias=False)
            setattr(self, f"conv{number}", nn.Sequential(conv, norm(channels)))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(5 * channels, FEATURES, 1, bias=False), norm(FEATURES), ChannelDropout(DROPOUT)
        )

    def pairs(self) -> list[Pair]:
        branches = [getattr(self, f"conv{number}") for number in range(1, 6)]
        return [*((branch[-2], branch[-1]) for branch in branches), (self.bottleneck[0], self.bottleneck[1])]

    def forward(self, x: Tensor, folded: Sequence[Folded | None]) -> Tensor:
        """(N, in_channels, h, w) -> (N, 512, h, w); ``folded``: :func:`deeplab.batch_norm.fold` of :meth:`pairs`."""
        (mean, bn), *branches, (bottleneck, last) = self.pairs()
        pooled = conv_bn_leaky(self.conv1[0](x), mean, bn, folded[0])  # N 256 1 1
        features = [pooled.expand(-1, -1, *x.shape[-2:])]
        features += [conv_bn_leaky(x, conv, norm, weights) for (conv, norm), weights in zip(branches, folded[1:])]
        x = torch.cat(features, dim=1)  # N 1280 h w
        return self.bottleneck[2](conv_bn_leaky(x, bottleneck, last, folded[5]))


class DeepLabV3(NetWithAuxiliary):
    __doc__ = f"DeepLabv3. {NetWithAuxiliary.__doc__}"
    name = "deeplabv3"
    context = ASPPv3
