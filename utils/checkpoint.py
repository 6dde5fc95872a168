"""Snapshots on disk: written whole or not at all, and self-describing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset import MEAN_BGR
from deeplab import Net
from deeplab.weights import LoadReport, Weights, WeightsError, build_net, check_sums, load_weights
from utils.command import UserError
from utils.files import write_atomically

VERSION = 1
"""Of the snapshot format; ``meta["version"]``."""


def make_meta(net: Net, classes: Sequence[str] | None, step: int, args: dict, **more: Any) -> dict:
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


def dataset_of(meta: dict) -> str:
    """The data set that a snapshot's net was trained on; ``"voc"`` where its meta does not tell."""
    return (meta.get("args") or {}).get("dataset", "voc")


def save_snapshot(path: str | Path, net: nn.Module, meta: dict, **more: Any) -> None:
    """Save ``{"model": state_dict, "meta": meta, **more}`` atomically."""
    write_atomically(path, lambda file: torch.save({"model": net.state_dict(), "meta": meta, **more}, file))


def load_init(path: str, trunk: str = "auto", **options: Any) -> tuple[Net, Weights, LoadReport]:
    """Load a weights file and build its net: :func:`load_weights`, then :func:`build_net` with ``options``."""
    weights = load_weights(path, trunk)
    net, report = build_net(weights, **options)
    return net, weights, report


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A ``last.ckpt``: model, meta, optimizer, step, scaler.

    Raises:
        UserError: the file is missing, broken, or a snapshot without the optimiser's state.
    """
    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume: there is no {path}") from None
    except WeightsError as error:
        raise UserError(f"--resume: {path}: {error}") from None
    except Exception as error:  # torch.load raises many kinds for broken files
        raise UserError(f"--resume: {path} is not a checkpoint that torch can read ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "meta", "optimizer", "scaler", "step"} <= content.keys():
        raise UserError(f"--resume: {path} holds no optimiser state; give a last.ckpt, or use --restore-from to start from it")
    return content
