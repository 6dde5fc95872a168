"""Label files are read back and compared by index; overlays and panels are compared pixel by pixel."""

import os

import numpy as np
import pytest
from PIL import Image

from dataset.classes import voc_palette
from utils import visualize
from utils.command import UserError
from utils.visualize import (
    GAP,
    OPACITY,
    Classes,
    blend,
    class_names,
    draw_errors,
    make_palette,
    panel,
    save_indexed_png,
    save_panel,
)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 21), (16, 16)])
def test_indexed_png_reads_back_exactly(tmp_path, shape):
    labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "2007_000033.png"
    save_indexed_png(path, labels)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), labels)
        np.testing.assert_array_equal(np.array(image.convert("RGB")), voc_palette()[labels])
        assert image.getpalette() == voc_palette().reshape(-1).tolist()
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


def naive_outline(labels, y, x):
    height, width = labels.shape
    beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return any(labels[v, u] != labels[y, x] for v, u in beside if 0 <= v < height and 0 <= u < width)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (1, 7), (12, 9)])
@pytest.mark.parametrize(
    ("name", "clear"),
    [("background", True), ("_Background_", True), ("background (void)", True), ("road", False), ("background wall", False)],
)
def test_an_overlay_has_class_colours_and_outlines(shape, name, clear):
    """The background shows the image: in black, images of mostly background would be dark."""
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = rng.choice(np.array([0, 3, 3, 3, 255], np.uint8), shape)
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    result = blend(image, labels, Classes([name, *"abc"], palette))
    for y in range(shape[0]):
        for x in range(shape[1]):
            color = palette[labels[y, x]].astype(float)
            if clear and labels[y, x] == 0:
                assert (result[y, x] == image[y, x]).all()
            elif naive_outline(labels, y, x):
                assert result[y, x].tolist() == color.tolist()
            else:
                expected = (1 - OPACITY) * image[y, x] + OPACITY * color
                assert np.abs(result[y, x] - expected).max() <= 1


def test_own_colours_and_the_rest_of_voc():
    palette = make_palette({0: (1, 2, 3), 255: (9, 9, 9)})
    assert palette[[0, 1, 15, 255]].tolist() == [[1, 2, 3], [128, 0, 0], [192, 128, 128], [9, 9, 9]]
    assert (voc_palette()[0] == 0).all()  # the table itself is unchanged


def test_names_of_classes():
    assert class_names(3, None, ["a", "b", "c"]) == ["a", "b", "c"]
    assert class_names(3, None) == ["class 0", "class 1", "class 2"]
    assert class_names(21)[15] == "person"


def test_errors_are_red_and_ignored_pixels_are_never_wrong():
    image = np.full((2, 3, 3), 100, np.uint8)
    label, prediction = np.array([[0, 1, 255], [2, 2, 255]], np.uint8), np.array([[0, 2, 1], [2, 0, 255]], np.uint8)
    tile = draw_errors(image, label, prediction).astype(int)
    red = (tile[..., 0] > 180) & (tile[..., 1] < 100)
    assert red.tolist() == [[False, True, False], [False, True, False]]
    assert len(np.unique(tile[label != 255][[0, 2]], axis=0)) == 1  # right ones are grey, whatever their class
    assert (tile[0, 2] == tile[1, 2]).all()


@pytest.mark.parametrize("with_label", [True, False])
def test_a_panel_has_its_parts_and_a_legend_of_the_classes_that_occur(with_label, monkeypatch):
    monkeypatch.setattr(visualize, "TILE_SIDES", (1, 1024))
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)
    label = rng.choice(np.array([0, 3, 255], np.uint8), (50, 90)) if with_label else None
    prediction = rng.choice(np.array([0, 7], np.uint8), (50, 90))
    classes = Classes([f"name {i}" for i in range(21)])
    result = panel(image, label, prediction, classes)
    tiles = [image, blend(image, prediction, classes)]
    if label is not None:
        tiles = [image, blend(image, label, classes), blend(image, prediction, classes), draw_errors(image, label, prediction)]
    assert result.shape[1] == len(tiles) * 90 + (len(tiles) - 1) * GAP
    top = next(y for y in range(result.shape[0]) if (result[y, :90] == image[0]).all())
    for number, tile in enumerate(tiles):
        left = number * (90 + GAP)
        assert (result[top : top + 50, left : left + 90] == tile).all()
    legend = result[top + 50 :].reshape(-1, 3)
    shown = {label for label in (0, 3, 7, 11, 255) if (legend == voc_palette()[label]).all(axis=1).sum() > 50}
    assert shown == ({0, 3, 7, 255} if with_label else {0, 7})


