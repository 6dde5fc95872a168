"""Images on two lists, as one file or as two files of the same bytes: the net would be evaluated on what it was trained on."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from dataset import VOCSegmentation
from scripts.data.causes import few
from scripts.data.inspection import Inspection


def same_sizes(sets: Mapping[str, VOCSegmentation]) -> set[Path]:
    """The images whose file size occurs on several lists: only these can be copies of each other."""
    sizes: dict[Path, int] = {}
    lists: dict[int, set[str]] = defaultdict(set)
    for name, data in sets.items():
        for path in map(data.image_path, data.entries):
            with suppress(OSError):
                sizes[path] = path.stat().st_size
                lists[sizes[path]].add(name)
    return {path for path, size in sizes.items() if len(lists[size]) > 1}


def find_leaks(lists: Mapping[str, Mapping[str, Inspection]]) -> tuple[list[dict], list[dict], list[str]]:
    """The images that are on two lists.

    Args:
        lists: name -> id -> what was found, with the digests of the images of :func:`same_sizes`.

    Returns:
        The names and ids of any two lists that share files; the names and pairs of ids of any two that hold copies, one pair
        per further image of the second list; and a sentence for each.
    """
    shared, copies, warnings = [], [], []
    for one, other in combinations(lists, 2):
        paths = {entry.image_path for entry in lists[one].values()}
        digests = {entry.digest: id for id, entry in sorted(lists[one].items(), reverse=True) if entry.digest}
        second = sorted(lists[other].items())
        if both := [id for id, entry in second if entry.image_path in paths]:
            shared.append({"lists": [one, other], "ids": both})
            warnings.append(f"{len(both)} ids are on both {one} and {other}: {few(both)}")
        further = ((id, entry.digest) for id, entry in second if entry.image_path not in paths)
        if twice := [[digests[digest], id] for id, digest in further if digest in digests]:
            copies.append({"lists": [one, other], "ids": twice})
            warnings.append(
                f"{len(twice)} images are on both {one} and {other} under other names, byte for byte: "
                f"{few(map(' = '.join, twice))}; leave them out of one list, or the net is evaluated on training images"
            )
    return shared, copies, warnings
