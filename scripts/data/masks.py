"""Class masks for SegmentationClassAug: read from SBD, VOC or a ready set, checked, and written as palette PNGs."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dataset.classes import IGNORE_LABEL, VOC_CLASSES, voc_colors
from dataset.images import DatasetError
from dataset.labels import BadLabel, check_palette, decode_label
from scripts.data.archive import damage, open_zip, tar_members
from utils.visualize import save_indexed_png

AUG_DIR, VOC_DIR = "SegmentationClassAug", "SegmentationClass"


# ---- one mask: bytes -> checked class indices -> palette PNG; runs in the worker processes


def read_mat(data: bytes, name: str, expected: str) -> dict[str, np.ndarray]:
    """The contents of a MATLAB file; BadLabel, with what was ``expected``, if the array ``name`` is missing."""
    from scipy.io import loadmat

    try:
        content = loadmat(io.BytesIO(data))
    except Exception as error:  # depending on the damage, scipy raises OSError, TypeError, zlib.error and ten others
        raise BadLabel(f"is not a readable MATLAB file ({type(error).__name__}: {error})") from None
    if not isinstance(content.get(name), np.ndarray):
        names = ", ".join(name for name in content if not name.startswith("__")) or "nothing"
        raise BadLabel(f"holds {names}, expected {expected}")
    return content


def decode_mat(data: bytes) -> np.ndarray:
    """The class mask (H, W) of an SBD ``cls/<id>.mat``: the field ``Segmentation`` of the 1x1 struct ``GTcls``."""
    expected = "GTcls.Segmentation as in SBD's cls folder"
    classes = read_mat(data, "GTcls", expected)["GTcls"]
    if classes.size != 1 or "Segmentation" not in (classes.dtype.names or ()):
        raise BadLabel(f"holds GTcls, expected {expected}")
    return np.asarray(classes["Segmentation"].item())


def decode_png(data: bytes) -> np.ndarray:
    """The class mask (H, W) of a palette or grey PNG; BadLabel if it is damaged or its palette is not in VOC's order."""
    mask, palette = decode_label(data)
    check_palette(np.unique(mask).tolist(), palette, voc_colors(len(VOC_CLASSES)))
    return mask


def checked(mask: np.ndarray, image_path: Path, num_classes: int = len(VOC_CLASSES)) -> np.ndarray:
    """``mask`` as (H, W) uint8; BadLabel if type, values or size do not fit a mask of the image."""
    if mask.ndim != 2 or mask.dtype.kind not in "ui":
        raise BadLabel(f"is an array {mask.shape} of {mask.dtype}, expected height x width integers")
    wrong = [int(value) for value in np.unique(mask) if not (0 <= value < num_classes or value == IGNORE_LABEL)]
    if wrong:
        raise BadLabel(f"holds {', '.join(map(str, wrong[:5]))}, expected 0..{num_classes - 1} and {IGNORE_LABEL}")
    try:
        with Image.open(image_path) as image:
            width, height = image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise BadLabel(f"has no readable image ({error})") from None
    if mask.shape != (height, width):
        raise BadLabel(f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}")
    return mask.astype(np.uint8)


def convert(image_id: str, kind: str, data: bytes, data_dir: Path, aside: Path, overwrite: bool) -> tuple[str, str]:
    """Write the mask in the bytes of a "mat" or "png" file to SegmentationClassAug/<id>.png.

    A file that already holds it, grey or with a palette, is kept unless ``overwrite``. A file with another mask is moved to
    the folder ``aside``.

    Returns:
        (id, "there"), (id, "new") or (id, "replaced"); or (id, what is wrong with the mask) if nothing is written.
    """
    path = data_dir / AUG_DIR / f"{image_id}.png"
    try:
        mask = checked(decode_mat(data) if kind == "mat" else decode_png(data), data_dir / "JPEGImages" / f"{image_id}.jpg")
    except BadLabel as error:
        return image_id, f"the mask {error}"
    right = path.exists() and holds(path, mask)
    if right and not overwrite:
        return image_id, "there"
    if replaced := path.exists() and not right:
        set_aside(path, aside)
    save_indexed_png(path, mask)
    return image_id, "replaced" if replaced else "new"


