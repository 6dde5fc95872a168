"""Batch norm in its three modes, and frozen batch norm as a part of the convolution before it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

BATCH_NORM_MODES = ("frozen", "stats", "full")

Folded = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""A frozen batch norm -> the weight and the bias of the convolution before it that does the batch norm as well."""


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module, folded: Folded | None = None) -> Tensor:
    """``bn(conv(x))``, in one convolution where ``folded``, of :func:`fold`, holds ``bn``: (N, C_out, h, w)."""
    if not folded or bn not in folded:
        return bn(conv(x))
    return F.conv2d(x, *folded[bn], conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_bn_pairs(net: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Every batch norm of a net with the convolution before it, which all nets here register right before it."""
    norms = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, *norms))]
    return [(conv, bn) for conv, bn in pairwise(layers) if isinstance(conv, nn.Conv2d) and isinstance(bn, norms)]


def fold(net: nn.Module) -> Folded:
    """Fold each frozen batch norm into the convolution before it, for the forward passes that share one backward pass.

    A frozen batch norm is the affine map ``y * scale + shift`` per channel, so ``bn(conv(x, w))`` equals
    ``conv(x, w * scale) + shift``. ``conv.weight`` stays the parameter that is trained and saved, and gets the same gradient;
    but no activation is stored between the two, as the unfolded pair does. Nothing is kept from one call to the next: for all
    layers at once, the constants cost eight operations, and cannot be older than the buffers that they come from.

    Returns:
        The weights and biases, under autocast in its type; other batch norms are not in it.
    """
    frozen = [(conv, bn) for conv, bn in conv_bn_pairs(net) if isinstance(bn, FrozenBatchNorm2d)]
    if not frozen:
        return {}
    scale, shift = scale_and_shift([bn for _, bn in frozen])
    device = scale.device.type
    autocast = not scale.is_meta and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else scale.dtype
    channels = [conv.out_channels for conv, _ in frozen]
    folded = {}
    scales, shifts = scale[:, None, None, None].split(channels), shift.to(dtype).split(channels)
    for (conv, bn), a, b in zip(frozen, scales, shifts):
        bias = b if conv.bias is None else (conv.bias * a.flatten() + b).to(dtype)
        folded[bn] = (conv.weight * a).to(dtype), bias
    return folded


def scale_and_shift(norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """What batch norms do on running statistics, ``y * scale + shift``: (channels of all of them,) each."""
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
    """A context in which a forward pass in training mode moves no running statistic and no counter.

    For passes that are made twice, as activation checkpointing does. The statistics are still handed to the kernel, with a
    momentum of 0: checkpointing wants both passes to save the same tensors for backward.
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
