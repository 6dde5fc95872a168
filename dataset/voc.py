"""Pictures and label masks in the PASCAL VOC layout, read so that a wrong file is an error and never a wrong label."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dataset.classes import IGNORE_LABEL

LABEL_DIRS = ("SegmentationClassAug", "SegmentationClass")


class DatasetError(ValueError):
    """A file of the data set is missing, broken or of the wrong kind: one sentence that names it."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        # A DataLoader worker sends its error as the text of a traceback; the sentence at its end is the one to show.
        super().__init__(message.rsplit("DatasetError: ", 1)[-1].strip())


def read_ids(path: str | Path) -> list[str]:
    """The image ids of a list file, in its order.

    Two line formats: a bare id (``2007_000032``), or ``/JPEGImages/x.jpg /SegmentationClassAug/x.png`` as in the official Caffe
    lists (label path optional); its id is the picture's path below the first folder, without the suffix. Blank lines are
    skipped.

    Raises:
        DatasetError: the file is missing, is not text, or holds no id.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DatasetError(f"the list of image ids {path} does not exist; pass a file with one id a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"the list of image ids {path} cannot be read as text ({error})") from None
    ids = []
    for line in lines:
        if not line.strip():
            continue
        name = line.split()[0]
        if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png"):
            parts = Path(name.lstrip("/")).with_suffix("").parts
            name = "/".join(parts[1:] or parts)
        ids.append(name)
    if not ids:
        raise DatasetError(f"the list of image ids {path} is empty; expected one id a line")
    return ids


def read_image(path: str | Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8, blue-green-red.

    Raises:
        DatasetError: the file is missing, cut off or no picture.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DatasetError(f"the picture {path} cannot be read ({error.strerror or error})") from None
    # OpenCV fills the missing part of a cut JPEG with grey and says nothing; a whole one ends with the marker FF D9.
    if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data[-4096:].tobytes():
        raise DatasetError(f"the picture {path} is cut off: its {data.size} bytes lack the JPEG end marker; fetch it again")
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise DatasetError(f"the picture {path} is not a picture that OpenCV can decode ({data.size} bytes)")
    return image


def read_label(path: str | Path, num_classes: int, ignore_label: int = IGNORE_LABEL) -> np.ndarray:
    """A label mask as (H, W) uint8 class indices, with every void pixel as 255.

    Read with Pillow, which gives the indices of palette (mode P) and grey (mode L) files as they are stored. OpenCV would
    turn a palette into grey levels.

    Args:
        path: a single-channel 8-bit PNG.
        num_classes: values 0..num_classes-1 are classes.
        ignore_label: a further value that means void, beside 255.

    Raises:
        DatasetError: a missing or broken file, a colour or 16-bit image, a value that is neither a class nor void.
    """
    try:
        with Image.open(path) as mask:
            mode = mask.mode
            label = np.array(mask)
    except FileNotFoundError:
        raise DatasetError(f"the label {path} does not exist") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for broken files
        raise DatasetError(f"the label {path} cannot be decoded ({error})") from None
    if mode not in ("P", "L"):
        raise DatasetError(
            f"the label {path} has Pillow mode {mode} with shape {label.shape} and type {label.dtype}; "
            "expected a single-channel 8-bit PNG of class indices (mode P or L)"
        )
    if ignore_label != IGNORE_LABEL:
        label[label == ignore_label] = IGNORE_LABEL
    counts = np.bincount(label.ravel(), minlength=256)
    wrong = np.flatnonzero(counts[num_classes:IGNORE_LABEL]) + num_classes
    if wrong.size:
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if wrong.size > 8 else "")
        raise DatasetError(
            f"the label {path} holds the value{'s' * (wrong.size > 1)} {shown}; "
            f"expected class indices 0..{num_classes - 1} and {IGNORE_LABEL} for void"
        )
    return label


class VOCSegmentation:
    """Pairs of picture and label mask: ``<root>/<image_dir>/<id>.jpg`` and ``<root>/<label_dir>/<id>.png``.

    A map-style data set. An entry is asked for by its index, or by ``(index, draw)`` where the transform draws random numbers:
    the draw number seeds them (see :class:`dataset.sampler.StepSampler`).

    Args:
        root: the folder that holds the two folders, for VOC ``VOCdevkit/VOC2012``.
        ids: image ids, see :func:`read_ids`.
        image_dir: folder of the pictures (``.jpg``, else ``.png``).
        label_dir: folder of the masks; None means ``SegmentationClassAug`` and, for ids that it lacks, ``SegmentationClass``.
        num_classes: classes 0..num_classes-1 are allowed in the masks.
        ignore_label: a value that means void, beside 255.
        transform: a function of (image, label, draw); None returns ``(image, label)`` as read.

    Raises:
        DatasetError: the root or one of its folders is missing (at once), a file is missing or wrong (when it is read).
    """

    def __init__(
        self,
        root: str | Path,
        ids: Sequence[str],
        image_dir: str = "JPEGImages",
        label_dir: str | None = None,
        num_classes: int = 21,
        ignore_label: int = IGNORE_LABEL,
        transform: Callable | None = None,
    ) -> None:
        self.root = Path(root)
        self.ids = list(ids)
        self.image_dir = self.root / image_dir
        self.label_dirs = [self.root / name for name in ([label_dir] if label_dir else LABEL_DIRS)]
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.transform = transform
        if not self.root.is_dir():
            raise DatasetError(f"the data set folder {self.root} does not exist; pass --data-dir")
        if not self.image_dir.is_dir():
            raise DatasetError(f"the data set folder {self.root} holds no {image_dir}/; expected <id>.jpg pictures there")
        if not any(folder.is_dir() for folder in self.label_dirs):
            names = " or ".join(f"{folder.name}/" for folder in self.label_dirs)
            raise DatasetError(f"the data set folder {self.root} holds no {names}; expected <id>.png label masks there")

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, image_id: str) -> Path:
        path = self.image_dir / f"{image_id}.jpg"
        if not path.exists() and (png := path.with_suffix(".png")).exists():
            return png
        return path

    def label_path(self, image_id: str) -> Path:
        paths = [folder / f"{image_id}.png" for folder in self.label_dirs]
        return next((path for path in paths if path.exists()), paths[0])

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture (H, W, 3) uint8 BGR and its mask (H, W) uint8, checked to be of one size."""
        image_id = self.ids[index]
        image = read_image(self.image_path(image_id))
        path = self.label_path(image_id)
        label = read_label(path, self.num_classes, self.ignore_label)
        if label.shape != image.shape[:2]:
            raise DatasetError(
                f"the label {path} is {label.shape[1]}x{label.shape[0]} pixels, its picture "
                f"{image.shape[1]}x{image.shape[0]}; both must be of one size"
            )
        return image, label

    def __getitem__(self, key: int | tuple[int, int]):
        index, draw = key if isinstance(key, tuple) else (key, 0)
        image, label = self.load(index)
        return (image, label) if self.transform is None else self.transform(image, label, draw)


def read_class_names(root: str | Path, num_classes: int) -> list[str] | None:
    """The class names of ``<root>/classes.txt``, one a line, or None where there is no such file.

    Raises:
        DatasetError: the file holds another number of names.
    """
    path = Path(root) / "classes.txt"
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != num_classes:
        raise DatasetError(f"{path} names {len(names)} classes; expected {num_classes}: pass --num-classes {len(names)}")
    return names
