"""The command lines of train.py, train_msc.py and evaluate.py: the options that they share, and their defaults."""

import argparse
from fractions import Fraction
from functools import partial
from typing import Any

from utils.command import (
    GivenParser,
    UserError,
    below_one,
    class_count,
    default_processes,
    helpers,
    label_value,
    not_negative,
    number,
    numbers,
    positive,
    probability,
    scale_range,
    share,
    size,
    target_text,
    whole,
)

DATA_DIR = "data/VOCdevkit/VOC2012"
INITIAL_WEIGHTS = "weights/MS_DeepLab_resnet_pretrained_COCO_init.pth"
TRAINED_WEIGHTS = "snapshots/VOC12_scenes_20000.pth"
# The choices that the net offers, written out so that --help and a mistyped flag answer without loading torch;
# a test compares them with deeplab's own.
NET_NAMES = ("deeplabv2", "deeplabv3", "pspnet")
BACKBONE_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BATCH_NORM_MODES = ("frozen", "stats", "full")
LOSS_SIZES = ("output", "input")
TRUNKS = ("auto", "torchvision", "caffe", "rgb-1x1", "bgr-3x3")
ABN = ("abs", "signed")
FUSIONS = ("max", "mean")
DATASETS = ("voc", "cityscapes")
CITYSCAPES: dict[str, Any] = {"data_dir": "data/cityscapes", "image_dir": "leftImg8bit"}
CITYSCAPES_TRAINING = CITYSCAPES | {"num_classes": 19, "input_size": (769, 769), "scale_range": (0.7, 2.1)}
# What pytorch-segmentation-toolbox trains DeepLabv3 and PSPNet with on Cityscapes, beside the nets' own `defaults`.
TOOLBOX_TRAINING: dict[str, Any] = {"batch_size": 8, "iter_size": 1, "num_steps": 40_000}

