"""Looking at a net while it is trained: the scores of evaluate.py, the best snapshot so far, and panels."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import VOCSegmentation, to_input
from deeplab import Net
from deeplab.inference import predict_classes
from deeplab.weights import check_sums
from utils import distributed
from utils.checkpoint import save_snapshot
from utils.command import UserError
from utils.evaluation.images import Sample
from utils.evaluation.score import score
from utils.files import DiskError
from utils.loader import open_dataset, what_is_compared
from utils.metrics import ConfusionMatrix
from utils.training.log import RunLog
from utils.training.stop import StopRequest
from utils.visualize import Classes, panel, scale, tile_factor


class Validation:
    """Scores a net that is in training, and leaves the training as it was.

    The numbers are those of ``evaluate.py`` without options: float32, each picture at its own size.

    Args:
        args: of the training; ``val_every`` and ``val_list``.
        classes: their names.
        run: of :class:`utils.training.start.Start`.

    Attributes:
        scored: the step of the last net that was scored, 0 where none was.

    Raises:
        UserError, DatasetError: there is no such list, or not the same in all processes; or the folder has the best snapshot
            of another run.
    """

    def __init__(self, args: Namespace, classes: Classes, device: torch.device, run: str | None) -> None:
        options = Namespace(**{**vars(args), "data_list": args.val_list})
        self.data, self.data_list = distributed.everywhere(lambda: open_dataset(options, "val", args.num_classes))
        distributed.check_same({f"validation {name}": value for name, value in what_is_compared(self.data).items()})
        self.args, self.classes, self.device = args, classes, device
        self.best_path = Path(args.snapshot_dir) / "best.pth"
        self.best, found = _score_of(self.best_path)
        if self.best >= 0 and found != run:
            raise UserError(f"{self.best_path} is another run's, and this one would replace it by a better one; move it away")
        self.scored = 0

    def due(self, done: int) -> bool:
        """Whether to validate after ``done`` steps."""
        return done % self.args.val_every == 0 or done == self.args.num_steps

    def run(
        self, net: Net, done: int, stop: StopRequest, log: RunLog | None, make_meta: Callable[..., dict]
    ) -> tuple[bool, Exception | None]:
        """Score ``net`` on all processes together, log it, and save it as ``best.pth`` if no earlier one was better.

        A request to stop leaves it unfinished.

        Args:
            make_meta: more entries -> the meta of a snapshot of now.

        Returns:
            Whether it failed in some process, and what went wrong in this one.
        """
        matrix, error = self._count(net, stop)
        stopped, failed = distributed.agree(stop.signal, int(error is not None))
        if matrix is None or stopped or failed:
            return bool(failed), error
        distributed.sum_(matrix.counts)
        scores = matrix.scores()
        if scores.mean_iou > self.best:  # the same on all processes
            unsaved = distributed.from_main(lambda: self._save(net, make_meta(val_mean_iou=scores.mean_iou), log))
            if log and unsaved:
                log.say(f"WARNING: the best net so far, of step {done}, is not saved: {unsaved}")
            self.best = self.best if unsaved else scores.mean_iou
        self.scored = done
        if log:  # a line in the log says that all of this is done
            log.scores(done, scores, self.classes.names)
            log.say(f"step {done}: mean IoU {100 * scores.mean_iou:.2f} on the {len(self.data)} pictures of {self.data_list}")
        return False, None

    def _save(self, net: Net, meta: dict, log: RunLog | None) -> str:
        """Write ``best.pth``; what went wrong, else ""."""
        if log:
            log.lock.check()
        try:
            save_snapshot(self.best_path, net, meta)
        except DiskError as error:
            return str(error)
        return ""

    def _count(self, net: Net, stop: StopRequest) -> tuple[ConfusionMatrix | None, Exception | None]:
        """The counts of this process's share of the pictures; None if it was stopped or failed."""

        def finish(sample: Sample, prediction: np.ndarray) -> None:
            if stop.signal:
                raise _Stopped

        if self.args.batch_norm != "frozen":
            distributed.broadcast(net.buffers())  # the running statistics of the process that saves
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False  # pictures are of many sizes
        net.eval()
        try:
            with torch.random.fork_rng(devices=[]):  # workers take their seeds from torch's generator
                # The forward pass itself: a compiled one would be compiled again, and for each size.
                options = {"num_workers": self.args.num_workers, "finish": finish, "add_up": False}
                matrices = score(net.forward, self.data, self.device, **options)
            return matrices[""], None
        except _Stopped:
            return None, None
        except Exception as error:  # a picture, a label, a worker: the other processes must hear of it
            return None, error
        finally:
            net.train()
            torch.backends.cudnn.benchmark = benchmark


class _Stopped(Exception):
    """A request to stop came between two pictures."""


def save_panels(
    net: Net, data: VOCSegmentation, classes: Classes, log: RunLog, step: int, count: int, device: torch.device
) -> str:
    """Save panels of the first ``count`` pictures, without augmentation, large ones shrunk.

    Returns:
        "", or a sentence where it did not work: a picture to look at is no reason to end a run.
    """
    net.eval()
    try:
        for index in range(min(count, len(data))):
            image, label = data.load(index)
            factor = min(1.0, tile_factor(label.shape))
            image, label = scale(image, factor), scale(label, factor)
            with torch.inference_mode():
                prediction = predict_classes(net.forward, to_input(image).to(device)).cpu().numpy()
            log.picture(data.ids[index], step, panel(image[:, :, ::-1], label, prediction, classes))
    except Exception as error:
        return f"warning: no panels at step {step} ({type(error).__name__}: {error})"
    finally:
        net.train()
    return ""


def _score_of(path: Path) -> tuple[float, str | None]:
    """The mean IoU and the run of an earlier ``best.pth``, by its meta, on all processes alike; -1 where there is none."""

    def read() -> tuple[float, str | None]:
        if not path.exists():
            return -1.0, None
        try:
            check_sums(path)
            meta: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]
            score = float(meta["val_mean_iou"])
            if not 0 <= score <= 1:
                raise ValueError(score)
            return score, meta.get("run")
        except Exception as error:
            raise UserError(f"{path}, the best snapshot so far, is damaged ({type(error).__name__}); move it away") from None

    return distributed.from_main(read)
