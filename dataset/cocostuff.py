"""COCO-Stuff as published: 164k with ``stuffthingmaps``, or 10k as prepared by scripts/prepare_cocostuff.py."""

from typing import ClassVar

import numpy as np

from dataset.classes import COCO_COLORS, COCO_NAMES, COCO_UNUSED
from dataset.images import DatasetError
from dataset.voc import VOCSegmentation

PREPARED = "annotations_png"  # labels of the 10k; the .mat files are in annotations/


class COCOStuffSegmentation(VOCSegmentation):
    """Pairs of image and label, as in :class:`dataset.voc.VOCSegmentation`, with 182 classes, of which 171 occur.

    164k: a list is a folder such as ``images/train2017`` of ``<12 digits>.jpg``; their labels are
    ``annotations/train2017/<same>.png`` (stuffthingmaps: grey, the value is the class, 255 unlabelled). An id is
    ``train2017/<12 digits>``.
    10k (version 1.1): the lists are in ``imageLists``; its ``test`` serves as val. Labels are read from ``annotations_png``.
    Images keep their sizes and scales are drawn uniformly. For the published scores kazuto1011 warps images and labels to
    513x513 and draws scales from 0.5, 0.75, 1.0, 1.25 and 1.5.

    Sources: nightrome/cocostuff, nightrome/cocostuff10k, kazuto1011/deeplab-pytorch.
    """

    TITLE = "COCO-Stuff"
    ABOUT = "COCO-Stuff 164k (2017), or 10k after scripts/prepare_cocostuff.py"
    SHORT = "COCO"
    SOURCE = (
        "for --dataset cocostuff download the 164k images with `python scripts/download.py coco-train2017 coco-val2017 "
        "cocostuff164k`, or the 10k with `python scripts/download.py cocostuff10k` and `python scripts/prepare_cocostuff.py`"
    )
    NAMES = COCO_NAMES
    COLORS = COCO_COLORS
    UNUSED = COCO_UNUSED
    DATA_DIR = "data/cocostuff"
    IMAGE_DIR = "images"
    LABEL_DIRS = ("annotations", PREPARED)
    TRAINING: ClassVar = {"num_steps": 100_000}  # for the 164k, as published; 20,000 for the 10k
    SERVER = None

    @classmethod
    def lists(cls, split: str, image_dir: str) -> tuple[str, ...]:
        """The folder of a split of the 164k, or a list of the 10k."""
        return f"{image_dir}/{split}2017", f"imageLists/{'train' if split == 'train' else 'test'}.txt"

    def check_files(self) -> None:
        """See :meth:`dataset.voc.VOCSegmentation.check_files`; also if the labels of the 10k are not prepared."""
        if text := self._unprepared():
            raise DatasetError(text)
        super().check_files()

    def _unprepared(self) -> str:
        """The error message if the labels are still .mat files, else ""."""
        if (self.root / PREPARED).is_dir() or not any(self.root.glob("annotations/*.mat")):
            return ""
        command = f"python scripts/prepare_cocostuff.py --data-dir {self.root}"
        return f"{self.root / 'annotations'} holds the .mat files of the 10k; `{command}` makes labels of them in {PREPARED}/"

    def remark(self) -> str:
        """See :meth:`dataset.voc.VOCSegmentation.remark`."""
        if not any(str(entry.label).startswith(f"{PREPARED}/") for entry in self.entries.values()):
            return ""
        return "note: published scores of the 10k are for images and labels warped to 513x513; here they keep their sizes"

    def causes(self, counts: np.ndarray, colours: bool, wrong: bool) -> list[str]:
        """See :meth:`dataset.voc.VOCSegmentation.causes`."""
        causes = [text] if (text := self._unprepared()) else []
        if colours:
            causes.append("colour labels are for viewing; expected grey PNGs, as in stuffthingmaps_trainval2017.zip")
        if wrong:
            causes.append("values are 0..181, and 255 unlabelled; if they count from 1, as in the .mat files, subtract 1")
        return causes
