import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

from dataset import (
    DatasetError,
    VOCSegmentation,
    absent_classes,
    count_classes,
    default_names,
    one_class_warning,
    read_class_names,
    read_ids,
    read_label,
    voc_palette,
)
from dataset.classes import VOC_NAMES, read_class_file
from dataset.lists import read_lines
from tests.helpers import TOY_CLASSES, TOY_SIZES, save_palette_png
from utils.loader import make_loader, running


def write_label(path, array, mode=None):
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)
    return path


def test_palette_and_grey_labels_read_as_indices(tmp_path):
    label = np.array([[0, 1, 15], [20, 255, 7]], dtype=np.uint8)
    save_palette_png(tmp_path / "p.png", label)
    write_label(tmp_path / "l.png", label)
    assert np.array_equal(read_label(tmp_path / "p.png", 21), label)
    assert np.array_equal(read_label(tmp_path / "l.png", 21), label)
    assert cv2.imread(str(tmp_path / "p.png"), cv2.IMREAD_GRAYSCALE)[0, 1] == 38  # what reading with OpenCV would train on


def test_another_ignore_label_becomes_255(tmp_path):
    path = write_label(tmp_path / "l.png", np.array([[0, 1, 11, 255]], dtype=np.uint8))
    assert read_label(path, 11, ignore_label=11).tolist() == [[0, 1, 255, 255]]
    assert read_label(path, 12, ignore_label=0).tolist() == [[255, 1, 11, 255]]


BAD_LABELS = {
    "rgb": (
        lambda p: write_label(p, voc_palette()[np.ones((40, 55), dtype=np.uint8)]),
        r"mode RGB.*\(40, 55, 3\).*mode P or L",
    ),
    "16 bit": (lambda p: write_label(p, np.ones((40, 55), dtype=np.uint16)), r"mode I;16.*uint16.*8-bit"),
    "out of range": (
        lambda p: write_label(p, np.tile(np.array([1, 38, 200], dtype=np.uint8), (40, 20))[:, :55]),
        r"values 38, 200; expected class indices 0\.\.3; 255",
    ),
    "binary": (lambda p: write_label(p, np.full((40, 55), 128, dtype=np.uint8)), r"the value 128; expected"),
    "mis-sized": (
        lambda p: write_label(p, np.ones((40, 50), dtype=np.uint8)),
        r"50x40 pixels, its image 55x40; both .* same size$",
    ),
    "turned": (
        lambda p: write_label(p, np.ones((55, 40), dtype=np.uint8)),
        r"40x55 pixels, its image 55x40; .*: the sides are swapped, so one of the two was rotated$",
    ),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:60]), r"is damaged: its"),
    "empty": (lambda p: p.write_bytes(b""), r"cannot be decoded"),
    "text": (lambda p: p.write_text("<html>not found</html>"), r"cannot be decoded"),
    "missing": (lambda p: p.unlink(), r"does not exist"),
}


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD_LABELS), ("rgb", 1), ("missing", 1)])
def test_bad_labels_are_one_sentence_that_names_the_file(toy_voc, kind, workers):
    """Also in a worker, where PyTorch wraps the sentence in a traceback."""
    path = toy_voc / "SegmentationClassAug" / "toy_0.png"
    break_it, message = BAD_LABELS[kind]
    break_it(path)
    data = VOCSegmentation(toy_voc, ["toy_0"], num_classes=TOY_CLASSES)
    with (
        pytest.raises(DatasetError, match=message) as error,
        running(make_loader(data, [[0]], workers, torch.device("cpu"))) as it,
    ):
        list(it)
    assert str(path) in str(error.value)
    assert str(error.value).startswith("the label")
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (0.5, "is truncated"), (b"GIF?" * 100, "is not an image"), (b"", "is not an image")],
)
def test_bad_images(toy_voc, content, message):
    path = toy_voc / "JPEGImages" / "toy_0.jpg"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: int(len(whole) * content)] if isinstance(content, float) else content)
    with pytest.raises(DatasetError, match=rf"the image .*toy_0\.jpg {message}"):
        VOCSegmentation(toy_voc, ["toy_0"], num_classes=TOY_CLASSES)[0]


