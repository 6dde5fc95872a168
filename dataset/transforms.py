"""The augmentation of DeepLab training: random scale, random mirror, pad and crop, mean subtraction.

Each random transform is called as ``transform(image, label, rng)`` with the picture (H, W, 3) uint8 BGR, its mask (H, W) uint8
and a ``numpy.random.Generator``; it draws once and applies the same geometry to both.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.classes import IGNORE_LABEL, MEAN_BGR


class RandomScale:
    """Enlarge or shrink by a factor drawn uniformly from [low, high]; picture bilinear, mask nearest on the same grid."""

    def __init__(self, low: float = 0.5, high: float = 1.5) -> None:
        if not 0 < low <= high:
            raise ValueError(f"the scale range is {low}..{high}; expected 0 < low <= high")
        self.low, self.high = low, high

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        factor = rng.uniform(self.low, self.high)
        height, width = (max(1, round(side * factor)) for side in label.shape)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        # INTER_NEAREST samples pixel corners and so lies half a pixel off the bilinear grid; the exact variant lies on it.
        label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        return image, label


class RandomMirror:
    """Mirror left to right with probability one half."""

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < 0.5:
            return image[:, ::-1], label[:, ::-1]
        return image, label


class PadCrop:
    """A random crop of ``size`` (height, width); sides that are too short are padded first, at the bottom and the right.

    The picture is padded with the mean colour (rounded to whole levels, as in the published Caffe code), the mask with 255.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float] = MEAN_BGR) -> None:
        self.size = size
        self.mean = [round(value) for value in mean]

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        (height, width), (crop_height, crop_width) = label.shape, self.size
        top = int(rng.integers(max(height - crop_height, 0) + 1))
        left = int(rng.integers(max(width - crop_width, 0) + 1))
        image = image[top : top + crop_height, left : left + crop_width]
        label = label[top : top + crop_height, left : left + crop_width]
        bottom, right = crop_height - label.shape[0], crop_width - label.shape[1]
        if bottom or right:
            image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=self.mean)
            label = cv2.copyMakeBorder(label, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=IGNORE_LABEL)
        return image, label


def to_input(image: np.ndarray, mean: Sequence[float] = MEAN_BGR) -> Tensor:
    """The net's input: (H, W, 3) uint8 BGR -> (3, H, W) float32 minus the mean colour. Nothing else subtracts the mean."""
    pixels = image.astype(np.float32)
    pixels -= np.asarray(mean, dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # a view: the memory stays pixel by pixel (channels last)


class TrainTransform:
    """Picture, mask and draw number -> one training sample.

    The random numbers come from a generator seeded with ``(seed, draw)``, so a sample depends on nothing else: not on the
    worker that makes it, nor on the samples before it.

    Args:
        seed: the run's seed.
        transforms: random transforms, called in order.
        mean: BGR mean colour, see :func:`to_input`.
    """

    def __init__(self, seed: int, transforms: Sequence[Callable], mean: Sequence[float] = MEAN_BGR) -> None:
        self.seed = seed
        self.transforms = list(transforms)
        self.mean = mean

    def __call__(self, image: np.ndarray, label: np.ndarray, draw: int) -> tuple[Tensor, Tensor]:
        """Returns (3, h, w) float32 and (h, w) int64."""
        rng = np.random.default_rng((self.seed, draw))
        for transform in self.transforms:
            image, label = transform(image, label, rng)
        return to_input(image, self.mean), torch.from_numpy(label.astype(np.int64))
