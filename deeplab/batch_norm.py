"""The three modes of batch norm, and the folding of frozen batch norm into the convolution before it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

BATCH_NORM_MODES = ("frozen", "stats", "full")


class Folded:
    """The frozen batch norms of a net, each folded into the convolution before it, for forward passes with a common backward.

    The scale and shift of all are computed at once. The weight of a convolution is multiplied by its scale when it is first
    used, and the product is kept for the other passes. So the backward pass computes the gradients one by one, last layer
    first, and DistributedDataParallel sends them meanwhile.

    Args:
        constants: frozen batch norm -> its scale, (C, 1, 1, 1), and its shift, (C,) of type ``dtype``.
        dtype: the type of the folded weights and biases.
    """

    def __init__(self, constants: Mapping[nn.Module, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        self.constants, self.dtype = constants, dtype
        self.products: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def weight_and_bias(self, conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
        """The weight and bias of ``conv`` with ``bn`` folded into it."""
        if bn not in self.products:
            scale, shift = self.constants[bn]
            bias = shift if conv.bias is None else (conv.bias * scale.flatten() + shift).to(self.dtype)
            self.products[bn] = (conv.weight * scale).to(self.dtype), bias
        return self.products[bn]

    def multiply(self, module: nn.Module) -> None:
        """Multiply all weights of a module now: a recomputed forward pass must find the same products as the first one."""
        for conv, bn in conv_bn_pairs(module):
            if bn in self.constants:
                self.weight_and_bias(conv, bn)


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module, folded: Folded | None = None) -> Tensor:
    """``bn(conv(x))``, as one convolution if ``folded`` (see :func:`fold`) holds ``bn``: (N, C_out, h, w)."""
    if folded is None or bn not in folded.constants:
        return bn(conv(x))
    weight, bias = folded.weight_and_bias(conv, bn)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_bn_pairs(net: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Each batch norm of a net with its convolution, which all nets here register right before it."""
    norms = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, *norms))]
    return [(conv, bn) for conv, bn in pairwise(layers) if isinstance(conv, nn.Conv2d) and isinstance(bn, norms)]


def fold(net: nn.Module) -> Folded:
    """Fold each frozen batch norm into the convolution before it, for forward passes with a common backward pass.

    A frozen batch norm is the affine map ``y * scale + shift`` per channel, so ``bn(conv(x, w))`` equals
    ``conv(x, w * scale) + shift``. ``conv.weight`` stays the parameter that is trained and saved, and gets the same gradient,
    but no activation is stored between the two. Nothing is kept between calls, so the constants are never older than their
    buffers; computing them for all layers at once costs eight operations.

    Under autocast the weights and biases have autocast's type. Other batch norms are not folded.
    """
    frozen = [bn for _, bn in conv_bn_pairs(net) if isinstance(bn, FrozenBatchNorm2d)]
    if not frozen:
        return Folded({}, torch.float32)
    scale, shift = scale_and_shift(frozen)
    device = scale.device.type
    autocast = not scale.is_meta and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else scale.dtype
    channels = [len(bn.weight) for bn in frozen]
    constants = zip(scale[:, None, None, None].split(channels), shift.to(dtype).split(channels))
    return Folded(dict(zip(frozen, constants)), dtype)


def scale_and_shift(norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The affine map ``y * scale + shift`` of batch norms that use running statistics: (channels of all of them,) each."""
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (torch.cat([getattr(bn, name) for bn in norms]) for name in names)
    (eps,) = {bn.eps for bn in norms}
    scale = weight * (var + eps).rsqrt()
    return scale, bias.addcmul(mean, scale, value=-1)


def make_norm(channels: int, batch_norm: str, eps: float) -> nn.Module:
    """The batch norm of a mode, one of ``BATCH_NORM_MODES``."""
    if batch_norm == "frozen":
        return FrozenBatchNorm2d(channels, eps=eps)
    bn = nn.BatchNorm2d(channels, eps=eps)
    bn.requires_grad_(batch_norm == "full")
    return bn


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """A context in which a forward pass in training mode changes no running statistics and no counter.

    It is for one of the two forward passes of activation checkpointing. The kernel still gets the statistics, with a momentum
    of 0: checkpointing needs both passes to save the same tensors for backward.
    """
    before = [
        (norm, norm.momentum, cast(Tensor, norm.num_batches_tracked))
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    ]
    for norm, _, counter in before:
        norm.momentum, norm.num_batches_tracked = 0.0, counter.clone()
    try:
        yield
    finally:
        for norm, momentum, counter in before:
            norm.momentum, norm.num_batches_tracked = momentum, counter
