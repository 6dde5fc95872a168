"""DeepLab-v2 (Chen et al., arXiv:1606.00915): a dilated ResNet with atrous spatial pyramid pooling."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab.batch_norm import Folded, fold
from deeplab.inference import check_input
from deeplab.resnet import DilatedResNet, check_classes

ATROUS_RATES = (6, 12, 18, 24)  # ASPP-L of the paper
PRODUCT_CLASSES = 32  # with more classes the taps of all rates together need too much memory


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: parallel dilated 3x3 convolutions to the classes, summed.

    The published name of the list is ``conv2d_list``; entry k has rate ``rates[k]``.
    """

    def __init__(self, in_channels: int, num_classes: int, rates: Sequence[int] = ATROUS_RATES) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv2d_list = nn.ModuleList(nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initial values: weights N(0, 0.01), biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(".weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, num_classes, h, w)"""
        if self.training and x.dtype in (torch.bfloat16, torch.float16) and self.num_classes <= PRODUCT_CLASSES:
            return self._as_one_product(x)
        first, *others = self.conv2d_list
        logits = first(x)
        for conv in others:
            logits = logits + conv(x)
        return logits

    def _as_one_product(self, x: Tensor) -> Tensor:
        """The same sum of convolutions, as one 1x1 convolution to all taps of all rates and a sum of shifted taps.

        Tensor cores need a multiple of eight channels, and 21 is none; all taps together are 756 channels. The taps are summed
        in float32, so the error is smaller than that of separate convolutions, whose sum is rounded after each. F.fold adds
        each tap at its offset from the pixel: the kernel of the convolution turned by half.
        """
        convs: list[Any] = [*self.conv2d_list]
        taps = torch.cat([conv.weight for conv in convs]).flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)  # rates*C*9 in
        exact = torch.promote_types(x.dtype, torch.float32)
        parts = F.conv2d(x, taps[:, :, None, None]).to(exact).flatten(2).chunk(len(convs), dim=1)  # N C*9 h*w each
        logits = torch.stack([conv.bias for conv in convs]).sum(dim=0)[:, None, None]
        for part, conv in zip(parts, convs):
            logits = logits + F.fold(part, x.shape[2:], 3, dilation=conv.dilation, padding=conv.padding)
        return logits


class DeepLabV2(DilatedResNet):
    """(N, 3, H, W) mean-subtracted BGR images -> (N, num_classes, h, w) logits; 8k + 1 pixels give k + 1 positions.

    ``net.config`` holds the arguments that build the same net again; it is saved in snapshots.

    Args:
        backbone, batch_norm, batch_norm_eps, stride_in_3x3, stem: see :class:`DilatedResNet`.
        num_classes: the number of classes including the background, 1..255 (255 is the ignore label).
        atrous_rates: the dilations of the head; (6, 12) gives the older two-branch head.

    Raises:
        ValueError: an unknown backbone or batch-norm mode, or a number of classes or an atrous rate out of range.
    """

    defaults: Mapping[str, Any] = MappingProxyType({})
    """Defaults of training options that differ from those of the scripts."""

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 21,
        batch_norm: str = "frozen",
        atrous_rates: Sequence[int] = ATROUS_RATES,
        stride_in_3x3: bool = False,
        batch_norm_eps: float = 1e-5,
        stem: str = "7x7",
    ) -> None:
        super().__init__(backbone, batch_norm, batch_norm_eps, stride_in_3x3, stem)
        check_classes(num_classes)
        if not atrous_rates or min(atrous_rates) < 1:
            raise ValueError(f"atrous_rates is {tuple(atrous_rates)}; expected one or more numbers of at least 1")
        self.num_classes = num_classes
        self.layer5 = ASPP(self.out_channels, num_classes, atrous_rates)
        self.config = {
            "net": "deeplabv2",
            "backbone": backbone,
            "num_classes": num_classes,
            "atrous_rates": [int(rate) for rate in atrous_rates],
            "stride_in_3x3": bool(stride_in_3x3),
            "batch_norm_eps": float(batch_norm_eps),
            "stem": stem,
        }

    def forward(self, images: Tensor, folded: Folded | None = None) -> Tensor:
        check_input(images)
        _, x = self.features(images, fold(self) if folded is None else folded)
        return self.layer5(x)

    def reset_head(self) -> None:
        """Give the head its initial values, for a file that holds the backbone only."""
        self.layer5.reset_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The learnable parameters in the published groups (``lr_mult`` and ``decay_mult`` of the official train.prototxt).

        Backbone: learning rate x1. ASPP weights: x10. ASPP biases: x20, no weight decay. Parameters that the batch-norm mode
        freezes are in no group.

        Returns:
            ``{"params": [...], "lr_scale": float, "decay_scale": float}`` per group.
        """
        head = dict(self.layer5.named_parameters())
        in_head = {id(parameter) for parameter in head.values()}
        backbone = [p for p in self.parameters() if p.requires_grad and id(p) not in in_head]
        biases = [p for name, p in head.items() if name.endswith(".bias")]
        weights = [p for name, p in head.items() if not name.endswith(".bias")]
        return [
            {"params": backbone, "lr_scale": 1.0, "decay_scale": 1.0},
            {"params": weights, "lr_scale": 10.0, "decay_scale": 1.0},
            {"params": biases, "lr_scale": 20.0, "decay_scale": 0.0},
        ]


deeplabv2 = DeepLabV2  # a function name, as torchvision's model builders have