# What the processes of one command may be given differently: what lies elsewhere on another machine, and how that works.
# Lists, weights and the kind of device are compared by what they are.
OF_A_MACHINE = {
    "data_dir", "data_list", "val_list", "image_dir", "label_dir", "restore_from", "snapshot_dir", "pictures", "device", "gpu",
    "num_workers", "crf_workers", "given",
}  # fmt: skip
OUTPUTS = {"save_dir", "save_panels", "save_json", "report", "compare", "submission", "resume"}  # all have them, or none


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that all processes of a command must have alike, by their flags."""
    options = {name: value for name, value in sorted(vars(args).items()) if name not in OF_A_MACHINE}
    options |= {name: "given" if options[name] else "not given" for name in OUTPUTS & options.keys()}
    return {f"--{name.replace('_', '-')}": value for name, value in options.items()}


def add_dataset_option(parser: Any, default: str | None = "voc", more: str = "") -> None:
    """Whose layout and labels are read; :func:`settle_dataset` brings the defaults that hang on it."""
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default=default,
        help="voc: PASCAL VOC, or data of your own in its layout; cityscapes: the official folders, labelIds read as the 19 "
        f"train ids{more} (default: {default or 'the one that the net was trained on'})",
    )


def settle_dataset(args: argparse.Namespace, defaults: dict[str, Any], trained_on: str = "voc") -> None:
    """Settle which data set it is, and take the ``defaults`` of Cityscapes for options that were not given.

    Args:
        trained_on: the data set where the command line names none.

    Raises:
        UserError: another number of classes was given.
    """
    args.dataset = args.dataset or trained_on
    if args.dataset == "cityscapes":
        if "num_classes" in args.given and args.num_classes != 19:
            raise UserError(f"--dataset cityscapes has 19 classes; leave --num-classes {args.num_classes} out")
        vars(args).update({name: value for name, value in defaults.items() if name not in args.given})


def add_window_options(parser: Any) -> None:
    """How several scales become one prediction, and large pictures several tiles."""
    parser.add_argument(
        "--fuse",
        choices=FUSIONS,
        default="max",
        help="logits of several --scales: DeepLab-v2 takes the maximum (%(default)s)",
    )
    parser.add_argument(
        "--window",
        type=size,
        metavar="H,W",
        help="predict in overlapping tiles, whose logits are averaged at full size, as published for Cityscapes: 769,769; at "
        "each of --scales tiles of this size, rounded up to 8k + 1 (default: pictures as a whole)",
    )
    parser.add_argument(
        "--overlap", type=share, default=Fraction(1, 3), help="share of a tile that the next one covers (default: %(default)s)"
    )


def add_data_options(parser: argparse.ArgumentParser, split: str, ignore_label: int | None) -> None:
    """Where the pictures, the labels and the weights are; shared by training and evaluation."""
    group = parser.add_argument_group("data")
    if split == "train":
        add_dataset_option(group, more=", by default in crops of 769,769 at scales 0.7 to 2.1")
    else:
        add_dataset_option(group, default=None)
    group.add_argument("--data-dir", default=DATA_DIR, help="its folder (default: %(default)s, Cityscapes data/cityscapes)")
    group.add_argument(
        "--data-list",
        help="file of image ids, one a line, or of pictures and labels; also looked for in --data-dir (default: "
        f"ImageSets/SegmentationAug/{'train_aug' if split == 'train' else split}.txt there, else "
        f"ImageSets/Segmentation/{split}.txt; Cityscapes: all of leftImg8bit/{split})",
    )
    group.add_argument(
        "--image-dir",
        default="JPEGImages",
        help="folder of the pictures in --data-dir: .jpg, .jpeg, .png, .bmp, .tif or .webp (default: %(default)s, Cityscapes "
        "leftImg8bit)",
    )
    group.add_argument(
        "--label-dir",
        help="folder of the masks in --data-dir (default: SegmentationClassAug, else SegmentationClass; Cityscapes gtFine)",
    )
    group.add_argument(
        "--ignore-label",
        type=label_value,
        default=ignore_label,
        help=f"a label that means void, beside 255{'' if ignore_label else ' (default: as the net was trained with)'}",
    )
    group.add_argument(
        "--num-workers",
        type=helpers,
        default=default_processes(16),
        help="processes that read pictures; 0 reads in the main process (default: this process's share of the cores, at most "
        "16; here %(default)s)",
    )


def add_net_options(parser: argparse.ArgumentParser) -> None:
    """The shape of the net; what a weights file says of itself is the default."""
    group = parser.add_argument_group("net")
    group.add_argument("--net", choices=NET_NAMES, help="default: that of the weights file, else deeplabv2")
    group.add_argument("--backbone", choices=BACKBONE_NAMES, help="default: that of the weights file, else resnet101")
    group.add_argument(
        "--atrous-rates",
        type=partial(numbers, int),
        help="dilations of DeepLab-v2's ASPP head (default: those of the weights file, else 6,12,18,24); "
        "6,12 for weights trained with the historic two-branch head",
    )
    add_abn_option(group)


def add_abn_option(parser: Any) -> None:
    """How weights of batch norms are read where the file does not tell."""
    parser.add_argument(
        "--abn",
        choices=ABN,
        help="what a weights file of pytorch-segmentation-toolbox's kind makes of a batch norm's weight: abs, its absolute "
        "value, as InPlace-ABN; signed, the weight as it is (default: what the file says; refused where that matters and it "
        "does not)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where and how the arithmetic is done."""
    group = parser.add_argument_group("device")
    group.add_argument("--gpu", type=not_negative, default=0, help="index of the CUDA device (default: %(default)s)")
    group.add_argument(
        "--device", default="auto", help="auto (CUDA, else CPU), cpu, cuda, cuda:N, mps or xpu (default: %(default)s)"
    )
    group.add_argument(
        "--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision; the loss stays in float32"
    )
    group.add_argument(
        "--no-tf32",
        action="store_true",
        help="on CUDA, float32 convolutions take factors of 10 bits (TF32), and sums in any order, so that two runs differ by "
        "rounding; this gives all 24 bits, several times slower",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits from the same command on the same machine, on CUDA as well, where it is slower",
    )
    group.add_argument("--compile", action="store_true", help="compile the net with torch.compile")


