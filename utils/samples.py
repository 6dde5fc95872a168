"""Pictures with their labels on the way through an evaluation: from the loader's workers into batches of one padded size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import VOCSegmentation
from deeplab.multiscale import canvas_size
from utils.command import UserError

MAX_WAITING = 64  # pictures that may wait for others of their padded size


@dataclass
class Sample:
    """One picture on its way through the evaluation. As arrays it comes through a worker's pipe, not through shared memory."""

    id: str
    image: np.ndarray  # H W 3 uint8 BGR
    label: np.ndarray  # H W uint8, 255 void

    def pin_memory(self) -> "Sample":
        """The same in memory from which a GPU copies while the host goes on; called by the loader."""
        image, label = (torch.from_numpy(array).pin_memory().numpy() for array in (self.image, self.label))
        return Sample(self.id, image, label)


class Samples(Dataset[Sample]):
    """The data set as :class:`Sample` entries, for a loader."""

    def __init__(self, data: VOCSegmentation) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.data.ids[index], *self.data.load(index))


def only_one(items: list[Sample]) -> Sample:
    """A batch of one picture as that picture; for a loader, whose workers find it by its name."""
    return items[0]


def group_by_canvas(
    samples: Iterable[Sample], fixed: tuple[int, int] | None, batch_size: int
) -> Iterator[tuple[list[Sample], tuple[int, int]]]:
    """Gather pictures of one padded size, so that pictures of mixed sizes run in batches.

    Yields:
        Up to ``batch_size`` pictures and their canvas (H, W).

    Raises:
        UserError: a picture does not fit the fixed canvas.
    """
    waiting: dict[tuple[int, int], list[Sample]] = {}
    count_waiting = 0
    for sample in samples:
        size = sample.image.shape[:2]
        if fixed and (size[0] > fixed[0] or size[1] > fixed[1]):
            advice = "enlarge --input-size, or leave it out to use each picture's own size"
            raise UserError(
                f"picture {sample.id} of {size[0]}x{size[1]} does not fit --input-size {fixed[0]}x{fixed[1]}; {advice}"
            )
        canvas = canvas_size(fixed or size)
        waiting.setdefault(canvas, []).append(sample)
        count_waiting += 1
        if len(waiting[canvas]) == batch_size or count_waiting == MAX_WAITING:
            fullest = max(waiting, key=lambda key: len(waiting[key]))
            count_waiting -= len(waiting[fullest])
            yield waiting.pop(fullest), fullest
    yield from ((group, canvas) for canvas, group in waiting.items())
