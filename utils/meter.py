"""The losses of a run, kept on the device and over all processes; the host reads them only where something is told or saved."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils import distributed
from utils.command import UserError

NEVER = 2**62  # the number of a batch that no run reaches


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
            advice = "the snapshots are as they were; look at these pictures or lower --learning-rate"
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
