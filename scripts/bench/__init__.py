"""The parts of ``scripts/benchmark.py``: for each the reference first, then this project's own ways of doing the work."""

from argparse import Namespace
from collections.abc import Callable

import torch

from scripts.bench.measure import Part
from scripts.bench.prediction import crf, evaluate, predict
from scripts.bench.training import data, msc, train

PARTS: dict[str, Callable[[Namespace, torch.device], Part]] = {
    "train": train,
    "msc": msc,
    "predict": predict,
    "evaluate": evaluate,
    "data": data,
    "crf": crf,
}
