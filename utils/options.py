"""The command line options shared by train.py, train_msc.py and evaluate.py, and their defaults."""

import argparse
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset import DATASETS, VOCSegmentation
from utils.argtypes import (
    backbone_name,
    below_one,
    helpers,
    label_value,
    net_name,
    not_negative,
    numbers,
    positive,
    share,
    size,
)
from utils.command import UserError
from utils.processes import default_processes

DATA_DIR = VOCSegmentation.DATA_DIR
INITIAL_WEIGHTS = "weights/MS_DeepLab_resnet_pretrained_COCO_init.pth"
TRAINED_WEIGHTS = "snapshots/VOC12_scenes_20000.pth"
# Choices of deeplab's own, repeated here so that --help and a mistyped option need not wait for torch; a test compares them.
BATCH_NORM_MODES = ("frozen", "stats", "full")
LOSS_SIZES = ("output", "input")
TRUNKS = ("auto", "torchvision", "caffe", "rgb-1x1", "bgr-3x3")
ABN = ("abs", "signed")
FUSIONS = ("max", "mean")

# Options that may differ between the processes of one command, as paths, devices and numbers of cores differ between machines.
# For lists, weights and devices, the contents and the type of device are compared instead.
OF_A_MACHINE = {
    "data_dir", "data_list", "val_list", "image_dir", "label_dir", "restore_from", "snapshot_dir", "pictures", "device", "gpu",
    "num_workers", "crf_workers", "given",
}  # fmt: skip
# Options that all processes must be given, or none; their values may differ.
OUTPUTS = {"save_dir", "save_panels", "save_json", "report", "compare", "submission", "resume"}


