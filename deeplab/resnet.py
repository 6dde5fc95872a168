"""Dilated ResNet backbones at output stride 8 (He et al., arXiv:1512.03385; Chen et al., arXiv:1606.00915).

The parameter names are the published ones (``conv1``, ``bn1``, ``layer{1..4}.{i}.conv1`` ...), so published DeepLab-ResNet
weights load unchanged. Three things differ from torchvision's ResNet, because the published weights come from a Caffe net:
the pool rounds its output size up, the stride of a stage sits in the first 1x1 convolution, and every block of a dilated
stage uses that stage's dilation (torchvision's first block uses the previous stage's).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplab.batch_norm import (
    BATCH_NORM_MODES,
    Folded,
    conv_bn,
    conv_bn_pairs,
    kept_statistics,
    make_norm,
    scale_and_shift,
)

STEMS = ("7x7", "deep")
MARK = "deeplab"
"""The key of a net's ``config`` in the metadata of its state_dict."""


Norm = Callable[[int], nn.Module]
"""Makes the batch norm of a number of channels."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the block of ResNet-18 and -34.

    (N, inplanes, h, w) -> (N, planes, h / stride, w / stride), with ``width`` channels between the convolutions.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, width: int, groups: int, stride: int, dilation: int, norm: Norm, stride_in_3x3: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, width, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, planes, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(inplanes, planes, stride, norm)

    def forward(self, x: Tensor, folded: Folded | None = None) -> Tensor:
        y = F.relu(conv_bn(x, self.conv1, self.bn1, folded), inplace=True)
        y = conv_bn(y, self.conv2, self.bn2, folded)
        shortcut = x if self.downsample is None else conv_bn(x, self.downsample[0], self.downsample[1], folded)
        return F.relu(y + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut; the block of ResNet-50, -101 and -152.

    (N, inplanes, h, w) -> (N, 4 planes, h / stride, w / stride); the 3x3 has ``width`` channels in ``groups`` groups.
    """

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, width: int, groups: int, stride: int, dilation: int, norm: Norm, stride_in_3x3: bool
    ) -> None:
        super().__init__()
        # MSRA and Caffe stride the first 1x1; torchvision ("ResNet v1.5") strides the 3x3. Weights work only with their own.
        stride1, stride2 = (1, stride) if stride_in_3x3 else (stride, 1)
        self.conv1 = nn.Conv2d(inplanes, width, 1, stride1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride2, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.downsample = _shortcut(inplanes, planes * self.expansion, stride, norm)

    def forward(self, x: Tensor, folded: Folded | None = None) -> Tensor:
        y = F.relu(conv_bn(x, self.conv1, self.bn1, folded), inplace=True)
        y = F.relu(conv_bn(y, self.conv2, self.bn2, folded), inplace=True)
        y = conv_bn(y, self.conv3, self.bn3, folded)
        shortcut = x if self.downsample is None else conv_bn(x, self.downsample[0], self.downsample[1], folded)
        return F.relu(y + shortcut, inplace=True)


def _recomputed(block: nn.Module, x: Tensor, folded: Folded) -> Tensor:
    """``block(x, folded)``; its activations are not stored but computed again in the backward pass."""
    folded.multiply(block)
    if torch.compiler.is_compiling():  # compiled code updates the statistics once, even if it recomputes
        return checkpoint(block, x, folded, use_reentrant=False, preserve_rng_state=False)
    contexts = lambda: (nullcontext(), kept_statistics(block))  # noqa: E731 (first pass, recomputation)
    return checkpoint(block, x, folded, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _shortcut(inplanes: int, outplanes: int, stride: int, norm: Norm) -> Any:
    """The projection of a block's input (published name ``downsample``); None if the input already fits."""
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))


