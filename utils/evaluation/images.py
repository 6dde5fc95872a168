"""Images, with or without labels, to predict: read by the loader's workers and grouped into batches of one padded size."""

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

MAX_WAITING = 64  # images that may wait for others of their padded size
AnyImage = TypeVar("AnyImage", bound="NamedImage")
Item = TypeVar("Item")


@dataclass
class NamedImage:
    """An image and its prediction. The image is a numpy array: workers send it through a pipe, not through shared memory.

    Attributes:
        classes: (H, W) uint8, the net's prediction, on its device.
        prediction: the same on the host.
        mask: (H, W) uint8 on the host: the final prediction, after the CRF if there is one.
        logits: (C, h, w) float32, if requested.
    """

    id: str
    image: np.ndarray  # H W 3 uint8 BGR
    classes: Tensor = field(init=False)
    prediction: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    logits: Tensor = field(init=False)

    def pin_memory(self: AnyImage) -> AnyImage:
        """A copy in pinned memory, from which a GPU copies asynchronously; called by the loader."""
        arrays = [value for name, value in vars(self).items() if name != "id"]
        return type(self)(self.id, *(torch.from_numpy(array).pin_memory().numpy() for array in arrays))


@dataclass
class Sample(NamedImage):
    """An image with its label."""

    label: np.ndarray  # H W uint8, 255 ignored


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
    """:class:`ImageFiles` that returns the error message in place of an unreadable image, so that the others go on."""

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except DatasetError as error:
            return str(error)


def readable(items: Iterable[NamedImage | str], broken: list[str]) -> Iterator[NamedImage]:
    """The images that could be read; the error messages of the others are appended to ``broken``."""
    for item in items:
        if isinstance(item, str):
            broken.append(item)
        else:
            yield item


def reading(
    data: Dataset[Item], order: Iterable[int], num_workers: int, device: torch.device
) -> AbstractContextManager[Iterator[Item]]:
    """The items of ``data`` in ``order``, prefetched by workers; a context manager, see :func:`utils.loader.running`."""
    return running(make_loader(data, [[index] for index in order], num_workers, device, collate_fn=itemgetter(0)))


def group_by_canvas(
    items: Iterable[AnyImage], fixed: tuple[int, int] | None, batch_size: int, stride: int = OUTPUT_STRIDE
) -> Iterator[tuple[list[AnyImage], tuple[int, int]]]:
    """Group images by padded size (by size if ``stride`` is 1), so that images of mixed sizes run in batches.

    Yields:
        Up to ``batch_size`` images and their canvas (H, W).

    Raises:
        UserError: an image does not fit the fixed canvas.
    """
    waiting: dict[tuple[int, int], list[AnyImage]] = {}
    count_waiting = 0
    for item in items:
        size = item.image.shape[:2]
        if fixed and (size[0] > fixed[0] or size[1] > fixed[1]):
            advice = "enlarge --input-size, or leave it out to use the size of each image"
            raise UserError(f"image {item.id} of {size[0]}x{size[1]} does not fit --input-size {fixed[0]}x{fixed[1]}; {advice}")
        canvas = canvas_size(fixed or size, stride)
        waiting.setdefault(canvas, []).append(item)
        count_waiting += 1
        if len(waiting[canvas]) == batch_size or count_waiting == MAX_WAITING:
            fullest = max(waiting, key=lambda key: len(waiting[key]))
            count_waiting -= len(waiting[fullest])
            yield waiting.pop(fullest), fullest
    yield from ((group, canvas) for canvas, group in waiting.items())
