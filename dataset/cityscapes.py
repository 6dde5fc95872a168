"""Cityscapes in its official layout: ``leftImg8bit/<split>/<city>/*_leftImg8bit.png``, ``gtFine/.../*_gtFine_labelIds.png``."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from dataset.classes import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, IGNORE_LABEL
from dataset.images import DatasetError
from dataset.lists import LABEL_SUFFIXES, Entry, Listing, read_folder, read_list
from dataset.voc import Server, VOCSegmentation

NUM_IDS = 34  # label ids 0..33; -1, the license plate, is 255 in a file


def train_ids() -> np.ndarray:
    """The class (train id) of each label id: (34,) uint8, 255 for ids that are not evaluated."""
    table = np.full(NUM_IDS, IGNORE_LABEL, dtype=np.uint8)
    for index, row in enumerate(CITYSCAPES_CLASSES):
        table[row.id] = index
    return table


class CityscapesSegmentation(VOCSegmentation):
    """Pairs of image and label, as in :class:`dataset.voc.VOCSegmentation`, with the train ids 0..18 as classes.

    A list is a folder such as ``leftImg8bit/train``, which means all images in it, or a file. A line of the file holds an
    image and its label, or an image alone; its label then has the same name in ``gtFine/``. An id is
    ``<city>_<sequence>_<frame>``. Files are named after their folder: ``gtCoarse/.../*_gtCoarse_labelIds.png``.

    Label files hold label ids, which are converted to train ids on reading; ``*_labelTrainIds.png`` hold train ids.
    """

    TITLE = "Cityscapes"
    ABOUT = "the official folders; labelIds are converted to the 19 train ids"
    SHORT = "CS"
    SOURCE = (
        "for --dataset cityscapes unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
        "www.cityscapes-dataset.com there"
    )
    NAMES = tuple(row.name for row in CITYSCAPES_CLASSES)
    COLORS = CITYSCAPES_COLORS
    DATA_DIR = "data/cityscapes"
    IMAGE_DIR = "leftImg8bit"
    LABEL_DIRS = ("gtFine",)
    LABEL = "<split>/<city>/<city>_<sequence>_<frame>_{}_labelIds.png"
    TRAINING: ClassVar = {"input_size": (769, 769), "scale_range": (0.7, 2.1)}
    TOOLBOX_TRAINING: ClassVar = {"batch_size": 8, "iter_size": 1, "num_steps": 40_000}
    # The server finds <city>_<sequence>_<frame>*.png of label ids (cityscapesScripts, evalPixelLevelSemanticLabeling.py).
    SERVER = Server(CITYSCAPES_CLASSES, "L", "", (".zip",), "upload it to the pixel-level semantic labeling task")

    @classmethod
    def lists(cls, split: str, image_dir: str) -> tuple[str, ...]:
        """The folder of the split ``"train"``, ``"val"`` or ``"test"``, below the root."""
        return (f"{image_dir}/{split}",)

    @classmethod
    def read_list(cls, path: str | Path, image_dir: str) -> list[Entry]:
        """The entries of a folder ``<root>/<image_dir>/<split>``, sorted by name, or of a list file.

        Raises:
            DatasetError: see :func:`dataset.lists.read_list`; the folder has no image, or a line names none.
        """
        path = Path(path)
        if path.is_dir():
            ending = f"_{PurePosixPath(image_dir).name}"
            entries = read_folder(path, image_dir, f"*/*{ending}.*", f"<city>/<city>_<sequence>_<frame>{ending}.png")
        else:
            entries = read_list(path, image_dir)
        for entry in entries:
            if entry.image is None:
                raise DatasetError(
                    f"the list {path} holds {entry.id!r}, which names no image; expected lines such as "
                    "leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png, alone or followed by the path of the label"
                )
        return [entry._replace(id=_split(str(entry.image), image_dir)[1]) for entry in entries]

    def find_label(self, listing: Listing, entry: Entry, label_dirs: Sequence[str]) -> str:
        """The (expected) path of the label of an entry that names none; label ids are preferred to train ids."""
        folder, id = _split(str(entry.image), self.image_folder)
        place = f"{label_dirs[0]}/{folder}{id}_{PurePosixPath(label_dirs[0]).name}"
        found = (listing.find(f"{place}_{kind}", LABEL_SUFFIXES) for kind in ("labelIds", "labelTrainIds"))
        return next(filter(None, found), f"{place}_labelIds.png")

    def classes_of(self, label_path: Path) -> np.ndarray | None:
        """The table from label ids to train ids; None for a file that already holds train ids."""
        return None if label_path.stem.endswith("_labelTrainIds") else train_ids()

    def causes(self, counts: np.ndarray, colours: bool, wrong: bool) -> list[str]:
        """See :meth:`dataset.voc.VOCSegmentation.causes`."""
        causes = []
        if colours:
            causes.append("colour labels are the *_color.png files, which are for viewing; expected *_labelIds.png")
        if wrong:
            causes.append("label ids are 0..33, as in *_labelIds.png; files with train ids are named *_labelTrainIds.png")
        last = 5  # train ids read as label ids give classes up to 5: id 17 is the pole, 18 is not evaluated
        if counts[: last + 1].any() and not counts[last + 1 : IGNORE_LABEL].any():
            causes.append(
                "no class after the pole occurs: if the files hold train ids, rename them to end in _labelTrainIds.png"
            )
        return causes


def _split(image: str, image_dir: str) -> tuple[str, str]:
    """The folder and the id of an image below ``image_dir``: ``"val/munster/"`` and ``"munster_000000_000019"``."""
    folder, _, name = image.removeprefix(f"{image_dir}/").rpartition("/")
    return f"{folder}/" if folder else "", PurePosixPath(name).stem.removesuffix(f"_{PurePosixPath(image_dir).name}")
