"""Reading images: a damaged file raises an error and never gives wrong pixels. Also the error of all readers."""

import io
import os
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, features

from dataset.tiff import SIGNATURES, open_tiff

# OpenCV's messages are replaced by our own. The function has moved between its versions; 0 is silent.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's "quiet", for videos; read when the first one is opened

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST = 2**30  # pixels of an image or label: OpenCV's own limit
_ORIENTATION = 0x0112  # the EXIF tag
_JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
DARK, NO_DATA = 4096, 65535  # 16-bit values: nearly black below this; no data
# of PNG files
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, strides
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PIECE = 4096  # compressed bytes; they inflate to at most 1032 times as many
# of JPEG files
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WITH_CONTENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}


class DatasetError(ValueError):
    """A file of the data set is missing, damaged or of the wrong kind; the message is one sentence that names it."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        # A DataLoader worker sends its error as the text of a traceback; only the sentence at its end is shown.
        super().__init__(message.rsplit("DatasetError: ", 1)[-1].strip())


def read_bytes(path: str | Path, what: str) -> bytes:
    """The contents of a file; DatasetError if it cannot be read. ``what`` names it in messages: "the image"."""
    try:
        if Path(path).is_char_device():  # such as the endless /dev/zero
            raise DatasetError(f"{what} {path} is a device; expected a file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{what} {path} does not exist; check its name") from None
    except OSError as error:
        raise DatasetError(f"{what} {path} cannot be read ({error.strerror or error})") from None


def read_image(path: str | Path) -> np.ndarray:
    """An image as (H, W, 3) uint8, blue-green-red, rotated by its EXIF orientation.

    Raises:
        DatasetError: the file is missing, truncated, too large or no image.
    """
    return read_with_orientation(path)[0]


def read_with_orientation(path: str | Path) -> tuple[np.ndarray, int]:
    """:func:`read_image`, and the EXIF orientation of the file: 1 as stored, 2..4 flipped or upside down, 5..8 sideways."""
    data = read_bytes(path, "the image")
    if data.startswith(b"\xff\xd8") and (damage := _jpeg_damage(data)):
        raise DatasetError(f"the image {path} {damage}; fetch it again")
    if data.startswith(PNG_SIGNATURE) and (damage := png_damage(data)):
        raise DatasetError(f"the image {path} is damaged: {damage}; fetch or make it again")
    if data.startswith(b"GIF8"):  # only newer versions of OpenCV read it: the first image, on a canvas of any size
        raise DatasetError(f"the image {path} is a GIF file; save it as PNG")
    if data[4:12] == b"ftypavif" and not features.check("avif"):
        raise DatasetError(f"the image {path} is an AVIF file, which needs pillow>=11.3; install that, or save it as PNG")
    tiff = None
    if data.startswith(SIGNATURES):
        try:
            tiff = open_tiff(data)
        except struct.error:
            text = f"the image {path} is damaged: its {len(data)} bytes end within its tags; fetch it again"
            raise DatasetError(text) from None
    try:
        image = _decode(tiff.data if tiff else data)
    except cv2.error as error:
        if "pixels <=" not in str(error):
            raise DatasetError(f"the image {path} cannot be decoded by OpenCV ({error.err})") from None
        raise DatasetError(f"the image {path} has more than {LARGEST} pixels, which OpenCV refuses; cut it up") from None
    if tiff and not tiff.readable:
        raise _unusable(path, tiff.bands, tiff.dtype, image)
    if image is None:
        if data.startswith(PNG_SIGNATURE) and (damage := png_damage(data, inflate=True)):
            raise DatasetError(f"the image {path} is damaged: {damage}; fetch or make it again")
        raise DatasetError(f"the image {path} is not an image that OpenCV can decode ({len(data)} bytes)")
    image = _to_bgr(image, path)
    orientation = tiff.orientation if tiff else _orientation(data)
    return image if orientation == 1 else _turned(image, orientation), orientation


def _decode(data: bytes) -> np.ndarray | None:
    """The pixels as stored, not rotated: OpenCV's versions differ in the formats that they rotate."""
    encoded = np.frombuffer(data, dtype=np.uint8)
    stored = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if data else None
    if stored is not None and stored.dtype == np.uint16 and _uses_fewer_bits(data):
        stored = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)  # scaled to the highest 8 bits used
    return stored


def _uses_fewer_bits(data: bytes) -> bool:
    """Whether a file of 16-bit values uses fewer bits: AVIF, and JPEG 2000 by its SIZ marker (T.800, A.5.1)."""
    siz = data.find(b"\xff\x51") + 40
    return data[4:8] == b"ftyp" or (data.startswith(_JPEG2000) and siz < len(data) and data[siz] & 127 < 15)


def _to_bgr(stored: np.ndarray, path: str | Path) -> np.ndarray:
    """Convert pixels (H, W) or (H, W, 1..4), blue-green-red first, to (H, W, 3) uint8; the only place that does.

    Grey is repeated for all three colours. Bands after the colours (alpha, near infrared) are left out. Of 16 bits the
    higher 8 are used.

    Raises:
        DatasetError: other pixels, or 16-bit values that are nearly black in the higher 8 bits.
    """
    bands = 1 if stored.ndim == 2 else stored.shape[2]
    if stored.dtype not in (np.uint8, np.uint16) or bands == 2:
        raise _unusable(path, bands, str(stored.dtype), stored)
    colors = stored[:, :, :3] if bands > 1 else stored
    if stored.dtype == np.uint16:
        highest = int((colors + np.uint16(1)).max()) - 1  # NO_DATA, 65535, becomes 0
        if 0 < highest < DARK:
            raise _unusable(path, bands, "uint16", np.where(colors == NO_DATA, 0, colors))
        colors = (colors >> 8).astype(np.uint8)
    return np.ascontiguousarray(colors) if bands > 1 else cv2.cvtColor(colors, cv2.COLOR_GRAY2BGR)


