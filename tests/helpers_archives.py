"""Archives for the tests of downloads."""

import io
import tarfile

from scripts.data.catalogue import Item


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tar_of(path, members, mode="w:gz"):
    """Write a tar file with members (name, content) or (name, (type, link target))."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def archive_item(filename, **changes):
    return Item("set", filename, "data", "", **{"unpack": "out", "holds": "out/d/x.txt"} | changes)
