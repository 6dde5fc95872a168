"""TIFF files of every layout, written tag by tag: their bands are read as stored, or the file is refused."""

import struct

import numpy as np
import pytest

from dataset import DatasetError, read_image
from dataset.images import read_with_orientation

RNG = np.random.default_rng(0)
GREY, RGB = 1, 2  # photometric interpretation


def tiff(pixels, photometric, extra=(), order="<", big=False, planar=False, orientation=None, signed=None):
    """A TIFF with one uncompressed strip per plane: ``pixels`` (H, W, bands) of any dtype."""
    height, width, bands = pixels.shape
    planes = np.moveaxis(pixels, -1, 0) if planar else pixels[None]
    strips = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    number, head = ("Q", 16) if big else ("I", 8)
    kinds = {"u": 1, "i": 2, "f": 3}
    offsets = [head + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * pixels.itemsize] * bands),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: (number, offsets),
        274: ("H", [orientation]) if orientation else None,
        277: ("H", [bands]),
        278: ("I", [height]),
        279: (number, [len(strip) for strip in strips]),
        284: ("H", [2 if planar else 1]),
        338: ("H", list(extra)) if extra else None,
        339: ("H", [signed or kinds[pixels.dtype.kind]] * bands),
    }
    entries = {tag: entry for tag, entry in tags.items() if entry}
    start = head + sum(map(len, strips))
    inline = struct.calcsize(number) if big else 4
    behind = start + (8 + 20 * len(entries) + 8 if big else 2 + 12 * len(entries) + 4)
    table, more = struct.pack(order + ("Q" if big else "H"), len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        table += struct.pack(f"{order}HH{number}", tag, {"H": 3, "I": 4, "Q": 16}[kind], len(values))
        if len(packed) <= inline:
            table += packed.ljust(inline, b"\0")
        else:
            table += struct.pack(order + number, behind + len(more))
            more += packed
    mark = b"II" if order == "<" else b"MM"
    header = mark + struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, start) if big else (42, start)))
    return header + b"".join(strips) + table + bytes(8 if big else 4) + more


def values(dtype, bands):
    return RNG.integers(0, np.iinfo(dtype).max, (9, 14, bands)).astype(dtype)


def as_bgr(pixels):
    """(H, W, bands) as stored -> (H, W, 3) uint8, by hand."""
    high = pixels // 256 if pixels.dtype == np.uint16 else pixels
    return np.stack([high[:, :, i] for i in ((2, 1, 0) if pixels.shape[2] > 2 else (0, 0, 0))], axis=2).astype(np.uint8)


@pytest.mark.parametrize("layout", [{}, {"order": ">"}, {"big": True}, {"big": True, "order": ">"}, {"planar": True}], ids=str)
@pytest.mark.parametrize(
    ("bands", "photometric", "extra"),
    [
        (1, GREY, ()),
        (2, GREY, (1,)),
        (2, GREY, (2,)),
        (3, RGB, ()),
        (3, GREY, (0, 0)),
        (3, GREY, ()),
        (4, RGB, (0,)),
        (4, RGB, (1,)),
        (4, RGB, (2,)),
        (4, GREY, (2, 0, 0)),
        (4, GREY, (0, 0, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bands_are_read_as_they_are_stored(dtype, bands, photometric, extra, layout, tmp_path, capfd):
    pixels = values(dtype, bands)
    (tmp_path / "a.tif").write_bytes(tiff(pixels, photometric, extra, **layout))
    if dtype == np.uint16 and (bands == 2 or (bands > 1 and layout.get("planar"))):  # OpenCV does not read these
        # The message for two bands has no values, as OpenCV does not return them as stored.
        apart = " in separate planes" if layout.get("planar") else "; expected"
        with pytest.raises(DatasetError, match=rf"a\.tif holds {bands} bands of uint16{apart}.*gdal_translate"):
            read_image(tmp_path / "a.tif")
    else:
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), as_bgr(pixels))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_is_rotated_once(dtype, bands, orientation, tmp_path):
    pixels = values(dtype, bands)
    (tmp_path / "a.tif").write_bytes(tiff(pixels, RGB if bands > 1 else GREY, (2,) * (bands == 4), orientation=orientation))
    upright = {
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: np.rot90,
    }.get(orientation, lambda x: x)
    image, found = read_with_orientation(tmp_path / "a.tif")
    np.testing.assert_array_equal(image, upright(as_bgr(pixels)))
    assert found == (orientation if 1 <= orientation <= 8 else 1)


@pytest.mark.parametrize(
    ("pixels", "photometric", "extra", "message"),
    [
        (
            np.linspace(-1000, 1000, 126).reshape(9, 14, 1).astype(np.int16),
            GREY,
            (),
            "1 band of int16 with values from -1000 to 1000",
        ),
        (np.full((9, 14, 3), -9999, np.int16), RGB, (), "3 bands of int16 .*from -9999 to -9999"),
        (np.full((9, 14, 1), 0.25, np.float32), GREY, (), r"1 band of float32 with values from 0\.25 to 0\.25"),
        (np.ones((9, 14, 1), np.uint32), GREY, (), "1 band of uint32"),
        (np.ones((9, 14, 2), np.uint8), GREY, (0,), r"2 bands of uint8.*-b 1 a\.tif"),
        (np.ones((9, 14, 5), np.uint8), RGB, (0, 0), r"5 bands of uint8; .*gdal_translate -b 1 -b 2 -b 3 a\.tif"),
        (np.ones((9, 14, 13), np.uint16), GREY, (0,) * 12, "13 bands of uint16"),
        (np.ones((9, 14, 1), np.int8), GREY, (), "1 band of int8"),
        (np.full((9, 14, 3), 4095, np.uint16), RGB, (), "3 bands of uint16 with values from 4095 to 4095.* go beyond 4095"),
    ],
)
def test_images_that_a_net_cannot_use_are_refused(pixels, photometric, extra, message, tmp_path, capfd):
    (tmp_path / "a.tif").write_bytes(tiff(pixels, photometric, extra))
    with pytest.raises(DatasetError, match=rf"a\.tif holds {message}"):
        read_image(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    data = tiff(values(np.uint8, 4), RGB, (2,), big=True)
    for length in range(4, len(data) - 8):
        (tmp_path / "a.tif").write_bytes(data[:length])
        with pytest.raises(DatasetError, match=r"end within its tags|not an image that OpenCV can decode"):
            read_image(tmp_path / "a.tif")


def test_damaged_tags_never_give_a_traceback(tmp_path):
    whole = tiff(values(np.uint8, 4), RGB, (2,), order=">")
    start = struct.unpack(">I", whole[4:8])[0]
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(RNG.integers(1, 4)):
            data[RNG.integers(start, len(data))] = RNG.integers(256)
        (tmp_path / "a.tif").write_bytes(data)
        try:
            image = read_image(tmp_path / "a.tif")
        except DatasetError:
            continue
        assert image.dtype == np.uint8
        assert image.shape[2:] == (3,)
