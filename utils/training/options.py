"""The command line of train.py and train_msc.py, and the checks of its options against each other."""

import math
from argparse import ArgumentTypeError, Namespace
from functools import partial

from dataset import DATASETS
from utils.argtypes import (
    GivenParser,
    below_one,
    class_count,
    not_negative,
    number,
    positive,
    probability,
    scale_range,
    size,
    target_text,
    whole,
)
from utils.command import UserError
from utils.options import (
    BATCH_NORM_MODES,
    INITIAL_WEIGHTS,
    LOSS_SIZES,
    TRUNKS,
    Options,
    add_data_options,
    add_device_options,
    add_net_options,
    dataset_defaults,
    elsewhere,
    flag,
)

# The first torch whose compiled code updates running statistics once per step if activations are recomputed: 2.9, 2.10 and 2.14
# do; 2.4 to 2.8 update them twice (2.4 with one compiler backend only).
COUNTS_ONCE = "2.9"
FINE_TUNING_RATE = 2.5e-4  # the published base learning rate


above_zero = partial(number, fits=lambda value: 0 < value < math.inf, expected="a finite number above 0")


def jitter(text: str) -> tuple[float, ...]:
    """An argparse type: ``"0.4,0.4,0.4,0.1"``, the strengths of brightness, contrast, saturation and hue."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 4 or not all(0 <= value < math.inf for value in values) or values[3] > 0.5:
        raise ArgumentTypeError(
            f"{text[:60]!r} is not a colour jitter; write B,C,S,H, numbers of at least 0, H at most 0.5, as in 0.4,0.4,0.4,0.1"
        )
    return values


EXAMPLES = """examples:
  python %(prog)s --random-mirror --random-scale --gpu 0
  python %(prog)s --data-dir data/mine --restore-from weights/resnet18-f37072fd.pth --random-scale --amp bf16
  python %(prog)s --resume
"""


def trained_with(name: str, default: str = "%(default)s") -> str:
    """For a help text: an option's default, and its defaults for other data sets than VOC and for the toolbox nets, if any."""
    text = f"(default: {default}{elsewhere(lambda kind: kind.TRAINING.get(name))}"
    toolbox = elsewhere(lambda kind: kind.TOOLBOX_TRAINING.get(name)).removeprefix(", ")
    return f"{text}; deeplabv3, pspnet on {toolbox})" if toolbox else f"{text})"


