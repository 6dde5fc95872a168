"""Evaluation during training: the mean IoU as in evaluate.py, the best snapshot so far, and panels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dataset import DatasetError, VOCSegmentation, to_input
from dataset.classes import ClassFile
from deeplab import Net
from deeplab.batch_norm import fold
from deeplab.inference import predict_classes
from deeplab.weights import check_sums
from utils import distributed
from utils.checkpoint import save_snapshot
from utils.command import UserError
from utils.data import list_of, open_dataset, what_is_compared
from utils.evaluation.images import Sample
from utils.evaluation.score import score
from utils.files import DiskError
from utils.metrics import ConfusionMatrix
from utils.options import Options
from utils.visualize import panel, scale, tile_factor

if TYPE_CHECKING:
    from utils.training.setup import Run


class Validation:
    """Evaluates a net during training, without an effect on the training.

    The results equal those of ``evaluate.py`` without options: float32, each image at its own size.

    Args:
        options: of the training; ``val_list`` names the images.
        class_file: of the data set.
        run_id: the identifier of this run.

    Attributes:
        done: the step of the last net that was evaluated, 0 if none was.

    Raises:
        UserError, DatasetError: the list is missing or differs between the processes, or the folder has the best snapshot of
            another run.
    """

    def __init__(self, options: Options, class_file: ClassFile, run_id: str | None) -> None:
        self.data, self.data_list = distributed.everywhere(lambda: open_validation_data(options, class_file))
        distributed.check_same({f"validation {name}": value for name, value in what_is_compared(self.data).items()})
        self.best_path = Path(options.snapshot_dir) / "best.pth"
        self.best, found = distributed.from_main(lambda: mean_iou_of(self.best_path))
        if self.best >= 0 and found != run_id:
            raise UserError(f"{self.best_path} is another run's, and this run would replace it; move it away")
        self.done = 0

    def run(self, run: "Run", done: int) -> None:
        """Evaluate the net after ``done`` steps, on all processes together; log the result, and save the net if it is the best.

        A stop signal interrupts the evaluation. Signals and errors are noted in ``run.ending``.
        """
        matrix = self.count(run)
        if run.ending.is_due() or matrix is None:
            return
        distributed.sum_(matrix.counts)
        scores = matrix.scores()
        if scores.mean_iou > self.best:  # the same on all processes
            problem = distributed.from_main(lambda: self.save(run, done, scores.mean_iou))
            if run.log and problem:
                run.log.say(f"WARNING: the best net so far, of step {done}, is not saved: {problem}")
            self.best = self.best if problem else scores.mean_iou
        self.done = done
        if run.log:  # last, as a line in the log means that the evaluation is complete
            run.log.scores(done, scores, run.classes.names)
            mean_iou = f"mean IoU {100 * scores.mean_iou:.2f} %"
            run.log.say(f"step {done}: {mean_iou} on the {len(self.data)} images of {self.data_list}")

    def count(self, run: "Run") -> ConfusionMatrix | None:
        """The counts of this process's share of the images; None if it was stopped or failed."""

        def stop_between_images(sample: Sample, prediction: np.ndarray) -> None:
            if run.ending.signal:
                raise _Stopped

        if run.options.batch_norm != "frozen":
            distributed.broadcast(run.net.buffers())  # the running statistics of process 0, which saves them
        try:
            with predicting(run.net) as forward, torch.random.fork_rng(devices=[]):  # workers draw their seeds from torch
                options = {"num_workers": run.options.num_workers, "finish": stop_between_images}
                return score(forward, self.data, run.device, **options)[""]
        except _Stopped:
            return None
        except Exception as error:  # an image, a label, a worker: is_due() shares it with the other processes
            run.ending.error = error
            return None

    def save(self, run: "Run", done: int, mean_iou: float) -> str:
        """Write ``best.pth``; returns the reason if that fails, else ""."""
        run.lock.check()
        try:
            save_snapshot(self.best_path, run.net, run.meta_at(done, val_mean_iou=mean_iou))
        except DiskError as error:
            return str(error)
        return ""


def open_validation_data(options: Options, class_file: ClassFile) -> tuple[VOCSegmentation, Path]:
    """The data set of ``--val-list``, and the path of that list.

    Raises:
        DatasetError: see :func:`utils.data.open_dataset`; if there is no list, the sentence names the option.
    """
    of_list = options.replace(data_list=options.val_list)
    try:
        list_of(of_list, "val", options.num_classes)
    except DatasetError as error:
        text = str(error).replace("--data-list", "--val-list")
        raise DatasetError(f"--val-every needs images to evaluate on, named by --val-list: {text}") from None
    return open_dataset(of_list, "val", options.num_classes, classes=class_file)


@contextmanager
def predicting(net: Net) -> Iterator[Callable[[Tensor], Tensor]]:
    """A context in which a net in training predicts images of any size: gives its forward pass, with batch norm folded once.

    This is the uncompiled pass, as a compiled one would be compiled again for every size.
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    net.eval()
    try:
        with torch.inference_mode():
            folded = fold(net)
        yield partial(net.forward, folded=folded)
    finally:
        net.train()
        torch.backends.cudnn.benchmark = benchmark


class _Stopped(Exception):
    """A stop signal came between two images."""


def mean_iou_of(path: Path) -> tuple[float, str | None]:
    """The mean IoU and the run's identifier in the meta of a ``best.pth``; -1 and None if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return -1.0, None
    try:
        check_sums(path)
        meta = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]
        mean_iou = float(meta["val_mean_iou"])
        if not 0 <= mean_iou <= 1:
            raise ValueError(mean_iou)
        return mean_iou, meta.get("run")
    except Exception as error:
        raise UserError(f"{path}, the best snapshot so far, is damaged ({type(error).__name__}); move it away") from None


def save_panels(run: "Run", done: int) -> str:
    """Save panels of the first ``--save-num-images`` images, without augmentation; large images are shrunk.

    Returns:
        "", or a warning if it failed: a missing panel is no reason to end a run.
    """
    assert run.log
    try:
        with predicting(run.net) as forward, torch.inference_mode():
            for index in range(min(run.options.save_num_images, len(run.data))):
                image, label = run.data.load(index)
                factor = min(1.0, tile_factor(label.shape))
                image, label = scale(image, factor), scale(label, factor)
                prediction = predict_classes(forward, to_input(image).to(run.device)).cpu().numpy()
                run.log.image(run.data.ids[index], done, panel(image[:, :, ::-1], label, prediction, run.classes))
    except Exception as error:
        return f"warning: no panels at step {done} ({type(error).__name__}: {error})"
    return ""
