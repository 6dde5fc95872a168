"""Segmentation scores from one integer confusion matrix over a whole data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.classes import IGNORE_LABEL


@dataclass(frozen=True)
class Scores:
    """The scores over a whole data set, as fractions 0..1.

    With n_ij pixels of class i predicted as class j, t_i = sum_j n_ij labelled and p_i = sum_j n_ji predicted pixels
    (Long et al., arXiv:1411.4038, section 5; the IoU is also that of the VOC development kit, ``VOCevalseg``):

    - ``pixel_accuracy``: sum_i n_ii / sum_i t_i
    - ``class_accuracy``: (C,) float64, n_ii / t_i; NaN for classes absent from the labels. ``mean_accuracy``: its mean.
    - ``class_iou``: (C,) float64, n_ii / (t_i + p_i - n_ii); NaN for classes absent from the labels and the predictions.
      ``mean_iou``: its mean.
    - ``frequency_weighted_iou``: sum_i t_i class_iou_i / sum_i t_i

    The means leave NaN out; if nothing was counted, every score is NaN. A class that is the ignore label is NaN in both
    arrays; predictions of it are errors of the labelled classes.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    class_iou: np.ndarray
    class_accuracy: np.ndarray

    @property
    def labelled_mean_iou(self) -> float:
        """The mean IoU of the labelled classes; ``mean_iou`` also counts classes that were only predicted, with 0."""
        return _mean(self.class_iou[~np.isnan(self.class_accuracy)])

    def as_dict(self, class_names: Sequence[str], labelled: bool = False) -> dict[str, object]:
        """The scores as plain values for JSON, NaN as None; one entry per class under ``"classes"``.

        Args:
            labelled: add ``labelled_mean_iou``.

        Raises:
            ValueError: the number of names is not the number of classes.
        """
        _check_names(class_names, len(self.class_iou))
        names = ("pixel_accuracy", "mean_accuracy", "mean_iou", "frequency_weighted_iou", *["labelled_mean_iou"] * labelled)
        return {name: _json_number(getattr(self, name)) for name in names} | {
            "classes": [
                {"id": i, "name": str(name), "iou": _json_number(iou), "accuracy": _json_number(accuracy)}
                for i, (name, iou, accuracy) in enumerate(zip(class_names, self.class_iou, self.class_accuracy))
            ],
        }

    def table(self, class_names: Sequence[str], palette: np.ndarray | None = None, labelled: bool = False) -> str:
        """A table for the terminal: one line per class in percent (``-`` for NaN), then the four scores of the data set.

        Args:
            palette: (256, 3) uint8 RGB; if given, the line of each class begins with a patch of its colour, for terminals with
                24-bit colours (ISO 8613-6).
            labelled: add ``labelled_mean_iou``.

        Raises:
            ValueError: the number of names is not the number of classes.
        """
        _check_names(class_names, len(self.class_iou))
        summary = {
            "pixel accuracy": self.pixel_accuracy,
            "mean accuracy": self.mean_accuracy,
            "mean IoU": self.mean_iou,
            "frequency-weighted IoU": self.frequency_weighted_iou,
        }
        if labelled:
            summary["mean IoU of labelled classes"] = self.labelled_mean_iou
        width = max(len(name) for name in (*class_names, *summary))
        header = f"{'':3} {'class':{width}} {'IoU %':>8} {'accuracy %':>10}"
        rule = "-" * len(header)
        rows = [
            f"{i:3} {name:{width}} {_percent(self.class_iou[i]):>8} {_percent(self.class_accuracy[i]):>10}"
            for i, name in enumerate(class_names)
        ]
        totals = [f"{'':3} {name:{width}} {_percent(value):>8}" for name, value in summary.items()]
        if palette is None:
            return "\n".join([header, rule, *rows, rule, *totals])
        patches = ["\033[48;2;{};{};{}m  \033[0m ".format(*color) for color in palette[: len(rows)]]
        rows = [patch + row for patch, row in zip(patches, rows)]
        return "\n".join(["   " + header, "   " + rule, *rows, "   " + rule, *("   " + line for line in totals)])


