"""Inputs of the benchmark: synthetic images and labels, and nets with random weights."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from dataset import VOCSegmentation, read_ids
from deeplab import BACKBONES, Net, make_net
from deeplab.resnet import Bottleneck
from scripts.bench import reference
from utils.visualize import save_indexed_png

SIZES = ((375, 500), (500, 375), (333, 500), (375, 500), (500, 333))  # height, width: common in VOC
LIST = "ImageSets/Segmentation/train.txt"


def make_images(root: Path, count: int, num_classes: int) -> None:
    """Write images with coarse and fine structure and labels of smooth regions, in the VOC layout; the same on every call."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    ids = [f"image_{number:04d}" for number in range(count)]
    for image_id, (height, width) in zip(ids, itertools.cycle(SIZES)):
        coarse = rng.integers(0, 256, (8, 10, 3)).astype(np.float32)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 8, (height, width, 3))
        cv2.imwrite(str(root / "JPEGImages" / f"{image_id}.jpg"), np.clip(image, 0, 255).astype(np.uint8))
        present = np.append(0, rng.integers(0, num_classes, 3))  # an image has few classes
        fields = [cv2.resize(rng.random((5, 6)), (width, height), interpolation=cv2.INTER_CUBIC) for _ in present]
        label = present[np.argmax(fields, axis=0)].astype(np.uint8)
        label[:3] = 255
        save_indexed_png(root / "SegmentationClass" / f"{image_id}.png", label)
    (root / LIST).write_text("\n".join(ids) + "\n")


def open_images(args: Namespace, transform: Callable | None = None) -> VOCSegmentation:
    """The data set of :func:`make_images`."""
    ids = read_ids(Path(args.data_dir) / LIST)
    return VOCSegmentation(args.data_dir, ids, num_classes=args.num_classes, transform=transform)


def random_net(args: Namespace) -> Net:
    """A net with random weights whose activations stay moderate through all blocks."""
    torch.manual_seed(0)
    net = make_net({"net": "deeplabv2", "backbone": args.backbone, "num_classes": args.num_classes})
    last = "bn3.weight" if issubclass(BACKBONES[args.backbone].block, Bottleneck) else "bn2.weight"
    for name, buffer in net.named_buffers():
        if name.endswith(last):
            buffer.fill_(0.25)
    for name, parameter in net.named_parameters():
        if name.startswith("layer5.") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.001)
    return net


def reference_net(args: Namespace, device: torch.device, norm: Callable[..., nn.Module] = reference.batch_norm) -> nn.Module:
    """The reference implementation with the same weights."""
    net = random_net(args)
    unfolded = reference.ReferenceNet(net.config, norm)
    unfolded.load_state_dict(net.state_dict(), strict=False)  # not strict: batch norm has a counter that a frozen one lacks
    return unfolded.to(device)


def our_modes(args: Namespace, compiled: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield (row name, amp, compile) of this project's rows."""
    amp = "" if args.amp == "off" else f" --amp {args.amp}"
    yield "ours", "off", False
    if amp:
        yield f"ours{amp}", args.amp, False
    if compiled:
        yield f"ours{amp} --compile", args.amp, True