def training_parser(description: str, *, batch_size: int, iter_size: int, snapshot_dir: str) -> GivenParser:
    """The command line of train.py and train_msc.py, with the published flags and defaults."""
    parser = GivenParser(description=description, epilog=EXAMPLES)
    add_data_options(parser, "train", 255)
    group = parser.add_argument_group("augmentation")
    text = f"height and width of the crops {trained_with('input_size', '321,321')}"
    group.add_argument("--input-size", type=size, default=(321, 321), metavar="H,W", help=text)
    group.add_argument("--random-mirror", action="store_true", help="flip half of the images horizontally")
    group.add_argument("--random-scale", action="store_true", help="scale each image by a random factor")
    text = f"of the factor {trained_with('scale_range', '0.5,1.5')}"
    group.add_argument("--scale-range", type=scale_range, default=(0.5, 1.5), metavar="L,H", help=text)
    group.add_argument(
        "--color-jitter",
        type=jitter,
        metavar="LIST",
        help="random brightness, contrast, saturation and hue, as torchvision's ColorJitter: 0.4,0.4,0.4,0.1 (default: off)",
    )

    add_net_options(parser)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--num-classes",
        type=class_count,
        default=21,
        metavar="N",
        help="classes with background (default: lines of classes.txt in --data-dir, else those of the snapshot, else 21)",
    )
    group.add_argument(
        "--restore-from",
        default=INITIAL_WEIGHTS,
        metavar="FILE",
        help="pretrained weights; none: train from scratch (default: %(default)s)",
    )
    group.add_argument(
        "--trunk",
        choices=TRUNKS,
        default="auto",
        metavar="KIND",
        help="kind of a bare ResNet: torchvision (RGB, stride in the 3x3), caffe (BGR, 1x1), rgb-1x1 or bgr-3x3 "
        "(default: by its first layer)",
    )
    group.add_argument("--not-restore-last", action="store_true", help="load the backbone only, not the head")
    group.add_argument(
        "--batch-norm",
        choices=BATCH_NORM_MODES,
        default="frozen",
        metavar="MODE",
        help="frozen; stats: update running statistics; full: train it (default: frozen; full from scratch and for "
        "deeplabv3, pspnet)",
    )
    group.add_argument("--is-training", action="store_true", help="the published name of --batch-norm stats")
    group.add_argument("--sync-bn", action="store_true", help="share batch statistics between GPUs")

    group = parser.add_argument_group("optimisation")
    text = f"images per batch {trained_with('batch_size')}"
    group.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=text)
    text = f"batches per step, for gradient accumulation {trained_with('iter_size')}"
    group.add_argument("--iter-size", type=positive, default=iter_size, metavar="N", help=text)
    text = f"optimiser steps {trained_with('num_steps')}"
    group.add_argument("--num-steps", type=positive, default=20000, metavar="N", help=text)
    text = "default: %(default)s, for fine-tuning; deeplabv3, pspnet: 0.01"
    group.add_argument("--learning-rate", type=number, default=FINE_TUNING_RATE, metavar="X", help=text)
    group.add_argument("--momentum", type=below_one, default=0.9, metavar="X", help="default: %(default)s")
    group.add_argument("--power", type=number, default=0.9, metavar="X", help="of the poly schedule (default: %(default)s)")
    group.add_argument(
        "--warmup-steps",
        type=not_negative,
        default=0,
        metavar="N",
        help="raise the learning rate over N steps (default: 0)",
    )
    group.add_argument(
        "--clip-grad-norm",
        type=above_zero,
        metavar="X",
        help="limit the total gradient norm (default: off)",
    )
    group.add_argument("--weight-decay", type=number, default=5e-4, metavar="X", help="default: %(default)s")
    group.add_argument(
        "--loss-size",
        choices=LOSS_SIZES,
        default="output",
        metavar="SIZE",
        help="output: shrink the labels to the logits; input: enlarge the logits (default: output; deeplabv3, pspnet: input)",
    )
    group.add_argument(
        "--class-weights",
        type=target_text,
        metavar="FILE",
        help="one number per class and line, or balanced: computed from pixel counts (default: all 1)",
    )
    group.add_argument(
        "--aux-weight",
        type=number,
        metavar="X",
        help="weight of the auxiliary loss of deeplabv3 and pspnet; 0: no such loss (default: 0.4)",
    )
    group.add_argument(
        "--ohem",
        action="store_true",
        help="only the hard pixels of a process count in the loss",
    )
    group.add_argument(
        "--ohem-threshold",
        type=probability,
        default=0.7,
        metavar="P",
        help="hard: the true class has a probability of at most P (default: %(default)s)",
    )
    group.add_argument(
        "--ohem-keep",
        type=positive,
        default=100_000,
        metavar="N",
        help="at least the N hardest of a batch (default: %(default)s)",
    )
    group.add_argument(
        "--random-seed", type=partial(whole, 0, 2**63 - 1), default=1234, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--grad-checkpoint", action="store_true", help="recompute activations: less memory, slower")

    group = parser.add_argument_group("output")
    group.add_argument("--snapshot-dir", type=target_text, default=snapshot_dir, help="default: %(default)s")
    group.add_argument(
        "--save-pred-every", type=positive, default=1000, metavar="N", help="steps between snapshots (default: %(default)s)"
    )
    text = "newest snapshots to keep (default: 0, all)"
    group.add_argument("--keep", type=not_negative, default=0, metavar="N", help=text)
    group.add_argument(
        "--save-num-images", type=not_negative, default=2, metavar="N", help="panels per snapshot (default: %(default)s)"
    )
    group.add_argument(
        "--val-every",
        type=not_negative,
        default=0,
        metavar="N",
        help="steps between evaluations; keeps best.pth (default: 0)",
    )
    group.add_argument("--val-list", help="list for --val-every (default: as in evaluate.py)")
    group.add_argument(
        "--log-every", type=positive, default=10, metavar="N", help="steps between log lines (default: %(default)s)"
    )
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars to --snapshot-dir")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CKPT",
        help="continue the run in --snapshot-dir, or from CKPT",
    )
    add_device_options(parser)
    return parser


