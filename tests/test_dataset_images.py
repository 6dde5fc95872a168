"""Image files: truncated ones, EXIF orientation of labelled images, sizes that cannot be read, and every stored kind."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, features

import evaluate as evaluate_script
import train as train_script
from dataset import DatasetError, VOCSegmentation, read_image
from dataset.images import read_with_orientation
from scripts import predict as predict_script
from tests.helpers_pngs import GREY_ALPHA, PALETTE, RGB, RGBA, chunk, interlaced_rows, png, rows_of
from utils.command import run_command

GRID = np.add.outer(np.arange(40) * 3, np.arange(56) * 2).astype(np.uint8)  # all corners differ
PIXELS = np.stack([GRID, 255 - GRID, GRID // 2], axis=-1)


def encoded(kind="JPEG", orientation=None, array=PIXELS, **options):
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def with_thumbnail(data: bytes) -> bytes:
    """The JPEG with a whole JPEG in a segment after the first marker, as in the EXIF thumbnails of cameras."""
    inner = b"Exif\0\0" + encoded(array=PIXELS[:8, :8])
    return data[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + data[2:]


def write(tmp_path, data, name="a.jpg"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


VARIANTS = {
    "baseline": encoded(),
    "progressive": encoded(progressive=True),  # several scans
    "restart markers": cv2.imencode(".jpg", PIXELS, [cv2.IMWRITE_JPEG_RST_INTERVAL, 1])[1].tobytes(),
    "thumbnail": with_thumbnail(encoded()),
    "fill bytes": encoded()[:-2] + b"\xff\xff\xff\xd9",
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("behind", [b"", b"\0" * 5000, b"video" * 2000, encoded()])
def test_bytes_after_the_end_of_a_jpeg_are_no_damage(tmp_path, name, behind):
    whole = VARIANTS[name]
    expected = cv2.imdecode(np.frombuffer(whole, dtype=np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(read_image(write(tmp_path, whole + behind)), expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("left", [0.5, 0.8, -2])
def test_a_truncated_jpeg_is_refused(tmp_path, name, left):
    """Also if a thumbnail's end marker is left, and if zeros replace the missing part, as on a broken disk."""
    whole = VARIANTS[name]
    cut = whole[: int(len(whole) * left)] if left > 0 else whole[:left]
    for data in (cut, cut + b"\0" * 5000):
        with pytest.raises(DatasetError, match=r"a\.jpg is truncated"):
            read_image(write(tmp_path, data))


def test_a_jpeg_truncated_after_its_thumbnail_is_refused(tmp_path):
    whole = VARIANTS["thumbnail"]
    end = whole.index(b"\xff\xd9") + 2
    with pytest.raises(DatasetError, match="is truncated"):
        read_image(write(tmp_path, whole[:end]))