def training_parser(description: str, *, batch_size: int, iter_size: int, snapshot_dir: str) -> GivenParser:
    """The command line of train.py and train_msc.py, with the published flags and defaults."""
    parser = GivenParser(description=description)
    add_data_options(parser, "train", 255)
    group = parser.add_argument_group("augmentation")
    text = "crop in pixels (default: 321,321, Cityscapes 769,769)"
    group.add_argument("--input-size", type=size, default=(321, 321), metavar="H,W", help=text)
    group.add_argument("--random-mirror", action="store_true", help="mirror every other picture")
    group.add_argument("--random-scale", action="store_true", help="scale each picture by a random factor of --scale-range")
    text = "drawn from uniformly (default: 0.5,1.5, Cityscapes 0.7,2.1)"
    group.add_argument("--scale-range", type=scale_range, default=(0.5, 1.5), metavar="LOW,HIGH", help=text)

    add_net_options(parser)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--num-classes",
        type=class_count,
        default=21,
        help="classes with the background (default: as many as classes.txt in --data-dir has lines, else those of the "
        "snapshot in --restore-from, else PASCAL VOC's 21)",
    )
    group.add_argument(
        "--restore-from", default=INITIAL_WEIGHTS, help='initial weights; "" or none: from scratch (default: %(default)s)'
    )
    group.add_argument(
        "--trunk",
        choices=TRUNKS,
        default="auto",
        help="how a ResNet in --restore-from was trained: torchvision (RGB, stride in the 3x3 convolutions), caffe (BGR, in "
        "the first 1x1) or one of the other pairs; auto tells by its numbers",
    )
    group.add_argument("--not-restore-last", action="store_true", help="leave the head of --restore-from out")
    group.add_argument(
        "--batch-norm",
        choices=BATCH_NORM_MODES,
        default="frozen",
        help="frozen; stats: running statistics move; full: everything learns (default: frozen; full from scratch and for "
        "deeplabv3 and pspnet)",
    )
    group.add_argument("--is-training", action="store_true", help="the published name of --batch-norm stats")
    group.add_argument("--sync-bn", action="store_true", help="with --batch-norm full: share batch statistics over the GPUs")

    group = parser.add_argument_group("optimisation")
    toolbox = "(default: %(default)s; with --net deeplabv3 or pspnet on Cityscapes {})"
    text = "pictures a batch " + toolbox.format(TOOLBOX_TRAINING["batch_size"])
    group.add_argument("--batch-size", type=positive, default=batch_size, help=text)
    text = "batches a step " + toolbox.format(TOOLBOX_TRAINING["iter_size"])
    group.add_argument("--iter-size", type=positive, default=iter_size, help=text)
    text = "optimiser steps " + toolbox.format(TOOLBOX_TRAINING["num_steps"])
    group.add_argument("--num-steps", type=positive, default=20000, help=text)
    group.add_argument(
        "--learning-rate", type=number, default=2.5e-4, help="base rate (default: %(default)s; deeplabv3 and pspnet 0.01)"
    )
    group.add_argument("--momentum", type=below_one, default=0.9, help="default: %(default)s")
    group.add_argument("--power", type=number, default=0.9, help="of the polynomial decay (default: %(default)s)")
    group.add_argument("--weight-decay", type=number, default=5e-4, help="default: %(default)s")
    group.add_argument(
        "--loss-size",
        choices=LOSS_SIZES,
        default="output",
        help="shrink the labels to the logits, or enlarge the logits (default: output; deeplabv3 and pspnet input)",
    )
    group.add_argument(
        "--aux-weight",
        type=number,
        help="what the loss of the auxiliary head of deeplabv3 and pspnet is multiplied by; 0: that head is left alone "
        "(default: 0.4)",
    )
    group.add_argument(
        "--ohem",
        action="store_true",
        help="only hard pixels count, averaged over the batch of this process, as published: several processes, or batches a "
        "step, are then not the same step as one; not in the auxiliary loss",
    )
    group.add_argument(
        "--ohem-threshold",
        type=probability,
        default=0.7,
        metavar="P",
        help="hard: the true class's probability is at most P (default: %(default)s)",
    )
    group.add_argument(
        "--ohem-keep",
        type=positive,
        default=100_000,
        metavar="N",
        help="but at least the N hardest pixels of the batch (default: %(default)s)",
    )
    group.add_argument("--random-seed", type=partial(whole, 0, 2**63 - 1), default=1234, help="default: %(default)s")
    group.add_argument("--grad-checkpoint", action="store_true", help="recompute activations: less memory, slower")

    group = parser.add_argument_group("output")
    group.add_argument("--snapshot-dir", type=target_text, default=snapshot_dir, help="default: %(default)s")
    group.add_argument("--save-pred-every", type=positive, default=1000, help="steps between snapshots (default: %(default)s)")
    text = "numbered snapshots that stay, the newest; older ones of this run are deleted (default: 0, all)"
    group.add_argument("--keep", type=not_negative, default=0, metavar="N", help=text)
    group.add_argument("--save-num-images", type=not_negative, default=2, help="panels a snapshot (default: %(default)s)")
    group.add_argument(
        "--val-every",
        type=not_negative,
        default=0,
        metavar="N",
        help="score the net every N steps and keep best.pth (default: 0, never)",
    )
    group.add_argument("--val-list", help="ids to score on (default: as in evaluate.py)")
    group.add_argument("--log-every", type=positive, default=10, help="steps between log lines (default: %(default)s)")
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars to --snapshot-dir")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CKPT",
        help="go on from CKPT, or from last.ckpt in --snapshot-dir, with that run's options",
    )
    add_device_options(parser)
    return parser
