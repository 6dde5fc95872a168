"""The report of an evaluation: a folder with a page, its images, and the counts that a later report can be compared with."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dataset.classes import IGNORE_LABEL
from deeplab.weights import Weights
from utils.captions import place_captions
from utils.command import UserError
from utils.evaluation.comparison import DATA, OtherReport, scores_of, setting_text
from utils.evaluation.images import Sample
from utils.files import save_json, write_atomically
from utils.metrics import ConfusionMatrix
from utils.options import OF_A_MACHINE, Options, flag
from utils.outputs import OUTPUT_MARK, Output, is_output, marked_jpeg
from utils.visualize import PALETTE, WRONG, Classes, blend, indexed_png, marked_png, scale, wrong_pixels

PREDICTED = ("scales", "fuse", "mirror", "window", "overlap", "crf", "amp", "input_size")  # the options on the page
BYTES = 150e6  # the size of all images together, about
PIXEL_BYTES = 0.4  # the size of a photo and its masks per pixel of the square around it, about
MOST_IMAGES = 5000  # larger sets show every second, third, ... image
MOST_SIDE = 1000  # pixels
THUMBNAIL_SIDE = 240
ERROR_COLORS = np.array([(255, 255, 255), WRONG, PALETTE[IGNORE_LABEL]], dtype=np.uint8)  # right, wrong, ignored


class Report:
    """Writes the images of a report as they are predicted, and its page at the end.

    Under torchrun each process writes the images of its share, and the main process the page.

    Args:
        folder: created if missing.
        ids: the ids of all images; the index of an id is the number in its file names.
        classes: the names and colours of the classes.
        ignore_label: a class that is ignored.
        crf: show the predictions before and after the CRF.
        other: the report to compare with.
        names: write class names into their regions.
    """

    def __init__(
        self,
        folder: Path,
        ids: Sequence[str],
        classes: Classes,
        ignore_label: int,
        crf: bool,
        other: OtherReport | None,
        names: bool = False,
    ) -> None:
        self.names = names
        self.folder, self.classes, self.ignore_label, self.crf, self.other = folder, classes, ignore_label, crf, other
        every = math.ceil(len(ids) / MOST_IMAGES)
        self.shown = {id: number for number, id in list(enumerate(ids))[::every]}
        self.side = min(MOST_SIDE, int((BYTES / PIXEL_BYTES / max(len(self.shown), 1)) ** 0.5))  # of all images
        self.records: list[dict[str, Any]] = []

    def add(self, sample: Sample, prediction: np.ndarray) -> None:
        """Count an image and write its files; ``prediction`` is (H, W) uint8, after the CRF if there is one."""
        counted = ConfusionMatrix(len(self.classes.names), ignore_label=self.ignore_label)
        counted.update(torch.from_numpy(sample.label), torch.from_numpy(prediction))
        matrix = counted.matrix.numpy()
        rows, columns = matrix.nonzero()
        entries = np.stack((rows, columns, matrix[rows, columns]), axis=1).tolist()
        record: dict[str, Any] = {"id": sample.id, "matrix": entries}
        if sample.id in self.shown:
            number = self.shown[sample.id]
            masks = {"label": sample.label, "prediction": sample.prediction} | ({"crf": prediction} if self.crf else {})
            record.update(number=number, size=sample.label.shape)
            record["layers"] = self._write_images(number, sample, masks, prediction)
            if self.names:
                record["captions"] = {layer: captions_of(mask, self.classes.captions) for layer, mask in masks.items()}
        self.records.append(record)

    def _write_images(self, number: int, sample: Sample, masks: Mapping[str, np.ndarray], prediction: np.ndarray) -> list[str]:
        """Write the image, its thumbnail and the masks that the page lays over it; returns the names of the masks."""
        errors = wrong_pixels(sample.label, prediction).astype(np.uint8)
        errors[sample.label == IGNORE_LABEL] = 2
        image = sample.image[:, :, ::-1]
        small = min(1.0, THUMBNAIL_SIDE / max(sample.label.shape))
        mixed = blend(np.ascontiguousarray(scale(image, small)), scale(prediction, small), self.classes)
        factor = min(1.0, self.side / max(sample.label.shape))
        files = {".jpg": _jpeg(scale(image, factor), 82), "_thumbnail.jpg": _jpeg(mixed, 72)}
        background = {"transparency": bytes([0])} if self.classes.has_background else {}  # opacity of the first colour
        for name, mask in masks.items():
            data = indexed_png(scale(mask, factor), self.classes.palette, pnginfo=marked_png(), **background)
            files[f"_{name}.png"] = data
        see_through = bytes([60, 255, 255])  # opacity of the first colours
        files["_errors.png"] = indexed_png(scale(errors, factor), ERROR_COLORS, pnginfo=marked_png(), transparency=see_through)
        if self.other and (others := self.other.mask(sample.id)):
            files["_other.png"] = others
        for ending, data in files.items():
            write_atomically(self.folder / "pictures" / f"{number:06d}{ending}", methodcaller("write", data), sync=False)
        return [name for name in (*masks, "errors", "other") if f"_{name}.png" in files]

    def write(
        self, records: Iterable[dict[str, Any]], result: dict[str, Any], head: Mapping[str, Any], settings: Mapping[str, str]
    ) -> None:
        """Write the page and its data.

        Args:
            records: the records of all processes.
            result: the content of ``--save-json``.
            head: title, subtitle, notes and facts of the page.
            settings: see :func:`settings_of`.
        """
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        unique = {record["id"]: record for record in records}  # a list may contain an id twice
        records = [unique[id] for id in sorted(unique)]
        colors = self.classes.palette[: len(self.classes.names)].tolist()
        saved = {"made_by": OUTPUT_MARK, "scores": result, "names": list(self.classes.names), "colors": colors}
        save_json(self.folder / DATA, saved | {"settings": settings, "pictures": records})
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
        )
        environment.filters.update(
            percent=_percent, signed=_signed, number=lambda value: "" if value is None else f"{value:.6f}"
        )
        differing = self.other.differing(settings) if self.other else []
        content = self._content(records, result) | {"names": self.names, "differing": differing, "made_by": OUTPUT_MARK}
        page = environment.get_template("report.html").render(**head, **content)
        write_atomically(self.folder / "index.html", lambda file: file.write(page.encode()))

    def _content(self, records: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
        """The scores and images for the page."""
        titles = [title for title in ("scores", "before_crf", "after_crf") if title in result]
        parts = [result[title] for title in titles]
        matrix = np.array(parts[-1]["confusion_matrix"])
        colors = ["rgb({}, {}, {})".format(*color) for color in self.classes.palette[: len(matrix)].tolist()]
        names = {"mean_iou": "mean IoU %", "pixel_accuracy": "pixel accuracy %", "mean_accuracy": "mean accuracy %"}
        names["frequency_weighted_iou"] = "frequency-weighted IoU %"
        if "labelled_mean_iou" in parts[0]:
            names["labelled_mean_iou"] = "mean IoU of labelled classes %"
        images = [self._image(record) for record in records if "number" in record]
        images.sort(key=lambda image: (image["iou"] is None, image["iou"], image["number"]))
        text = "Lowest mean IoU first, over the classes of each image. Click an image to enlarge it; then the arrow keys show "
        text += "the next one, and the digits switch the overlay."
        if len(images) < len(records):
            text += f" {len(images):,} of the {len(records):,} images are shown; all are counted."
        return {
            "columns": [title.replace("_", " ").replace("crf", "CRF") for title in titles] if len(titles) > 1 else ["score"],
            "totals": [{"name": name, "numbers": [part[key] for part in parts]} for key, name in names.items()],
            "classes": [
                {
                    "name": entry["name"],
                    "color": colors[i],
                    "ious": [part["classes"][i]["iou"] for part in parts],
                    "accuracy": entry["accuracy"],
                    "pixels": int(matrix[i].sum()),
                }
                for i, entry in enumerate(parts[-1]["classes"])
            ],
            "matrix": _heat_map(matrix, self.classes.names),
            "comparison": self.other and self.other.compare(records, self.classes, self.ignore_label, colors),
            "images": images,
            "images_text": text,
        }

    def _image(self, record: dict[str, Any]) -> dict[str, Any]:
        """An image as the page shows it."""
        scores = scores_of([record["matrix"]], len(self.classes.names), self.ignore_label)
        known = [(i, iou) for i, iou in enumerate(scores.class_iou.tolist()) if not math.isnan(iou)]
        iou = None if math.isnan(scores.mean_iou) else scores.mean_iou
        before = self.other.iou(record["id"], self.ignore_label) if self.other else None
        stem = f"pictures/{record['number']:06d}"
        return {
            "id": record["id"],
            "number": record["number"],
            "iou": iou,
            "change": None if iou is None or before is None else iou - before,
            "ious": " ".join(f"{i}:{value:.4f}" for i, value in known),
            "ratio": round(record["size"][1] / record["size"][0], 4),
            "layers": " ".join(("image", *record["layers"])),
            "captions": json.dumps(record["captions"], separators=(",", ":")) if "captions" in record else "",
            "files": {"image": f"{stem}.jpg", "thumbnail": f"{stem}_thumbnail.jpg"},
        }


def captions_of(labels: np.ndarray, names: Mapping[int, str]) -> list[list[float]]:
    """The captions of a mask: class, x and y of the centre, font size and width, in thousandths of the image's width."""
    factor = min(1.0, MOST_SIDE / max(labels.shape))
    labels = scale(labels, factor)
    unit = 1000 / labels.shape[1]
    return [
        [c.label, *(round(unit * value, 1) for value in (c.left + c.width / 2, c.top + c.height / 2, c.size, c.width))]
        for c in place_captions(labels, names)
    ]


