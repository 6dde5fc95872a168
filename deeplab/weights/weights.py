"""The contents of a weights file, and the error for a file that cannot be used; the other modules build on this one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

CONFIG: dict[str, Any] = {
    "net": str,
    "backbone": str,
    "num_classes": int,
    "atrous_rates": (list, tuple),
    "stride_in_3x3": bool,
    "batch_norm_eps": float,
    "stem": str,
    "negative_slope": float,
    "auxiliary_channels": int,
}
"""The entries of a file's meta that describe its net, with their types: the arguments of :func:`deeplab.nets.make_net`."""
OF_HEAD = ("net", "num_classes", "atrous_rates", "negative_slope", "auxiliary_channels")
"""Those that do not concern the backbone."""
VERSION = 2
"""The version of the format of our own files, ``meta["version"]``; it rises when an older program would misread a file.

1: the loss function is named without its module; an older program compares only such bare names.
"""
SNAPSHOT = "snapshot"
"""The scheme of our own files."""
NO_PLACE = "no place in the net"
"""The reason for entries that fit no part of the net."""
OTHER_HEAD = "another net's head"
SHOWN = 6  # names per line


class WeightsError(ValueError):
    """A weights file that cannot be used, or not for this net: one sentence with what was found and what to do."""

    exit_status = 2


@dataclass
class Weights:
    """What a weights file holds.

    Attributes:
        state: canonical name -> tensor on the CPU, float32 if it is floating point.
        scheme: the source of the file, in words.
        config: the file's description of the net, by the names in ``CONFIG``; without those in ``OF_HEAD`` if it has no usable
            head.
        meta: the meta of one of our own snapshots, else {}.
        skipped: key in the file, without a wrapper's prefix -> the reason why it is not in ``state``.
        notes: sentences for the user.
        signed: its batch norms are known to keep the sign of their weights; InPlace-ABN does not.
        bare: a ResNet that does not say how it was trained, so that ``trunk`` of :func:`deeplab.weights.load_weights` applies.
        seen_voc_val: why the mean IoU on VOC val means nothing for this file; "" if it means something.
        path: the file that was read.
    """

    state: dict[str, Tensor]
    scheme: str
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    signed: bool = False
    bare: bool = False
    seen_voc_val: str = ""
    path: str = ""

    def lines(self) -> list[str]:
        """A short description of the file."""
        config = ", ".join(f"{name} {self.config[name]}" for name in CONFIG if name in self.config)
        lines = [f"{self.scheme}: {len(self.state)} tensors; {config}"]
        lines += [f"skipped {text}" for text in group_by_reason(self.skipped)]
        lines += self.notes
        if self.seen_voc_val:
            lines.append(f"do not evaluate it on val: {self.seen_voc_val}")
        return lines


def group_by_reason(skipped: Mapping[str, str]) -> list[str]:
    """``{key: reason}`` as one line per reason, with a few of its keys."""
    groups: dict[str, list[str]] = {}
    for key, reason in skipped.items():
        groups.setdefault(reason, []).append(key)
    return [f"{some(keys)}: {reason}" for reason, keys in groups.items()]


def some(names: Iterable[str]) -> str:
    """The first few of the names, and how many more there are."""
    names = list(map(printable, names))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def printable(text: str) -> str:
    """The text with ? in place of control characters, which names in a file may contain."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def check_version(meta: Mapping[Any, Any]) -> None:
    """Raise :class:`WeightsError` if one of our own files has a version that this program does not know."""
    version = meta.get("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise WeightsError(
            f"it is of format {version!r}, and this program knows 1 to {VERSION}; use the program that wrote it, or a newer one"
        )
