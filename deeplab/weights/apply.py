"""Load weights into a net: everything is checked before anything is copied, and every key is accounted for."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deeplab.nets import Net, make_net
from deeplab.weights.load import load_weights
from deeplab.weights.names import IN_HEAD
from deeplab.weights.weights import NO_PLACE, OF_HEAD, Weights, WeightsError, group_by_reason, some

_BUILD: dict[str, tuple[str, dict[Any, str]]] = {  # what a file may say of its net that names and shapes do not show
    "backbone": ("backbone", {}),
    "stem": ("stem", {"7x7": "one 7x7 convolution", "deep": "three 3x3 convolutions"}),
    "stride_in_3x3": ("stride", {True: "in the 3x3 convolutions", False: "in the first 1x1 convolutions"}),
    "batch_norm_eps": ("batch-norm epsilon", {}),
    "negative_slope": ("heads' leaky ReLU slope", {}),
    "auxiliary_channels": ("auxiliary head's number of channels", {}),
}


@dataclass
class LoadReport:
    """What became of every key of a file and of a net, except the batch counters of batch norm.

    Attributes:
        loaded: names in the net that got the file's values.
        skipped: key in the file -> why it was left out.
        missing: names in the net that keep their initial values.
        unexpected: keys in the file that fit nothing in the net.
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


def load_net(
    path: str | Path, batch_norm: str = "frozen", abn: str | None = None, atrous_rates: Sequence[int] | None = None
) -> Net:
    """The net that a weights file describes, with its weights, in evaluation mode on the CPU.

    Args:
        path: any file that :func:`deeplab.weights.load_weights` reads.
        batch_norm: one of ``deeplab.BATCH_NORM_MODES``.
        abn, atrous_rates: see :func:`deeplab.weights.load_weights`.

    Raises:
        WeightsError: the file cannot be used, or holds no trained head.
    """
    net, report = build_net(load_weights(path, abn=abn, atrous_rates=atrous_rates), batch_norm=batch_norm)
    if report.missing:
        raise WeightsError(f"{path}: it gives no trained head, so its net cannot predict classes; train a net from it first")
    return net.eval()


def build_net(
    weights: Weights | None,
    *,
    net: str | None = None,
    backbone: str | None = None,
    num_classes: int | None = None,
    atrous_rates: Sequence[int] | None = None,
    batch_norm: str = "frozen",
    restore_last: bool = True,
) -> tuple[Net, LoadReport]:
    """The net that a weights file describes, with its weights (None: random ones); arguments that are given take precedence.

    Returns:
        The net (in training mode, on the CPU) and what became of every tensor.

    Raises:
        WeightsError: the file does not fit the net that the arguments ask for.
    """
    config = dict(weights.config) if weights else {}
    if net not in (None, config.get("net")):  # the file's head is left out
        config = {name: value for name, value in config.items() if name not in OF_HEAD or name == "num_classes"}
    asked = {"net": net, "backbone": backbone, "num_classes": num_classes, "atrous_rates": atrous_rates}
    config |= {name: value for name, value in asked.items() if value is not None}
    if config.get("net", "deeplabv2") != "deeplabv2" and atrous_rates is not None:
        raise WeightsError(f"--atrous-rates are those of DeepLab-v2's head; leave the option out for a {config['net']}")
    if weights is None:
        return make_net(config, batch_norm), LoadReport(notes=["initial weights: random"])
    with torch.device("meta"):  # spend no time on initial values that the file replaces
        built = make_net(config, batch_norm)
    built.to_empty(device="cpu")
    built.reset_head()
    for name, buffer in built.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return built, apply_weights(built, weights, restore_last=restore_last)


