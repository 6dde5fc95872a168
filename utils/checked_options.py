"""Options of a training run that depend on each other, on the machine or on the data set: settled, or refused in a sentence."""

from argparse import Namespace

import torch
from torch.torch_version import TorchVersion

from deeplab.multiscale import scaled_size
from utils import distributed
from utils.command import UserError
from utils.loader import list_of
from utils.options import CITYSCAPES_TRAINING, TOOLBOX_TRAINING, settle_dataset

# The first torch whose compiled code moves running statistics once a step where activations are computed again: 2.9, 2.10 and
# 2.14 do; 2.4 to 2.8 move them twice (2.4 with one compiler backend only).
COUNTS_ONCE = "2.9"


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


def check_options(args: Namespace, device: torch.device) -> None:
    """Refuse options that do not go together, whatever the net.

    Raises:
        UserError: the sentence names both.
    """
    processes = distributed.world_size()
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} does not divide into {processes} processes; choose a multiple")
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn works between CUDA devices only, and this run is on {device.type}; leave it out")
    if args.compile:
        distributed.check_compiler(device)


def check_net_options(args: Namespace) -> None:
    """Refuse options that do not go together with the net's, once these are settled (see :func:`utils.start.begin`).

    Raises:
        UserError: the sentence names both.
    """
    processes = distributed.world_size()
    if args.sync_bn and args.batch_norm == "frozen":
        raise UserError("--sync-bn has nothing to do with frozen batch norm; add --batch-norm full")
    if args.net == "deeplabv2" and args.aux_weight is not None:
        raise UserError("--aux-weight is of an auxiliary head, which deeplabv2 has none of; leave it out")
    alone = args.batch_size == (1 if args.sync_bn else processes)
    if args.net != "deeplabv2" and args.batch_norm != "frozen" and alone:
        raise UserError(
            f"--batch-size {args.batch_size} is one picture a process, whose mean features are one value a channel, of which "
            f"--batch-norm {args.batch_norm} cannot take statistics; give {args.net} at least two pictures a process"
        )
    # 6 pixels a side are a single position of the net's output, at the smallest scale that the loss takes.
    smallest = scaled_size(args.input_size, 0.5 if "one_scale_at_a_time" in args else 1.0)
    if args.batch_norm != "frozen" and args.batch_size == processes and max(smallest) <= 6:
        raise UserError(
            f"--input-size {args.input_size[0]},{args.input_size[1]} gives one position a picture, of which --batch-norm "
            f"{args.batch_norm} cannot take statistics; enlarge the crop or the batch"
        )
    three_scales = "one_scale_at_a_time" in args and not args.one_scale_at_a_time
    if args.compile and args.grad_checkpoint and args.batch_norm != "frozen" and three_scales:
        # torch keeps the running statistics of the first scale for its backward pass, and the second scale has moved them.
        raise UserError(
            f"--compile and --grad-checkpoint cannot both be had with --batch-norm {args.batch_norm} on three scales at once; "
            "add --one-scale-at-a-time, or leave one of them out"
        )
    version = TorchVersion(torch.__version__)  # compares by numbers: 2.9 is older than 2.10
    if args.compile and args.grad_checkpoint and args.batch_norm != "frozen" and version < COUNTS_ONCE:
        raise UserError(
            f"--compile and --grad-checkpoint with --batch-norm {args.batch_norm} need torch {COUNTS_ONCE}: "
            f"torch {version} would move the running statistics twice a step; leave one of them out"
        )
    if args.compile and getattr(args, "one_scale_at_a_time", False) and version < "2.5":
        raise UserError(f"--compile with --one-scale-at-a-time needs torch 2.5, and this is {version}; leave one of them out")


def choose_device(args: Namespace) -> torch.device:
    """The device of this process, once options and data set are known to be there: before any weights are read."""
    device = distributed.select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    check_options(args, device)
    list_of(args, "train", args.num_classes)
    return device
