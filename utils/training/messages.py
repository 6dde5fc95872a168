"""What a training run prints before its first step and after its last one."""

import os
import shlex
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from dataset import DatasetError, VOCSegmentation
from deeplab import Net
from utils import distributed
from utils.data import images_of, layout_words, list_of
from utils.options import Options
from utils.training.optimizer import GuardedSGD

if TYPE_CHECKING:
    from utils.training.setup import Run


def head_lines(options: Options, data: VOCSegmentation, data_list: Path, seen: str, device: torch.device) -> list[str]:
    """Lines on the run that is about to start; ``seen`` is the result of :func:`seen_val`."""
    images = options.batch_size * options.iter_size
    lines = [f"{images_of(data, data_list)}; {images} images per step, {options.num_steps} steps"]
    lines += [f"warning: {seen}, so a mean IoU on that list will mean nothing"] if seen else []
    lines += [crop_warning(data, options.input_size)]
    if device.type == "cuda" and options.amp == "off" and torch.cuda.get_device_capability(device) >= (8, 0):
        lines.append("note: bf16 is about twice as fast on this card: --amp bf16")
    if distributed.world_size() > 1 and options.batch_norm != "frozen" and not options.sync_bn:
        share = options.batch_size // distributed.world_size()
        lines.append(
            f"note: with --batch-norm {options.batch_norm} each process takes batch statistics of its own {share} images, so "
            "the results differ from those of a single process; --sync-bn shares the statistics between GPUs"
        )
    return lines


def net_line(net: Net, options: Options, given: list[str] | None) -> str:
    """The net: its name, its size, its trainable parameters, and the mode of its batch norm with the reason.

    Args:
        given: the names of the options on the command line that began the run; None if unknown.
    """
    name = net.config.get("net", "deeplabv2")
    if given is None:
        why = "as the run was begun"
    elif "batch_norm" in given:
        why = "as asked for"
    elif not options.restore_from:
        why = "from scratch"
    else:
        why = f"default of {name}"
    every, learning = (sum(p.numel() for p in net.parameters() if p.requires_grad or all_) for all_ in (True, False))
    trainable = "all trainable" if learning == every else f"{count_text(learning)} trainable"
    batch_norm = f"batch norm {options.batch_norm} ({why})"
    return f"net: {name} on {net.config['backbone']}, {count_text(every)} parameters, {trainable}; {batch_norm}"


def optimizer_line(optimizer: GuardedSGD, lr: float) -> str:
    """The optimiser: the number of parameters, the base learning rate and the weight decay of each of its groups."""
    groups = [(sum(p.numel() for p in group["params"] if p.requires_grad), group) for group in optimizer.param_groups]
    rates = [
        f"{count_text(count)} parameters at learning rate {lr * group['lr_scale']:g}, weight decay {group['weight_decay']:g}"
        for count, group in groups
        if count
    ]
    return f"optimiser: SGD, momentum {optimizer.param_groups[0]['momentum']:g}; {'; '.join(rates)}"


def count_text(count: int) -> str:
    """A number of parameters, in millions from 10,000 on."""
    return f"{count / 1e6:.2f} M" if count >= 10_000 else str(count)


def added_lines(options: Options, class_weights: list[float]) -> list[str]:
    """A line for each option that is on and not part of the published recipe."""
    lines = []
    if class_weights:
        weights = f"{min(class_weights):.3g} to {max(class_weights):.3g}"
        lines.append(f"class weights: {options.class_weights}, {weights}; the loss is a mean weighted by them")
    if options.warmup_steps:
        lines.append(f"warm-up: the learning rate rises over the first {options.warmup_steps} steps")
    if options.clip_grad_norm:
        lines.append(f"gradients are scaled down to a total norm of at most {options.clip_grad_norm:g}")
    if options.color_jitter:
        brightness, contrast, saturation, hue = options.color_jitter
        text = f"brightness {brightness:g}, contrast {contrast:g}, saturation {saturation:g}, hue {hue:g}"
        lines.append(f"colour jitter: {text}")
    return lines


def seen_val(data: VOCSegmentation) -> str:
    """Why a mean IoU on the validation list means nothing after training on ``data``; "" if it means something."""
    trained = {os.path.splitext(str(entry.image))[0] for entry in data.entries.values()}
    for path in (data.root / name for name in data.lists("val", data.image_folder)):
        with suppress(DatasetError):  # no such list, or an unreadable one
            images = (e.image or f"{data.image_folder}/{e.id}.jpg" for e in data.read_list(path, data.image_folder))
            if common := {os.path.splitext(image)[0] for image in images} & trained:
                return f"{len(common)} of the images that it was trained on are on {path.name}"
    return ""


def crop_warning(data: VOCSegmentation, crop: tuple[int, int]) -> str:
    """A warning if crops (height, width) would be mostly padding, judged by the sizes of some images; else ""."""
    filled = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings of large images
        for image_id in data.ids[:: max(1, len(data) // 20)]:
            with (
                suppress(Exception),
                Image.open(data.image_path(image_id)) as image,
            ):  # a broken image fails later, when it is loaded
                filled.append(min(image.height, crop[0]) * min(image.width, crop[1]) / (crop[0] * crop[1]))
    if not filled or (share := sum(filled) / len(filled)) > 0.5:
        return ""
    return (
        f"warning: {1 - share:.0%} of the crops of {crop[0]}x{crop[1]} will be padding, as the images are smaller; "
        "lower --input-size"
    )


def last_words(run: "Run", done: int) -> str:
    """The run's last line: what was saved, and what to do next."""
    options, validation = run.options, run.validation
    folder = Path(options.snapshot_dir)
    if done < options.num_steps:
        saved = f"saved {folder / 'last.ckpt'} at step {done} of {options.num_steps}"
        saved = saved if done > run.start else "no step was finished"
        return f"{saved}; add --resume to go on" if done else f"{saved}, nothing was saved"
    if validation and validation.done < done:
        return f"all {done} steps are done and saved, but the last net is not evaluated; add --resume to evaluate it"
    if done == run.start:
        return f"nothing is left to do: all {done} steps are done; to train on, add a larger --num-steps"
    root = Path(options.data_dir or "DATA_DIR")
    words = ["python", "evaluate.py", "--data-dir", str(root), "--restore-from", str(run.snapshots.path(done))]
    try:
        list_of(options.replace(data_dir=root, data_list=None), "val")
    except DatasetError:
        words += ["--data-list", "LIST"]
    return f"saved {words[5]}; next: {shlex.join([*words, *layout_words(options)])}"
