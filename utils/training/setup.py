"""Everything that the training loop needs, made in order."""

import hashlib
import shlex
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from dataset import (
    DatasetError,
    PadCrop,
    RandomMirror,
    RandomScale,
    StepSampler,
    TrainTransform,
    VOCSegmentation,
)
from deeplab.loss import Ohem
from deeplab.multiscale import scaled_size
from utils import distributed
from utils.command import UserError
from utils.device import check_compiler, select_device
from utils.loader import crop_warning, layout_words, list_of, open_dataset
from utils.training.monitor import Diverged as Diverged
from utils.training.start import Start

# The first torch whose compiled code moves running statistics once a step where activations are computed again: 2.9, 2.10 and
# 2.14 do; 2.4 to 2.8 move them twice (2.4 with one compiler backend only).
COUNTS_ONCE = "2.9"


PICTURES_TO_JUDGE = 200  # labels that are looked at before it is said which classes they lack


def last_words(args: Namespace, data: VOCSegmentation, done: int, began: int, unscored: bool) -> str:
    """What was saved, and what to do next; ``unscored`` tells that the last validation was not finished."""
    folder = Path(args.snapshot_dir)
    if done < args.num_steps:
        saved = f"saved {folder / 'last.ckpt'} at step {done} of {args.num_steps}" if done > began else "no step was finished"
        return f"{saved}; add --resume to go on" if done else f"{saved}, nothing was saved"
    if unscored:
        return f"all {done} steps are done and saved, but the last net is not scored; add --resume, which does that"
    if done == began:
        return f"nothing is left to do: all {done} steps are done; to train on, add a larger --num-steps"
    words = ["python", "evaluate.py", "--data-dir", args.data_dir, "--restore-from", folder / f"{data.SHORT}_scenes_{done}.pth"]
    if not any((data.root / name).exists() for name in data.lists("val", data.image_folder)):
        words += ["--data-list", "LIST"]
    return f"saved {words[5]}; next: {shlex.join(map(str, words + layout_words(args)))}"


def open_training_data(args: Namespace) -> tuple[VOCSegmentation, Path]:
    """The training set with its augmentation, and the list of ids it comes from."""
    transforms: list[Callable] = [RandomScale(*args.scale_range)] if args.random_scale else []
    transforms += [RandomMirror()] if args.random_mirror else []
    transforms += [PadCrop(args.input_size)]
    return open_dataset(args, "train", args.num_classes, TrainTransform(args.random_seed, transforms))


def check_ids(ids: list[str], resumed: Start | None) -> str:
    """A check sum of the ids in their order, which the draws depend on.

    Raises:
        UserError: the run that is resumed has other ids.
    """
    found = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    if resumed and resumed.checkpoint.get("ids") not in (None, found):
        raise UserError(f"--resume: the list of {len(ids)} pictures is not the one that the run was begun with; pass that one")
    return found


def head_lines(args: Namespace, data: VOCSegmentation, data_list: Path) -> list[str]:
    """What is about to happen."""
    lines = [f"{len(data)} pictures of {data_list}; {args.batch_size * args.iter_size} pictures a step, {args.num_steps} steps"]
    lines += [f"warning: {text}, so scores on that list will mean nothing" for text in [seen_val(data)] if text]
    lines += [crop_warning(data, args.input_size)]
    if distributed.world_size() > 1 and args.batch_norm != "frozen" and not args.sync_bn:
        share = args.batch_size // distributed.world_size()
        lines.append(
            f"note: with --batch-norm {args.batch_norm} each process takes batch statistics of its own {share} pictures, which "
            "is another run than that of a single process; between GPUs, --sync-bn shares them"
        )
    return lines


def describe(batch: int, args: Namespace, data: VOCSegmentation) -> str:
    """The step of a batch, its pictures in all processes, and what else makes a loss explode."""
    draws = StepSampler(len(data), args.batch_size, args.random_seed).batch(batch)
    pictures = ", ".join(data.ids[index] for index, _ in draws)
    how = f"--learning-rate {args.learning_rate:g}, --batch-norm {args.batch_norm}, weights {args.restore_from or 'none'}"
    return f"step {batch // args.iter_size + 1}, pictures {pictures} ({how})"


def seen_val(data: VOCSegmentation) -> str:
    """Why scores on the validation list of ``data`` mean nothing after training on it; "" where they mean something."""
    for path in (data.root / name for name in data.lists("val", data.image_folder)):
        with suppress(DatasetError):  # no such list, or none that can be read
            if common := {entry.id for entry in data.read_list(path, data.image_folder)} & set(data.ids):
                return f"{len(common)} of the pictures that it was trained on are on {path.name}"
    return ""


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
        check_compiler(device)


def check_net_options(args: Namespace) -> None:
    """Refuse options that do not go together with the net's, once these are settled (see :func:`utils.training.start.begin`).

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
    device = select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    check_options(args, device)
    list_of(args, "train", args.num_classes)
    return device


def loss_options(args: Namespace) -> dict[str, object]:
    """What a loss function takes beside net, images and labels."""
    options: dict[str, object] = {"size": args.loss_size, "aux_weight": args.aux_weight or 0.0}
    if args.ohem:
        options["ohem"] = Ohem(args.ohem_threshold, args.ohem_keep)
    if getattr(args, "one_scale_at_a_time", False):
        options["one_scale_at_a_time"] = True
    return options
