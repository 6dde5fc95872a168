"""One training run, for train.py and train_msc.py: ``training.run(args, loss_function, data=None)``."""

from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from deeplab.loss import LossFunction


def run(args: Namespace, loss_function: "LossFunction", data: "Dataset | None" = None) -> int:
    """Train with the options ``args``; see :func:`utils.training.loop.run`, imported only here because torch loads slowly."""
    from utils.training import loop

    return loop.run(args, loss_function, data)
