"""Toy data sets and files, shared by the tests of data sets."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from utils.evaluation.images import Sample

SIZE = (48, 80)
CITIES = {"train": ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313"),
          "val": ("lindau_000000_000019", "munster_000000_000019"), "test": ("berlin_000000_000019",)}  # fmt: skip
IMAGE, LABEL = "leftImg8bit/{0}/{1}/{2}_leftImg8bit.png", "gtFine/{0}/{1}/{2}_gtFine_labelIds.png"


def place(pattern: str, split: str, id: str) -> str:
    return pattern.format(split, id.split("_")[0], id)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_toy_cityscapes(root: Path) -> Path:
    """Squares of all label ids on noise, in 80x48 images; the test images have no labels."""
    rng = np.random.default_rng(0)
    for split, ids in CITIES.items():
        for id in ids:
            save(root / place(IMAGE, split, id), rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
            labels = rng.permutation(np.resize(np.arange(34, dtype=np.uint8), 60)).reshape(6, 10)
            if split != "test":
                save(root / place(LABEL, split, id), np.kron(labels, np.ones((8, 8), np.uint8)))
    return root


TRAINVAL_AUG = ["2007_000032", "2007_000033", "2008_000002", "2008_000007", "2008_000015", "2009_000001"]
SIZES = {image_id: (37 + 2 * k, 53 - 3 * k) for k, image_id in enumerate(TRAINVAL_AUG)}  # height, width


def voc_mask(image_id):
    """An aeroplane (1) with VOC's ignored border."""
    mask = np.zeros(SIZES[image_id], dtype=np.uint8)
    mask[8:24, 8:24] = 255
    mask[10:22, 10:22] = 1
    return mask


def sbd_mask(image_id):
    """A larger sofa (18) in its place; SBD has no border."""
    mask = np.zeros(SIZES[image_id], dtype=np.uint8)
    mask[7:25, 7:25] = 18
    return mask


def mat_bytes(mask, field="Segmentation", name="GTcls"):
    boundaries = np.empty((20, 1), dtype=object)
    for k in range(20):
        boundaries[k, 0] = csc_matrix(mask.shape[:2])
    buffer = io.BytesIO()
    content = {"Boundaries": boundaries, field: mask, "CategoriesPresent": np.array([[18]], dtype=np.uint8)}
    savemat(buffer, {name: content}, do_compression=True)
    return buffer.getvalue()


def png_bytes(mask):
    """A palette PNG; the palette is hand-written for the labels in use."""
    image = Image.fromarray(mask)
    palette = [0] * 768
    palette[3:6], palette[54:57], palette[765:768] = (128, 0, 0), (0, 192, 0), (224, 224, 192)
    image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg_bytes(image_id):
    buffer = io.BytesIO()
    rng = np.random.default_rng(int(image_id[-6:]))
    Image.fromarray(rng.integers(0, 256, (*SIZES[image_id], 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def samples_with_logits(count: int) -> list[tuple[Sample, torch.Tensor]]:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    sizes = [(9 + 8 * (i % 3), 33 - 8 * (i % 2)) for i in range(count)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    logits = [torch.randn(4, size[0] // 8 + 1, size[1] // 8 + 1) for size in sizes]
    return [(Sample(str(i), image, image[..., 0]), x) for i, (image, x) in enumerate(zip(images, logits))]
