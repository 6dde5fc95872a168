"""A minimal PNG writer, for the variants that image libraries do not write."""

import struct
import zlib

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of the PNG specification


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


# Adam7 (PNG specification, section 8.2): first row, step, first column, step
PASSES = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))


def rows_of(pixels, bits=8) -> bytes:
    """The rows of pixels (H, W) or (H, W, channels) as stored in a PNG, without filter."""
    rows = b""
    for row in pixels.reshape(len(pixels), -1) if pixels.size else ():
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    return rows


def interlaced_rows(pixels, bits=8) -> bytes:
    """The same, interlaced in seven passes."""
    return b"".join(rows_of(pixels[row::down, column::right], bits) for row, down, column, right in PASSES)


def png(pixels, bits=8, color_type=GREY, palette=(), extra=b"", size=None, rows=None, interlaced=False) -> bytes:
    """A PNG of the pixels (H, W) or (H, W, channels) with ``bits`` per value. ``size`` (height, width) is a false size for the
    header, and ``rows`` replace the rows of the pixels."""
    pixels = np.asarray(pixels)
    height, width = size or pixels.shape[:2]
    if rows is None:
        rows = (interlaced_rows if interlaced else rows_of)(pixels, bits)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, interlaced)
    colors = chunk(b"PLTE", bytes(value for color in palette for value in color)) if len(palette) else b""
    data = chunk(b"IHDR", header) + colors + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data