def prepare_folder(folder: Path) -> None:
    """Create the folder of a report, and delete the images of an earlier report from it.

    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    try:
        files = [path for path in folder.rglob("[!.]*") if not path.is_dir() or path.is_symlink()]
        if foreign := next((path for path in files if not is_output(path)), None):
            raise UserError(
                f"--report {folder} holds other files ({foreign.relative_to(folder)}); choose an empty or new folder, or move "
                "the files that no report has written"
            )
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for path in (folder / "pictures").glob("[0-9]*"):
            path.unlink()
    except OSError as error:
        raise UserError(f"--report {folder} cannot be written ({error.strerror or error}); choose another folder") from None


def planned(folder: Path) -> list[Output]:
    """The files of a report, with one image standing for all."""
    return [Output("--report", folder, name, f"the report's {name}") for name in ("index.html", DATA, "pictures/000000.jpg")]


def settings_of(options: Options, weights: Weights, data_list: Path) -> dict[str, str]:
    """The settings of an evaluation and of its net, for :meth:`utils.evaluation.comparison.OtherReport.differing`."""
    places = OF_A_MACHINE - {"data_dir", "data_list", "restore_from"} | {"resume"} | weights.config.keys()
    args = weights.meta.get("args") or {}
    trained = {f"trained with {name}": value for name, value in args.items() if name not in places}
    settings = {"restore_from": options.restore_from, "step": weights.meta.get("step"), "data_list": data_list}
    settings |= {name: getattr(options, name) for name in (*PREDICTED, "ignore_label")} | weights.config | trained
    return {name: setting_text(value) for name, value in settings.items()}


def head_of(options: Options, weights: Weights, data_list: Path, count: int, notes: Sequence[str]) -> dict[str, Any]:
    """The head of the page, and the facts of "How it was made"."""
    packages = ("torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "pydensecrf2")
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages), platform.platform()]
    hidden = ("args", "classes", "colors", "given", "mean")
    meta = {name: value for name, value in weights.meta.items() if name not in hidden}
    args = {name: value for name, value in (weights.meta.get("args") or {}).items() if name != "resume"}
    given = weights.meta.get("given") or []
    options_given = [[flag(name), *[setting_text(args[name])] * (args[name] is not True)] for name in args if name in given]
    defaults = [f"{name} {setting_text(value)}" for name, value in args.items() if name not in given and value is not None]
    facts = [
        ("command", shlex.join(["python", *sys.argv])),
        ("weights", f"{options.restore_from}: {weights.scheme}"),
        ("net", ", ".join(f"{name} {value}" for name, value in {**weights.config, **meta}.items() if value not in (None, ""))),
        ("trained with", " ".join(map(shlex.join, options_given))),
        ("other options" if options_given else "trained with", ", ".join(defaults)),
        ("images", f"{count:,} of {data_list}"),
        ("predicted", ", ".join(f"{name} {getattr(options, name)}" for name in PREDICTED)),
        ("versions", ", ".join(versions)),
    ]
    return {
        "title": f"{Path(options.restore_from).name} on {data_list.name}",
        "subtitle": f"{count:,} images of {options.data_dir}",
        "notes": list(notes),
        "facts": [(name, value) for name, value in facts if value],
    }


def _heat_map(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the confusion matrix for the classes that occur in labels or predictions."""
    present = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1)).tolist()
    totals = np.maximum(matrix.sum(axis=1), 1)
    return [
        {
            "name": names[i],
            "cells": [
                {"name": names[j], "count": int(matrix[i, j]), "share": float(matrix[i, j] / totals[i])} for j in present
            ],
        }
        for i in present
    ]


def _jpeg(image_rgb: np.ndarray, quality: int) -> bytes:
    return marked_jpeg(cv2.imencode(".jpg", image_rgb[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes())


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # not installed, or not as a package
        return "?"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:+.2f}"
