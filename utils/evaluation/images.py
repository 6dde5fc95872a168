"""Images, with or without labels, on their way to a prediction: from the loader's workers into batches of one padded size."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset import DatasetError, VOCSegmentation, read_image
from deeplab.inference import OUTPUT_STRIDE, canvas_size
from utils.command import UserError
from utils.loader import make_loader, running

MAX_WAITING = 64  # pictures that may wait for others of their padded size
AnyImage = TypeVar("AnyImage", bound="NamedImage")
Item = TypeVar("Item")


@dataclass
class NamedImage:
    """An image on its way to a prediction. As an array it comes through a worker's pipe, not through shared memory.

    Attributes:
        classes: (H, W) uint8 of the net, on its device.
        prediction: the same on the host.
        mask: (H, W) uint8 on the host: ``prediction``, after the CRF where there is one.
        logits: (C, h, w) float32, where they are asked for.
    """

    id: str
    image: np.ndarray  # H W 3 uint8 BGR
    classes: Tensor = field(init=False)
    prediction: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    logits: Tensor = field(init=False)

    def pin_memory(self: AnyImage) -> AnyImage:
        """The same in memory from which a GPU copies while the host goes on; called by the loader."""
        arrays = [value for name, value in vars(self).items() if name != "id"]
        return type(self)(self.id, *(torch.from_numpy(array).pin_memory().numpy() for array in arrays))


@dataclass
class Sample(NamedImage):
    """An image with its label."""

    label: np.ndarray  # H W uint8, 255 void


class Samples(Dataset[Sample]):
    """The data set as :class:`Sample` entries, for a loader."""

    def __init__(self, data: VOCSegmentation) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.data.ids[index], *self.data.load(index))


class ImageFiles(Dataset[NamedImage]):
    """Image files as :class:`NamedImage` entries, for a loader.

    Args:
        files: (id, path) of each.
    """

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> NamedImage:
        name, path = self.files[index]
        return NamedImage(name, read_image(path))


class ReadableImageFiles(ImageFiles):
    """:class:`ImageFiles` in which a broken one is the sentence that says why, and does not end the work on the others."""

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except DatasetError as error:
            return str(error)


def readable(pictures: Iterable[NamedImage | str], broken: list[str]) -> Iterator[NamedImage]:
    """The pictures that could be read; why the others could not is added to ``broken``."""
    for picture in pictures:
        if isinstance(picture, str):
            broken.append(picture)
        else:
            yield picture


def reading(
    data: Dataset[Item], order: Iterable[int], num_workers: int, device: torch.device
) -> AbstractContextManager[Iterator[Item]]:
    """The items of ``data`` one by one in ``order``, read ahead by workers; a context, see :func:`utils.loader.running`."""
    return running(make_loader(data, [[index] for index in order], num_workers, device, collate_fn=itemgetter(0)))


def group_by_canvas(
    pictures: Iterable[AnyImage], fixed: tuple[int, int] | None, batch_size: int, stride: int = OUTPUT_STRIDE
) -> Iterator[tuple[list[AnyImage], tuple[int, int]]]:
    """Gather pictures of one padded size, with ``stride`` 1 of one size, so that pictures of mixed sizes run in batches.

    Yields:
        Up to ``batch_size`` pictures and their canvas (H, W).

    Raises:
        UserError: a picture does not fit the fixed canvas.
    """
    waiting: dict[tuple[int, int], list[AnyImage]] = {}
    count_waiting = 0
    for picture in pictures:
        size = picture.image.shape[:2]
        if fixed and (size[0] > fixed[0] or size[1] > fixed[1]):
            advice = "enlarge --input-size, or leave it out to use each picture's own size"
            raise UserError(
                f"picture {picture.id} of {size[0]}x{size[1]} does not fit --input-size {fixed[0]}x{fixed[1]}; {advice}"
            )
        canvas = canvas_size(fixed or size, stride)
        waiting.setdefault(canvas, []).append(picture)
        count_waiting += 1
        if len(waiting[canvas]) == batch_size or count_waiting == MAX_WAITING:
            fullest = max(waiting, key=lambda key: len(waiting[key]))
            count_waiting -= len(waiting[fullest])
            yield waiting.pop(fullest), fullest
    yield from ((group, canvas) for canvas, group in waiting.items())
