"""Lists of ids as users bring them, and the pairs of files that they stand for."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError, VOCSegmentation, find_list, read_ids, read_list
from tests.conftest import TOY_CLASSES


def listing(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("2007_000032\n2008_000002\n\n", ["2007_000032", "2008_000002"]),
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\r\n/JPEGImages/b.jpg /SegmentationClassAug/b.png\r\n", ["a", "b"]),
        ("/JPEGImages/a.jpg\nJPEGImages/b.JPG", ["a", "b"]),
        ("./JPEGImages/a.jpg ./SegmentationClass/a.png\n", ["a"]),
        ("JPEGImages\\a.jpg\r\n", ["a"]),
        ("JPEGImages\\a.jpg\tSegmentationClass\\a.png\r\n", ["a"]),
        ("berlin/a_1\n/JPEGImages/munich/a_1.jpg\nframe.0001\n", ["berlin/a_1", "munich/a_1", "frame.0001"]),
        ("my photo\n/JPEGImages/my pet.jpg /Masks/my pet.png\n/JPEGImages/my car.jpg\n", ["my photo", "my pet", "my car"]),
        ("cls1/a.jpg\ncls2/a.jpg\n", ["cls1/a", "cls2/a"]),  # below JPEGImages
        ("/images/x/a.png /labels/x/a.png\n/images/b.png /labels/b.png\n", ["x/a", "b"]),
        ("train/a.png trainannot/a.png\nval/a.png valannot/a.png\n", ["train/a", "val/a"]),  # two pictures, two ids
        ("\ufeffa\n\ufeffb\n", ["a", "b"]),
        ("  a  \n\n\tb", ["a", "b"]),
    ],
)  # fmt: skip
def test_ids_by_hand(tmp_path, text, ids):
    assert read_ids(listing(tmp_path, text)) == ids


@pytest.mark.parametrize(
    ("line", "image", "label"),
    [
        ("a", None, None),
        ("/JPEGImages/a.jpeg", "JPEGImages/a.jpeg", None),
        ("cls1/a.jpg", "JPEGImages/cls1/a.jpg", None),
        ("/cls1/a.jpg", "cls1/a.jpg", None),
        ("cls1/a.jpg masks/a.png", "cls1/a.jpg", "masks/a.png"),
        ("/JPEGImages/a b.jpg /SegmentationClass/a b.png", "JPEGImages/a b.jpg", "SegmentationClass/a b.png"),
    ],
)
def test_files_that_a_line_names(tmp_path, line, image, label):
    assert read_list(listing(tmp_path, line))[0][1:] == (image, label)


@pytest.mark.parametrize(
    "line",
    [
        "../elsewhere/a",
        "a/../../b",
        "..\\elsewhere\\a",
        "/etc/a",
        "/JPEGImages/../../a.jpg",
        "/JPEGImages/a.jpg /SegmentationClass/../../a.png",
        "C:\\data\\a.jpg",
        "c:a",
        "\\\\server\\share\\a.jpg",
        "JPEGImages/a.jpg D:/masks/a.png",
        "..",
        "/",
        ".",
    ],
)
def test_lines_that_lead_out_of_the_folder_are_refused(tmp_path, line):
    with pytest.raises(DatasetError, match=r"list\.txt holds '.*' in line 2, which leads out .*; expected an id such as"):
        read_list(listing(tmp_path, f"good\n{line}\n"))


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        (" \n \n", "utf-8", "is empty"),
        ("a\nb\n", "utf-16", "as text: it looks like UTF-16; save it as UTF-8"),
        ("a\nb\n", "utf-16-le", "as text: it looks like UTF-16"),
        ("a\nStraße\n", "latin-1", "as text: byte 0xdf in line 2 is not UTF-8"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, text, encoding, message):
    with pytest.raises(DatasetError, match=message):
        read_ids(listing(tmp_path, text, encoding))
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        read_ids(tmp_path / "nowhere")


def test_find_list(tmp_path):
    (tmp_path / "b.txt").write_text("x")
    assert find_list(tmp_path, None, ["a.txt", "b.txt"]) == tmp_path / "b.txt"
    assert find_list(tmp_path, "c.txt", ["a.txt"]).name == "c.txt"
    with pytest.raises(DatasetError, match=r"neither .*a\.txt nor .*c\.txt exists; .*--data-list"):
        find_list(tmp_path, None, ["a.txt", "c.txt"])
    with pytest.raises(DatasetError, match=r"nowhere does not exist; .*--data-dir"):
        find_list(tmp_path / "nowhere", None, ["a.txt"])


# ---- from entries to files


def make_label(path, value, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(path)


def label_of(root, line, **options):
    entries = read_list(listing(root, line), options.get("image_dir", "JPEGImages"))
    data = VOCSegmentation(root, entries, num_classes=TOY_CLASSES, **options)
    return int(data[0][1].max())


def test_the_label_that_a_line_names_is_read(toy_voc):
    make_label(toy_voc / "SegmentationClassAug/toy_0.png", 1, (40, 55))
    make_label(toy_voc / "SegmentationClass/toy_0.png", 2, (40, 55))
    make_label(toy_voc / "mine/masks/other name.png", 3, (40, 55))
    assert label_of(toy_voc, "toy_0") == 1
    assert label_of(toy_voc, "/JPEGImages/toy_0.jpg /SegmentationClass/toy_0.png") == 2
    assert label_of(toy_voc, "JPEGImages/toy_0.jpg mine/masks/other name.png") == 3
    # a folder given by hand goes before the one in the list
    assert label_of(toy_voc, "/JPEGImages/toy_0.jpg /SegmentationClass/toy_0.png", label_dir="SegmentationClassAug") == 1
    assert label_of(toy_voc, "JPEGImages/toy_0.jpg mine/masks/other name.png", label_dir="mine") == 3
    with pytest.raises(DatasetError, match=r"SegmentationClass/missing\.png does not exist"):  # never another one instead
        label_of(toy_voc, "/JPEGImages/toy_0.jpg /SegmentationClass/missing.png")


def test_the_picture_that_a_line_names_is_read(toy_voc):
    (toy_voc / "extra/x").mkdir(parents=True)
    shutil.move(toy_voc / "JPEGImages/toy_1.jpg", toy_voc / "extra/x/toy_1.jpeg")
    (toy_voc / "SegmentationClassAug/x").mkdir()
    shutil.copy(toy_voc / "SegmentationClassAug/toy_1.png", toy_voc / "SegmentationClassAug/x/toy_1.png")
    for line, options in (
        ("/extra/x/toy_1.jpeg", {}),
        ("extra/x/toy_1.jpeg SegmentationClassAug/toy_1.png", {}),
        ("x/toy_1.jpeg", {"image_dir": "extra"}),
        ("extra\\x\\toy_1.jpeg", {"image_dir": "extra"}),
    ):
        assert label_of(toy_voc, line, **options) in (3, 255)
    assert read_ids(toy_voc / "list.txt") == ["extra/x/toy_1"]  # where nobody says that pictures are in extra/


def test_a_list_of_pairs_needs_none_of_the_usual_folders(toy_voc):
    (toy_voc / "JPEGImages").rename(toy_voc / "a")
    (toy_voc / "SegmentationClassAug").rename(toy_voc / "b")
    assert label_of(toy_voc, "a/toy_0.jpg b/toy_0.png") in (3, 255)
    with pytest.raises(DatasetError, match="holds no JPEGImages/"):
        label_of(toy_voc, "a/toy_0.jpg b/toy_0.png\ntoy_1")


def test_one_id_cannot_stand_for_two_pairs(toy_voc):
    line = "/JPEGImages/toy_0.jpg /SegmentationClassAug/toy_{}.png\n"
    with pytest.raises(DatasetError, match="holds the id toy_0 twice, for other files"):
        label_of(toy_voc, line.format(0) + line.format(1))
    assert label_of(toy_voc, line.format(0) * 2) in (3, 255)


def test_a_missing_label_is_reported_where_labels_are(toy_voc):
    (toy_voc / "SegmentationClassAug").rename(toy_voc / "SegmentationClass")
    (toy_voc / "SegmentationClass/toy_0.png").unlink()
    with pytest.raises(DatasetError, match=r"SegmentationClass/toy_0\.png does not exist"):
        label_of(toy_voc, "toy_0")
