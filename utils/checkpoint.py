"""Snapshots on disk: written whole or not at all, and self-describing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset import MEAN_BGR
from deeplab import DeepLabV2, deeplabv2
from deeplab.weights import LoadReport, Weights, apply_weights, load_weights
from utils.command import UserError
from utils.files import write_atomically

VERSION = 1
"""Of the snapshot format; ``meta["version"]``."""


def make_meta(net: DeepLabV2, classes: Sequence[str] | None, step: int, args: dict, **more: Any) -> dict:
    """What a snapshot says of itself; ``evaluate.py`` rebuilds the net from it without flags."""
    return {
        **net.config,
        "classes": list(classes) if classes else None,
        "mean": list(MEAN_BGR),
        "step": step,
        "args": args,
        "version": VERSION,
        **more,
    }


def save_snapshot(path: str | Path, net: nn.Module, meta: dict, **more: Any) -> None:
    """Save ``{"model": state_dict, "meta": meta, **more}`` atomically."""
    write_atomically(path, lambda file: torch.save({"model": net.state_dict(), "meta": meta, **more}, file))


def build_net(
    weights: Weights | None,
    *,
    backbone: str | None = None,
    num_classes: int | None = None,
    atrous_rates: Sequence[int] | None = None,
    batch_norm: str = "frozen",
    restore_last: bool = True,
) -> tuple[DeepLabV2, LoadReport]:
    """The net that a weights file describes, with that file's weights; arguments that are given take precedence.

    Args:
        weights: from :func:`deeplab.weights.load_weights`; None leaves the initial values.
        restore_last: False leaves the head of ``weights`` out.

    Returns:
        The net (in training mode, on the CPU) and what became of every tensor.

    Raises:
        WeightsError: the file does not fit the net that the arguments ask for.
    """
    config = dict(weights.config) if weights else {}
    asked = {"backbone": backbone, "num_classes": num_classes, "atrous_rates": atrous_rates}
    config.update({name: value for name, value in asked.items() if value is not None})
    if weights is None:
        return deeplabv2(**config, batch_norm=batch_norm), LoadReport(notes=["initial weights: random"])
    with torch.device("meta"):  # no time is spent on initial values that the file replaces
        net = deeplabv2(**config, batch_norm=batch_norm)
    net.to_empty(device="cpu")
    net.layer5.reset_parameters()
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return net, apply_weights(net, weights, restore_last=restore_last)


def load_init(path: str, **options: Any) -> tuple[DeepLabV2, Weights, LoadReport]:
    """Load a weights file and build its net: :func:`load_weights`, then :func:`build_net` with ``options``."""
    weights = load_weights(path)
    net, report = build_net(weights, **options)
    return net, weights, report


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A ``last.ckpt``: model, meta, optimizer, step, scaler, rng.

    Raises:
        UserError: the file is missing, broken, or a snapshot without the optimiser's state.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume: there is no {path}") from None
    except Exception as error:  # torch.load raises many kinds for broken files
        raise UserError(f"--resume: {path} is not a checkpoint that torch can read ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "meta", "optimizer", "scaler", "rng", "step"} <= content.keys():
        raise UserError(f"--resume: {path} holds no optimiser state; give a last.ckpt, or use --restore-from to start from it")
    return content
