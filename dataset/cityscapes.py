"""Cityscapes in its official layout: ``leftImg8bit/<split>/<city>/*_leftImg8bit.png``, ``gtFine/.../*_gtFine_labelIds.png``."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from dataset.classes import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, IGNORE_LABEL, ClassFile, Color
from dataset.images import DatasetError
from dataset.lists import LABEL_SUFFIXES, PICTURE_SUFFIXES, Entry, Listing, read_list
from dataset.voc import VOCSegmentation

NUM_IDS = 34  # label ids 0..33; -1, the license plate, is 255 in a file


def train_ids() -> np.ndarray:
    """The class, or train id, of each label id: (34,) uint8, 255 for those that are not scored."""
    table = np.full(NUM_IDS, IGNORE_LABEL, dtype=np.uint8)
    for index, row in enumerate(CITYSCAPES_CLASSES):
        table[row.id] = index
    return table


class CityscapesSegmentation(VOCSegmentation):
    """Pairs of image and label, as :class:`dataset.voc.VOCSegmentation` has them, with train ids 0..18 for classes.

    A list is a folder, ``leftImg8bit/train``, that stands for all images in it; or a file whose lines hold an image and its
    label, or an image alone, whose label then has its name in ``gtFine/``. An id is ``<city>_<sequence>_<frame>``. Other
    folders than ``leftImg8bit`` and ``gtFine`` have files named after them: ``gtCoarse/.../*_gtCoarse_labelIds.png``.

    Label files hold label ids, which become train ids while they are read; those named ``*_labelTrainIds.png`` hold train ids.
    """

    TITLE = "Cityscapes"
    SHORT = "CS"
    SOURCE = (
        "for --dataset cityscapes unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
        "www.cityscapes-dataset.com there"
    )
    NAMES = tuple(row.name for row in CITYSCAPES_CLASSES)
    IMAGE_DIR = "leftImg8bit"
    LABEL_DIRS = ("gtFine",)
    LABEL = "<split>/<city>/<city>_<sequence>_<frame>_{}_labelIds.png"

    @classmethod
    def lists(cls, split: str, image_dir: str) -> tuple[str, ...]:
        """The folder of ``"train"``, ``"val"`` or ``"test"`` below the root."""
        return (f"{image_dir}/{split}",)

    @classmethod
    def read_list(cls, path: str | Path, image_dir: str) -> list[Entry]:
        """The entries of a folder ``<root>/<image_dir>/<split>``, in the order of their names, or of a list file.

        Raises:
            DatasetError: see :func:`dataset.lists.read_list`; no image in the folder, a line that names none.
        """
        path = Path(path)
        if path.is_dir():
            ending = f"_{PurePosixPath(image_dir).name}"
            files = [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in PICTURE_SUFFIXES]
            names = [file.relative_to(path).as_posix() for file in files if file.stem.endswith(ending) and file.name[0] != "."]
            if not names:
                raise DatasetError(f"the folder {path} holds no picture; expected <city>/<city>_<sequence>_<frame>{ending}.png")
            entries = [Entry("", f"{image_dir}/{path.name}/{name}") for name in names]
        else:
            entries = read_list(path, image_dir)
        for entry in entries:
            if entry.image is None:
                raise DatasetError(
                    f"the list {path} holds {entry.id!r}, which names no picture; expected lines such as "
                    "leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png, with the label's path behind it or without"
                )
        return [entry._replace(id=_split(str(entry.image), image_dir)[1]) for entry in entries]

    def names_and_colors(self, classes: ClassFile | None) -> tuple[Sequence[str] | None, Mapping[int, Color]]:
        """The names and the colours of the classes, which no file changes."""
        return self.NAMES, CITYSCAPES_COLORS

    def find_label(self, listing: Listing, entry: Entry, label_dirs: Sequence[str]) -> str:
        """Where the label of an entry that names none is, or should be: label ids come before train ids."""
        folder, id = _split(str(entry.image), self.image_folder)
        place = f"{label_dirs[0]}/{folder}{id}_{PurePosixPath(label_dirs[0]).name}"
        found = (listing.find(f"{place}_{kind}", LABEL_SUFFIXES) for kind in ("labelIds", "labelTrainIds"))
        return next(filter(None, found), f"{place}_labelIds.png")

    def classes_of(self, label_path: Path) -> np.ndarray | None:
        """The train ids of label ids; None for a file that holds train ids already."""
        return None if label_path.stem.endswith("_labelTrainIds") else train_ids()


def _split(image: str, image_dir: str) -> tuple[str, str]:
    """The path of an image below ``image_dir`` as the folder, ``"val/munster/"``, and the id, ``"munster_000000_000019"``."""
    folder, _, name = image.removeprefix(f"{image_dir}/").rpartition("/")
    return f"{folder}/" if folder else "", PurePosixPath(name).stem.removesuffix(f"_{PurePosixPath(image_dir).name}")
