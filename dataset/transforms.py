"""The augmentation for training on uint8 images (scale, flip, crop, colour jitter, padding), and the input of the net.

Each random transform is called as ``transform(image, label, rng)`` with the image (H, W, 3) uint8 BGR, its mask (H, W) uint8
and a ``numpy.random.Generator``; it draws once and applies the same geometry to both.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from dataset.classes import IGNORE_LABEL, MEAN_BGR

if TYPE_CHECKING:  # keeps --help fast
    from torch import Tensor


class RandomScale:
    """Resize by a factor drawn uniformly from [low, high]: image bilinear, mask nearest on the same grid."""

    def __init__(self, low: float = 0.5, high: float = 1.5) -> None:
        if not 0 < low <= high:
            raise ValueError(f"the scale range is {low}..{high}; expected 0 < low <= high")
        self.low, self.high = low, high

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        factor = rng.uniform(self.low, self.high)
        height, width = (max(1, round(side * factor)) for side in label.shape)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        # INTER_NEAREST samples pixel corners, half a pixel off the bilinear grid; the exact variant is on that grid.
        label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        return image, label


class RandomMirror:
    """Horizontal flip with probability 0.5."""

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < 0.5:
            return cv2.flip(image, 1), cv2.flip(label, 1)
        return image, label


class ColorJitter:
    """Brightness, contrast, saturation and hue changed at random and in random order, as torchvision's ``ColorJitter``.

    Args:
        brightness, contrast, saturation: for s the factor is drawn uniformly from [max(0, 1 - s), 1 + s]; 0 changes nothing.
        hue: at most 0.5; for h the shift, as a share of the colour circle, is drawn uniformly from [-h, h].
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = {name: (max(0.0, 1 - s), 1 + s) for name, s in strengths.items()} | {"hue": (-hue, hue)}

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        from PIL import Image
        from torchvision.transforms import functional

        # Pillow images, not tensors: the mean grey used for contrast must not depend on the number of threads.
        rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        for name, (low, high) in (list(self.ranges.items())[k] for k in rng.permutation(4)):
            if low < high:
                rgb = getattr(functional, f"adjust_{name}")(rgb, rng.uniform(low, high))
        return np.ascontiguousarray(np.array(rgb)[:, :, ::-1]), label


class RandomCrop:
    """A random crop of at most ``size`` (height, width); a shorter side is left for :class:`Pad`."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        (height, width), (crop_height, crop_width) = label.shape, self.size
        top = int(rng.integers(max(height - crop_height, 0) + 1))
        left = int(rng.integers(max(width - crop_width, 0) + 1))
        part = slice(top, top + crop_height), slice(left, left + crop_width)
        return image[part], label[part]


class Pad:
    """Pad sides shorter than ``size`` (height, width), at the bottom and the right.

    The image is padded with the mean colour (rounded to whole levels, as in the published Caffe code), the mask with 255.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bottom, right = (max(0, side - own) for side, own in zip(self.size, label.shape))
        if bottom or right:
            color = [round(value) for value in MEAN_BGR]
            image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=color)
            label = cv2.copyMakeBorder(label, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=IGNORE_LABEL)
        return image, label


class Crop(NamedTuple):
    """A training sample, as sent from a worker to the device: bytes, no floats.

    Attributes:
        image: (h, w, 3) uint8 BGR; in a batch (N, h, w, 3).
        label: (h, w) uint8, 255 ignored; in a batch (N, h, w).
        present: (256,) bool, the label values of the whole image before the crop; in a batch (N, 256).
    """

    image: "Tensor"
    label: "Tensor"
    present: "Tensor"


def training_transforms(options: Any) -> list[Callable]:
    """The transforms that the training options ask for, in order; add a transform's option here."""
    transforms: list[Callable] = []
    if options.random_scale:
        transforms.append(RandomScale(*options.scale_range))
    if options.random_mirror:
        transforms.append(RandomMirror())
    transforms.append(RandomCrop(options.input_size))
    if options.color_jitter:
        transforms.append(ColorJitter(*options.color_jitter))  # before the padding; only on the crop, to save time
    transforms.append(Pad(options.input_size))
    return transforms


class TrainTransform:
    """Image, mask and draw number -> one training sample.

    The random numbers come from a generator seeded with ``(seed, draw)``, so a sample depends neither on the worker
    that makes it nor on earlier samples.

    Args:
        seed: the run's seed.
        transforms: random transforms, called in order.
    """

    def __init__(self, seed: int, transforms: Sequence[Callable]) -> None:
        self.seed = seed
        self.transforms = list(transforms)

    def __call__(self, image: np.ndarray, label: np.ndarray, draw: int) -> Crop:
        import torch

        rng = np.random.default_rng((self.seed, draw))
        present = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel() > 0
        for transform in self.transforms:
            image, label = transform(image, label, rng)
        arrays = (image, label, present)
        return Crop(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))  # copies only the crop


def to_input(images: "Tensor | np.ndarray") -> "Tensor":
    """The input of the net: images minus the mean colour, on their device. Nothing else subtracts the mean.

    Args:
        images: (..., H, W, 3) uint8 BGR.

    Returns:
        (..., 3, H, W) float32 in channels-last memory format.

    Raises:
        TypeError: another type, dtype or shape.
    """
    import torch

    known = isinstance(images, np.ndarray | torch.Tensor)
    if not known or images.dtype not in (np.uint8, torch.uint8) or images.shape[-1] != 3:
        found = f"{type(images).__name__} of {getattr(images, 'dtype', 'no numbers')}{list(getattr(images, 'shape', ()))}"
        raise TypeError(f"the image is a {found}; expected uint8 (..., H, W, 3) in BGR, which read_image(path) reads")
    images = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    pixels = images.to(torch.float32)
    for channel, mean in enumerate(MEAN_BGR):  # plain numbers: a tensor would need a copy to the device
        pixels[..., channel] -= mean
    return pixels.movedim(-1, -3)
