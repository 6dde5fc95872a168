"""Putting weights into a net: checked as a whole before anything is copied, and every key accounted for."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeplab.deeplabv2 import DeepLabV2
from deeplab.resnet import BACKBONES, Bottleneck
from deeplab.weights.contents import NO_PLACE, Weights, WeightsError, group_by_reason, some
from deeplab.weights.load import load_weights
from deeplab.weights.names import HEAD_KEY


@dataclass
class LoadReport:
    """What became of every key of a file and of a net; the batch counters of batch norm are not told.

    Attributes:
        loaded: names in the net that got the file's numbers.
        skipped: key in the file -> why it was left out.
        missing: names in the net that keep their initial values.
        unexpected: keys in the file that fit nothing in a DeepLab-v2.
        notes: sentences for the user.
    """

    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in a few lines, the counts first."""
        total = len(self.loaded) + len(self.missing)
        counts = f"loaded {len(self.loaded)} of the net's {total} tensors"
        counts += f"; of the file, {len(self.skipped)} skipped, {len(self.unexpected)} unexpected"
        lines = [counts]
        if self.missing:
            lines.append(f"keeping their initial values: {some(self.missing)}")
        lines += [f"skipped {text}" for text in group_by_reason(self.skipped)]
        if self.unexpected:
            lines.append(f"unexpected in the file: {some(self.unexpected)}")
        return lines + self.notes


def load_net(path: str | Path, batch_norm: str = "frozen") -> DeepLabV2:
    """The net that a weights file describes, with its weights, in evaluation mode on the CPU.

    Args:
        path: any file that :func:`deeplab.weights.load_weights` reads.
        batch_norm: one of ``deeplab.BATCH_NORM_MODES``.

    Raises:
        WeightsError: the file cannot be used, or holds no trained head.
    """
    net, report = build_net(load_weights(path), batch_norm=batch_norm)
    if report.missing:
        raise WeightsError(f"{path}: it gives no trained head, so its net has no classes to tell; train one from it first")
    return net.eval()


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
    config |= {name: value for name, value in asked.items() if value is not None}
    if weights is None:
        return DeepLabV2(**config, batch_norm=batch_norm), LoadReport(notes=["initial weights: random"])
    with torch.device("meta"):  # no time is spent on initial values that the file replaces
        net = DeepLabV2(**config, batch_norm=batch_norm)
    net.to_empty(device="cpu")
    net.layer5.reset_parameters()
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return net, apply_weights(net, weights, restore_last=restore_last)


def apply_weights(net: DeepLabV2, weights: Weights, restore_last: bool = True) -> LoadReport:
    """Copy weights into a net, in place: all that the report names, or nothing.

    A head for another number of classes or other branches is left out with one line; the first branches of a longer head
    are used where the net's rates are the first of the file's. Everything else must fit.

    Args:
        net: any device; its parameters keep their types.
        weights: from :func:`deeplab.weights.load_weights`.
        restore_last: False leaves the head out in any case.

    Raises:
        WeightsError: the net is built differently, a shape differs, or a part of the trunk is not in the file. The net is
            as it was.
    """
    _check_build(net, weights)
    branches, head_line = _choose_branches(net, weights, restore_last)
    target = net.state_dict()
    report = LoadReport(notes=list(weights.notes))
    for key, reason in weights.skipped.items():
        if reason.startswith(NO_PLACE):
            report.unexpected.append(key)
        else:
            report.skipped[key] = reason
    for key in weights.state:
        if key in target and not _is_unused_branch(key, branches):
            report.loaded.append(key)
        elif not key.endswith(".num_batches_tracked"):
            report.skipped.setdefault(key, "the head" if branches == 0 else "branches that this net does not have")
    taken = set(report.loaded)
    report.missing = [key for key in target if key not in taken and not key.endswith(".num_batches_tracked")]
    _refuse_misfits(report, weights, target)
    with torch.no_grad():
        for key in report.loaded:
            target[key].copy_(weights.state[key])
    report.loaded = [key for key in report.loaded if not key.endswith(".num_batches_tracked")]
    if head_line:
        report.notes.append(head_line)
    return report