class ConfusionMatrix:
    """Counts of (label, prediction) pixel pairs over a whole data set, on one device.

    ``matrix`` is a (C, C) int64 tensor, rows = label, columns = prediction. It is a view of ``counts`` (C*C + 3, int64),
    whose last three values are the numbers of ignored pixels, invalid labels and invalid predictions. To sum several
    processes, sum their ``counts`` in place.

    Args:
        num_classes: C, at least 1.
        device: the device of the counts, labels and predictions.
        ignore_label: pixels with this label, or 255, are not counted, whatever their prediction.

    Raises:
        ValueError: ``num_classes`` below 1.
    """

    def __init__(self, num_classes: int, device: str | torch.device = "cpu", ignore_label: int = IGNORE_LABEL) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.counts = torch.zeros(num_classes * num_classes + 3, dtype=torch.int64, device=device)
        self.matrix = self.counts[: num_classes * num_classes].view(num_classes, num_classes)

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Count one batch, without a host sync.

        Each pixel is counted in bin label * C + prediction, or in one of the three bins behind the matrix. Selecting the
        valid pixels, or ``torch.bincount``, would cause a host sync on CUDA, for the size of the result. For the same reason
        values out of range are reported by :meth:`scores`, not here.

        Args:
            labels, predictions: integer tensors of one shape, with any number of dimensions, possibly empty.

        Raises:
            TypeError: not a tensor; :func:`mean_iou` accepts arrays.
            ValueError: the shapes differ, or a tensor does not hold integers.
        """
        for name, tensor in (("labels", labels), ("predictions", predictions)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} are a {type(tensor).__name__}; expected a tensor (mean_iou accepts arrays as well)")
        if labels.shape != predictions.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and predictions of shape {tuple(predictions.shape)} differ in shape; "
                "expected one class index per pixel in both"
            )
        for name, tensor in (("labels", labels), ("predictions", predictions)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"{name} are {tensor.dtype}; expected integer class indices")
        classes = self.num_classes
        labels, predictions = labels.reshape(-1).long(), predictions.reshape(-1).long()
        bins = labels * classes + predictions
        bins = bins.masked_fill((predictions < 0) | (predictions >= classes), classes * classes + 2)
        bins = bins.masked_fill((labels < 0) | (labels >= classes), classes * classes + 1)
        for ignored in {IGNORE_LABEL, self.ignore_label}:
            bins = bins.masked_fill(labels == ignored, classes * classes)
        self.counts.index_add_(0, bins, self.counts.new_ones(()).expand_as(bins))

    def present(self) -> list[int]:
        """The label values that occurred, 255 for ignored pixels; copies the counts to the host."""
        values = self.matrix.sum(dim=1).nonzero().flatten().tolist()
        return values + [IGNORE_LABEL] * (int(self.counts[-3]) > 0)

    def scores(self) -> Scores:
        """The scores of everything counted so far; copies the counts to the host.

        Raises:
            ValueError: labels or predictions outside 0..C-1 were counted.
        """
        counts = self.counts.cpu().numpy()
        wrong_labels, wrong_predictions = int(counts[-2]), int(counts[-1])
        if wrong_labels or wrong_predictions:
            raise ValueError(
                f"{wrong_labels} pixels have a label and {wrong_predictions} a prediction outside 0..{self.num_classes - 1} "
                "that is not the ignore label; check the number of classes and the label files"
            )
        matrix = self.matrix.cpu().numpy()
        correct = np.diagonal(matrix)
        labelled, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
        class_iou = _ratio(correct, labelled + predicted - correct)
        class_accuracy = _ratio(correct, labelled)
        if 0 <= self.ignore_label < self.num_classes:
            class_iou[self.ignore_label] = np.nan  # it occurs only in predictions
        present = labelled > 0
        return Scores(
            pixel_accuracy=float(_ratio(correct.sum(), labelled.sum())),
            mean_accuracy=_mean(class_accuracy),
            mean_iou=_mean(class_iou),
            frequency_weighted_iou=float(_ratio((labelled[present] * class_iou[present]).sum(), labelled.sum())),
            class_iou=class_iou,
            class_accuracy=class_accuracy,
        )


def mean_iou(labels: Tensor | np.ndarray, predictions: Tensor | np.ndarray, num_classes: int) -> float:
    """The mean IoU, 0..1, of two arrays of class indices, see :class:`Scores`; NaN if no pixel is labelled.

    Args:
        labels, predictions: integers of one shape; pixels with label 255 are not counted, whatever their prediction.

    Raises:
        ValueError: the shapes differ, the values are not integers, or a class is outside 0..num_classes - 1.
    """
    confusion = ConfusionMatrix(num_classes)
    arrays = (a if isinstance(a, Tensor) else torch.from_numpy(np.array(a)) for a in (labels, predictions))
    confusion.update(*(a.cpu() for a in arrays))
    return confusion.scores().mean_iou


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator in float64; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=np.asarray(denominator) > 0)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _json_number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.2f}"


def _check_names(class_names: Sequence[str], num_classes: int) -> None:
    if len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for {num_classes} classes; expected one name per class")