def _unusable(path: str | Path, bands: int, dtype: str, stored: np.ndarray | None) -> DatasetError:
    """The error for pixels that a net cannot use; ``stored`` holds them if they can be decoded."""
    several, wide = bands > 2, dtype != "uint8"
    found, low, high = f"{bands} band{'s' * (bands > 1)} of {dtype}", "LOW", "HIGH"
    if stored is not None and dtype.startswith(str(stored.dtype)):  # OpenCV gives 8 bits for 2 bands of 16
        low, high = (f"{float(value):g}" for value in (stored.min(), stored.max()))
        found += f" with values from {low} to {high}"
    gdal = f"-ot Byte -scale {low} {high} 0 255 " * wide + ("-b 1 -b 2 -b 3" if several else "-b 1")
    python = f"((x * 1.0 - {low}) * (255 / ({high} - {low}))).clip(0, 255).astype('uint8')" if wide else "x"
    return DatasetError(
        f"the image {path} holds {found}; expected grey or RGB of 8 bits, or of 16 unsigned bits whose values go beyond "
        f"{DARK - 1}: choose the bands and their range, with GDAL: gdal_translate {gdal} {Path(path).name} new.tif, or in "
        f"Python, for an array x (H, W, bands): cv2.imwrite('new.png', {python}{'[:, :, [2, 1, 0]]' * several})"
    )


def png_damage(data: bytes, inflate: bool = False) -> str:
    """What is wrong with the chunks of a PNG; "" if each matches its checksum. Pillow and OpenCV do not check them all.

    A chunk is its length, its name, its contents and a CRC-32 of the name and the contents (PNG specification, section 5.3).

    Args:
        inflate: also count the bytes of the pixels. OpenCV does so too, but Pillow leaves missing pixels at 0.
    """
    view, position, pixels = memoryview(data), len(PNG_SIGNATURE), []
    while (end := position + 12 + int.from_bytes(view[position : position + 4], "big")) <= len(data):
        name = data[position + 4 : position + 8]
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return f"its part {repr(name)[2:-1]} does not match its checksum"
        if name == b"IDAT":
            pixels.append(view[position + 8 : end - 4])
        if name == b"IEND":
            return _png_shortage(data, b"".join(pixels)) if inflate else ""
        position = end
    return f"its {len(data)} bytes end within the image"


def _png_shortage(data: bytes, pixels: bytes) -> str:
    """What is wrong with a PNG whose compressed ``pixels`` inflate to less than its header says; "" if nothing is.

    A row is a filter byte and its values; an interlaced image is seven smaller ones, some perhaps empty (PNG
    specification, sections 7.2, 8.1 and 11.2.1). Bytes after the last row are ignored, as decoders do.
    """
    if not data.startswith(b"\0\0\0\rIHDR", len(PNG_SIGNATURE)):
        return "it does not begin with its header"
    width, height, bits, color_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if width * height > LARGEST:
        return ""  # refused for its size
    promised = 0
    for x, y, right, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // right), -((y - height) // down)
        promised += rows * (1 + -(-columns * bits * _CHANNELS.get(color_type, 1) // 8)) if columns > 0 else 0
    inflater, held = zlib.decompressobj(), 0
    try:
        for start in range(0, len(pixels), _PIECE):
            held += len(inflater.decompress(pixels[start : start + _PIECE]))
            if held >= promised:
                return ""
    except zlib.error as error:
        return f"its pixels cannot be inflated ({error})"
    return f"its pixels end after {held} of {promised} bytes, for {width}x{height} pixels"


def _jpeg_damage(data: bytes) -> str:
    """What is wrong with a JPEG by its markers; "" if nothing is. OpenCV fills the missing part of one with grey.

    A segment gives its length, so the end marker of a thumbnail inside one is skipped. The pixels after a "start of scan" end
    at the next marker (ITU-T T.81, annex B). Within them FF 00 is data, FF D0..D7 are restart markers, and FF FF is filling.
    Huffman coding (SOF0..SOF2) needs at least one bit for each 8x8 block. Arithmetic coding (SOF9, SOF10) could need less for
    a single colour, but is hardly used.
    """
    position = 2
    while found := _MARKER.search(data, position):
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return ""
        length = int.from_bytes(data[position : position + 2], "big") if marker in _WITH_CONTENTS else 0
        contents = data[position + 2 : position + length]
        height, width = struct.unpack(">HH", contents[1:5]) if marker in _FRAMES and len(contents) > 4 else (0, 0)
        if height * width > 64 * 8 * len(data):
            return f"is damaged: its {len(data)} bytes cannot hold the {width}x{height} pixels of its header"
        position += length
    return f"is truncated: its {len(data)} bytes lack the JPEG end marker"


def _orientation(data: bytes) -> int:
    """The EXIF orientation 1..8 of an image file, read by Pillow; 1 if it has none or it cannot be read."""
    tags = Image.Exif()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # OpenCV has its own limit
    try:
        if not data.startswith(PNG_SIGNATURE) or b"eXIf" in data or b"Raw profile type exif" in data:
            # In a PNG without either, Pillow would decode the pixels to read the chunks after them.
            with Image.open(io.BytesIO(data)) as image:
                tags = image.getexif()
        value = tags.get(_ORIENTATION)
    except Exception:  # depending on the damage, Pillow raises SyntaxError, struct.error and others
        return 1
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W, 3) rotated for display by its EXIF orientation (Exif 2.3, section 4.6.4)."""
    if orientation > 4:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