def holds(path: Path, mask: np.ndarray) -> bool:
    """Whether the file at ``path`` is an undamaged PNG of this mask."""
    try:
        return np.array_equal(decode_png(path.read_bytes()), mask)
    except BadLabel:
        return False


def set_aside(path: Path, folder: Path) -> None:
    """Move a file to a folder, which is created."""
    folder.mkdir(exist_ok=True)
    shutil.move(path, folder / path.name)


def agrees(image_id: str, data: bytes, data_dir: Path) -> tuple[str, bool]:
    """Whether the bytes of a PNG hold VOC's own mask of an id; true if ``data`` cannot be read."""
    try:
        return image_id, holds(data_dir / VOC_DIR / f"{image_id}.png", decode_png(data))
    except BadLabel:
        return image_id, True


# ---- the sources of masks


def read_sbd(path: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the ``wanted`` files that exist; names are relative to SBD's ``dataset`` folder.

    ``path`` is the unpacked folder or ``benchmark.tgz``, which is not unpacked to disk. It is read to its end to verify its
    checksum.
    """
    if path.is_dir():
        root = next((folder for folder in (path / "dataset", path / "benchmark_RELEASE/dataset") if folder.is_dir()), path)
        for name in sorted(wanted):
            if (root / name).is_file():
                yield name, (root / name).read_bytes()
        return
    left = set(wanted)
    if not left:
        return
    try:
        with tarfile.open(path) as archive:
            for member in tar_members(archive):
                name = member.name.rpartition("dataset/")[2]
                if name in left and member.isfile() and (file := archive.extractfile(member)):
                    left.remove(name)
                    yield name, file.read()
    except Exception as error:
        raise DatasetError(f"the archive {path} is damaged or truncated ({damage(error)}); fetch it again") from None


def sbd_ids(path: Path) -> dict[str, set[str]]:
    """The ids in SBD's own lists, {"train": ..., "val": ...}."""
    lists = {
        Path(name).stem: set(data.decode(errors="replace").split()) for name, data in read_sbd(path, {"train.txt", "val.txt"})
    }
    if len(lists) < 2 or not all(lists.values()):
        raise DatasetError(
            f"{path} lacks the lists dataset/train.txt and dataset/val.txt; expected SBD's benchmark_RELEASE folder or "
            "benchmark.tgz (python scripts/download.py sbd)"
        )
    return lists


def ready_masks(path: Path) -> dict[str, str]:
    """{id: name} of the PNGs in a SegmentationClassAug folder or zip; for a zip, the name inside it."""
    if path.is_dir():
        folder = path / AUG_DIR if (path / AUG_DIR).is_dir() else path
        names = [str(file) for file in folder.glob("*.png") if not file.name.startswith(".")]
    else:
        try:
            with open_zip(path) as archive:
                names = [n for n in archive.namelist() if n.endswith(".png") and not n.startswith("__MACOSX/")]
        except FileNotFoundError:
            raise DatasetError(f"--aug {path} does not exist; pass a SegmentationClassAug folder or zip") from None
        except Exception as error:
            raise DatasetError(f"--aug {path} is neither a folder nor a readable zip ({damage(error)})") from None
    found: dict[str, str] = {}
    for name in sorted(names):
        stem = PurePosixPath(name).stem
        if stem in found:
            raise DatasetError(f"--aug {path} holds {stem}.png twice, as {found[stem]} and {name}; expected one mask per id")
        found[stem] = name
    if not found:
        raise DatasetError(f"--aug {path} holds no PNG masks; expected SegmentationClassAug/<id>.png")
    return found


def read_ready(path: Path, names: dict[str, str], ids: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (id, PNG bytes) from a SegmentationClassAug folder or zip; ``names`` comes from :func:`ready_masks`."""
    if path.is_dir():
        yield from ((image_id, Path(names[image_id]).read_bytes()) for image_id in sorted(ids))
        return
    with open_zip(path) as archive:
        for image_id in sorted(ids):
            try:
                data = archive.read(names[image_id])
            except Exception as error:
                damage(error)
                data = b""  # damaged in the zip: reported with the id on decoding
            yield image_id, data