def test_small_images_are_enlarged_and_large_ones_shrunk():
    classes = Classes(["a"] * 255)
    for size, expected in (((9, 7), (153, 119)), ((100, 60), (100, 60)), ((2048, 5), (1024, 2)), ((1, 3000), (1, 1024))):
        labels = np.zeros(size, np.uint8)
        result = panel(np.zeros((*size, 3), np.uint8), None, labels, classes)
        assert result.shape[1] == 2 * expected[1] + GAP
        assert result.shape[0] > expected[0]
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (visualize.scale(labels, 3) == labels.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_a_legend_of_many_and_of_unreadable_names():
    """A long legend has several lines; a name that no font can show still has its number."""
    labels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    names = [f"a rather long name of class {i} " * 9 for i in range(199)] + ["\u65e5\u672c"]
    result = panel(np.zeros((10, 20, 3), np.uint8), labels, labels, Classes(names))
    assert result.shape[1] == 4 * 160 + 3 * GAP
    assert result.shape[0] > 200 * 13


def test_saved_panels(tmp_path):
    rng = np.random.default_rng(3)
    image = np.full((15, 17, 3), (200, 60, 30), dtype=np.uint8)
    label, prediction = rng.integers(0, 3, (2, 15, 17), dtype=np.uint8)
    expected = panel(image, label, prediction, CLASSES)
    save_panel(tmp_path / "a.png", image, label, prediction, CLASSES)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), expected)
    for name in ("a.jpg", "a.JPEG"):
        save_panel(tmp_path / "step_1" / name, image, None, prediction, CLASSES)
        with Image.open(tmp_path / "step_1" / name) as saved:
            assert saved.format == "JPEG"
            read = np.array(saved.convert("RGB")).astype(int)
        assert np.abs(read[30:100, :120] - (200, 60, 30)).max() <= 4  # RGB, not BGR
    assert sorted(os.listdir(tmp_path / "step_1")) == ["a.JPEG", "a.jpg"]


def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_indexed_png(path, np.zeros((3, 4), np.uint8))
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.files.os.fsync", disk_full)
    with pytest.raises(UserError, match="No space left"):
        save_indexed_png(path, np.ones((3, 4), np.uint8))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


CLASSES = Classes(class_names(21))
IMAGE, LABELS = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)


@pytest.mark.parametrize(
    ("image", "label", "prediction", "message"),
    [
        (IMAGE, LABELS, LABELS[:3], r"prediction is 3x6 and the image 4x6 \(height x width\)"),
        (IMAGE, LABELS.T, LABELS, "label is 6x4 and the image 4x6"),
        (IMAGE, LABELS, None, "prediction to draw is NoneType"),
        (IMAGE, LABELS.astype(np.int64), LABELS, r"label to draw is int64 of shape \(4, 6\); expected"),
        (IMAGE, None, IMAGE, r"prediction to draw is uint8 of shape \(4, 6, 3\)"),
        (IMAGE.transpose(2, 0, 1), LABELS, LABELS, r"image is uint8 of shape \(3, 4, 6\); expected"),
        (IMAGE.astype(np.float32), LABELS, LABELS, "image is float32"),
        (IMAGE[:0], None, LABELS[:0], r"image is uint8 of shape \(0, 6, 3\)"),
    ],
)
def test_wrong_inputs_of_panels_are_refused(tmp_path, image, label, prediction, message):
    with pytest.raises(ValueError, match=message):
        save_panel(tmp_path / "a.png", image, label, prediction, CLASSES)
    assert os.listdir(tmp_path) == []


def test_wrong_files_and_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg: labels are saved as \.png only"):
        save_indexed_png(tmp_path / "a.jpg", LABELS)
    with pytest.raises(ValueError, match=r"a\.gif: a panel is saved as"):
        save_panel(tmp_path / "a.gif", IMAGE, None, LABELS, CLASSES)
    with pytest.raises(ValueError, match="labels to draw is bool"):
        save_indexed_png(tmp_path / "a.png", LABELS > 0)
    with pytest.raises(ValueError, match=r"palette is uint8 of shape \(21, 3\)"):
        save_indexed_png(tmp_path / "a.png", LABELS, voc_palette()[:21])
    assert os.listdir(tmp_path) == []
