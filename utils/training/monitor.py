"""What a run measures, without a host sync in between: its losses, the classes in its labels, and its wait for data.

The losses of all processes stay on the device; the host reads them only when something is logged or saved.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataset import IGNORE_LABEL, absent_classes, one_class_warning
from dataset.classes import name_the_classes
from utils import distributed
from utils.command import UserError
from utils.processes import usable_cores

NEVER = 2**62  # the number of a batch that no run reaches
MUCH_WAITING = 0.1  # share of the time that the device may wait for data without a warning


class ClassWatch:
    """Warns, once and over all processes, if the labels lack classes or hold only one class.

    Args:
        labels: the number of labels to look at, over all processes.
        names: of all classes, in the order of their indices.
        ignore_label: a label to ignore, beside 255.
        fixed: whether the number of classes is fixed by the data set.
        unused: classes that occur in no label of the data set.
    """

    def __init__(
        self,
        labels: int,
        names: Sequence[str],
        ignore_label: int = IGNORE_LABEL,
        fixed: bool = False,
        unused: Sequence[int] = (),
    ) -> None:
        self.labels = self.left = labels
        self.over = False
        self.names, self.ignore_label, self.fixed, self.unused = names, ignore_label, fixed, unused
        self.present = torch.zeros(256, dtype=torch.bool)

    def add(self, present: Tensor) -> None:
        """Add a batch of this process: (N, 256) bool, the values that occur in each label."""
        self.present |= present.any(dim=0)
        self.left -= len(present) * distributed.world_size()

    def warning(self) -> str:
        """The warning, once the last of the labels has been added, else "". All processes must call this after each step."""
        if self.over or self.left > 0:
            return ""
        self.over = True
        occurs = distributed.agree(*self.present.int().tolist())
        present = [value for value in range(256) if occurs[value]]
        if text := one_class_warning(present):
            return f"warning: {text}"
        if not (absent := absent_classes(present, self.names, self.ignore_label, self.unused)):
            return ""
        used = max(value for value in present if value < len(self.names)) + 1
        fewer = used < len(self.names) and not self.fixed
        more = f"; if there are no more: {name_the_classes(used)}, or train with --num-classes {used}" if fewer else ""
        return f"warning: none of the {self.labels} labels read so far has the classes {absent}{more}"


class Diverged(UserError):
    """The loss is no longer finite."""

    exit_status = 1


class Meter:
    """Sums the losses of the batches, and remembers the first batch with a non-finite loss on any process.

    Args:
        device: where the losses are.
        describe: number of a batch -> its description in the message about a non-finite loss.

    Attributes:
        steps: the number of steps since the last :meth:`means`.
    """

    def __init__(self, device: torch.device, describe: Callable[[int], str]) -> None:
        self.describe = describe
        self.first_bad = torch.full((), NEVER, device=device)
        self.names: list[str] = []
        self.sums = torch.zeros(1, device=device)
        self.batches = self.steps = 0

    def add(self, losses: dict[str, Tensor], batch: int) -> None:
        """Add the losses of batch number ``batch``: scalars on the device, ``"loss"`` among them."""
        values = torch.stack(list(losses.values())).detach()
        self.sums = values + self.sums if self.batches else values
        self.names = list(losses)
        self.first_bad = torch.where(losses["loss"].isfinite(), self.first_bad, self.first_bad.clamp(max=batch))
        self.batches += 1

    def end_step(self) -> Tensor:
        """Share the finding of this step between the processes: 1 if any loss so far was not finite, else 0, on the device."""
        self.steps += 1
        distributed.min_(self.first_bad)
        return (self.first_bad < NEVER).float()

    def check(self) -> None:
        """Raise :class:`Diverged`, on all processes alike, if any loss was not finite; a host sync."""
        if (batch := int(self.first_bad)) < NEVER:
            advice = (
                "the snapshots are unchanged; lower the learning rate (published: 2.5e-4, for pretrained weights with frozen "
                "batch norm), or check these images, their labels, and whether the weights expect BGR of 0..255"
            )
            raise Diverged(f"the loss is not finite at {self.describe(batch)}: {advice}")

    def means(self) -> dict[str, float]:
        """The mean losses since the last call, over the batches and the processes; a host sync.

        Raises:
            Diverged: a loss was not finite.
        """
        self.check()
        sums = distributed.sum_(self.sums.clone()).tolist()
        count = self.batches * distributed.world_size()
        self.batches = self.steps = 0
        return {name: value / count for name, value in zip(self.names, sums)}


class DataWait:
    """The share of the time that the device is idle because the next images are not loaded yet.

    On CUDA the wait is measured between two events on the stream: the host runs ahead, and may wait for images while the device
    is busy. Other devices wait when the host does.

    Args:
        device: where the steps are computed.
        workers: the number of data loading workers.
    """

    def __init__(self, device: torch.device, workers: int) -> None:
        self.on_cuda, self.workers = device.type == "cuda", workers
        self.marks: list[tuple[Any, Any]] = []
        self.since, self.high, self.warned = time.perf_counter(), 0, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context around the code that waits for the next images."""
        before = self._mark()
        yield
        self.marks.append((before, self._mark()))

    def _mark(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share(self) -> float:
        """The share since the last call, 0..1. On CUDA a host sync must come first, as in :meth:`Meter.means`."""
        waits = [a.elapsed_time(b) / 1000 if self.on_cuda else b - a for a, b in self.marks]
        now = time.perf_counter()
        share = min(1.0, sum(waits) / max(now - self.since, 1e-9))
        self.since, self.marks = now, []
        self.high = self.high + 1 if share > MUCH_WAITING else 0
        return share

    def warning(self) -> str:
        """A warning, once, if the share was high three times in a row (the first steps start the workers), else ""."""
        if self.warned or self.high < 3:
            return ""
        self.warned = True
        cores = usable_cores()
        if self.workers < cores:
            advice = f"raise --num-workers, which is {self.workers}; this process may use {cores} cores"
        else:
            advice = f"use more than {cores} cores and as many --num-workers, or smaller images, or a faster disk"
        return f"warning: the device waits for images more than {MUCH_WAITING:.0%} of the time; {advice}"


def check_weights(net: nn.Module, step: int) -> None:
    """Raise :class:`Diverged` if a weight is not finite after the last step, which no loss has shown yet."""
    finite = [tensor.isfinite().all() for tensor in net.state_dict().values() if tensor.is_floating_point()]
    if not bool(torch.stack(finite).all()):
        advice = "the snapshots are unchanged; lower --learning-rate"
        raise Diverged(f"weights of the net are not finite after step {step}: {advice}")