def test_advice_follows_the_sentence(toy_voc):
    (toy_voc / "JPEGImages/toy_0.jpg").write_bytes(b"")
    for advice, end in (("look at the docs", "(0 bytes); look at the docs"), ("", "(0 bytes)")):
        with pytest.raises(DatasetError) as error:
            VOCSegmentation(toy_voc, ["toy_0"], num_classes=TOY_CLASSES, advice=advice)[0]
        assert str(error.value).endswith(end)


def test_pairs_are_not_changed(toy_voc):
    data = VOCSegmentation(toy_voc, read_ids(toy_voc / "ImageSets/Segmentation/val.txt"), num_classes=TOY_CLASSES)
    assert len(data) == 6
    for i, size in enumerate(TOY_SIZES):
        image, label = data[i]
        assert image.shape == (*size, 3)
        assert label.shape == size
        assert np.array_equal(image, cv2.imread(str(toy_voc / "JPEGImages" / f"toy_{i}.jpg")))
        assert set(np.unique(label)) <= {0, 1, 2, 3, 255}


def test_folders(toy_voc):
    """A mask missing from SegmentationClassAug is read from SegmentationClass; folder names are arguments."""
    (toy_voc / "SegmentationClass").mkdir()
    shutil.move(toy_voc / "SegmentationClassAug/toy_1.png", toy_voc / "SegmentationClass/toy_1.png")
    data = VOCSegmentation(toy_voc, ["toy_0", "toy_1"], num_classes=TOY_CLASSES)
    assert [data.label_path(i).parent.name for i in data.ids] == ["SegmentationClassAug", "SegmentationClass"]
    assert data[1][1].shape == TOY_SIZES[1]
    (toy_voc / "JPEGImages").rename(toy_voc / "photos")
    (toy_voc / "SegmentationClassAug").rename(toy_voc / "masks")
    data = VOCSegmentation(toy_voc, ["toy_0"], "photos", "masks", TOY_CLASSES)
    assert data[0][1].shape == TOY_SIZES[0]
    folders = "ImageSets/, SegmentationClass/, masks/, photos/"
    with pytest.raises(
        DatasetError, match=f"holds no JPEGImages/; expected images <id>.jpg there or in --image-dir, but it holds {folders}$"
    ):
        VOCSegmentation(toy_voc, ["toy_0"])
    with pytest.raises(DatasetError, match="holds no labels/"):
        VOCSegmentation(toy_voc, ["toy_0"], "photos", "labels")
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        VOCSegmentation(toy_voc / "nowhere", ["toy_0"])


def test_class_names(tmp_path):
    assert read_class_names(tmp_path, 2) is None
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert read_class_names(tmp_path, 2) == ["sky", "road"]
    with pytest.raises(DatasetError, match="names 2 classes; expected 3: leave --num-classes out to use all 2, or edit"):
        read_class_names(tmp_path, 3)


def test_the_file_of_classes_is_read_once(tmp_path, toy_voc, monkeypatch):
    root = shutil.copytree(toy_voc, tmp_path / "voc")
    (root / "classes.txt").write_text("\n".join(f"kind {i} {i} 0 {i}" for i in range(TOY_CLASSES)))
    reads = []
    monkeypatch.setattr("dataset.classes.read_lines", lambda path, what: reads.append(path) or read_lines(path, what))
    alone = VOCSegmentation(root, ["toy_0"], num_classes=TOY_CLASSES)
    assert reads == [root / "classes.txt"]
    classes = read_class_file(root)
    (root / "classes.txt").write_text("changed\n")
    given = VOCSegmentation(root, ["toy_0"], num_classes=TOY_CLASSES, classes=classes)
    assert len(reads) == 2  # one more, by read_class_file
    assert given.names == alone.names == [f"kind {i}" for i in range(TOY_CLASSES)]
    assert given.colors == alone.colors
    assert given.colors[1] == (1, 0, 1)