def settle(args: Namespace) -> Options:
    """The options of the command line, with the data set's defaults, and options of the same meaning made consistent.

    Raises:
        UserError: an option is given without the one that it modifies, or the number of classes is not the data set's.
    """
    given = set(args.given)
    if not (args.ohem or args.resume) and (alone := given & {"ohem_threshold", "ohem_keep"}):
        raise UserError(f"{flag(min(alone))} does nothing without --ohem; add --ohem, or leave it out")
    kind = DATASETS[args.dataset]
    defaults = {**kind.TRAINING, **(kind.TOOLBOX_TRAINING if args.net not in (None, "deeplabv2") else {})}
    options = dataset_defaults(args, more=defaults)
    batch_norm = options.batch_norm
    if options.is_training and batch_norm == "frozen":
        batch_norm = "stats"
        given.add("batch_norm")
    restore_from = "" if options.restore_from.lower() == "none" else options.restore_from
    if not restore_from and "batch_norm" not in given:
        batch_norm = "full"
    is_training = batch_norm == "stats"
    return options.replace(batch_norm=batch_norm, is_training=is_training, restore_from=restore_from, given=given)


def check_net_options(options: Options) -> None:
    """Refuse options that do not fit the net or each other, once the net is known (see :func:`utils.training.start.begin`).

    Raises:
        UserError: two options do not go together; the sentence names both.
    """
    import torch
    from torch.torch_version import TorchVersion

    from deeplab import NETS
    from deeplab.multiscale import scaled_size
    from deeplab.toolbox import NetWithAuxiliary
    from utils import distributed

    processes, batch_norm, frozen = distributed.world_size(), options.batch_norm, options.batch_norm == "frozen"
    several_scales = "one_scale_at_a_time" in vars(options)  # train_msc.py's
    if options.sync_bn and frozen:
        raise UserError("--sync-bn has nothing to do with frozen batch norm; add --batch-norm full")
    auxiliary = issubclass(NETS[options.net], NetWithAuxiliary)
    if not auxiliary and options.aux_weight is not None:
        raise UserError(f"--aux-weight is for an auxiliary head, but {options.net} has none; leave it out")
    if auxiliary and not frozen and options.batch_size == (1 if options.sync_bn else processes):
        raise UserError(
            f"--batch-size {options.batch_size} is one image per process: its mean features are one value per channel, too few "
            f"for the statistics of --batch-norm {batch_norm}; give {options.net} at least two images per process"
        )
    if options.warmup_steps > options.num_steps:
        raise UserError(f"--warmup-steps {options.warmup_steps} is more than --num-steps {options.num_steps}; lower it")
    # A side of up to 6 pixels, at the smallest scale of the loss, gives a single position of the net's output.
    smallest = scaled_size(options.input_size, 0.5 if several_scales else 1.0)
    if not frozen and options.batch_size == processes and max(smallest) <= 6:
        raise UserError(
            f"--input-size {options.input_size[0]},{options.input_size[1]} gives one position per image, too few for the "
            f"statistics of --batch-norm {batch_norm}; enlarge the crop or the batch"
        )
    version = TorchVersion(torch.__version__)  # compares by numbers: 2.9 is older than 2.10
    if options.compile and options.grad_checkpoint and not frozen and version < COUNTS_ONCE:
        raise UserError(
            f"--compile and --grad-checkpoint with --batch-norm {batch_norm} need torch {COUNTS_ONCE}: torch {version} "
            "would update the running statistics twice per step; leave one of them out"
        )
    if options.compile and several_scales and options.one_scale_at_a_time and version < "2.5":
        raise UserError(f"--compile with --one-scale-at-a-time needs torch 2.5, and this is {version}; leave one of them out")