def test_the_end_marker_in_a_comment_does_not_count(tmp_path):
    whole = VARIANTS["baseline"]
    data = whole[:2] + b"\xff\xfe\x00\x08ab\xff\xd9cd" + whole[2:]
    assert np.array_equal(read_image(write(tmp_path, data)), read_image(write(tmp_path, whole)))
    with pytest.raises(DatasetError, match="is truncated"):
        read_image(write(tmp_path, data[: len(data) // 2]))


NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
CUT = {
    "PNG": [{}],
    "BMP": [{}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}],
    "WEBP": [{}, {"lossless": True}],
}


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind in CUT for options in CUT[kind]])
@pytest.mark.parametrize("left", [0.5, 0.9, -1])
def test_a_truncated_image_of_any_kind_is_refused(tmp_path, kind, options, left):
    whole = encoded(kind, array=NOISE, **options)
    assert read_image(write(tmp_path, whole)).shape == NOISE.shape
    with pytest.raises(DatasetError, match=r"a\.jpg is "):
        read_image(write(tmp_path, whole[: int(len(whole) * left)] if left > 0 else whole[:left]))


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_image_with_missing_pixels_is_refused(tmp_path, interlaced):
    rows = (interlaced_rows if interlaced else rows_of)(NOISE)
    for stored, fits in ((rows, True), (rows + bytes(9), True), (rows[:-1], False), (rows[: len(rows) // 2], False)):
        path = write(tmp_path, png(NOISE, color_type=RGB, rows=stored, interlaced=interlaced), "a.png")
        if fits:
            assert np.array_equal(read_image(path)[..., ::-1], NOISE)
        else:
            with pytest.raises(DatasetError, match=r"a\.png is damaged: its pixels end after"):
                read_image(path)


@pytest.mark.parametrize("frame", [0xC0, 0xC1, 0xC2, 0xC9, 0xCA])  # all kinds of coding that decoders support
def test_a_small_jpeg_that_claims_to_be_large_is_not_decoded(tmp_path, monkeypatch, frame):
    data = bytearray(encoded())
    place = data.index(b"\xff\xc0")
    data[place + 1] = frame
    data[place + 5 : place + 9] = (28_000).to_bytes(2, "big") * 2
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(DatasetError, match=rf"its {len(data)} bytes cannot hold the 28000x28000 pixels of its header"):
        read_image(write(tmp_path, data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_one_colour_is_not_truncated(tmp_path, mode, options):
    """The smallest possible files for their size."""
    grey = np.full((3000, 3000), 128, np.uint8)
    data = encoded(array=grey if mode == "L" else np.stack([grey] * 3, axis=-1), quality=1, **options)
    assert read_image(write(tmp_path, data)).shape == (3000, 3000, 3)


def test_a_gif_is_refused_with_every_opencv(tmp_path):
    with pytest.raises(DatasetError, match=r"a\.jpg is a GIF file; save it as PNG"):
        read_image(write(tmp_path, encoded("GIF")))


def labelled(tmp_path, data, label_size, suffix=".jpg"):
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir(exist_ok=True)
    write(tmp_path / "JPEGImages", data, f"a{suffix}")
    write(tmp_path / "SegmentationClass", png(np.ones(label_size, dtype=int)), "a.png")
    return VOCSegmentation(tmp_path, ["a"], num_classes=2)


@pytest.mark.parametrize(
    ("kind", "orientation"),
    [
        *((kind, orientation) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for orientation in (None, *range(1, 9))),
    ],
)
def test_orientation_of_a_labelled_image(tmp_path, kind, orientation):
    data = labelled(tmp_path, encoded(kind, orientation), (40, 56), suffix=f".{kind.lower()}")
    if orientation in (None, 1):
        assert data[0][0].shape == (40, 56, 3)
    elif orientation < 5:
        with pytest.raises(DatasetError, match=rf"has EXIF orientation {orientation}, .* rotate the pixels .* remove the tag"):
            data[0]
    else:
        with pytest.raises(DatasetError, match=rf"56x40 pixels, its image 40x56; .* {orientation} swaps the sides"):
            data[0]
        data = labelled(tmp_path, encoded(kind, orientation), (56, 40), suffix=f".{kind.lower()}")
        assert data[0][0].shape == (56, 40, 3)  # the sizes show that the label was drawn on the rotated image


def test_orientation_of_a_square_image_is_refused(tmp_path):
    square = PIXELS[:, :40]
    for orientation in range(2, 9):
        with pytest.raises(DatasetError, match="its size does not show"):
            labelled(tmp_path, encoded(orientation=orientation, array=square), (40, 40))[0]
    assert labelled(tmp_path, encoded(orientation=1, array=square), (40, 40))[0][0].shape == (40, 40, 3)


SHOWN = {  # in numpy; sides at which the stored first row and column are displayed (TIFF 6.0, Orientation)
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.fliplr(np.rot90(image, -1)),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.flipud(np.rot90(image, -1)),
    8: np.rot90,
}
TURNING = [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
if features.check("avif") and cv2.imdecode(np.frombuffer(encoded("AVIF"), np.uint8), cv2.IMREAD_COLOR) is not None:
    TURNING.append(("AVIF", {"quality": 95}))


@pytest.mark.parametrize(("kind", "options"), TURNING)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_rotated_once_and_its_orientation_is_returned(tmp_path, kind, options, orientation):
    image, found = read_with_orientation(write(tmp_path, encoded(kind, orientation, **options)))
    expected = SHOWN[orientation](PIXELS[..., ::-1])
    assert found == orientation
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 8


def test_an_avif_that_pillow_cannot_open_is_not_read_as_upright(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(DatasetError, match=r"a\.jpg is an AVIF file, .* pillow>=11\.3"):
        read_image(write(tmp_path, b"\0\0\0\x20ftypavif" + bytes(20)))


def test_the_word_exif_in_a_comment_is_no_orientation(tmp_path):
    """In a PNG only the chunk of that name counts, before or after the pixels."""
    tags = Image.Exif()
    tags[0x0112] = 6
    exif = chunk(b"eXIf", tags.tobytes().removeprefix(b"Exif\0\0"))
    comment = chunk(b"tEXt", b"Comment\0eXIf" + tags.tobytes())
    plain = png(GRID)
    end = len(plain) - len(chunk(b"IEND", b""))
    for extra, expected in ((comment, 1), (exif, 6), (comment + exif, 6), (exif + comment, 6)):
        for data in (png(GRID, extra=extra), plain[:end] + extra + plain[end:]):  # before the pixels, after them
            image, found = read_with_orientation(write(tmp_path, data, "a.png"))
            assert found == expected
            assert np.array_equal(image[..., 0], SHOWN[expected](GRID))


def test_an_image_beyond_pillows_limit_is_rotated(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_with_orientation(write(tmp_path, encoded(orientation=6)))[0].shape == (56, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert not recwarn


def test_prediction_applies_the_orientation(tmp_path):
    upright, turned = (read_image(write(tmp_path, encoded(orientation=o, quality=95))) for o in (None, 6))
    assert np.abs(np.rot90(upright, -1).astype(int) - turned).max() < 10


def test_damaged_exif_is_no_orientation(tmp_path):
    assert [read_with_orientation(write(tmp_path, encoded(orientation=o)))[1] for o in (1, 2, 8, 9)] == [1, 2, 8, 1]
    data = encoded(orientation=3)
    start = data.index(b"Exif\0\0") + 6
    data = data[:start] + b"XX" + data[start + 2 :]
    assert labelled(tmp_path, data, (40, 56))[0][0].shape == (40, 56, 3)


def test_an_image_beyond_opencvs_limit_is_refused(tmp_path):
    path = write(tmp_path, png([[0, 0]], size=(40000, 30000)), "a.png")
    with pytest.raises(DatasetError, match=r"a\.png has more than 1073741824 pixels, which OpenCV refuses"):
        read_image(path)


# Every kind of image through training, evaluation and prediction


def odd_images(root):
    """A data set of one image of each unusual kind, with labels of two classes; returns its ids."""
    grey = Image.fromarray(GRID)
    rgb = Image.fromarray(PIXELS)
    kinds = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey.jpg": grey,
        "grey16.png": Image.fromarray(GRID.astype(np.uint16) * 257),
        "alpha.png": rgb.convert("RGBA"),
        "grey_alpha.png": grey.convert("LA"),
        "palette.png": rgb.quantize(64),
        "bits.png": grey.convert("1"),
        "pixel.png": rgb.crop((0, 0, 1, 1)),
        "line.png": rgb.resize((10_000, 1)),
    }
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, image in kinds.items():
        image.save(root / "JPEGImages" / name)
        label = np.arange(image.height * image.width).reshape(image.height, image.width) % 2
        write(root / "SegmentationClass", png(label), f"{name.partition('.')[0]}.png")
    ids = [name.partition(".")[0] for name in kinds]
    for name in ("train", "val"):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(ids))
    return ids


def test_odd_images_are_read_correctly(tmp_path):
    data = VOCSegmentation(tmp_path, odd_images(tmp_path), num_classes=2)
    found = {id: data[index][0] for index, id in enumerate(data.ids)}
    grey = np.stack([GRID] * 3, axis=-1)
    bgr = PIXELS[..., ::-1]
    for id, expected, most in (
        ("alpha", bgr, 0),
        ("grey16", grey, 0),
        ("grey_alpha", grey, 0),
        ("grey", grey, 3),
        ("cmyk", bgr, 20),
        ("palette", bgr, 20),
        ("pixel", bgr[:1, :1], 0),
    ):
        assert found[id].shape == expected.shape
        assert np.abs(found[id].astype(int) - expected).mean() <= most, id
    assert set(np.unique(found["bits"])) == {0, 255}
    assert found["line"].shape == (1, 10_000, 3)


def test_odd_images_are_trained_on_evaluated_and_predicted(tmp_path, monkeypatch):
    ids = odd_images(tmp_path / "data")
    folder = tmp_path / "run"
    common = ["--data-dir", str(tmp_path / "data"), "--num-workers", "0", "--device", "cpu"]
    small = ["--backbone", "resnet18", "--num-classes", "2", "--input-size", "33,41", "--batch-size", "9", "--num-steps", "2"]
    train = [*common, *small, "--restore-from", "none", "--snapshot-dir", str(folder), "--random-scale", "--random-mirror"]
    assert train_script.main([*train, "--save-num-images", "9", "--learning-rate", "1e-4"]) == 0
    weights = ["--restore-from", str(folder / "VOC12_scenes_2.pth")]
    assert not evaluate_script.main([*common, *weights, "--save-dir", str(tmp_path / "masks")])
    images = [str(path) for path in sorted((tmp_path / "data/JPEGImages").iterdir())]
    assert not predict_script.main([*weights, *images, "--device", "cpu", "--save-dir", str(tmp_path / "drawn")])
    for place in ("masks", "drawn"):
        assert {path.stem for path in (tmp_path / place).glob("**/*.png")} >= set(ids)


WIDE = np.random.default_rng(1).integers(0, 65536, (12, 17, 4))
BYTES = WIDE // 256
SIXTEENTHS = WIDE[..., 0] // 4096
COLORS = [(i * 16, 255 - i * 9, i * 5) for i in range(16)]
TRANSPARENT = chunk(b"tRNS", bytes(range(16)))
DRAWN = Image.fromarray(BYTES[..., :3].astype(np.uint8))
ALPHA = Image.fromarray(BYTES.astype(np.uint8))
GREY_DRAWN = Image.fromarray(BYTES[..., 0].astype(np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pnm(magic: bytes, largest: int, pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    return b"%s\n%d %d\n%d\n" % (magic, width, height, largest) + pixels.astype(">u2" if largest > 255 else np.uint8).tobytes()


RED_GREEN_BLUE, GREYS = BYTES[..., :3], BYTES[..., [0, 0, 0]]
KINDS = {  # contents of a file -> (H, W, 3) red-green-blue
    "png grey 1": (png(BYTES[..., 0] % 2, 1), BYTES[..., [0, 0, 0]] % 2 * 255),
    "png grey 2": (png(BYTES[..., 0] % 4, 2), BYTES[..., [0, 0, 0]] % 4 * 85),
    "png grey 4": (png(BYTES[..., 0] % 16, 4), BYTES[..., [0, 0, 0]] % 16 * 17),
    "png grey 8": (png(BYTES[..., 0]), GREYS),
    "png grey 16": (png(WIDE[..., 0], 16), GREYS),
    "png grey alpha 8": (png(BYTES[..., :2], color_type=GREY_ALPHA), GREYS),
    "png grey alpha 16": (png(WIDE[..., :2], 16, GREY_ALPHA), GREYS),
    "png rgb 8": (png(BYTES[..., :3], color_type=RGB), RED_GREEN_BLUE),
    "png rgb 8 interlaced": (png(BYTES[..., :3], color_type=RGB, interlaced=True), RED_GREEN_BLUE),
    "png rgb 16": (png(WIDE[..., :3], 16, RGB), RED_GREEN_BLUE),
    "png rgba 8": (png(BYTES, color_type=RGBA), RED_GREEN_BLUE),
    "png rgba 16": (png(WIDE, 16, RGBA), RED_GREEN_BLUE),
    "png palette 4": (png(SIXTEENTHS, 4, PALETTE, COLORS), np.array(COLORS)[SIXTEENTHS]),
    "png palette 8": (png(SIXTEENTHS, 8, PALETTE, COLORS), np.array(COLORS)[SIXTEENTHS]),
    "png palette transparent": (png(SIXTEENTHS, 8, PALETTE, COLORS, TRANSPARENT), np.array(COLORS)[SIXTEENTHS]),
    "png grey 0 and 65535": (png(WIDE[..., 0] % 2 * 65535, 16), WIDE[..., [0, 0, 0]] % 2 * 255),
    "png grey 16 black": (png(np.zeros((3, 4), int), 16), np.zeros((3, 4, 3))),
    "bmp rgb": (saved(DRAWN, "BMP"), RED_GREEN_BLUE),
    "bmp rgba": (saved(ALPHA, "BMP"), RED_GREEN_BLUE),
    "bmp grey": (saved(GREY_DRAWN, "BMP"), GREYS),
    "bmp 1": (saved(GREY_DRAWN.point(lambda v: v > 99 and 255).convert("1"), "BMP"), (GREYS > 99) * 255),
    "bmp palette": (saved(DRAWN.quantize(16), "BMP"), np.array(DRAWN.quantize(16).convert("RGB"))),
    "webp rgb": (saved(DRAWN, "WEBP", lossless=True), RED_GREEN_BLUE),
    "webp rgba": (saved(ALPHA, "WEBP", lossless=True, exact=True), RED_GREEN_BLUE),
    "tiff rgba": (saved(ALPHA, "TIFF"), RED_GREEN_BLUE),
    "tiff lzw": (saved(DRAWN, "TIFF", compression="tiff_lzw"), RED_GREEN_BLUE),
    "tiff deflate": (saved(DRAWN, "TIFF", compression="tiff_adobe_deflate"), RED_GREEN_BLUE),
    "tiff grey alpha": (saved(Image.fromarray(BYTES[..., :2].astype(np.uint8)), "TIFF"), GREYS),
    "tiff 1": (saved(GREY_DRAWN.point(lambda v: v > 99 and 255).convert("1"), "TIFF"), (GREYS > 99) * 255),
    "tiff palette": (saved(DRAWN.quantize(16), "TIFF"), np.array(DRAWN.quantize(16).convert("RGB"))),
    "jp2 rgb": (saved(DRAWN, "JPEG2000"), RED_GREEN_BLUE),
    "jp2 rgba": (saved(ALPHA, "JPEG2000"), RED_GREEN_BLUE),
    "jp2 grey 16": (saved(Image.fromarray(WIDE[..., 0].astype(np.uint16)), "JPEG2000"), GREYS),
    "pgm": (pnm(b"P5", 255, BYTES[..., 0]), GREYS),
    "pgm 16": (pnm(b"P5", 65535, WIDE[..., 0]), GREYS),
    "ppm": (pnm(b"P6", 255, BYTES[..., :3]), RED_GREEN_BLUE),
    "ppm 16": (pnm(b"P6", 65535, WIDE[..., :3]), RED_GREEN_BLUE),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_stored(name, tmp_path, capfd):
    data, expected = KINDS[name]
    np.testing.assert_array_equal(read_image(write(tmp_path, data, "a"))[..., ::-1], expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_lossy_kinds_are_read_approximately(kind, mode, tmp_path):
    image = Image.fromarray(PIXELS).convert(mode)
    found = read_image(write(tmp_path, saved(image, kind, quality=95)))
    assert np.abs(found[..., ::-1].astype(int) - np.array(image.convert("RGB"))).mean() < 4


@pytest.mark.skipif(not (features.check("avif") and cv2.haveImageWriter("a.avif")), reason="no AVIF here")
@pytest.mark.parametrize("bits", [10, 12])
def test_an_avif_of_more_bits_is_read_by_its_highest_eight(bits, tmp_path):
    deep = np.repeat(PIXELS.astype(np.uint16) << (bits - 8), 2, axis=1)
    done, data = cv2.imencode(".avif", deep, [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100])
    assert done
    assert np.abs(read_image(write(tmp_path, data.tobytes())).astype(int) - (deep >> (bits - 8))).mean() < 4


@pytest.mark.parametrize("values", [[0, 255], [0, 4095], [1, 1], [0, 1000, 65535], [7, 65535]])
@pytest.mark.parametrize("kind", ["png", "png rgb", "png alpha", "pgm", "jp2"])
def test_sixteen_bits_that_would_be_nearly_black_are_refused(values, kind, tmp_path):
    """Bytes, 12 bits and millimetres in 16-bit files; 65535 means no data."""
    grey = np.resize(values, (30, 40))
    data = {
        "png": lambda: png(grey, 16),
        "png rgb": lambda: png(np.stack([grey] * 3, axis=-1), 16, RGB),
        "png alpha": lambda: png(np.stack([grey, np.full_like(grey, 65535)], axis=-1), 16, GREY_ALPHA),
        "pgm": lambda: pnm(b"P5", 65535, grey),
        "jp2": lambda: saved(Image.fromarray(grey.astype(np.uint16)), "JPEG2000"),
    }[kind]()
    highest = max(value for value in values if value < 65535)
    with pytest.raises(
        DatasetError, match=rf"a\.png holds . bands? of uint16 with values from \d+ to {highest}; .*gdal_translate"
    ):
        read_image(write(tmp_path, data, "a.png"))


def test_running_out_of_memory_is_one_sentence(capsys):
    for fill in (
        lambda: torch.empty(1 << 52),
        lambda: torch.empty(1 << 32, 1 << 32),
        lambda: bytearray(1 << 52),
        lambda: np.empty(1 << 52),
    ):
        with pytest.raises(SystemExit) as status:
            run_command(fill)
        assert status.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1
