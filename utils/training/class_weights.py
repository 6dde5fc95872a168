"""``--class-weights``: the weight of each class in the loss, from a file or computed from the training labels."""

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
    """Weights that give every class that occurs the same share of the loss: all pixels / (classes that occur * own pixels).

    This is scikit-learn's "balanced" (King and Zeng, "Logistic Regression in Rare Events Data", 2001). The mean weight of a
    labelled pixel is 1. A class without pixels gets 1: if it occurs after all, its pixels count as the average pixel does.

    Args:
        counts: the number of labelled pixels per class.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 1.0 for count in counts]


def read_weights(path: str | Path, num_classes: int) -> list[float]:
    """The weights in a text file: one number of at least 0 per line, in the order of the classes.

    Raises:
        DatasetError: the file cannot be read.
        UserError: it does not hold ``num_classes`` finite numbers of at least 0, or all of them are 0.
    """
    words = " ".join(read_lines(path, "the class weights")).split()
    try:
        weights = [float(word) for word in words]
    except ValueError as error:
        raise UserError(f"--class-weights {path}: {error}; expected one number per class, each on its own line") from None
    if len(weights) != num_classes:
        raise UserError(f"--class-weights {path} holds {len(weights)} numbers; expected {num_classes}, one per class")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(f"--class-weights {path}: expected finite numbers of at least 0, not all of them 0")
    return weights


def find_weights(options: Options, data: Any, begun: list[float] | None, given: bool) -> list[float]:
    """The weights that ``--class-weights`` asks for, the same on all processes. Each process counts its share of the labels.

    Args:
        data: the training set.
        begun: the weights of the resumed run; None for a new run.
        given: whether the option is on the command line.

    Raises:
        DatasetError, UserError: a label or the file is wrong, or the file has changed since the run was begun.
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
    """A map-style dataset: item i is (256,) int64, the number of pixels of each value in label i of ``data``."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, index: int) -> np.ndarray:
        return np.bincount(self.data.load_label(index).ravel(), minlength=256)


def count_labels(data: Any, num_workers: int) -> np.ndarray:
    """The number of pixels of each value in this process's share of the labels of ``data``, (256,) int64."""
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