def _refuse_misfits(report: LoadReport, weights: Weights, target: Mapping[str, Tensor]) -> None:
    """Raise :class:`WeightsError` where a shape differs or a part of the trunk is not in the file."""
    clashes = [key for key in report.loaded if weights.state[key].shape != target[key].shape]
    if clashes:
        key, more = clashes[0], f" (and {len(clashes) - 1} more such)" if len(clashes) > 1 else ""
        raise WeightsError(
            f"{weights.path}: {key} is {tuple(weights.state[key].shape)} in the file and {tuple(target[key].shape)} in the "
            f"net{more}; nothing was loaded"
        )
    lost = [key for key in report.missing if not HEAD_KEY.match(key)]
    if lost:
        raise WeightsError(
            f"{weights.path}: it lacks {len(lost)} of the trunk's tensors ({some(lost)}); "
            "nothing was loaded, fetch or save the file again"
        )


def _is_unused_branch(key: str, branches: int) -> bool:
    match = HEAD_KEY.match(key)
    return match is not None and int(match[1]) >= branches


def _check_build(net: DeepLabV2, weights: Weights) -> None:
    """Refuse a net whose layers mean something else than the file's although the names are the same."""
    ours: Mapping[str, Any] = net.config
    theirs, path = weights.config, weights.path
    backbone = theirs.get("backbone", ours["backbone"])
    if backbone != ours["backbone"]:
        raise WeightsError(
            f"{path}: it holds a {backbone}, but the net is a {ours['backbone']}; use --backbone {backbone} or another file"
        )
    stride = theirs.get("stride_in_3x3", ours["stride_in_3x3"])
    if stride != ours["stride_in_3x3"] and BACKBONES[backbone][0] is Bottleneck:
        places = ("the first 1x1", "the 3x3")
        raise WeightsError(
            f"{path}: the stride of its stages sits in {places[stride]} convolutions, but in {places[not stride]} of the net; "
            f"build the net with stride_in_3x3={stride}"
        )
    eps = theirs.get("batch_norm_eps", ours["batch_norm_eps"])
    if not math.isclose(eps, ours["batch_norm_eps"], rel_tol=1e-4):
        raise WeightsError(
            f"{path}: its batch-norm epsilon is {eps:g}, but that of the net is {ours['batch_norm_eps']:g}; "
            f"build the net with batch_norm_eps={eps:g}"
        )


def _choose_branches(net: DeepLabV2, weights: Weights, restore_last: bool) -> tuple[int, str]:
    """How many of the file's head convolutions are used, and the line that says why not all of them."""
    classes, rates = weights.config.get("num_classes"), weights.config.get("atrous_rates")
    if classes is None or rates is None:
        return 0, ""
    ours: Mapping[str, Any] = net.config
    rates, net_rates = list(rates), ours["atrous_rates"]
    if not restore_last:
        return 0, f"the file's head ({classes} classes) is left out, as asked"
    if classes != net.num_classes:
        return 0, f"the file's head has {classes} classes and the net {net.num_classes}: the head is left out"
    if rates[: len(net_rates)] == net_rates:
        unused = ", ".join(map(str, rates[len(net_rates) :]))
        return len(net_rates), f"the branches of the file's head at rates {unused} are left out" if unused else ""
    if len(rates) != len(net_rates):
        return 0, f"the file's head has the rates {rates} and the net {net_rates}: the head is left out"
    option = re.sub(r"[^\d,]", "", str(rates))
    raise WeightsError(
        f"{weights.path}: its head has the rates {rates}, but the net {net_rates}; "
        f"use --atrous-rates {option}; in training, --not-restore-last leaves the head out"
    )
