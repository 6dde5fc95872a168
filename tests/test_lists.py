"""Users' lists of ids, and the pairs of files that they mean."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError, VOCSegmentation, find_list, read_class_names, read_ids, read_list
from dataset.classes import read_class_file
from dataset.lists import is_bare
from scripts.data.tables import read_table
from tests.helpers import TOY_CLASSES


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
        ("train/a.png trainannot/a.png\nval/a.png valannot/a.png\n", ["train/a", "val/a"]),  # two images, two ids
        ("\ufeffa\n\ufeffb\n", ["a", "b"]),
        ("  a  \n\n\tb", ["a", "b"]),
    ],
)  # fmt: skip
def test_ids_by_hand(tmp_path, text, ids):
    assert read_ids(listing(tmp_path, text)) == ids


OTHER_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # further line ends of str.splitlines


@pytest.mark.parametrize("sign", OTHER_ENDS)
def test_other_line_ends_are_part_of_a_name(tmp_path, sign):
    text = f"a{sign}b\rc\r\n{sign}d\ne{sign}\n"
    expected = [f"a{sign}b", "c", f"{sign}d", f"e{sign}"]
    assert read_ids(listing(tmp_path, text)) == expected
    assert read_list(listing(tmp_path, f"x{sign}y.jpg m{sign}n.png"))[0][1:] == (f"x{sign}y.jpg", f"m{sign}n.png")
    assert read_list(listing(tmp_path, f"x.jpg{sign}y.png"))[0].label is None  # one name, no pair
    (tmp_path / "classes.txt").write_bytes(f"sky{sign}blue 1 2 3\nroad{sign}7\r\n".encode())
    assert read_class_names(tmp_path, 2) == [f"sky{sign}blue", f"road{sign}7"]
    assert read_class_file(tmp_path).colors(2)[0] == (1, 2, 3)
    names = f"__ignore__\nsky{sign}blue\nroad"  # labelme's class_names.txt
    assert [name for name, _ in read_table(listing(tmp_path, names))] == [f"sky{sign}blue", "road"]


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
def test_lines_that_leave_the_folder_are_refused(tmp_path, line):
    with pytest.raises(DatasetError, match=r"list\.txt holds '.*' in line 2, which leaves .*; expected an id such as"):
        read_list(listing(tmp_path, f"good\n{line}\n"))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("JPEGImages/a.jpg SegmentationClass/a.png 3", "more columns than image and label, '3'"),
        ("a.jpg b.png c.png", "more columns than image and label, 'c.png'"),
        ("a.jpg\tb.png\tsplit", "more columns than image and label, 'split'"),
        ("JPEGImages/a.jpg 3", "more columns than image and label, '3'"),
        ("SegmentationClass/a.png JPEGImages/a.jpg", "the label comes before the image"),
        ("SegmentationClass/a.png /JPEGImages/a.png", "the label comes before the image"),
        ("JPEGImages/a.jpg,SegmentationClass/a.png", "its columns are separated by ','"),
        ("JPEGImages/a.jpg; SegmentationClass/a.png", "its columns are separated by ';'"),
        ("IMG_1.HEIC IMG_1.png", "IMG_1.HEIC is not read as an image"),
        ("JPEGImages/IMG_1.heic SegmentationClass/IMG_1.png", "convert it to JPEG or PNG"),
        ("IMG_1.heic", "IMG_1.heic is not read as an image"),
        ("a.jpg a.jpg", "a.jpg is not read as a label; expected a PNG"),
        ("a.jpg a.mat", "a.mat is not read as a label; expected a PNG"),
    ],
)
def test_lines_that_are_no_pair_are_refused(tmp_path, line, cause):
    with pytest.raises(DatasetError, match=re.escape("list.txt holds ") + ".* in line 2: .*" + re.escape(cause)):
        read_list(listing(tmp_path, f"good\n{line}\n"))


def test_ids_that_contain_a_suffix(tmp_path):
    ids = ["shot.png copy", "a.jpg.old", "p0.jpg___fuse", "b.jpeg (2)", "scan.pdf 3", "a.heic b"]
    entries = read_list(listing(tmp_path, "\n".join(ids)))
    assert [(entry.id, entry.image) for entry in entries] == [(name, None) for name in ids]
    assert all(map(is_bare, ids))
    assert not any(map(is_bare, ["a.jpg", "a.jpg 2", "a.jpg b.png", "a\nb", " a", "../a", "/a", "a//b", "\ufeffa", ""]))


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


def test_find_list(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("x")
    assert find_list(tmp_path, None, ["a.txt", "b.txt"]) == tmp_path / "b.txt"
    with pytest.raises(DatasetError, match=r"has no list of image ids \(a\.txt or c\.txt\): .*--data-list"):
        find_list(tmp_path, None, ["a.txt", "c.txt"])
    with pytest.raises(DatasetError, match=r"nowhere does not exist; .*--data-dir"):
        find_list(tmp_path / "nowhere", None, ["a.txt"])
    # a given list is tried as a path, then below the data set's folder
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert find_list(tmp_path, "b.txt", ["a.txt"]) == tmp_path / "b.txt"
    (tmp_path / "here/b.txt").write_text("y")
    assert find_list(tmp_path, "b.txt", ["a.txt"]).read_text() == "y"
    with pytest.raises(DatasetError, match=r": d\.txt and .*d\.txt do not exist; pass a file with one id per line"):
        find_list(tmp_path, "d.txt", ["b.txt"])
    with pytest.raises(DatasetError, match=r": \S*d\.txt does not exist"):
        find_list(tmp_path, str(tmp_path / "d.txt"), ["b.txt"])


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
    # a given folder is preferred to the one in the list
    assert label_of(toy_voc, "/JPEGImages/toy_0.jpg /SegmentationClass/toy_0.png", label_dir="SegmentationClassAug") == 1
    assert label_of(toy_voc, "JPEGImages/toy_0.jpg mine/masks/other name.png", label_dir="mine") == 3
    with pytest.raises(DatasetError, match=r"SegmentationClass/missing\.png does not exist"):  # no other file is used instead
        label_of(toy_voc, "/JPEGImages/toy_0.jpg /SegmentationClass/missing.png")


def test_the_image_that_a_line_names_is_read(toy_voc):
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
    assert read_ids(toy_voc / "list.txt") == ["extra/x/toy_1"]  # without saying that images are in extra/


def test_a_list_of_pairs_needs_none_of_the_usual_folders(toy_voc):
    (toy_voc / "JPEGImages").rename(toy_voc / "a")
    (toy_voc / "SegmentationClassAug").rename(toy_voc / "b")
    assert label_of(toy_voc, "a/toy_0.jpg b/toy_0.png") in (3, 255)
    with pytest.raises(DatasetError, match="holds no JPEGImages/"):
        label_of(toy_voc, "a/toy_0.jpg b/toy_0.png\ntoy_1")


def test_one_id_cannot_mean_two_pairs(toy_voc):
    line = "/JPEGImages/toy_0.jpg /SegmentationClassAug/toy_{}.png\n"
    with pytest.raises(DatasetError, match="holds the id toy_0 twice, with different files"):
        label_of(toy_voc, line.format(0) + line.format(1))
    assert label_of(toy_voc, line.format(0) * 2) in (3, 255)
    assert label_of(toy_voc, "toy_0\n" + line.format(0)) in (3, 255)  # in two spellings


def test_a_missing_label_is_reported_with_its_folder(toy_voc):
    (toy_voc / "SegmentationClassAug").rename(toy_voc / "SegmentationClass")
    (toy_voc / "SegmentationClass/toy_0.png").unlink()
    with pytest.raises(DatasetError, match=r"SegmentationClass/toy_0\.png does not exist"):
        label_of(toy_voc, "toy_0")


# ---- finding files


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".Jpeg", ".png", ".PNG", ".bmp", ".tif", ".TIFF", ".webp"])
def test_images_of_every_suffix_are_found(toy_voc, suffix):
    (toy_voc / "JPEGImages/toy_1.jpg").unlink()
    pixels = np.arange(33 * 47 * 3, dtype=np.uint32).reshape(33, 47, 3).astype(np.uint8)
    Image.fromarray(pixels).save(toy_voc / f"JPEGImages/toy_1{suffix}")
    for line in ("toy_1", "JPEGImages/toy_1.jpg SegmentationClassAug/toy_1.png"):
        data = VOCSegmentation(toy_voc, read_list(listing(toy_voc, line)), num_classes=TOY_CLASSES)
        data.check_files()
        assert data.image_path(data.ids[0]).name == f"toy_1{suffix}"
        assert abs(data[0][0][..., ::-1].astype(int) - pixels).mean() < (50 if "j" in suffix.lower() or "w" in suffix else 1)


def test_the_choice_among_several_images(toy_voc):
    """The first suffix of the list, lower case before upper case; an id may contain dots and folders."""
    for name in ("a.png", "a.JPG", "a.bmp", "b.PNG", "b.tif", "c.0001.jpeg", "d.jpg", "d.JPG", "x/a.webp"):
        path = toy_voc / "JPEGImages" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for name in ("a.PNG", "c.0001.png"):
        (toy_voc / "SegmentationClassAug" / name).touch()
    data = VOCSegmentation(toy_voc, ["a", "b", "c.0001", "d", "x/a"], num_classes=TOY_CLASSES)
    names = [str(data.image_path(id).relative_to(toy_voc / "JPEGImages")) for id in data.ids]
    assert names == ["a.JPG", "b.PNG", "c.0001.jpeg", "d.jpg", "x/a.webp"]
    assert data.label_path("a").name == "a.PNG"
    assert data.label_path("c.0001").name == "c.0001.png"
    assert data.label_path("b").name == "b.png"  # the expected path


def test_names_with_umlauts_as_macos_writes_them(toy_voc):
    (toy_voc / "JPEGImages/toy_0.jpg").rename(toy_voc / "JPEGImages/Ku\u0308he.jpg")
    (toy_voc / "SegmentationClassAug/toy_0.png").rename(toy_voc / "SegmentationClassAug/Ku\u0308he.png")
    data = VOCSegmentation(toy_voc, ["K\u00fche"], num_classes=TOY_CLASSES)
    data.check_files()
    assert data[0][1].shape == (40, 55)


def test_a_label_is_never_taken_for_its_image(toy_voc):
    for path in (toy_voc / "JPEGImages").iterdir():
        path.rename(toy_voc / "SegmentationClassAug" / path.name)
    options = {"image_dir": "SegmentationClassAug", "label_dir": "SegmentationClassAug", "num_classes": TOY_CLASSES}
    VOCSegmentation(toy_voc, ["toy_0"], **options).check_files()
    (toy_voc / "SegmentationClassAug/toy_0.jpg").unlink()
    with pytest.raises(DatasetError, match=r"no image for toy_0 in .*, which has toy_0\.png"):
        VOCSegmentation(toy_voc, ["toy_0"], **options).check_files()


def missing(root, lines):
    data = VOCSegmentation(root, read_list(listing(root, "\n".join(lines))), num_classes=TOY_CLASSES)
    with pytest.raises(DatasetError) as error:
        data.check_files()
    return str(error.value)


def test_missing_files_are_named_with_existing_folders(toy_voc):
    ids = [f"toy_{i}" for i in range(6)]
    VOCSegmentation(toy_voc, ids, num_classes=TOY_CLASSES).check_files()
    for name in ("JPEGImages/toy_1.jpg", "JPEGImages/toy_4.jpg", "SegmentationClassAug/toy_4.png"):
        (toy_voc / name).unlink()
    (toy_voc / "SegmentationClassAug/toy_2.png").rename(toy_voc / "SegmentationClassAug/toy_2.gif")
    images, labels = toy_voc / "JPEGImages", toy_voc / "SegmentationClassAug"
    assert missing(toy_voc, ids) == (
        f"files of the 6 ids are missing: no image for toy_1, toy_4 in {images}, which has files such as "
        f"{next(iter(images.iterdir())).name}; no label for toy_2, toy_4 in {labels}, which has toy_2.gif: expected .png"
    )
    text = missing(toy_voc, ["city/a", "JPEGImages/toy_0.jpg Masks/toy_0.png"])
    assert f"no image for a: the folder {images / 'city'} does not exist" in text
    assert f"no label for toy_0: the folder {toy_voc / 'Masks'} does not exist" in text
    many = missing(toy_voc, [f"id{i}" for i in range(130)])
    assert "id19 and 110 more in" in many
    assert "id19 in" in missing(toy_voc, [f"id{i}" for i in range(20)])


def test_many_missing_files_in_many_folders_are_one_short_line(toy_voc):
    """As in a Cityscapes without most files: 18 cities of 150 images."""
    names = [f"{city}/{city}_{i:06d}_leftImg8bit" for city in "abcdefghijklmnopqr" for i in range(150)]
    text = missing(toy_voc, names)
    assert text.count("more images in 15 other folders") == 1
    assert f"{15 * 150} more images in 15" in text
    assert f"no label for {'a_000000_leftImg8bit'}" in text
    assert len(text) < 6000 + 12 * len(str(toy_voc))
    assert "other folders" not in missing(toy_voc, [f"{city}/x" for city in "abc"])
    assert "1 more images in 1 other folders" in missing(toy_voc, [f"{city}/x" for city in "abcd"])


def test_the_longest_name(tmp_path):
    (tmp_path / "list.txt").write_text("é" * 127 + "x\n")  # 255 bytes
    assert read_ids(tmp_path / "list.txt") == ["é" * 127 + "x"]
    (tmp_path / "list.txt").write_text("é" * 128)
    with pytest.raises(DatasetError, match="too long for a file name"):
        read_ids(tmp_path / "list.txt")


def test_a_line_that_is_too_long_for_a_name_is_refused(tmp_path):
    """For example annotations in JSON: no file system has names of over 255 bytes."""
    (tmp_path / "list.json").write_text("{" + '"id": 1, ' * 100 + "}")
    with pytest.raises(DatasetError, match=r"in line 1, which is too long for a file name"):
        read_list(tmp_path / "list.json")


def test_a_list_may_be_a_folder_of_images(toy_voc):
    """All images in it, by name; below the folder of images their ids are paths."""
    (toy_voc / "JPEGImages/notes.txt").touch()
    (toy_voc / "JPEGImages/walk").mkdir()
    shutil.copy(toy_voc / "JPEGImages/toy_0.jpg", toy_voc / "JPEGImages/walk/b.JPG")
    shutil.copy(toy_voc / "JPEGImages/toy_0.jpg", toy_voc / "JPEGImages/walk/a.jpg")
    entries = VOCSegmentation.read_list(toy_voc / "JPEGImages", "JPEGImages")
    assert [entry.id for entry in entries] == [f"toy_{i}" for i in range(6)]
    VOCSegmentation(toy_voc, entries, num_classes=TOY_CLASSES).check_files()
    entries = VOCSegmentation.read_list(toy_voc / "JPEGImages/walk", "JPEGImages")
    assert [(entry.id, entry.image) for entry in entries] == [
        ("walk/a", "JPEGImages/walk/a.jpg"),
        ("walk/b", "JPEGImages/walk/b.JPG"),
    ]
    with pytest.raises(DatasetError, match="ImageSets holds no image; expected images such as"):
        VOCSegmentation.read_list(toy_voc / "ImageSets", "JPEGImages")
