"""What the benchmark measures with: made-up pictures, nets with moderate values, and the rows that every part has."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from dataset import VOCSegmentation
from deeplab import Net, fold_batch_norm, make_net
from scripts.bench import reference
from utils.checkpoint import load_init
from utils.evaluation_options import evaluation_parser
from utils.loader import open_dataset
from utils.prediction import compile_for_prediction
from utils.visualize import save_indexed_png

SIZES = ((375, 500), (500, 375), (333, 500), (375, 500), (500, 333))  # height, width: the usual ones in VOC
REFERENCE = "reference, as published"


def make_pictures(root: Path, count: int, num_classes: int) -> None:
    """Pictures of the usual VOC sizes with smooth and fine structure, and masks of smooth regions, in the VOC layout."""
    rng = np.random.default_rng(0)
    lists = root / "ImageSets/Segmentation"
    (root / "JPEGImages").mkdir(parents=True)
    lists.mkdir(parents=True)
    ids = [f"picture_{number:04d}" for number in range(count)]
    for image_id, (height, width) in zip(ids, itertools.cycle(SIZES)):
        coarse = rng.integers(0, 256, (8, 10, 3)).astype(np.float32)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 8, (height, width, 3))
        cv2.imwrite(str(root / "JPEGImages" / f"{image_id}.jpg"), np.clip(picture, 0, 255).astype(np.uint8))
        present = np.append(0, rng.integers(0, num_classes, 3))  # a picture shows few classes
        fields = [cv2.resize(rng.random((5, 6)), (width, height), interpolation=cv2.INTER_CUBIC) for _ in present]
        mask = present[np.argmax(fields, axis=0)].astype(np.uint8)
        mask[:3] = 255
        save_indexed_png(root / "SegmentationClass" / f"{image_id}.png", mask)
    for name in ("train", "val"):
        (lists / f"{name}.txt").write_text("\n".join(ids) + "\n")


def open_pictures(args: Namespace) -> VOCSegmentation:
    """The first ``--pictures`` of the data set."""
    options = ["--dataset", "voc", "--data-dir", args.data_dir, *(["--data-list", args.data_list] if args.data_list else [])]
    data, _ = open_dataset(evaluation_parser("").parse_args(options), "val", args.num_classes)
    data.ids = data.ids[: args.pictures]
    return data


def random_net(args: Namespace) -> Net:
    """The net of ``--restore-from``, else one with random values that stay moderate through all its blocks."""
    if args.restore_from:
        return load_init(args.restore_from, net=args.net, backbone=args.backbone, num_classes=args.num_classes)[0]
    torch.manual_seed(0)
    net = make_net({"net": args.net, "backbone": args.backbone, "num_classes": args.num_classes})
    last = "bn2.weight" if args.backbone in ("resnet18", "resnet34") else "bn3.weight"
    for name, buffer in net.named_buffers():
        if name.endswith(last):
            buffer.fill_(0.25)
    for name, parameter in net.named_parameters():
        if name.startswith("layer5.") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.001)
    return net


def reference_net(args: Namespace, device: torch.device, norm: Callable[..., nn.Module] = reference.batch_norm) -> nn.Module:
    """The same net with the same values, unfolded; of a DeepLabv3 or PSPNet its own, without ``norm``."""
    net = random_net(args)
    if args.net != "deeplabv2":
        net.fold = lambda: [[None] * len(part) for part in net.pairs()]  # type: ignore[method-assign]
        return net.to(device)
    unfolded = reference.ReferenceNet(net.config, norm)
    unfolded.load_state_dict(net.state_dict(), strict=False)  # all but the counters of a batch norm on batch statistics
    return unfolded.to(device)


def folded_net(args: Namespace, device: torch.device, compiled: bool) -> nn.Module:
    net = fold_batch_norm(random_net(args).eval()).to(device).to(memory_format=torch.channels_last)
    if compiled:
        compile_for_prediction(net, device)
    return net


def our_modes(args: Namespace, compiled: bool) -> Iterator[tuple[str, str, bool]]:
    """(row, amp, compile) of this project's rows."""
    yield "ours", "off", False
    if args.amp != "off":
        yield f"ours --amp {args.amp}", args.amp, False
    if compiled:
        yield ("ours" if args.amp == "off" else f"ours --amp {args.amp}") + " --compile", args.amp, True


def compiled_remarks(rows: dict[str, dict]) -> Iterator[str]:
    for name, row in rows.items():
        if "--compile" in name:
            yield f"{name}: the first call, which compiles, took {row['first_s']:.0f} s and is not in the median"
