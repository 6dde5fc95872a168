"""Label files of every kind: read as stored or refused in one sentence, never read as other labels."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dataset import DatasetError, read_class_names, read_label, voc_palette
from dataset.classes import VOC_NAMES, read_class_file, read_classes
from dataset.images import PNG_SIGNATURE
from dataset.labels import BadLabel, check_palette, check_values, read_png
from tests.helpers_pngs import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, interlaced_rows, png, rows_of

BLACK, RED, PERSON, VOID = (0, 0, 0), (128, 0, 0), (192, 128, 128), (224, 224, 192)  # VOC's 0, 1, 15, 255
VOC = [tuple(color) for color in voc_palette().tolist()]


def read(tmp_path, data, *args, **options):
    path = tmp_path / "label.png"
    path.write_bytes(data)
    return read_label(path, *args, **options)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("color_type", [GREY, PALETTE])
def test_values_are_read_as_stored(tmp_path, bits, color_type):
    values = np.arange(35).reshape(5, 7) % min(2**bits, 21)
    data = png(values, bits, color_type, VOC[: 2**bits] if color_type == PALETTE else ())
    label = read(tmp_path, data, 21)
    assert label.dtype == np.uint8
    assert label.tolist() == values.tolist()


def encoded(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.arange(20, dtype=np.uint8), 20).reshape(20, 20)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded("JPEG"), "is a JPEG file despite its name, and that format changes labels"),
        (encoded("WEBP", quality=80), "is a WEBP file .* changes labels"),
        (encoded("BMP"), "is a BMP file .*expected a PNG"),
        (encoded("GIF"), "is a GIF file .*expected a PNG"),
        (encoded("TIFF"), "is a TIFF file .*expected a PNG"),
        (b"<html>not found</html>", "cannot be decoded .*no PNG"),
        (b"", "cannot be decoded .*no PNG"),
        (png([[0, 300]], 16), ".*mode I.*8-bit.*masks_to_indices.py saves 16 bits as 8"),
        (png([[[0, 1, 2]]], 8, RGB), ".*mode RGB .*masks_to_indices"),
        (png([[[0, 1, 2, 3]]], 8, RGBA), ".*mode RGBA .*masks_to_indices"),
        (png([[[0, 1]]], 8, GREY_ALPHA), ".*mode LA"),
        (png([[0, 0]], size=(40000, 30000)), "is 30000x40000 pixels; expected at most 1073741824"),
    ],
    ids="jpeg webp bmp gif tiff html empty 16-bit rgb rgba grey-alpha huge".split(),  # noqa: SIM905
)
def test_other_files_are_refused_by_format(tmp_path, data, message):
    with pytest.raises(DatasetError, match=rf"^the label .*label\.png {message}") as error:
        read(tmp_path, data, 21)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("color_type", [GREY, PALETTE])
def test_no_changed_byte_changes_a_label(tmp_path, color_type):
    """Each byte is changed, one at a time: an error, or the same label."""
    values = np.arange(48).reshape(6, 8) % 3
    whole = png(values, 8, color_type, VOC[:3] if color_type == PALETTE else ())
    refused = 0
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 0x11
        try:
            assert read(tmp_path, bytes(damaged), 3).tolist() == values.tolist(), f"byte {i}"
        except DatasetError:
            refused += 1
    assert refused > len(whole) - 16


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "color_type"), [(1, GREY), (2, GREY), (8, GREY), (4, PALETTE), (8, PALETTE)])
@pytest.mark.parametrize("size", [(5, 7), (16, 20), (1, 9), (9, 1), (1, 1)])
def test_missing_pixels_are_not_class_0(tmp_path, size, bits, color_type, interlaced):
    """All checksums are right; one byte too few is refused, and bytes after the last row are ignored."""
    values = np.arange(size[0] * size[1]).reshape(size) % min(2**bits, 21)
    rows = (interlaced_rows if interlaced else rows_of)(values, bits)
    options = (bits, color_type, VOC[: 2**bits] if color_type == PALETTE else ())
    for stored in (rows, rows + b"\0", rows + bytes(9000)):
        assert read(tmp_path, png(values, *options, rows=stored, interlaced=interlaced), 21).tolist() == values.tolist()
    for stored in (rows[:-1], rows[: len(rows) // 2], b""):
        with pytest.raises(DatasetError, match=rf"is damaged: .* {len(stored)} of {len(rows)} bytes, for {size[1]}x{size[0]} "):
            read(tmp_path, png(values, *options, rows=stored, interlaced=interlaced), 21)


@pytest.mark.parametrize(("bits", "color_type", "channels"), [(16, GREY, 1), (8, RGB, 3), (16, RGB, 3), (8, RGBA, 4)])
def test_missing_pixels_of_colour_images(bits, color_type, channels):
    """Also for the kinds that masks_to_indices.py reads."""
    values = np.full((9, 10, channels), 7)
    for interlaced, rows in ((False, rows_of(values, bits)), (True, interlaced_rows(values, bits))):
        assert read_png(png(values, bits, color_type, rows=rows, interlaced=interlaced))[0].shape[:2] == (9, 10)
        with pytest.raises(BadLabel, match=f"end after {len(rows) - 1} of {len(rows)} bytes"):
            read_png(png(values, bits, color_type, rows=rows[:-1], interlaced=interlaced))


@pytest.mark.parametrize("header", [b"", chunk(b"IHDR", b"\0\0\0\1"), chunk(b"tEXt", b"a\0b")])
def test_a_png_without_its_header(tmp_path, header):
    with pytest.raises(DatasetError, match="is damaged: it does not begin with its header"):
        read(tmp_path, PNG_SIGNATURE + header + chunk(b"IEND", b""), 21)


def test_a_small_file_that_claims_to_be_large_takes_no_memory(tmp_path, monkeypatch):
    data = png([[0]], size=(28_000, 28_000), rows=b"")
    assert len(data) < 99
    monkeypatch.setattr(PngImagePlugin, "PngImageFile", None)  # refused before Pillow reads it
    with pytest.raises(DatasetError, match="end after 0 of 784028000 bytes, for 28000x28000 pixels"):
        read(tmp_path, data, 21)


def test_a_label_may_be_as_large_as_an_image(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow warns above this, and refuses twice as many
    assert read(tmp_path, png(np.ones((5, 5), dtype=int)), 2).sum() == 25
    assert read(tmp_path, png(np.ones((3, 5), dtype=int)), 2).sum() == 15
    assert Image.MAX_IMAGE_PIXELS == 10
    assert not recwarn


# ---- palettes


@pytest.mark.parametrize(
    ("stored", "palette"),
    [
        ([0, 1, 2], [BLACK, PERSON, VOID]),  # sorted, as by ImageMagick and pngquant
        ([0, 1, 2], [PERSON, VOID, BLACK]),
        ([0, 1], [BLACK, PERSON]),
        ([0, 1], [RED, BLACK]),
        ([0, 1], [VOID, RED]),  # 1 is right, 0 has the colour of 255
        ([0, 2], [BLACK, RED, VOID, PERSON]),  # unused entries do not count
    ],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_palette_that_a_tool_re_ordered_is_refused(tmp_path, stored, palette, bits):
    data = png([stored], bits, PALETTE, palette)
    with pytest.raises(DatasetError, match=r"a tool re-ordered: index \d has the colour of .*masks_to_indices\.py"):
        read(tmp_path, data, 21)
    assert read(tmp_path, data, 20).tolist() == [stored]  # other classes than VOC's: their colours are not known


CAMVID = [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128)]
CITYSCAPES = [(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30)]


@pytest.mark.parametrize(
    ("stored", "palette"),
    [
        ([0, 15, 20], VOC),  # labelme's own is VOC's
        ([0, 15, 255], VOC),
        ([0, 1, 15], VOC[:16]),  # shortened to the last index in use, as by optipng and pngcrush
        ([0, 1, 3], VOC[:2]),  # shortened further
        ([0, 1, 2], [RED, BLACK]),  # one too short
        ([0, 15, 20], [(i, i, i) for i in range(256)]),
        ([0, 1, 2], [(i * 85, i * 85, i * 85) for i in range(4)]),
        ([0, 1, 3, 6], CAMVID),
        ([0, 1, 2, 6], CITYSCAPES),
        ([0, 0, 0], [PERSON]),  # one colour proves nothing
        ([0, 1, 5], [BLACK, RED, *[BLACK] * 14]),  # never filled in: tools keep one index per colour
        ([0, 1, 2], [BLACK, PERSON, (1, 2, 3)]),  # with another colour
    ],
)
def test_other_palettes_are_read_as_stored(tmp_path, stored, palette):
    assert read(tmp_path, png([stored], 8, PALETTE, palette), 21).tolist() == [stored]


def test_another_ignore_label_may_have_its_colour(tmp_path):
    palette = [*VOC[:11], VOID]
    data = png([[0, 1, 11]], 8, PALETTE, palette)
    assert read(tmp_path, data, 21, ignore_label=11).tolist() == [[0, 1, 255]]
    with pytest.raises(DatasetError, match="11 has the colour of 255"):
        read(tmp_path, data, 21)


def test_a_re_ordered_palette_is_detected_by_classes_txt(tmp_path):
    (tmp_path / "classes.txt").write_text("sky 10 20 30\nwide road\t40 50  60\n")
    colors = read_class_file(tmp_path).colors(2)
    assert colors == {0: (10, 20, 30), 1: (40, 50, 60), 255: VOID}
    own = [(10, 20, 30), (40, 50, 60)]
    assert read(tmp_path, png([[0, 1]], 1, PALETTE, own), 2, colors=colors).tolist() == [[0, 1]]
    with pytest.raises(DatasetError, match="0 has the colour of 1, 1 has the colour of 0"):
        read(tmp_path, png([[0, 1]], 1, PALETTE, own[::-1]), 2, colors=colors)
    with pytest.raises(DatasetError, match="1 has the colour of 255"):
        read(tmp_path, png([[0, 1]], 1, PALETTE, [own[0], VOID]), 2, colors=colors)


# ---- the file of classes


def test_names_may_be_followed_by_a_colour(tmp_path):
    (tmp_path / "classes.txt").write_text("sky 1 2 3\nroad 66\nland use 1990 4 5 6\nsea, lake\n", encoding="utf-8-sig")
    assert read_class_names(tmp_path, 4) == ["sky", "road 66", "land use 1990", "sea, lake"]
    assert read_class_file(tmp_path).colors(4) == {0: (1, 2, 3), 2: (4, 5, 6), 255: VOID}


@pytest.mark.parametrize(
    "head",
    ["# my classes\n", "#\n# two\n", "name r g b\n", "name,r,g,b\n", "Class\tRed\tGreen\tBlue\n", "# a\nlabel; R; G; B\n"],
)
@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", ";"])
def test_comments_and_a_header_are_no_class(head, separator, tmp_path):
    rows = [("sky", (1, 2, 3)), ("low road", (4, 5, 6)), ("3D object", (7, 8, 9))]
    lines = [separator.join([name, *map(str, color)]) for name, color in rows]
    (tmp_path / "classes.txt").write_text(head + "\n".join(lines) + "\n# the end\n\n\n")
    assert read_classes(tmp_path / "classes.txt") == rows


def test_names_may_end_in_numbers(tmp_path):
    (tmp_path / "classes.txt").write_text("class 0\nclass 1\nclass 2\n")
    assert read_class_names(tmp_path, 3) == ["class 0", "class 1", "class 2"]


def test_vocs_colours_are_for_vocs_classes_only(tmp_path):
    voc = {**dict(enumerate(VOC[:21])), 255: VOID}
    assert read_class_file(tmp_path).colors(21) == voc
    assert read_class_file(tmp_path).colors(20) == {}
    names = ["_background_", "Aeroplane", *VOC_NAMES[2:11], "dining-table", *VOC_NAMES[12:16], "potted plant", *VOC_NAMES[17:]]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert read_class_file(tmp_path).colors(21) == voc
    (tmp_path / "classes.txt").write_text("\n".join(f"kind {i}" for i in range(21)))
    assert read_class_file(tmp_path).colors(21) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Himmel\nStraße\n".encode("latin-1"), "byte 0xdf in line 2 is not UTF-8; save it as UTF-8"),
        ("sky\nroad\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("sky\nroad\n".encode("utf-16-be"), "UTF-16; save it as UTF-8"),
        (b"__ignore__\n_background_\nroad\n", "line 1, '__ignore__': .*is the ignore label .*, not a class; delete that line"),
        (b"names:\n  - sky\n  - road\n", "line 1, 'names:': it is a line of another format"),
        (b"- sky\n- road\n", "line 1, '- sky': it is a line of another format"),
        (b'["sky",\n"road"]\n', "line 1, .*: it is a line of another format"),
        (b"# void\nsky\nroad:128,64,128::\n", "line 3, .*: it is a line of another format"),
        (b"sky,road,tree\n", r"holds several names in one line \(sky,road,tree\)"),
        (b"sky; road\n", "holds several names in one line"),
        (b"0 sky\n1 road\n", r"numbers its classes \(0 sky\)"),
        (b"sky 0\nroad 1\n", r"numbers its classes \(sky 0\)"),
        (b"0=sky\n1=road\n", "line 1, '0=sky': it is a line of another format"),
        (b"// c\nsky\nroad\n", "line 1, '// c': it is a line of another format"),
        (b"* sky\n* road\n", "line 1, .*: it is a line of another format"),
        (b"7,sky\n8,road\n", r"numbers its classes \(7,sky\)"),
        (b"0: sky\n1: road\n", r"numbers its classes"),
        (b"name\nsky\nroad\n", "line 1, 'name': it is the title of a column"),
        (b"# a\nClass Names\nsky\nroad\n", "line 2, 'Class Names': it is the title of a column"),
        (b"id,name\n0,sky\n1,road\n", "line 1, 'id,name': it is the title of a column"),
        (b"Pixel Value, Class\n0, sky\n1, road\n", "line 1, .*: it is the title of a column"),
        (b"name color\nsky 1 2 3\n", "line 1, 'name color': it is the title of a column"),
        (b"r g b name\n1 2 3 sky\n", "line 1, 'r g b name': it is the title of a column"),
        (b"1 2 3 sky\n4 5 6 road\n", "line 1, '1 2 3 sky': its colour is not three numbers after the name"),
        (b"sky #aabbcc\nroad #112233\n", "line 1, .*: its colour is not three"),
        (b"sky 1 2 3\nroad (3,4,5)\n", "line 2, .*: its colour is not three"),
        (b"sky 0.1 0.2 0.3\nroad 1 1 1\n", "line 1, .*: its colour is not three"),
        (b"sky -1 2 3\nroad 1 1 1\n", "line 1, .*: its colour is not three"),
        (b"sky 1 2\nroad 3 4\n", "line 1, .*: its colour is not three"),
        (b"sky 1 2 3 255\nroad 4 5 6 255\n", r"four numbers \(sky 1 2 3 255\); .* without the opacity"),
        (b"sky\n\nroad\n", "line 2, '': the line is empty"),
        (b"sky\n12\n", "line 2, '12': it contains no letter"),
        (b"sky 300 0 0\nroad\n", "line 1, 'sky 300 0 0': a value of its colour is above 255"),
        (b"sky,128,64\nroad\n", "line 1, 'sky,128,64': a part of its colour is missing"),
        (b"sky\nroad\nsky\n", "names sky twice, in lines 1 and 3"),
    ],
)
def test_files_of_classes_that_cannot_be_read(tmp_path, data, message):
    (tmp_path / "classes.txt").write_bytes(data)
    with pytest.raises(DatasetError, match=rf"classes\.txt .*{message}"):
        read_class_names(tmp_path, 2)


def test_eight_wrong_values_are_all_named():
    for count, end in ((8, "27; expected"), (9, r"27, \.\.\.; expected")):
        with pytest.raises(BadLabel, match=f"holds the values 20, .* {end}"):
            check_values(range(20, 20 + count), 20)


@pytest.mark.parametrize("count", [2, 5, 6, 7])
def test_a_palette_in_another_order_by_hand(count):
    """Every colour of the table occurs, each index has the colour of the next one, and five are named."""
    colors = {index: (index, 0, 0) for index in range(count)}
    palette = np.array([[(index + 1) % count, 0, 0] for index in range(count)], np.uint8)
    check_palette(range(count), np.array(list(colors.values()), np.uint8), colors)
    check_palette(range(count), palette + np.uint8(9), colors)  # other colours are not checked
    with pytest.raises(BadLabel, match="index 0 has the colour of 1, 1 has the colour of") as caught:
        check_palette(range(count), palette, colors)
    assert str(caught.value).count("has the colour of") == min(count, 5)
