"""Label files read back index by index, masks and panels compared pixel by pixel."""

import os

import numpy as np
import pytest
from PIL import Image

from dataset.classes import voc_palette
from utils.command import UserError
from utils.visualize import GAP, color_mask, panel, save_indexed_png, save_panel


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 21), (16, 16)])
def test_indexed_png_reads_back_exactly(tmp_path, shape):
    labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "2007_000033.png"
    save_indexed_png(path, labels)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), labels)
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), voc_palette()[labels])
        assert picture.getpalette() == voc_palette().reshape(-1).tolist()
    assert os.listdir(path.parent) == ["2007_000033.png"]


def test_every_label_and_few_labels_survive(tmp_path):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, labels in (("every", every), ("strided", every[::2, ::-3]), ("one", np.full((3, 5), 255, np.uint8))):
        save_indexed_png(tmp_path / f"{name}.png", labels)
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / f"{name}.png")), labels)


def test_own_palette(tmp_path):
    palette = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    labels = np.array([[0, 1], [7, 255]], np.uint8)
    save_indexed_png(tmp_path / "a.png", labels, palette)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png").convert("RGB")), palette[labels])


def test_color_mask_has_the_published_colours():
    labels = np.array([[0, 1, 2], [15, 20, 255]], dtype=np.uint8)
    mask = color_mask(labels)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]],
        [[192, 128, 128], [0, 64, 128], [224, 224, 192]],
    ]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3), (4, 9)])
@pytest.mark.parametrize("with_label", [True, False])
def test_panel_tiles(height, width, with_label):
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = rng.choice(np.array([0, 3, 255], np.uint8), (height, width)) if with_label else None
    prediction = rng.integers(0, 21, (height, width), dtype=np.uint8)
    result = panel(image, label, prediction)
    tiles = 3 if with_label else 2
    assert result.dtype == np.uint8
    assert result.shape == (height, tiles * width + (tiles - 1) * GAP, 3)
    for y in range(height):
        for x in range(width):
            assert result[y, x].tolist() == image[y, x].tolist()
            assert result[y, x + (tiles - 1) * (width + GAP)].tolist() == voc_palette()[prediction[y, x]].tolist()
            if with_label:
                assert result[y, x + width + GAP].tolist() == voc_palette()[label[y, x]].tolist()
        for gap in range(tiles - 1):
            start = (gap + 1) * width + gap * GAP
            assert (result[y, start : start + GAP] == 255).all()


def test_saved_panels(tmp_path):
    rng = np.random.default_rng(3)
    image = np.full((15, 17, 3), (200, 60, 30), dtype=np.uint8)
    label, prediction = rng.integers(0, 3, (2, 15, 17), dtype=np.uint8)
    expected = panel(image, label, prediction)
    save_panel(tmp_path / "a.png", image, label, prediction)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), expected)
    for name in ("a.jpg", "a.JPEG"):
        save_panel(tmp_path / "step_1" / name, image, None, prediction)
        with Image.open(tmp_path / "step_1" / name) as picture:
            assert picture.format == "JPEG"
            read = np.array(picture.convert("RGB")).astype(int)
        assert read.shape == (15, 2 * 17 + GAP, 3)
        assert np.abs(read[:, :12] - (200, 60, 30)).max() <= 4  # RGB, not BGR
    assert sorted(os.listdir(tmp_path / "step_1")) == ["a.JPEG", "a.jpg"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_indexed_png(path, np.zeros((3, 4), np.uint8))
    before = path.read_bytes()

    def disk_full(*args, **kwargs):
        args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(UserError, match="No space left"):
        save_indexed_png(path, np.ones((3, 4), np.uint8))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


IMAGE, LABELS = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)


@pytest.mark.parametrize(
    ("image", "label", "prediction", "message"),
    [
        (IMAGE, LABELS, LABELS[:3], r"prediction is 3x6 and the picture 4x6 \(height x width\)"),
        (IMAGE, LABELS.T, LABELS, "label is 6x4 and the picture 4x6"),
        (IMAGE, LABELS, None, "prediction to draw is NoneType"),
        (IMAGE, LABELS.astype(np.int64), LABELS, r"label to draw is int64 of shape \(4, 6\); expected"),
        (IMAGE, None, IMAGE, r"prediction to draw is uint8 of shape \(4, 6, 3\)"),
        (IMAGE.transpose(2, 0, 1), LABELS, LABELS, r"picture is uint8 of shape \(3, 4, 6\); expected"),
        (IMAGE.astype(np.float32), LABELS, LABELS, "picture is float32"),
        (IMAGE[:0], None, LABELS[:0], r"picture is uint8 of shape \(0, 6, 3\)"),
    ],
)
def test_wrong_panels_are_refused_in_words(tmp_path, image, label, prediction, message):
    with pytest.raises(ValueError, match=message):
        save_panel(tmp_path / "a.png", image, label, prediction)
    assert os.listdir(tmp_path) == []


def test_wrong_files_and_labels_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg: labels are saved as \.png only"):
        save_indexed_png(tmp_path / "a.jpg", LABELS)
    with pytest.raises(ValueError, match=r"a\.gif: a panel is saved as"):
        save_panel(tmp_path / "a.gif", IMAGE, None, LABELS)
    with pytest.raises(ValueError, match="labels to draw is bool"):
        save_indexed_png(tmp_path / "a.png", LABELS > 0)
    with pytest.raises(ValueError, match="labels to draw is int32"):
        color_mask(LABELS.astype(np.int32))
    with pytest.raises(ValueError, match=r"palette is uint8 of shape \(21, 3\)"):
        save_indexed_png(tmp_path / "a.png", LABELS, voc_palette()[:21])
    assert os.listdir(tmp_path) == []