def test_the_number_of_classes(tmp_path):
    assert count_classes(tmp_path) is None
    path = tmp_path / "classes.txt"
    for text, count in (
        ("sky\nroad\n", 2),
        ("sky\nroad\nvoid\n", 3),
        ("void\na\nb", 3),
        ("a 1 2 3\nb 4 5 6\n", 2),
        ("".join(f"x{i}\n" for i in range(255)), 255),
    ):
        path.write_text(text)
        assert count_classes(tmp_path) == count
    for text in ("only\n", "\n", "\n".join(f"c{i}" for i in range(256))):
        path.write_text(text)
        with pytest.raises(DatasetError, match=r"names \d+ classes; expected 2 to 255"):
            count_classes(tmp_path)


@pytest.mark.parametrize("name", ["void", "Ignore", "unlabelled", "unlabeled"])
def test_a_last_line_for_the_ignore_label_is_no_class(tmp_path, name):
    (tmp_path / "classes.txt").write_text(f"sky\nroad\n{name}\n")
    with pytest.raises(DatasetError, match=f"names {name} as its last class, but --ignore-label 2 says .*: delete that line"):
        count_classes(tmp_path, 2)
    with pytest.raises(DatasetError, match=f"expected 2: delete its last line, {name}, .* pass --ignore-label 2"):
        read_class_names(tmp_path, 2)
    assert count_classes(tmp_path, 0) == 3  # another label is ignored


@pytest.mark.parametrize(
    ("present", "ignore_label", "text"),
    [
        ([0, 1, 2, 255], 255, ""),
        ([0, 2], 255, "1 red"),
        ([1, 2, 255], 0, ""),  # the ignore label is no class
        ([0, 1], 255, "2 blue"),
        ([1], 255, ""),  # a single class has its own warning
        ([255], 255, ""),
    ],
)
def test_absent_classes(present, ignore_label, text):
    assert absent_classes(present, ["ground", "red", "blue"], ignore_label) == text


def test_many_absent_classes_are_counted():
    """Most of 182 classes are absent from a few labels; unused ones are not listed."""
    assert absent_classes([0, 1, 5], [f"c{i}" for i in range(30)], unused=[2, 29]).endswith("21 c21, 22 c22, 23 c23 and 5 more")


def test_default_names():
    assert default_names(2) == ["class 0", "class 1"]
    assert default_names(21)[::20] == ["background", "tvmonitor"]


def test_a_data_set_knows_whether_its_classes_fit(toy_voc):
    (toy_voc / "classes.txt").write_text("ground\nred\ngreen\nblue\n")
    assert VOCSegmentation(toy_voc, ["toy_0"], num_classes=4)[0][1].shape == TOY_SIZES[0]
    with pytest.raises(DatasetError, match=r"names 4 classes; expected 21: leave --num-classes out to use all 4"):
        VOCSegmentation(toy_voc, ["toy_0"], num_classes=21)


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ([0, 255], "binary masks 0/255"),
        ([3], "only class 3"),
        ([3, 255], "only class 3"),
        ([255], "all labels are ignored"),
        ([], "no labels"),
        ([0, 1], None),
        ({0, 1, 255}, None),
        (np.flatnonzero([4, 0, 9]), None),
    ],
)
def test_labels_of_one_class(present, words):
    sentence = one_class_warning(present)
    assert sentence is None if words is None else re.search(words, sentence)


def test_names_equal_those_in_torchvision():
    theirs = DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"]
    assert [name.strip("_") for name in theirs] == list(VOC_NAMES)


def test_voc_palette():
    """The colours printed in the VOC development kit's documentation."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {k: tuple(voc_palette()[k].tolist()) for k in known} == known
