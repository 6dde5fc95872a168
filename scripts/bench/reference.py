"""A plain version of the published implementation: the reference of ``scripts/benchmark.py``, used by nothing else.

It follows the scripts of github.com/speedinghzl/Pytorch-Deeplab step by step. The net: batch norm after every convolution, not
folded, NCHW memory, float32, not compiled. Training: batch statistics, logits enlarged to the labels, a host sync per step to
read the loss. Evaluation: one image at a time on a 505x505 canvas, argmax in numpy, pixels counted one by one in Python on all
cores. CRF: one process per image. If the published code cannot run today or is wrong, the cheaper way is used, so that no ratio
is too good: the head sums its branches without copies, labels are shrunk on the device, masks are read in their own mode, and
all cores count equally many pixels.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet

from dataset.classes import IGNORE_LABEL, MEAN_BGR
from deeplab.resnet import BACKBONES, Bottleneck

MEAN = np.asarray(MEAN_BGR, dtype=np.float32)
CANVAS = (505, 505)  # height, width: evaluation pads every image to this size


def batch_norm(channels: int, eps: float = 1e-5) -> nn.BatchNorm2d:
    """The published batch norm: batch statistics in training, fixed weight and bias."""
    return nn.BatchNorm2d(channels, eps=eps).requires_grad_(False)


class ReferenceNet(nn.Module):
    """The same net as :class:`deeplab.DeepLabV2` with the same parameter names and batch norm not folded: torchvision's ResNet
    with the published changes of stride, dilation and pooling.

    Args:
        config: the ``config`` of a ``DeepLabV2``.
        norm: (channels, eps=...) -> batch norm module.
    """

    def __init__(self, config: Mapping[str, Any], norm: Callable[..., nn.Module] = batch_norm) -> None:
        super().__init__()
        entry, norm = BACKBONES[config["backbone"]], partial(norm, eps=config["batch_norm_eps"])
        block = resnet.Bottleneck if issubclass(entry.block, Bottleneck) else resnet.BasicBlock
        backbone: Any = resnet.ResNet(
            block, list(entry.depths), groups=entry.groups, width_per_group=entry.width, norm_layer=norm
        )
        self.conv1, self.bn1, self.relu = backbone.conv1, backbone.bn1, backbone.relu
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4
        for layer, stride, dilation in ((self.layer2, 2, 1), (self.layer3, 1, 2), (self.layer4, 1, 4)):
            first = layer[0]
            first.downsample[0].stride = (stride, stride)
            bottleneck = hasattr(first, "conv3")
            strided = 2 if bottleneck and config["stride_in_3x3"] else 1
            for number in (1, 2):
                getattr(first, f"conv{number}").stride = (stride, stride) if number == strided else (1, 1)
            for conv in layer.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
        self.layer5: Any = nn.Module()
        self.layer5.conv2d_list = nn.ModuleList(
            nn.Conv2d(backbone.fc.in_features, config["num_classes"], 3, padding=rate, dilation=rate)
            for rate in config["atrous_rates"]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes, h, w)"""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        first, *others = self.layer5.conv2d_list
        out = first(x)
        for conv in others:
            out += conv(x)
        return out


def _enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def single_scale_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of the published ``train.py``: logits enlarged to the labels, mean over all labelled pixels."""
    return F.cross_entropy(_enlarge(net(images), labels.shape[-2:]), labels, ignore_index=IGNORE_LABEL)


def multi_scale_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of the published ``train_msc.py``: the enlarged maximum of three scales, plus each scale with shrunk labels."""
    height, width = images.shape[-2:]
    logits = [net(images)]
    logits += [net(_enlarge(images, (int(height * scale), int(width * scale)))) for scale in (0.75, 0.5)]
    alike = [logits[0], *(_enlarge(other, logits[0].shape[-2:]) for other in logits[1:])]
    loss = F.cross_entropy(_enlarge(torch.stack(alike).max(dim=0)[0], (height, width)), labels, ignore_index=IGNORE_LABEL)
    for scale_logits in logits:
        shrunk = F.interpolate(labels[:, None].float(), size=scale_logits.shape[-2:], mode="nearest")[:, 0].long()
        loss = loss + F.cross_entropy(scale_logits, shrunk, ignore_index=IGNORE_LABEL)
    return loss


