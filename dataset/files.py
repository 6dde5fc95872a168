"""Pictures, and the text files beside them, read so that what is damaged is an error."""

import re
import zlib
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST = 2**30  # pixels of a picture or label: OpenCV's own limit
_ORIENTATION = 0x0112  # the EXIF tag


class DatasetError(ValueError):
    """A file of the data set is missing, broken or of the wrong kind: one sentence that names it."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        # A DataLoader worker sends its error as the text of a traceback; the sentence at its end is the one to show.
        super().__init__(message.rsplit("DatasetError: ", 1)[-1].strip())


def read_text(path: str | Path, what: str) -> str:
    """The text of a UTF-8 file, without byte-order marks.

    Args:
        what: what the file is, for messages: "the list of image ids".

    Raises:
        DatasetError: the file cannot be read, or is in another encoding.
    """
    data = _read_bytes(path, what)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise DatasetError(f"{what} {path} cannot be read as text: it looks like UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8").replace("\ufeff", "")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{what} {path} cannot be read as text: byte {data[error.start]:#04x} in line {line} is not UTF-8; save it as UTF-8"
        ) from None


def _read_bytes(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{what} {path} does not exist; check its name") from None
    except OSError as error:
        raise DatasetError(f"{what} {path} cannot be read ({error.strerror or error})") from None


def read_image(path: str | Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8, blue-green-red, turned as its EXIF orientation says.

    Raises:
        DatasetError: the file is missing, cut off, too large or no picture.
    """
    return read_picture(path)[0]


def read_picture(path: str | Path) -> tuple[np.ndarray, int]:
    """:func:`read_image`, and the EXIF orientation of the file: 1 as stored, 2..4 mirrored or turned over, 5..8 on its side."""
    data = _read_bytes(path, "the picture")
    # OpenCV fills the missing part of a cut JPEG with grey and says nothing.
    if data.startswith(b"\xff\xd8") and not any(marker == 0xD9 for marker, _ in _jpeg_segments(data)):
        raise DatasetError(f"the picture {path} is cut off: its {len(data)} bytes lack the JPEG end marker; fetch it again")
    if data.startswith(PNG_SIGNATURE) and (damage := png_damage(data)):
        raise DatasetError(f"the picture {path} is damaged: {damage}; fetch or make it again")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error as error:
        if "pixels <=" not in str(error):
            raise DatasetError(f"the picture {path} cannot be decoded by OpenCV ({error.err})") from None
        raise DatasetError(f"the picture {path} has more than {LARGEST} pixels, which OpenCV refuses; cut it up") from None
    if image is None:
        raise DatasetError(f"the picture {path} is not a picture that OpenCV can decode ({len(data)} bytes)")
    return image, _orientation(data)


def png_damage(data: bytes) -> str:
    """What is wrong with the chunks of a PNG, which Pillow and OpenCV do not all look at; "" where each fits its check sum.

    A chunk is its length, its name, its contents and a CRC-32 of the latter two (PNG specification, section 5.3).
    """
    view, position = memoryview(data), len(PNG_SIGNATURE)
    while (end := position + 12 + int.from_bytes(view[position : position + 4], "big")) <= len(data):
        name = data[position + 4 : position + 8]
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return f"its part {repr(name)[2:-1]} does not fit its check sum"
        if name == b"IEND":
            return ""
        position = end
    return f"its {len(data)} bytes end before the picture does"


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The segments of a JPEG file up to its end marker, as (marker, contents); contents are empty where there are none.

    A segment gives its length, so that the end marker of a thumbnail inside one is stepped over; picture data after a "start of
    scan" ends at the next marker (ITU-T T.81, annex B). There FF 00 is data, FF D0..D7 restart markers, and FF FF filling.
    """
    position = 2
    while found := _MARKER.search(data, position):
        marker, position = data[found.start() + 1], found.end()
        length = int.from_bytes(data[position : position + 2], "big") if marker in _WITH_CONTENTS else 0
        yield marker, data[position + 2 : position + length]
        if marker == 0xD9:
            return
        position += length


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WITH_CONTENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}


def _orientation(data: bytes) -> int:
    """The EXIF orientation 1..8 in a picture file; 1 where it says nothing, or nothing that can be read."""
    if data.startswith(b"\xff\xd8"):
        head = takewhile(lambda segment: segment[0] != 0xDA, _jpeg_segments(data))  # up to the picture data
        exif = next((contents for marker, contents in head if marker == 0xE1 and contents.startswith(b"Exif\0\0")), b"")
    elif data.startswith(PNG_SIGNATURE):
        exif = data.partition(b"eXIf")[2]
    elif data.startswith(b"RIFF"):  # WebP
        exif = data.partition(b"EXIF")[2][4:]
    else:
        exif = data if data.startswith((b"II*\0", b"MM\0*")) else b""  # TIFF, which is what EXIF data are in themselves
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        value = tags.get(_ORIENTATION)
    except Exception:  # by where it is broken, Pillow raises SyntaxError, struct.error and others
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