class Options:
    """Settled options, read by attribute: the same on every process, and never changed afterwards."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def replace(self, **changes: Any) -> "Options":
        """A copy with some options changed."""
        return Options(vars(self) | changes)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"options are settled, so {name} cannot be set; see replace()")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


AnyOptions = argparse.Namespace | Options


def flag(name: str) -> str:
    """An option as it is written on the command line: ``num_steps`` -> ``--num-steps``."""
    return "--" + name.replace("_", "-")


def shared_options(args: AnyOptions) -> dict[str, Any]:
    """The options that must be the same on all processes of a command: flag -> value."""
    options = {name: value for name, value in sorted(vars(args).items()) if name not in OF_A_MACHINE}
    options |= {name: "given" if options[name] else "not given" for name in OUTPUTS & options.keys()}
    return {flag(name): value for name, value in options.items()}


def with_own_places(options: Options, asked: Options, resumed: bool) -> Options:
    """The options that process 0 settled, with this machine's own paths, devices and numbers of workers.

    Args:
        asked: this process's options; if the run is ``resumed``, only those that were on its command line count.
    """
    own = {name: value for name, value in vars(asked).items() if name in OF_A_MACHINE and name in vars(options)}
    return options.replace(**{name: value for name, value in own.items() if name in asked.given or not resumed})


def elsewhere(value: Callable[[type[VOCSegmentation]], Any]) -> str:
    """For a help text: the defaults for other data sets than VOC, ``", Cityscapes 769,769"``; None means no own default."""
    found = [(kind.TITLE, value(kind)) for kind in DATASETS.values() if kind is not VOCSegmentation]
    texts = [(title, ",".join(map(str, given)) if isinstance(given, tuple) else given) for title, given in found]
    return "".join(f", {title} {text}" for title, text in texts if text is not None)


def add_dataset_option(parser: Any, default: str | None = "voc") -> None:
    """Add ``--dataset``; :func:`dataset_defaults` sets the defaults that depend on it."""
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default=default,
        metavar="NAME",
        help="; ".join(f"{name}: {kind.ABOUT}" for name, kind in DATASETS.items())
        + f" (default: {default or 'what the net was trained on'})",
    )


def dataset_defaults(args: AnyOptions, trained_on: str = "voc", more: Mapping[str, Any] | None = None) -> Options:
    """The options with the name of their data set, and its defaults for the options that were not given.

    Args:
        trained_on: the data set if the command line names none.
        more: defaults beside the folders.

    Raises:
        UserError: the given number of classes is not the data set's.
    """
    options = Options({**vars(args), "dataset": args.dataset or trained_on})
    kind = DATASETS[options.dataset]
    count = len(kind.NAMES)
    if count and "num_classes" in options.given and options.num_classes != count:
        raise UserError(f"--dataset {options.dataset} has {count} classes; leave --num-classes {options.num_classes} out")
    defaults = {"data_dir": kind.DATA_DIR, "image_dir": kind.IMAGE_DIR, **(more or {})}
    return options.replace(**{name: value for name, value in defaults.items() if name not in options.given})


def trained_weights() -> str:
    """The default of ``--restore-from``: the published name; without such a file, the snapshot of the last step beside it."""
    numbers = {path: re.search(r"_(\d+)\.pth$", path.name) for path in Path(TRAINED_WEIGHTS).parent.glob("*_scenes_*.pth")}
    steps = {int(number[1]): str(path) for path, number in numbers.items() if number}
    return TRAINED_WEIGHTS if Path(TRAINED_WEIGHTS).exists() or not steps else steps[max(steps)]


def add_prediction_options(parser: Any) -> None:
    """Add the options of prediction: scales, flip, sliding window, batch size and CRF."""
    parser.add_argument(
        "--scales",
        type=partial(numbers, float),
        default=(1.0,),
        metavar="LIST",
        help="scales of the input: 1,0.75,0.5 (default: 1)",
    )
    text = "of the logits of several scales (default: %(default)s, as DeepLab-v2)"
    parser.add_argument("--fuse", choices=FUSIONS, default="max", help=text)
    parser.add_argument(
        "--window",
        type=size,
        metavar="H,W",
        help="predict by a sliding window of this size, rounded up to 8k + 1, as published for Cityscapes: 769,769 (default: "
        "whole images)",
    )
    text = "share of a tile that the next one covers (default: %(default)s)"
    parser.add_argument("--overlap", type=share, default=Fraction(1, 3), help=text)
    parser.add_argument("--mirror", action="store_true", help="average with the horizontally flipped image")
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images of one padded size at once (default: 1)"
    )
    text = "refine with the dense CRF"
    parser.add_argument("--crf", action="store_true", help=text)
    parser.add_argument(
        "--crf-backend",
        choices=("auto", "pydensecrf", "torch"),
        default="auto",
        metavar="NAME",
        help="pydensecrf, in processes; torch, on the device of the net; equal to rounding (default: auto, torch on a GPU)",
    )
    parser.add_argument(
        "--crf-workers",
        type=positive,
        default=default_processes(32),
        metavar="N",
        help="processes for the CRF, 0.5 GB each, 3 GB for Cityscapes (default: one per core, at most 32; here %(default)s)",
    )
    parser.add_argument(
        "--crf-prune",
        type=below_one,
        default=0.0,
        metavar="P",
        help="leave out classes whose probability is nowhere above P (default: 0, none)",
    )


def add_data_options(parser: argparse.ArgumentParser, split: str, ignore_label: int | None) -> None:
    """Add the options of the data, which training and evaluation share."""
    group = parser.add_argument_group("data")
    add_dataset_option(group, default="voc" if split == "train" else None)
    text = f"its folder (default: %(default)s{elsewhere(lambda kind: kind.DATA_DIR)})"
    group.add_argument("--data-dir", default=DATA_DIR, help=text)
    group.add_argument(
        "--data-list",
        help="file with an image id, or an image and its label, per line; or a folder of images (default: the data set's)",
    )
    group.add_argument(
        "--image-dir",
        default=VOCSegmentation.IMAGE_DIR,
        help="folder of the images in --data-dir: .jpg, .png, .bmp, .tif or .webp (default: the data set's; for your own "
        "data JPEGImages or images, with masks in masks/)",
    )
    group.add_argument(
        "--label-dir",
        help="folder of the masks in --data-dir (default: the data set's)",
    )
    group.add_argument(
        "--ignore-label",
        type=label_value,
        default=ignore_label,
        help=f"another label to ignore, beside 255{'' if ignore_label else ' (default: as in training)'}",
    )
    group.add_argument(
        "--num-workers",
        type=helpers,
        default=default_processes(16),
        metavar="N",
        help="processes that read images; 0: none (default: one per core, at most 16; here %(default)s)",
    )


def add_net_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the net; by default they are as in the weights file."""
    group = parser.add_argument_group("net")
    text = "deeplabv2, deeplabv3 or pspnet (default: that of the weights, else deeplabv2)"
    group.add_argument("--net", type=net_name, metavar="NAME", help=text)
    text = "resnet18, 34, 50, 101 or 152 (default: that of the "
    group.add_argument("--backbone", type=backbone_name, metavar="NAME", help=f"{text}weights, else resnet101)")
    add_file_options(group)


def add_file_options(parser: Any) -> None:
    """Add the options for facts about a net that a weights file may lack."""
    parser.add_argument(
        "--atrous-rates",
        type=partial(numbers, int),
        metavar="RATES",
        help="dilations of DeepLab-v2's ASPP (default: those of the weights, else 6,12,18,24)",
    )
    parser.add_argument(
        "--abn",
        choices=ABN,
        metavar="KIND",
        help="for weights of pytorch-segmentation-toolbox: abs (InPlace-ABN) or signed (plain batch norm)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the device and its arithmetic."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--gpu", type=not_negative, default=0, metavar="N", help="index of the CUDA device (default: %(default)s)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps or xpu (default: CUDA, else CPU)")
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        metavar="TYPE",
        help="mixed precision: bf16 or fp16; the loss stays in float32 (default: off)",
    )
    group.add_argument(
        "--no-tf32",
        action="store_true",
        help="full float32 convolutions on CUDA; much slower",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same command gives the same bits; slower on CUDA",
    )
    group.add_argument("--compile", action="store_true", help="compile net and loss with torch.compile")