def make_optimizer(net: nn.Module, lr: float) -> torch.optim.SGD:
    """The published optimiser: two groups, ten times the learning rate for the head."""
    head = list(net.get_submodule("layer5").parameters())
    held = {id(parameter) for parameter in head}
    backbone = [parameter for parameter in net.parameters() if parameter.requires_grad and id(parameter) not in held]
    groups = [{"params": backbone, "lr": lr}, {"params": head, "lr": 10 * lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4)


def train_step(net: nn.Module, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor, loss_function: Callable) -> float:
    """One published training step; returns the loss, as the published script prints it."""
    optimizer.zero_grad()
    loss = loss_function(net, images, labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def read(image_path: Path, label_path: Path) -> tuple[Any, Any]:
    """A (H, W, 3) uint8 BGR image and its (H, W) uint8 label."""
    return cv2.imread(str(image_path), cv2.IMREAD_COLOR), np.array(Image.open(label_path))


def training_sample(image_path: Path, label_path: Path, crop: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One published training sample: scale, subtract the mean, pad, crop, flip; (3, h, w) and (h, w) float32."""
    image, label = read(image_path, label_path)
    scale = 0.5 + random.randint(0, 11) / 10
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    image = np.asarray(image, np.float32) - MEAN
    bottom, right = (max(side - have, 0) for side, have in zip(crop, label.shape))
    if bottom or right:
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(0.0, 0.0, 0.0))
        label = cv2.copyMakeBorder(label, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(IGNORE_LABEL,))
    top, left = (random.randint(0, have - side) for side, have in zip(crop, label.shape))
    image = image[top : top + crop[0], left : left + crop[1]].transpose(2, 0, 1)
    label = np.asarray(label[top : top + crop[0], left : left + crop[1]], np.float32)
    flip = random.choice((-1, 1))
    return image[:, :, ::flip].copy(), label[:, ::flip].copy()


def on_canvas(image: np.ndarray, canvas: tuple[int, int]) -> Tensor:
    """(H, W, 3) uint8 BGR -> (1, 3, *canvas) float32 minus the mean, padded with 0 at the bottom and right."""
    height, width = image.shape[:2]
    bottom, right = max(canvas[0] - height, 0), max(canvas[1] - width, 0)
    pixels: Any = np.asarray(image, np.float32) - MEAN
    pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(0.0, 0.0, 0.0))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def predict(net: nn.Module, image: np.ndarray, canvas: tuple[int, int], device: torch.device) -> np.ndarray:
    """The classes of one image: (H, W, 3) uint8 BGR -> (H, W) int64; logits enlarged to the canvas, argmax in numpy."""
    height, width = image.shape[:2]
    with torch.no_grad():
        inputs = on_canvas(image, canvas)
        logits = _enlarge(net(inputs.to(device)), inputs.shape[-2:]).cpu().numpy()[0]
    return np.argmax(logits[:, :height, :width].transpose(1, 2, 0), axis=2)


def count(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """The confusion matrix of two flat arrays, pixel by pixel in Python: (num_classes, num_classes) float64."""
    matrix = np.zeros((num_classes, num_classes))
    for i in range(len(labels)):
        if labels[i] < num_classes:
            matrix[labels[i], predictions[i]] += 1.0
    return matrix


def crf(image: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The dense CRF with the published settings: (H, W, 3) uint8 BGR and (C, h, w) logits -> (H, W) classes."""
    from pydensecrf import densecrf, utils

    height, width = image.shape[:2]
    canvas = [8 * (side - 1) + 1 for side in logits.shape[-2:]]
    probabilities = _enlarge(torch.from_numpy(logits)[None], canvas)[0, :, :height, :width].softmax(dim=0).numpy()
    model = densecrf.DenseCRF2D(width, height, len(logits))
    model.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probabilities)))
    model.addPairwiseGaussian(sxy=1, compat=3)
    model.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(image[:, :, ::-1]), compat=4)
    return np.argmax(model.inference(10), axis=0).reshape(height, width)
