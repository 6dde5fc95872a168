"""The common part of DeepLabv3 and PSPNet as published by pytorch-segmentation-toolbox: a head and an auxiliary one on stage 3.

The parameter names are the published ones: ``head.0`` is the context module, ``head.1`` the classifier, ``dsn`` the auxiliary
head. The toolbox's InPlace-ABN multiplies by |weight| + eps; ``deeplab.weights`` converts that to the weight of a plain batch
norm. In the heads it includes a leaky ReLU of slope 0.01, which is in :func:`conv_bn_leaky` here. The PSPNet of hszhao/semseg
has slope 0 (ReLU) and 256 channels in the auxiliary head.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from deeplab.batch_norm import Folded, conv_bn, fold
from deeplab.inference import check_input
from deeplab.resnet import DilatedResNet, check_classes

FEATURES = 512  # channels before each classifier
DROPOUT = 0.1  # of whole channels, before each classifier


def conv_bn_leaky(x: Tensor, conv: nn.Conv2d, bn: nn.Module, folded: Folded | None, negative_slope: float) -> Tensor:
    """:func:`deeplab.batch_norm.conv_bn`, then the leaky ReLU of the heads."""
    return F.leaky_relu(conv_bn(x, conv, bn, folded), negative_slope, inplace=True)


class ChannelDropout(nn.Dropout2d):
    """``Dropout2d`` that draws for the whole batch of all processes and uses the part of its own process.

    So with the same seed everywhere the result does not depend on the number of processes. ``shard``: (rank, world size).
    """

    shard = (0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        number, processes = self.shard
        kept = torch.rand(processes * x.shape[0], x.shape[1], 1, 1, device=x.device) >= self.p
        return x * kept.chunk(processes)[number].to(x.dtype).div(1 - self.p)


class NetWithAuxiliary(DilatedResNet):
    """(N, 3, H, W) mean-subtracted BGR images -> (N, num_classes, h, w) logits; in training, the logits of both heads.

    ``net.config`` holds the arguments that build the same net again; it is saved in snapshots.

    Args:
        backbone, batch_norm, batch_norm_eps, stride_in_3x3, stem: see :class:`DilatedResNet`; the defaults are the published.
        num_classes: the number of classes, 1..255 (255 is the ignore label).
        negative_slope: the slope of the leaky ReLU in the heads, at least 0.
        auxiliary_channels: channels of the auxiliary head before its classifier.

    Raises:
        ValueError: an unknown backbone, batch-norm mode or stem, or a number out of range.
    """

    name: str
    context: type[nn.Module]
    """``head.0``: (in_channels, norm, negative_slope) -> a module (N, in_channels, h, w), folded -> (N, 512, h, w)."""
    defaults: Mapping[str, Any] = MappingProxyType(
        {"learning_rate": 1e-2, "loss_size": "input", "batch_norm": "full", "aux_weight": 0.4}
    )
    """Defaults of training options: the published values."""

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 19,
        batch_norm: str = "full",
        stride_in_3x3: bool = True,
        batch_norm_eps: float = 1e-5,
        stem: str = "deep",
        negative_slope: float = 0.01,
        auxiliary_channels: int = FEATURES,
    ) -> None:
        super().__init__(backbone, batch_norm, batch_norm_eps, stride_in_3x3, stem)
        check_classes(num_classes)
        if not 0 <= negative_slope < 1 or auxiliary_channels < 1:
            raise ValueError(
                f"negative_slope is {negative_slope} and auxiliary_channels is {auxiliary_channels}; expected 0 <= slope < 1 "
                "and one channel or more"
            )
        self.num_classes = num_classes
        self.negative_slope = negative_slope
        context = self.context(self.out_channels, self.norm, negative_slope)
        self.head: Any = nn.Sequential(context, nn.Conv2d(FEATURES, num_classes, 1))
        self.dsn: Any = nn.Sequential(
            nn.Conv2d(self.out_channels // 2, auxiliary_channels, 3, padding=1),
            self.norm(auxiliary_channels),
            ChannelDropout(DROPOUT),
            nn.Conv2d(auxiliary_channels, num_classes, 1),
        )
        self.config = {
            "net": self.name,
            "backbone": backbone,
            "num_classes": num_classes,
            "stride_in_3x3": bool(stride_in_3x3),
            "batch_norm_eps": float(batch_norm_eps),
            "stem": stem,
            "negative_slope": float(negative_slope),
            "auxiliary_channels": int(auxiliary_channels),
        }

    def forward(self, images: Tensor, folded: Folded | None = None, auxiliary: bool | None = None) -> Any:
        """The logits of ``head``; with ``auxiliary``, by default in training, the pair of logits of ``head`` and ``dsn``."""
        check_input(images)
        folded = fold(self) if folded is None else folded
        third, fourth = self.features(images, folded)
        logits = self.head[1](self.head[0](fourth, folded))
        if not (self.training if auxiliary is None else auxiliary):
            return logits
        x = conv_bn_leaky(third, self.dsn[0], self.dsn[1], folded, self.negative_slope)
        return logits, self.dsn[3](self.dsn[2](x))

    def reset_head(self) -> None:
        """Give both heads torch's initial values, for a file that holds the backbone only."""
        for module in (*self.head.modules(), *self.dsn.modules()):
            if isinstance(module, FrozenBatchNorm2d):
                for buffer, value in ((module.weight, 1), (module.bias, 0), (module.running_mean, 0), (module.running_var, 1)):
                    buffer.fill_(value)
            elif isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All learnable parameters in one group, as published: ``{"params": [...], "lr_scale": 1, "decay_scale": 1}``."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0, "decay_scale": 1.0}]
