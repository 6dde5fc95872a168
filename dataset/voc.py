"""A data set in the PASCAL VOC layout: pairs of image and label mask, and the places of its lists of ids."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dataset.classes import IGNORE_LABEL, TO_INDICES, VOC_CLASSES, ClassFile, Color, NamedClass, read_class_file
from dataset.folders import what_to_do
from dataset.images import DatasetError, read_with_orientation
from dataset.labels import read_label
from dataset.lists import IMAGE_DIR, IMAGE_SUFFIXES, LABEL_SUFFIXES, Entry, Listing, below, read_folder, read_list

LABEL_DIRS = ("SegmentationClassAug", "SegmentationClass")
TRAIN_LISTS = ("ImageSets/SegmentationAug/train_aug.txt", "ImageSets/Segmentation/train.txt")
VAL_LISTS = ("ImageSets/SegmentationAug/val.txt", "ImageSets/Segmentation/val.txt")
TEST_LISTS = ("ImageSets/Segmentation/test.txt",)


def find_list(data_dir: str | Path, data_list: str | Path | None, candidates: Sequence[str], source: str = "") -> Path:
    """The file of image ids: ``data_list`` as given or below ``data_dir``, else the first of ``candidates`` that exists.

    Args:
        source: how to get the data set, for messages; "" means PASCAL VOC.

    Raises:
        DatasetError: the folder, or every one of the files, is missing.
    """
    root = Path(data_dir)
    if not root.is_dir():
        advice = source or "get PASCAL VOC with `python scripts/download.py voc2012 sbd` and `python scripts/prepare_voc.py`"
        raise DatasetError(f"the data set folder {root} does not exist; {advice}, or pass --data-dir")
    paths = [Path(data_list), root / data_list] if data_list else [root / name for name in candidates]
    if found := next((path for path in paths if os.path.exists(path)), None):
        return found
    names = list(dict.fromkeys(map(str, paths)))
    text = f"{' and '.join(names)} {'do' if len(names) > 1 else 'does'} not exist"
    if source:
        text += _found_elsewhere(root, [str(data_list)] if data_list else candidates)
    if data_list:
        raise DatasetError(f"no list of image ids: {text}; pass a file with one id per line")
    if source:
        raise DatasetError(f"{text}; {source}, or pass --data-list")
    voc = "for PASCAL VOC run `python scripts/prepare_voc.py`; " if (root / IMAGE_DIR).is_dir() else ""
    raise DatasetError(f"{root} has no list of image ids ({' or '.join(candidates)}): {voc}{what_to_do(root)}")


def _found_elsewhere(root: Path, names: Iterable[str]) -> str:
    """The place of a folder that ``root`` lacks, for messages: archives are often unpacked into separate folders.

    One beside ``root`` is meant only if its parent has no other folder; otherwise that is another data set.
    """
    for name in (name for name in names if not Path(name).is_absolute()):
        for path in (*root.glob(f"*/{name}"), *root.glob(f"../*/{name}")):
            top = path.parents[name.count("/")]
            if top.parent == root or sum(each.is_dir() for each in top.iterdir()) == 1:
                there = os.path.normpath(path)
                return f", but {there} exists: move the contents of {os.path.normpath(top)} to {root}"
    return ""


class Server(NamedTuple):
    """What an evaluation server accepts: an archive of masks of the test images.

    Attributes:
        classes: their ids are the mask values.
        mode: Pillow mode of the masks: P with a palette, L grey.
        folder: folder of the masks in the archive.
        suffixes: allowed suffixes of the archive.
        advice: what to do with the archive.
    """

    classes: tuple[NamedClass, ...]
    mode: str
    folder: str
    suffixes: tuple[str, ...]
    advice: str


class VOCSegmentation:
    """Pairs of image and label mask: ``<root>/<image_dir>/<id>.jpg`` (or another of IMAGE_SUFFIXES, in any case) and
    ``<root>/<label_dir>/<id>.png``.

    A map-style data set. The key of an entry is its index, or ``(index, draw)`` for a random transform, which is seeded by the
    draw number (see :class:`dataset.sampler.StepSampler`).

    Args:
        root: the folder that holds the two folders, for VOC ``VOCdevkit/VOC2012``.
        ids: image ids, or entries of :func:`dataset.lists.read_list`; the files that these name are read, unless another
            ``image_dir`` or ``label_dir`` is given here.
        image_dir: folder of the images; None means ``JPEGImages``.
        label_dir: folder of the masks; None means ``SegmentationClassAug`` and, for ids that it lacks, ``SegmentationClass``.
        num_classes: classes 0..num_classes-1 are allowed in the masks.
        ignore_label: a value that is ignored, besides 255.
        transform: a function of (image, label, draw); None returns ``(image, label)`` as read.
        advice: what to do about a wrong file, for the end of the message.
        classes: the contents of ``classes.txt`` if already read; None reads it.

    Attributes:
        image_folder: ``image_dir`` as it was given, below ``root``.
        names: names of the classes if given; None means the names that the net has.
        colors: colours of the classes, to draw them and to detect re-ordered palettes.
        ids: one per entry of the list, in its order.
        entries: id -> Entry with the (expected) paths of its two files below ``root``.

    Raises:
        DatasetError: at once, if the root or one of its folders is missing, ``classes.txt`` does not fit, or an id means two
            pairs; later, if a file is missing (:meth:`check_files`) or wrong (when it is read).
    """

    # The properties of a data set; subclasses override them.
    TITLE: ClassVar[str] = "PASCAL VOC"
    ABOUT: ClassVar[str] = "PASCAL VOC, or data of your own in its layout"  # for --help
    SHORT: ClassVar[str] = "VOC12"  # in the file names of snapshots
    SOURCE: ClassVar[str] = ""  # how to get it, see find_list
    NAMES: ClassVar[tuple[str, ...]] = ()  # class names, if they are fixed
    COLORS: ClassVar[Mapping[int, Color]] = {}  # colours of these classes and of the ignore label
    UNUSED: ClassVar[tuple[int, ...]] = ()  # indices of classes that never occur in labels
    DATA_DIR: ClassVar[str] = "data/VOCdevkit/VOC2012"
    IMAGE_DIR: ClassVar[str] = IMAGE_DIR
    LABEL_DIRS: ClassVar[tuple[str, ...]] = LABEL_DIRS
    LABEL: ClassVar[str] = "<id>.png"  # file name of a label in the folder {}; for messages
    TRAINING: ClassVar[Mapping[str, Any]] = {}  # training defaults that differ from VOC's, the defaults of the options
    TOOLBOX_TRAINING: ClassVar[Mapping[str, Any]] = {}  # as in pytorch-segmentation-toolbox, for DeepLabv3 and PSPNet
    SERVER: ClassVar[Server | None] = Server(  # comp6: any training data except the test set
        VOC_CLASSES, "P", "results/VOC2012/Segmentation/comp6_test_cls/", (".tgz", ".tar.gz"),
        "upload it as comp6 of the segmentation challenge",
    )  # fmt: skip

    def __init__(
        self,
        root: str | Path,
        ids: Sequence[str | Entry],
        image_dir: str | None = None,
        label_dir: str | None = None,
        num_classes: int = 21,
        ignore_label: int = IGNORE_LABEL,
        transform: Callable | None = None,
        advice: str = "",
        classes: ClassFile | None = None,
    ) -> None:
        self.root = Path(root)
        self.image_folder = image_dir = image_dir or self.IMAGE_DIR
        self.image_dir = self.root / image_dir
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.transform = transform
        self.advice = advice
        if not self.root.is_dir():
            raise DatasetError(f"the data set folder {self.root} does not exist; pass --data-dir")
        self.names, self.colors = self.names_and_colors(classes)

        entries = [Entry(entry) if isinstance(entry, str) else entry for entry in ids]
        if image_dir != self.IMAGE_DIR:
            entries = [entry._replace(image=below(entry.image, image_dir)) for entry in entries]
        if label_dir:
            entries = [entry._replace(label=below(entry.label, label_dir)) for entry in entries]
        self.ids = [entry.id for entry in entries]
        if not self.image_dir.is_dir() and any(entry.image is None for entry in entries):
            raise DatasetError(
                f"the data set folder {self.root} holds no {image_dir}/; expected images <id>.jpg there or in --image-dir"
                f"{self._holds()}"
            )
        wanted = [label_dir] if label_dir else self.LABEL_DIRS
        label_dirs = [name for name in wanted if (self.root / name).is_dir()] or list(wanted[:1])
        self.label_dirs = [self.root / name for name in label_dirs]
        if not self.label_dirs[0].is_dir() and any(entry.label is None for entry in entries):
            names, example = " or ".join(f"{name}/" for name in wanted), self.LABEL.format(PurePosixPath(label_dirs[0]).name)
            raise DatasetError(
                f"the data set folder {self.root} holds no {names}; expected {example} label masks there (--label-dir)"
                + self._holds()
                + (f"{_found_elsewhere(self.root, wanted)}; {self.SOURCE}" if self.SOURCE else "")
            )
        listing = Listing(self.root)
        self.entries: dict[str, Entry] = {}
        for entry in entries:
            label = entry.label or self.find_label(listing, entry, label_dirs)
            entry = Entry(entry.id, _image(listing, entry, image_dir, label), label)
            if (first := self.entries.setdefault(entry.id, entry)) != entry:
                files = f"{first.image} {first.label}, then {entry.image} {entry.label}"
                raise DatasetError(f"the list holds the id {entry.id} twice, with different files ({files}); remove one")

    @classmethod
    def lists(cls, split: str, image_dir: str) -> tuple[str, ...]:
        """Candidates below the root for the list of ``"train"``, ``"val"`` or ``"test"``; the first that exists is used."""
        return {"train": TRAIN_LISTS, "val": VAL_LISTS, "test": TEST_LISTS}[split]

    @classmethod
    def read_list(cls, path: str | Path, image_dir: str) -> list[Entry]:
        """The entries of a list or of a folder of images, see :func:`dataset.lists.read_list` and ``read_folder``.

        A folder that has only sub-folders means the images in those.
        """
        if not os.path.isdir(path):
            return read_list(path, image_dir)
        nested = all(each.is_dir() or each.name.startswith(".") for each in Path(path).iterdir())
        return read_folder(Path(path), image_dir, "**/*" if nested else "*")

    def names_and_colors(self, classes: ClassFile | None) -> tuple[Sequence[str] | None, Mapping[int, Color]]:
        """The names and colours of the classes: fixed ones of the data set, else those of ``classes.txt``."""
        if self.NAMES:
            return self.NAMES, self.COLORS
        classes = classes or read_class_file(self.root)
        return classes.names(self.num_classes), classes.colors(self.num_classes)

    def find_label(self, listing: Listing, entry: Entry, label_dirs: Sequence[str]) -> str:
        """The (expected) path of the label of an entry that names none."""
        found = (listing.find(f"{folder}/{entry.id}", LABEL_SUFFIXES) for folder in label_dirs)
        return next(filter(None, found), None) or f"{label_dirs[0]}/{entry.id}.png"

    def classes_of(self, label_path: Path) -> np.ndarray | None:
        """The class of each value of a label file, see :func:`dataset.labels.read_label`; None if they are the classes."""
        return None

    def causes(self, counts: np.ndarray, colours: bool, wrong: bool) -> list[str]:
        """Likely causes of what the labels hold, one sentence each, for a data set that has ``NAMES``.

        Args:
            counts: (256,) pixels per class after reading.
            colours, wrong: whether a label has colours, or a value that is neither a class nor the ignore label.
        """
        return []

    def remark(self) -> str:
        """A note on comparing scores on this data with published ones; "" if there is none."""
        return ""

    def __len__(self) -> int:
        return len(self.ids)

    def _holds(self) -> str:
        """The folders that exist, for messages."""
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        return f", but it holds {', '.join(f'{name}/' for name in names)}" if names else ""

    def check_files(self) -> None:
        """Raise :class:`DatasetError` that names the missing images and labels; no file is read."""
        listing, entries = Listing(self.root), self.entries.values()
        lost = listing.missing("image", [entry.image for entry in entries if entry.image], IMAGE_SUFFIXES)
        lost += listing.missing("label", [entry.label for entry in entries if entry.label], LABEL_SUFFIXES)
        if lost:
            advice = f"; `python {TO_INDICES} {quote(str(self.root))} NEW` copies the pairs, also if masks have other names"
            found = f"files of the {len(entries)} ids are missing: {'; '.join(lost)}"
            raise DatasetError(found + (advice if self.image_folder != self.IMAGE_DIR and not self.NAMES else ""))

    def image_path(self, image_id: str) -> Path:
        """The (expected) path of the image."""
        return self.root / str(self.entries[image_id].image)

    def label_path(self, image_id: str) -> Path:
        """The (expected) path of the label."""
        return self.root / str(self.entries[image_id].label)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image (H, W, 3) uint8 BGR and its mask (H, W) uint8, checked to be of one size."""
        image_path, label_path = self.image_path(self.ids[index]), self.label_path(self.ids[index])
        try:
            image, orientation = read_with_orientation(image_path)
            label = self.load_label(index)
            check_pair(image_path, image.shape[:2], orientation, label_path, label.shape)
        except DatasetError as error:
            raise DatasetError(f"{error}; {self.advice}") if self.advice else error from None
        return image, label

    def load_label(self, index: int) -> np.ndarray:
        """Only the mask, (H, W) uint8."""
        path = self.label_path(self.ids[index])
        return read_label(path, self.num_classes, self.ignore_label, self.colors, self.classes_of(path))

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        image, label = self.load(index)
        return (image, label) if self.transform is None else self.transform(image, label, draw)