class Backbone(NamedTuple):
    """An entry of ``BACKBONES``, the table that commands and weights files read.

    Attributes:
        block: the class of the blocks; subclasses of the two work as well.
        depths: blocks in each of the four stages.
        groups, width: torchvision's ``groups`` and ``width_per_group``. In the first stage the inner convolutions have
            ``groups`` groups of ``width`` channels; each later stage doubles the channels.
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    groups: int = 1
    width: int = 64


BACKBONES = {
    "resnet18": Backbone(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Backbone(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Backbone(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Backbone(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Backbone(Bottleneck, (3, 8, 36, 3)),
}


def check_classes(num_classes: int) -> None:
    """Raise :class:`ValueError` for a number of classes that labels of one byte cannot hold."""
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes is {num_classes}; expected 1..255 (255 is the ignore label)")


class DilatedResNet(nn.Module):
    """A ResNet backbone at output stride 8: stage 3 has stride 1 and dilation 2, stage 4 stride 1 and dilation 4.

    An input side of 8k + 1 pixels gives k + 1 positions, 8 pixels apart: 321 -> 41, 505 -> 64. Other sides work as well;
    the pool rounds up: 320 -> 41, 512 -> 65.

    Args:
        backbone: one of ``BACKBONES``.
        batch_norm: ``"frozen"`` (``FrozenBatchNorm2d``: nothing in it changes, not even after ``.train()``), ``"stats"``
            (training updates the running statistics; weight and bias are fixed) or ``"full"`` (everything is trained).
        batch_norm_eps: added to the variance; 1e-5 in all published nets except those trained with TensorFlow-Slim (1e-3).
        stride_in_3x3: the stride of a bottleneck stage sits in its 3x3 (torchvision) instead of its first 1x1 (published).
        stem: ``"7x7"``: one convolution; ``"deep"``: three 3x3 convolutions of 64, 64 and 128 channels, as in MIT's scene
            parsing nets and pytorch-segmentation-toolbox.

    Raises:
        ValueError: an unknown ``backbone``, ``batch_norm`` or ``stem``.
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        batch_norm: str = "frozen",
        batch_norm_eps: float = 1e-5,
        stride_in_3x3: bool = False,
        stem: str = "7x7",
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(
                f"backbone {backbone!r} is unknown; choose one of {', '.join(BACKBONES)}"
                "; to open a weights file, use deeplab.load_net(path)"
            )
        if batch_norm not in BATCH_NORM_MODES:
            raise ValueError(f"batch_norm {batch_norm!r} is unknown; choose one of {', '.join(BATCH_NORM_MODES)}")
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is unknown; choose one of {', '.join(STEMS)}")
        block, depths, groups, width = BACKBONES[backbone]
        self.config: dict[str, Any] = {}  # set by each net; make_net builds the same net from it
        self.norm = partial(make_norm, batch_norm=batch_norm, eps=batch_norm_eps)
        self.grad_checkpoint = False

        def stage(inplanes: int, planes: int, depth: int, stride: int, dilation: int) -> nn.Sequential:
            inner = planes * width // 64 * groups
            blocks = [block(inplanes, planes, inner, groups, stride, dilation, self.norm, stride_in_3x3)]
            for _ in range(1, depth):
                blocks.append(block(planes * block.expansion, planes, inner, groups, 1, dilation, self.norm, stride_in_3x3))
            return nn.Sequential(*blocks)

        self.stem, channels = stem, 64
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = self.norm(64)
        else:
            self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
            self.bn1 = self.norm(64)
            self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
            self.bn2 = self.norm(64)
            self.conv3 = nn.Conv2d(64, channels := 128, 3, padding=1, bias=False)
            self.bn3 = self.norm(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)  # Caffe rounds pooled sizes up
        self.layer1 = stage(channels, 64, depths[0], stride=1, dilation=1)
        self.layer2 = stage(64 * block.expansion, 128, depths[1], stride=2, dilation=1)
        self.layer3 = stage(128 * block.expansion, 256, depths[2], stride=1, dilation=2)
        self.layer4 = stage(256 * block.expansion, 512, depths[3], stride=1, dilation=4)
        self.out_channels = 512 * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if batch_norm == "full" and isinstance(module, (BasicBlock, Bottleneck)):
                # Each block starts as its shortcut, for higher learning rates from scratch (Goyal et al., arXiv:1706.02677).
                last: Any = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As in torch; also puts ``config`` into the metadata of the state_dict, which ``torch.save`` keeps."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][MARK] = dict(self.config)

    def features(self, x: Tensor, folded: Folded) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) mean-subtracted BGR images -> the outputs of stages 3 and 4: (N, out_channels / 2, h, w)
        and (N, out_channels, h, w), h and w about an eighth of H and W.

        ``folded`` is :func:`deeplab.batch_norm.fold` of the net.
        """
        x = F.relu(conv_bn(x, self.conv1, self.bn1, folded), inplace=True)  # N 64 H/2 W/2
        if self.stem == "deep":
            x = F.relu(conv_bn(x, self.conv2, self.bn2, folded), inplace=True)
            x = F.relu(conv_bn(x, self.conv3, self.bn3, folded), inplace=True)  # N 128 H/2 W/2
        x = self.maxpool(x)  # H/4 W/4
        recompute = self.grad_checkpoint and torch.is_grad_enabled()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):  # H/4, H/8, H/8, H/8
            before = x
            for block in stage:
                x = _recomputed(block, x, folded) if recompute else block(x, folded)
        return before, x


def fold_batch_norm(net: DilatedResNet) -> nn.Module:
    """Fold every batch norm of a net into its convolution permanently, for prediction; changes and returns ``net``.

    Each convolution gets a scaled weight and a bias; each batch norm becomes ``nn.Identity``. The running statistics are used
    in every batch norm mode. Afterwards the net can be neither trained as before nor saved under the published names.
    """
    names = {module: name for name, module in net.named_modules()}
    for conv, bn in conv_bn_pairs(net):
        with torch.no_grad():
            scale, shift = scale_and_shift([bn])
            conv.weight.mul_(scale[:, None, None, None])
            conv.bias = nn.Parameter(shift if conv.bias is None else shift + scale * conv.bias)
        parent, _, name = names[bn].rpartition(".")
        setattr(net.get_submodule(parent), name, nn.Identity())
    return net