def apply_weights(net: Net, weights: Weights, restore_last: bool = True) -> LoadReport:
    """Copy weights into a net in place, on any device: all that the report lists, or nothing.

    A head with another number of classes or other branches is left out, and the report says so. If the net's rates are the
    first of the file's, those branches are used. Everything else must fit. ``restore_last=False`` leaves the head
    out in any case.

    Raises:
        WeightsError: the net is built differently, a shape differs, or the file lacks a part of the backbone. The net is then
            unchanged.
    """
    _check_build(net, weights)
    head, head_line = _choose_head(net, weights, restore_last)
    target = net.state_dict()
    report = LoadReport(notes=list(weights.notes))
    for key, reason in weights.skipped.items():
        if reason.startswith(NO_PLACE):
            report.unexpected.append(key)
        else:
            report.skipped[key] = reason
    for key in weights.state:
        if key in target and (key in head or not IN_HEAD.match(key)):
            report.loaded.append(key)
        elif not key.endswith(".num_batches_tracked"):
            report.skipped.setdefault(key, "branches that this net does not have" if head else "the head")
    taken = set(report.loaded)
    report.missing = [key for key in target if key not in taken and not key.endswith(".num_batches_tracked")]
    if clashes := [key for key in report.loaded if weights.state[key].shape != target[key].shape]:
        key, more = clashes[0], f" (and {len(clashes) - 1} more such)" if len(clashes) > 1 else ""
        raise WeightsError(
            f"{weights.path}: {key} is {tuple(weights.state[key].shape)} in the file and {tuple(target[key].shape)} in the "
            f"net{more}; nothing was loaded"
        )
    if lost := [key for key in report.missing if not IN_HEAD.match(key)]:
        raise WeightsError(
            f"{weights.path}: it lacks {len(lost)} of the backbone's tensors ({some(lost)}); "
            "nothing was loaded, fetch or save the file again"
        )
    with torch.no_grad():
        for key in report.loaded:
            target[key].copy_(weights.state[key])
    report.loaded = [key for key in report.loaded if not key.endswith(".num_batches_tracked")]
    report.notes += [head_line] if head_line else []
    return report


def _check_build(net: Net, weights: Weights) -> None:
    """Refuse a net that is built differently from the file's although the names agree."""
    ours: Mapping[str, Any] = net.config
    for name, (what, words) in _BUILD.items():
        if name in OF_HEAD and (name not in ours or weights.config.get("net") != ours["net"]):  # the file's head is left out
            continue
        built, found = ours[name], weights.config.get(name, ours[name])
        if found == built or (isinstance(found, float) and math.isclose(found, built, rel_tol=1e-4)):
            continue
        advice = f"use --backbone {found} or another file" if name == "backbone" else f"build the net with {name}={found!r}"
        raise WeightsError(
            f"{weights.path}: its {what} is {words.get(found, found)}, that of the net is {words.get(built, built)}; {advice}"
        )


def _choose_head(net: Net, weights: Weights, restore_last: bool) -> tuple[set[str], str]:
    """The tensors of the file's head that are used, and the line that says why some are not."""
    classes, theirs = weights.config.get("num_classes"), weights.config.get("net")
    if classes is None:
        return set(), ""
    ours: Mapping[str, Any] = net.config
    head = {key for key in weights.state if IN_HEAD.match(key)}
    if not restore_last:
        return set(), f"the file's head ({classes} classes) is left out, as asked"
    if theirs != ours["net"]:
        return set(), f"the file's head is that of a {theirs} and the net is a {ours['net']}: the head is left out"
    if classes != net.num_classes:
        return set(), f"the file's head has {classes} classes and the net {net.num_classes}: the head is left out"
    if theirs != "deeplabv2":
        return head, ""
    rates, net_rates = list(weights.config["atrous_rates"]), ours["atrous_rates"]
    if rates[: len(net_rates)] == net_rates:
        unused = ", ".join(map(str, rates[len(net_rates) :]))
        return head, f"the branches of the file's head at rates {unused} are left out" if unused else ""
    if len(rates) != len(net_rates):
        return set(), f"the file's head has the rates {rates} and the net {net_rates}: the head is left out"
    option = re.sub(r"[^\d,]", "", str(rates))
    raise WeightsError(
        f"{weights.path}: its head has the rates {rates}, but the net {net_rates}; "
        f"use --atrous-rates {option}; in training, --not-restore-last leaves the head out"
    )