def _image(listing: Listing, entry: Entry, image_dir: str, label: str) -> str:
    """The (expected) path of an entry's image: as in the list, else with another suffix; never its label."""
    if entry.image and listing.has(entry.image):
        return entry.image
    place = str(PurePosixPath(entry.image).with_suffix("")) if entry.image else f"{image_dir}/{entry.id}"
    found = listing.find(place, IMAGE_SUFFIXES)
    return found if found and found != label else entry.image or f"{place}.jpg"


def check_pair(
    image_path: Path, size: tuple[int, ...], orientation: int, label_path: Path, label_size: tuple[int, ...]
) -> None:
    """Refuse an image and a label that are not aligned, or may not be.

    An EXIF tag rotates or flips an image on reading; the label was drawn either on that image or on the stored one. If the
    tag swaps the sides, the sizes show which.

    Args:
        size, label_size: (H, W) as read.
        orientation: the EXIF tag of the image, 1..8.

    Raises:
        DatasetError: the sizes differ, or the EXIF orientation does not change the size.
    """
    advice = "rotate the pixels of the image to match the label, and remove the tag (ImageMagick: -auto-orient)"
    if label_size != size:
        cause = ": the sides are swapped, so one of the two was rotated" if label_size == size[::-1] else ""
        if orientation > 4:
            cause = f": its EXIF orientation {orientation} swaps the sides, but not those of the label; {advice}"
        raise DatasetError(
            f"the label {label_path} is {label_size[1]}x{label_size[0]} pixels, its image {size[1]}x{size[0]}; "
            f"both must have the same size{cause}"
        )
    if orientation in (2, 3, 4) or (orientation > 4 and size[0] == size[1]):
        raise DatasetError(
            f"the image {image_path} has EXIF orientation {orientation}, and its size does not show whether the label was "
            f"drawn on the displayed or on the stored image; {advice}"
        )
