"""Compares two evaluations of the same images: a report keeps a small confusion matrix per image."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.command import UserError
from utils.metrics import ConfusionMatrix, Scores
from utils.visualize import Classes

MOST_IMAGES, MOST_PIXELS = 10**9, 2**40  # of a report, of an image
DATA = "report.json"  # in a report's folder: the scores and a small matrix per image


@dataclass
class OtherReport:
    """An earlier report to compare with.

    Attributes:
        folder: its folder.
        content: the content of its ``report.json``.
        records: its records by image id.
    """

    folder: Path
    content: dict[str, Any]
    records: dict[str, dict[str, Any]]

    def mask(self, id: str) -> bytes | None:
        """The PNG file of an image's prediction; None if the report does not show the image."""
        record = self.records.get(id, {})
        layer = "crf" if "crf" in record.get("layers", ()) else "prediction"
        path = self.folder / "pictures" / f"{record.get('number', -1):06d}_{layer}.png"
        return path.read_bytes() if path.is_file() else None

    def iou(self, id: str, ignore_label: int) -> float | None:
        """An image's mean IoU; None if the image is missing or has no labelled pixel."""
        if id not in self.records:
            return None
        value = scores_of([self.records[id]["matrix"]], len(self.content["names"]), ignore_label).mean_iou
        return None if math.isnan(value) else value

    def differing(self, settings: Mapping[str, str]) -> list[tuple[str, str, str]]:
        """The settings that differ: (name, there, here); reports of earlier versions hold fewer settings."""
        scores, found = self.content["scores"], self.content.get("settings")
        there = found if isinstance(found, dict) else {**scores, "crf": "after_crf" in scores}
        values = {name: setting_text(there[name]) for name in settings if name in there}
        return [(name, value, settings[name]) for name, value in values.items() if value != settings[name]]

    def compare(
        self, records: Sequence[dict[str, Any]], classes: Classes, ignore_label: int, colors: Sequence[str]
    ) -> dict[str, Any]:
        """The IoU of each class there and here, over the images in both reports."""
        common = [record for record in records if record["id"] in self.records]
        sides = ([self.records[record["id"]]["matrix"] for record in common], [record["matrix"] for record in common])
        there, here = (scores_of(matrices, len(classes.names), ignore_label) for matrices in sides)
        rows = [
            {"name": name, "color": color, "there": a, "here": b, "change": b - a}
            for name, color, a, b in zip(
                ("mean IoU", *classes.names),
                ("", *colors),
                (there.mean_iou, *there.class_iou.tolist()),
                (here.mean_iou, *here.class_iou.tolist()),
            )
        ]
        text = f"{self.content['scores'].get('restore_from')}; over the {len(common):,} images in both reports."
        moved = sum(_labelled(a) != _labelled(b) for a, b in zip(*sides))
        if moved:
            text += f" The labels of {moved:,} of them differ."
        return {"name": self.folder, "text": text, "rows": rows}


def open_other(folder: str, report: Path, ids: Sequence[str], classes: Classes) -> OtherReport:
    """The report in ``folder``, for ``--compare``.

    Raises:
        UserError: the folder holds no report, is also ``--report``, or the report has other classes or other images.
    """
    path = Path(folder) / DATA
    try:
        content = json.loads(path.read_bytes())
        records = {record["id"]: record for record in content["pictures"]}
        names, _ = content["names"], content["scores"].get("restore_from")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(names)
        if damaged := [id for id, record in records.items() if not _is_record(id, record, len(names))]:
            raise UserError(f"--compare {folder}: its {DATA} is damaged at image {damaged[0]!r}; write that report again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--compare {folder} is no report: expected a folder that evaluate.py wrote with --report") from None
    if report.exists() and report.samefile(folder):
        raise UserError(f"--compare and --report are both {folder}; write the new report to another folder")
    if names != list(classes.names):
        raise UserError(
            f"--compare {folder} has other classes ({', '.join(names[:4])}, ...; {len(names)} of them) than this evaluation "
            f"({', '.join(classes.names[:4])}, ...; {len(classes.names)}); compare reports with the same classes"
        )
    if not records.keys() & set(ids):
        raise UserError(f"--compare {folder} has none of the {len(ids)} images of this evaluation; compare the same list")
    return OtherReport(Path(folder), content, records)


def setting_text(value: object) -> str:
    """A setting as reports store and compare it: 1,0.75 for a tuple or a list, since JSON stores tuples as lists."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "none" if value is None else {"True": "yes", "False": "no"}.get(str(value), str(value))


def _is_record(id: object, record: dict[str, Any], num_classes: int) -> bool:
    """Whether an image's record is valid: counts of the report's classes and, for a shown image, its number and layers."""
    number, layers, matrix = record.get("number", 0), record.get("layers", []), record["matrix"]
    return (
        isinstance(id, str)
        and type(number) is int
        and 0 <= number < MOST_IMAGES
        and isinstance(layers, list)
        and all(
            [type(value) for value in entry] == [int] * 3
            and max(entry[:2]) < num_classes
            and min(entry) >= 0
            and entry[2] < MOST_PIXELS
            for entry in matrix
        )
    )


def scores_of(matrices: Sequence[Sequence[Sequence[int]]], num_classes: int, ignore_label: int) -> Scores:
    """The scores over all given images, from their (label, prediction, count) entries."""
    total = ConfusionMatrix(num_classes, ignore_label=ignore_label)
    for entries in matrices:
        for label, prediction, count in entries:
            total.matrix[label, prediction] += count
    return total.scores()


def _labelled(entries: Sequence[Sequence[int]]) -> dict[int, int]:
    """The number of labelled pixels per class of an image."""
    counts: dict[int, int] = {}
    for label, _, count in entries:
        counts[label] = counts.get(label, 0) + count
    return counts
