"""Options of a training run that depend on each other, on the machine or on the data set: settled, or refused in a sentence."""

from argparse import Namespace

import torch

from dataset import TRAIN_LISTS, find_list
from deeplab.multiscale import scaled_size
from utils import distributed
from utils.command import UserError


def settle_options(args: Namespace) -> None:
    """Bring options that say the same thing in two ways to one."""
    if args.is_training and args.batch_norm == "frozen":
        args.batch_norm = "stats"
        args.given = args.given | {"batch_norm"}
    args.is_training = args.batch_norm == "stats"
    if args.restore_from.lower() == "none":
        args.restore_from = ""
    if not args.restore_from and "batch_norm" not in args.given:
        args.batch_norm = "full"


def check_options(args: Namespace, device: torch.device) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: the sentence names both.
    """
    processes = distributed.world_size()
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} does not divide into {processes} processes; choose a multiple")
    if args.sync_bn and args.batch_norm == "frozen":
        raise UserError("--sync-bn has nothing to do with frozen batch norm; add --batch-norm full")
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn works between CUDA devices only, and this run is on {device.type}; leave it out")
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
    if args.compile:
        distributed.check_compiler(device)


def choose_device(args: Namespace) -> torch.device:
    """The device of this process, once options and data set are known to be there: before any weights are read."""
    device = distributed.select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    check_options(args, device)
    find_list(args.data_dir, args.data_list, TRAIN_LISTS)
    return device
