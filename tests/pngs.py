"""A PNG writer of a few lines, for the kinds that image libraries do not write."""

import struct
import zlib

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of the PNG specification


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def png(pixels, bits=8, color_type=GREY, palette=(), extra=b"", size=None) -> bytes:
    """A PNG of the pixels (H, W) or (H, W, channels) at so many bits a value; ``size`` (height, width) lies about theirs."""
    pixels = np.asarray(pixels)
    height, width = size or pixels.shape[:2]
    rows = b""
    for row in pixels.reshape(len(pixels), -1):
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    colors = chunk(b"PLTE", bytes(value for color in palette for value in color)) if len(palette) else b""
    data = chunk(b"IHDR", header) + colors + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data
