"""Helpers for tests of nets: naive loops that compute the same numbers, and random statistics."""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dataset import MEAN_BGR
from deeplab import BACKBONES, deeplabv2
from deeplab.resnet import Backbone, BasicBlock
from tests.helpers import TOY_CLASSES

WHOLE = {"resnet18": BACKBONES["resnet18"]}
THIN = {"resnet18": Backbone(BasicBlock, (2, 2, 2, 2), groups=32, width=2)}
"""For ``BACKBONES``: a ResNet-18 with the same names and 1/32 of the weights; runs are ten times as fast."""


def naive_logits(snapshot: Path, toy_voc: Path, i: int) -> np.ndarray:
    """One image from its file to full-size logits: mean, padding to 8k + 1, unfolded net, enlarging, cropping."""
    net = deeplabv2("resnet18", TOY_CLASSES).double()
    net.load_state_dict(torch.load(snapshot, weights_only=True)["model"])
    image = cv2.imread(str(toy_voc / "JPEGImages" / f"toy_{i}.jpg")).astype(np.float64) - MEAN_BGR
    height, width = image.shape[:2]
    padded = np.zeros((3, (height + 6) // 8 * 8 + 1, (width + 6) // 8 * 8 + 1))
    padded[:, :height, :width] = image.transpose(2, 0, 1)
    with torch.no_grad():
        logits = naive_forward(net.eval(), torch.from_numpy(padded)[None])[0].numpy()
    return np.stack([naive_bilinear(plane, padded.shape[1:])[:height, :width] for plane in logits])


def naive_scores(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Pixel accuracy and mean IoU over all pixels, one class at a time with sets of pixels."""
    labels = np.concatenate([label.ravel() for label, _ in pairs])
    predictions = np.concatenate([prediction.ravel() for _, prediction in pairs])
    predictions, labels = predictions[labels != 255], labels[labels != 255]
    ious = []
    for k in range(TOY_CLASSES):
        either = np.logical_or(labels == k, predictions == k).sum()
        if either:
            ious.append(np.logical_and(labels == k, predictions == k).sum() / either)
    return float((labels == predictions).mean()), float(np.mean(ious))


def naive_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) at another size with the corners in place, one pixel at a time in float64."""
    result = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = i * (x.shape[0] - 1) / (size[0] - 1) if size[0] > 1 else 0.0
            z = j * (x.shape[1] - 1) / (size[1] - 1) if size[1] > 1 else 0.0
            y0, z0 = min(int(y), x.shape[0] - 2), min(int(z), x.shape[1] - 2)
            top = x[y0, z0] * (1 - z + z0) + x[y0, z0 + 1] * (z - z0)
            bottom = x[y0 + 1, z0] * (1 - z + z0) + x[y0 + 1, z0 + 1] * (z - z0)
            result[i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return result


class EveryEighth(nn.Module):
    """Replaces the net: its logits are every 8th pixel of the image, so predictions can be computed by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::8, ::8]


def enlarged_sizes(monkeypatch) -> list[int]:
    """A list to which each later call of ``F.interpolate`` appends the number of elements of its result."""
    sizes: list[int] = []
    enlarge = torch.nn.functional.interpolate

    def watched(*args, **kwargs):
        result = enlarge(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    return sizes


def randomise_batch_norm(net: nn.Module) -> nn.Module:
    """Weights, biases and running statistics away from 1 and 0, so that a test fails if one is left out."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
                value = getattr(module, name).data
                value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) * (high - low) + low)
    return net


def naive_forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The net written again, with textbook batch norm after each convolution."""

    def norm(y, bn):
        mean, var, weight, bias = (v[None, :, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return (y - mean) / torch.sqrt(var + bn.eps) * weight + bias

    def block(x, m):
        shortcut = norm(m.downsample[0](x), m.downsample[1]) if m.downsample is not None else x
        y = torch.relu(norm(m.conv1(x), m.bn1))
        y = norm(m.conv2(y), m.bn2)
        if hasattr(m, "conv3"):
            y = norm(m.conv3(torch.relu(y)), m.bn3)
        return torch.relu(y + shortcut)

    x = torch.relu(norm(net.conv1(x), net.bn1))
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        for m in layer:
            x = block(x, m)
    return sum(F.conv2d(x, c.weight, c.bias, padding=r, dilation=r) for c, r in zip(net.layer5.conv2d_list, (6, 12, 18, 24)))
