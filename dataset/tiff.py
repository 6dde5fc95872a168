"""The tags of a TIFF file: its bands, and the file with changed tags so that OpenCV returns the bands as stored.

OpenCV reads 8-bit TIFF files through libtiff's conversion for display. It multiplies the colours by a fourth band tagged as
alpha, as GDAL tags any fourth band. Of three bands tagged as grey it returns the first alone.
"""

import struct
from typing import NamedTuple

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian; BigTIFF
BITS, PHOTOMETRIC, ORIENTATION, BANDS, PLANES, EXTRA, FORMAT = 258, 262, 274, 277, 284, 338, 339
GREY, RGB = (0, 1), 2  # of PHOTOMETRIC
ALPHA = (1, 2)  # of EXTRA
UNUSED = 65000  # a tag that no reader uses
FORMATS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex float"}
SHORT = 3  # the type of a tag's values: 16 bits


class Tiff(NamedTuple):
    """The first image of a TIFF file.

    Attributes:
        bands, dtype: such as 4 and ``"uint8"``, or ``"uint16 in separate planes"``, which OpenCV mixes up.
        readable: grey, grey and alpha, or RGB with at most one more band, unsigned, of up to 8 or of 16 bits.
        orientation: as EXIF's.
        data: the file with tags that OpenCV reads correctly: grey, or RGB and its further band, not multiplied or rotated.
    """

    bands: int
    dtype: str
    readable: bool
    orientation: int
    data: bytes


def open_tiff(data: bytes) -> Tiff:
    """Read the tags of a TIFF file (TIFF 6.0, section 2, and BigTIFF, whose offsets have 64 bits).

    Raises:
        struct.error: the file ends within its tags.
    """
    order, big = "<" if data[:2] == b"II" else ">", b"+" in data[:4]
    offset, inline, entries = ("Q", 8, "Q") if big else ("I", 4, "H")
    entry = struct.Struct(f"{order}HH{offset}")  # tag, type and number of values; the values or their offset follow
    (start,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + entries, data, start)
    start += struct.calcsize(order + entries)
    places, values = dict[int, int](), dict[int, tuple[int, ...]]()
    for place in range(start, start + count * (entry.size + inline), entry.size + inline):
        tag, kind, number = entry.unpack_from(data, place)
        if kind == SHORT and 0 < number <= len(data):
            at = place + entry.size
            if 2 * number > inline:
                (at,) = struct.unpack_from(order + offset, data, at)
            places[tag], values[tag] = place, struct.unpack_from(f"{order}{number}H", data, at)

    bands, bits, photometric, planes, form = (
        values.get(tag, (default,))[0] for tag, default in ((BANDS, 1), (BITS, 1), (PHOTOMETRIC, RGB), (PLANES, 1), (FORMAT, 1))
    )
    extra = values.get(EXTRA, (0,))[0]
    rgb = photometric in (*GREY, RGB) and bands in (3, 4)
    grey = photometric in GREY and (bands == 1 or (bands == 2 and bits == 8 and extra in ALPHA))
    others = photometric not in (*GREY, RGB) and bands <= 4  # a palette, CMYK, YCbCr: as libtiff converts them
    whole = bits <= 8 or (bits == 16 and (bands == 1 or planes == 1))  # OpenCV mixes up planes of 16 bits
    readable = form in (1, 4) and whole and (rgb or grey or others)  # unsigned, or not defined

    changed = bytearray(data)

    def put(tag: int, value: int, name: int) -> None:
        if tag in places:
            entry.pack_into(changed, places[tag], name, SHORT, 1)
            struct.pack_into(f"{order}H{inline - 2}x", changed, places[tag] + entry.size, value)

    put(ORIENTATION, 1, ORIENTATION)
    if rgb:
        put(PHOTOMETRIC, RGB, PHOTOMETRIC)
    if rgb or grey:
        put(EXTRA, 0, EXTRA if bands in (2, 4) else UNUSED)
    orientation = values.get(ORIENTATION, (1,))[0]
    dtype = f"{FORMATS.get(form, 'uint')}{bits}" + " in separate planes" * (bits == 16 and not whole)
    return Tiff(bands, dtype, readable, orientation if 1 <= orientation <= 8 else 1, bytes(changed))
