"""Labels that lack classes, or hold nothing but one: noticed while they are read, before the run has taken long."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dataset import IGNORE_LABEL, absent_classes, one_class_warning
from utils import distributed


class ClassWatch:
    """Notices, once and over all processes, where labels lack classes or hold nothing but one.

    Args:
        pictures: how many to look at, over all processes.
        names: of all classes, in the order of their indices.
        ignore_label: a label that means void, beside 255.
        fixed: the data set has these classes and no fewer.
    """

    def __init__(self, pictures: int, names: Sequence[str], ignore_label: int = IGNORE_LABEL, fixed: bool = False) -> None:
        self.pictures = self.left = pictures
        self.over = False
        self.names, self.ignore_label, self.fixed = names, ignore_label, fixed
        self.present = torch.zeros(256, dtype=torch.bool)

    def add(self, present: Tensor) -> None:
        """Take the (N, 256) bool label values of a batch of this process."""
        self.present |= present.any(dim=0)
        self.left -= len(present) * distributed.world_size()

    def warning(self) -> str:
        """The sentence, at the end of the step in which the last picture was looked at, else ""; all processes must ask."""
        if self.over or self.left > 0:
            return ""
        self.over = True
        occurs = distributed.agree(*self.present.int().tolist())
        present = [value for value in range(256) if occurs[value]]
        if text := one_class_warning(present):
            return f"warning: {text}"
        if not (absent := absent_classes(present, self.names, self.ignore_label)):
            return ""
        used = max(value for value in present if value < len(self.names)) + 1
        fewer = used < len(self.names) and not self.fixed
        more = f"; if there are no more than {used} classes, train with --num-classes {used}" if fewer else ""
        return f"warning: none of the {self.pictures} labels read so far has the classes {absent}{more}"
