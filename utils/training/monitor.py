"""What a run measures, without a host sync in between: its losses, the classes in its labels, and its waiting for data.

The losses are kept on the device and over all processes; the host reads them only where something is logged or saved.
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
MUCH_WAITING = 0.1  # of the time; more is worth a word


class ClassWatch:
    """Notices, once and over all processes, where labels lack classes or hold nothing but one.

    Args:
        labels: how many to look at, over all processes.
        names: of all classes, in the order of their indices.
        ignore_label: a label that means void, beside 255.
        fixed: the data set has these classes and no fewer.
        unused: classes that no label of the data set has.
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
        """Take the (N, 256) bool label values of a batch of this process."""
        self.present |= present.any(dim=0)
        self.left -= len(present) * distributed.world_size()

    def warning(self) -> str:
        """The sentence, at the end of the step in which the last label was looked at, else ""; all processes must ask."""
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
    """The loss is no longer a number."""

    exit_status = 1


class Meter:
    """Sums the losses of batches, and remembers the first batch whose loss was not finite on any process.

    Args:
        device: where the losses are.
        describe: number of a batch -> what to say of it where its loss is not finite.

    Attributes:
        steps: since the last :meth:`means`.
    """

    def __init__(self, device: torch.device, describe: Callable[[int], str]) -> None:
        self.describe = describe
        self.first_bad = torch.full((), NEVER, device=device)
        self.names: list[str] = []
        self.sums = torch.zeros(1, device=device)
        self.batches = self.steps = 0

    def add(self, losses: dict[str, Tensor], batch: int) -> None:
        """Take the losses of batch number ``batch``: scalars on the device, ``"loss"`` among them."""
        values = torch.stack(list(losses.values())).detach()
        self.sums = values + self.sums if self.batches else values
        self.names = list(losses)
        self.first_bad = torch.where(losses["loss"].isfinite(), self.first_bad, self.first_bad.clamp(max=batch))
        self.batches += 1

    def end_step(self) -> Tensor:
        """Share what this step found with the other processes: 1 if any loss so far was not finite, else 0, on the device."""
        self.steps += 1
        distributed.min_(self.first_bad)
        return (self.first_bad < NEVER).float()

    def check(self) -> None:
        """Raise :class:`Diverged`, on all processes alike, if some loss was not finite; waits for the device."""
        if (batch := int(self.first_bad)) < NEVER:
            advice = (
                "the snapshots are as they were; lower the rate (2.5e-4 is published, for pretrained weights with frozen batch "
                "norm), or look at these pictures, their labels, and whether the weights were made for BGR of 0..255"
            )
            raise Diverged(f"the loss is not finite at {self.describe(batch)}: {advice}")

    def means(self) -> dict[str, float]:
        """The mean losses since the last call, over the batches and the processes; waits for the device.

        Raises:
            Diverged: some loss was not finite.
        """
        self.check()
        sums = distributed.sum_(self.sums.clone()).tolist()
        count = self.batches * distributed.world_size()
        self.batches = self.steps = 0
        return {name: value / count for name, value in zip(self.names, sums)}


class DataWait:
    """The share of its time that the device has nothing to do because the next images are not read yet.

    On CUDA it lies between two events on the stream: the host, which is ahead, may well wait for images while the device is
    busy. Elsewhere the device waits when the host does.

    Args:
        device: where the steps are done.
        workers: that read images.
    """

    def __init__(self, device: torch.device, workers: int) -> None:
        self.on_cuda, self.workers = device.type == "cuda", workers
        self.marks: list[tuple[Any, Any]] = []
        self.since, self.high, self.told = time.perf_counter(), 0, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what waits for the next images."""
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
        """0..1, since the last call; the device must have been waited for, as :meth:`Meter.means` does."""
        waits = [a.elapsed_time(b) / 1000 if self.on_cuda else b - a for a, b in self.marks]
        now = time.perf_counter()
        share = min(1.0, sum(waits) / max(now - self.since, 1e-9))
        self.since, self.marks = now, []
        self.high = self.high + 1 if share > MUCH_WAITING else 0
        return share

    def warning(self) -> str:
        """A sentence, once, when the share was high three times in a row, else ""; the first steps start the workers."""
        if self.told or self.high < 3:
            return ""
        self.told = True
        cores = usable_cores()
        if self.workers < cores:
            advice = f"raise --num-workers, which is {self.workers}; this process may use {cores} cores"
        else:
            advice = f"give it more than {cores} cores and as many --num-workers, or smaller pictures on a faster disk"
        return f"warning: the device waits for pictures more than {MUCH_WAITING:.0%} of the time; {advice}"


def check_weights(net: nn.Module, step: int) -> None:
    """Raise :class:`Diverged` if the last step has made a weight infinite, which no loss has shown yet."""
    finite = [tensor.isfinite().all() for tensor in net.state_dict().values() if tensor.is_floating_point()]
    if not bool(torch.stack(finite).all()):
        advice = "the snapshots are as they were; lower --learning-rate"
        raise Diverged(f"weights of the net are not finite after step {step}: {advice}")
