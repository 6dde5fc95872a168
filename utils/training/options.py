"""The command line of train.py and train_msc.py, and what its options mean together."""

from argparse import Namespace
from functools import partial

from utils.argtypes import (
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
from utils.command import GivenParser, UserError
from utils.options import (
    BATCH_NORM_MODES,
    CITYSCAPES,
    INITIAL_WEIGHTS,
    LOSS_SIZES,
    TOOLBOX_TRAINING,
    TRUNKS,
    add_data_options,
    add_device_options,
    add_net_options,
    settle_dataset,
)

CITYSCAPES_TRAINING = CITYSCAPES | {"num_classes": 19, "input_size": (769, 769), "scale_range": (0.7, 2.1)}


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


def settle_options(args: Namespace) -> None:
    """Bring options that say the same thing in two ways to one, and defaults to those of the data set and the net.

    Raises:
        UserError: an option that says how another one works, without that one.
    """
    if not (args.ohem or args.resume) and (given := args.given & {"ohem_threshold", "ohem_keep"}):
        raise UserError(f"--{min(given).replace('_', '-')} says how --ohem chooses its pixels; add --ohem, or leave it out")
    settle_dataset(args, CITYSCAPES_TRAINING | ({} if args.net in (None, "deeplabv2") else TOOLBOX_TRAINING))
    if args.is_training and args.batch_norm == "frozen":
        args.batch_norm = "stats"
        args.given = args.given | {"batch_norm"}
    args.is_training = args.batch_norm == "stats"
    if args.restore_from.lower() == "none":
        args.restore_from = ""
    if not args.restore_from and "batch_norm" not in args.given:
        args.batch_norm = "full"
