"""``--class-weights``: the weight of each class in the loss, from a file or balanced by the labels of the training list."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.lists import read_lines
from utils.command import UserError
from utils.options import Options

BALANCED = "balanced"


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """The weights with which each class that occurs has the same share of the loss: all / (classes that occur * own pixels).

    That is the "balanced" of scikit-learn (King and Zeng, "Logistic Regression in Rare Events Data", 2001). The mean weight
    of a labelled pixel is 1. A class without pixels gets 1: no pixel is multiplied by it, and where one turns up after all, it
    counts as one does on average.

    Args:
        counts: labelled pixels of each class.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 1.0 for count in counts]


def read_weights(path: str | Path, num_classes: int) -> list[float]:
    """The weights of a text file: one number of at least 0 a line, in the order of the classes.

    Raises:
        DatasetError: it cannot be read.
        UserError: another number of them, or something else than such numbers.
    """
    words = " ".join(read_lines(path, "the class weights")).split()
    try:
        weights = [float(word) for word in words]
    except ValueError as error:
        raise UserError(f"--class-weights {path}: {error}; expected one number per class, one a line") from None
    if len(weights) != num_classes:
        raise UserError(f"--class-weights {path} holds {len(weights)} numbers; expected {num_classes}, one per class")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(f"--class-weights {path}: expected finite numbers of at least 0, not all of them 0")
    return weights


def find_weights(options: Options, data: Any, begun: list[float] | None, given: bool) -> list[float]:
    """The weights that ``--class-weights`` asks for, the same on all processes, each of which counts its share of the labels.

    Args:
        data: the training set.
        begun: those of the run that is resumed; None of a new one.
        given: the option is on the command line.

    Raises:
        DatasetError, UserError: a label or the file is wrong, or no longer what it was when the run was begun.
    """
    import torch

    from utils import distributed

    path = options.class_weights
    if path != BALANCED and (given or not begun):
        weights = distributed.from_main(lambda: read_weights(path, options.num_classes))
        if begun not in (None, weights):
            raise UserError(
                f"--resume: {path} holds other class weights than when the run was begun; leave --class-weights out"
            )
        return weights
    if begun:
        return begun
    counts = distributed.everywhere(lambda: count_labels(data, options.num_workers)[: options.num_classes])
    return balanced_weights(distributed.sum_(torch.from_numpy(counts)).tolist())


class LabelCounts:
    """A map-style data set of label counts: item i is (256,) int64, the pixels of each value in label i of ``data``."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, index: int) -> np.ndarray:
        return np.bincount(self.data.load_label(index).ravel(), minlength=256)


def count_labels(data: Any, num_workers: int) -> np.ndarray:
    """The pixels of each value in this process's share of the labels of ``data``, (256,) int64."""
    import torch
    from tqdm import tqdm

    from utils import distributed
    from utils.loader import make_loader, running

    share = range(distributed.rank(), len(data), distributed.world_size())
    chunks = [share[start : start + 16] for start in range(0, len(share), 16)]
    loader = make_loader(LabelCounts(data), chunks, num_workers, torch.device("cpu"), collate_fn=sum)
    total = np.zeros(256, dtype=np.int64)
    with running(loader) as batches:
        for counts in tqdm(batches, "counting labels for the class weights", len(chunks), leave=False, disable=None):
            total += counts
    return total
