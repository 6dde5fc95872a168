"""What lies in the folders of a data set: each folder is listed once, and no file is read."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from unicodedata import normalize

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png",)
SHOWN = 20  # names in a message
FOLDERS = 3  # in a message


class Listing:
    """The files below a folder, found by their paths without suffix; paths hold forward slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, dict[str, list[str]]] = {}

    def names(self, path: str) -> list[str]:
        """The names of all files that stand where ``path``, which has no suffix, says: ``"a/x"`` -> ``["x.jpg", "x.json"]``."""
        folder, _, stem = path.rpartition("/")
        return self.by_stem(folder).get(normalize("NFC", stem), [])  # macOS writes umlauts as two characters

    def find(self, path: str, suffixes: Sequence[str]) -> str | None:
        """The file of ``path`` in one of the suffixes, in any case, the first of them first; None where there is none."""
        ranks = {name: _rank(name, suffixes) for name in self.names(path)}
        found = [name for name, rank in ranks.items() if rank < len(suffixes)]
        folder = path[: path.rfind("/") + 1]
        return folder + min(found, key=lambda name: (ranks[name], name.swapcase())) if found else None

    def has(self, path: str) -> bool:
        """Whether there is a file of this path, with its suffix."""
        return path.rpartition("/")[2] in self.names(os.path.splitext(path)[0]) or (self.root / path).exists()

    def by_stem(self, folder: str) -> dict[str, list[str]]:
        """The names of a folder's files by what stands before their suffix; {} where there is no such folder."""
        if folder not in self._folders:
            stems = defaultdict(list)
            if (self.root / folder).is_dir():
                for name in os.listdir(self.root / folder):
                    stems[normalize("NFC", os.path.splitext(name)[0])].append(name)
            self._folders[folder] = dict(stems)
        return self._folders[folder]

    def missing(self, kind: str, paths: Iterable[str], suffixes: Sequence[str]) -> list[str]:
        """A clause a folder for those of ``paths`` that are not there, each with the folder as it is; a few of many."""
        lost: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            if not self.has(path):
                lost[path.rpartition("/")[0]].append(path)
        clauses = [f"no {kind} {self._told(folder, found, suffixes)}" for folder, found in islice(lost.items(), FOLDERS)]
        if len(lost) > FOLDERS:
            more = sum(len(found) for found in islice(lost.values(), FOLDERS, None))
            clauses.append(f"{more} more {kind}s in {len(lost) - FOLDERS} other folders")
        return clauses

    def _told(self, folder: str, lost: Sequence[str], suffixes: Sequence[str]) -> str:
        place = self.root / folder
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        text = ", ".join(os.path.basename(os.path.splitext(path)[0]) for path in lost[:SHOWN]) + more
        if not place.is_dir():
            return f"for {text}: the folder {place} does not exist"
        others = (name for path in lost for name in self.names(os.path.splitext(path)[0]))
        if other := next(others, None):
            return f"for {text} in {place}, which has {other}: expected {', '.join(suffixes)}"
        example = next((name for names in self.by_stem(folder).values() for name in names if not name.startswith(".")), None)
        return f"for {text} in {place}" + (f", which has files such as {example}" if example else ", which is empty")


def _rank(name: str, suffixes: Sequence[str]) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return suffixes.index(suffix) if suffix in suffixes else len(suffixes)
