"""A data set of arrays: any map-style ``torch.utils.data.Dataset``, for the training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from dataset.classes import IGNORE_LABEL, ClassFile
from dataset.images import DatasetError
from dataset.labels import BadLabel, check_values
from dataset.lists import Entry
from dataset.voc import VOCSegmentation

EXPECTED = "expected an image (H, W, 3) in BGR and its label (H, W) of class indices, two numpy arrays of uint8"


class ArraySegmentation(VOCSegmentation):
    """Images and labels of a ``Dataset`` instead of files. With the start method spawn it must be picklable.

    Args:
        items: ``items[i]`` is a pair of numpy arrays: the image (H, W, 3) uint8 in BGR, and its label (H, W) uint8. Its
            attributes ``names`` and ``colors`` (class index -> (r, g, b)), if any, describe the classes.
        classes: names and colours, see :func:`classes_of`.
        num_classes, ignore_label, transform: as in :class:`VOCSegmentation`.

    Attributes:
        ids: the indices as text.

    Raises:
        DatasetError: the data set is not map-style or empty (at once); an item is wrong (when it is read).
    """

    SHORT: ClassVar[str] = "own"

    def __init__(
        self,
        items: Any,
        classes: ClassFile,
        num_classes: int,
        ignore_label: int = IGNORE_LABEL,
        transform: Callable | None = None,
    ) -> None:
        self.title = type(items).__name__
        if not (hasattr(items, "__getitem__") and hasattr(items, "__len__") and len(items)):
            raise DatasetError(f"the data set {self.title} is empty or not map-style; expected __len__() > 0 and __getitem__()")
        self.items, self.num_classes, self.ignore_label, self.transform = items, num_classes, ignore_label, transform
        self.root, self.image_folder = Path(self.title), self.IMAGE_DIR  # for messages
        self.names, self.colors = self.names_and_colors(classes)
        self.ids = [str(index) for index in range(len(items))]
        self.entries = {image_id: Entry(image_id, image_id, image_id) for image_id in self.ids}

    @classmethod
    def lists(cls, split: str, image_dir: str) -> tuple[str, ...]:
        """No lists: all items are used."""
        return ()

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the image and label of item ``index``, checked; the ignore label is 255 in them."""
        item, where = self.items[index], f"item {index} of {self.title}"
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise DatasetError(f"{where} is {_found(item)}; {EXPECTED}")
        for array, shape, what in zip(item, ((..., 3), (...,)), ("image", "label")):
            if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1 + len(shape) or not array.size:
                raise DatasetError(f"the {what} of {where} is {_found(array)}; {EXPECTED}")
        image, label = (np.array(array, order="C") for array in item)
        if image.shape != (*label.shape, 3):
            raise DatasetError(f"{where} has an image of {image.shape} and a label of {label.shape}; {EXPECTED} of one size")
        try:
            present = np.flatnonzero(cv2.calcHist([label], [0], None, [256], [0, 256])).tolist()
            check_values(present, self.num_classes, self.ignore_label)
        except BadLabel as error:
            raise DatasetError(f"the label of {where} {error}") from None
        label[label == self.ignore_label] = IGNORE_LABEL
        return image, label

    def load_label(self, index: int) -> np.ndarray:
        """Only the label, (H, W) uint8."""
        return self.load(index)[1]


def classes_of(items: Any) -> ClassFile:
    """The classes by the ``names`` and ``colors`` of a data set of arrays, if it has them."""
    names, colors = getattr(items, "names", None), getattr(items, "colors", None) or {}
    rows = [(str(name), tuple(colors[index]) if index in colors else None) for index, name in enumerate(names or ())]
    return ClassFile(Path(type(items).__name__), rows or None)


def _found(value: Any) -> str:
    """The type and shape of an item or of a part of it, for messages."""
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
