"""check_dataset.py on sets with known faults, counted by hand."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError, read_image
from dataset.classes import voc_palette
from scripts import check_dataset
from tests.helpers_pngs import PALETTE, RGB, png
from utils.command import UserError

SCRIPT = Path(check_dataset.__file__)


def put(root, image_id, label, size=None, mode=None):
    """Write an image and its label: an array (mode L or P, or RGB by its shape), or raw bytes."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    height, width = size or np.shape(label)[:2]
    image = Image.fromarray(np.full((height, width, 3), 77, dtype=np.uint8))
    image.save(root / f"JPEGImages/{image_id}.jpg", comment=image_id)  # so that no two files are equal
    image = Image.fromarray(np.asarray(label, dtype=np.uint8))
    if mode == "P":
        image.putpalette(voc_palette().tobytes())
    image.save(root / f"SegmentationClass/{image_id}.png")
    with open(root / "ImageSets/Segmentation/train.txt", "a", encoding="utf-8") as file:
        file.write(image_id + "\n")


def check(root, capsys, *options):
    """Run the script: (exit status, output)."""
    status = check_dataset.main(["--data-dir", str(root), "--workers", "0", *map(str, options)])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/train.txt", "net.pth", "old.json", "classes.txt"],
)
def test_the_report_replaces_only_an_earlier_report(tmp_path, capsys, name):
    put(tmp_path, "a", [[0, 1]])
    (tmp_path / "net.pth").write_bytes(b"PK weights")
    (tmp_path / "old.json").write_text('{"data_dir": "of a version before", "wrong": false}')
    (tmp_path / "classes.txt").write_text("a\nb\n")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=r"--json: the report would be written to .*(over|among the data)"):
        check(tmp_path, capsys, "--num-classes", 2, "--json", tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    for _ in range(2):
        assert check(tmp_path, capsys, "--num-classes", 2, "--json", tmp_path / "new.json")[0] == 0


def line(text, start):
    return next(row.split() for row in text.splitlines() if row.strip().startswith(start))


def test_a_good_data_set_counted_by_hand(tmp_path, capsys):
    put(tmp_path, "a", [[0, 0, 1], [255, 2, 1]])
    put(tmp_path, "b", [[1, 1, 1, 1, 1]], mode="P")
    report = tmp_path / "report.json"
    status, text = check(tmp_path, capsys, "--num-classes", 4, "--json", report)
    assert status == 0
    found = json.loads(report.read_text())
    assert (found["wrong"], found["good"], found["absent"], found["width"], found["height"]) == (False, 2, [3], [3, 5], [1, 2])
    assert [row["pixels"] for row in found["classes"]] == [2, 7, 1, 0]
    # 10 labelled pixels: 2 of class 0, 7 of class 1, 1 of class 2; 1 of 11 pixels is ignored
    assert line(text, "0")[-2:] == ["20.000%", "1"]
    assert line(text, "1")[-2:] == ["70.000%", "2"]
    assert line(text, "2")[-2:] == ["10.000%", "1"]
    assert line(text, "3")[-2:] == ["0.000%", "0"]
    assert line(text, "ignored")[-1] == "9.091%"
    assert "classes that never occur: 3" in text
    # 10 pixels of 3 classes that occur: 10 / (3 * 2), 10 / (3 * 7), 10 / (3 * 1), and 1
    assert found["class_weights"] == pytest.approx([10 / 6, 10 / 21, 10 / 3, 1.0])
    assert "balanced class weights of the list: 1.66667 0.47619 3.33333 1" in text
    assert line(text, "image width") == ["image", "width", "3", "to", "5", "pixels"]
    assert line(text, "image height") == ["image", "height", "1", "to", "2", "pixels"]
    assert text.endswith("OK: 2 good pairs, 2 lines in the list\n")


def test_every_fault_is_counted_and_named(tmp_path, capsys):
    good = np.array([[0, 1, 2], [2, 1, 0]])
    for name in ("good", "noimage", "cutimage", "nolabel", "cutlabel", "deep"):
        put(tmp_path, name, good)
    (tmp_path / "JPEGImages/noimage.jpg").unlink()
    image = tmp_path / "JPEGImages/cutimage.jpg"
    image.write_bytes(image.read_bytes()[:-30])
    (tmp_path / "SegmentationClass/nolabel.png").unlink()
    label = tmp_path / "SegmentationClass/cutlabel.png"
    label.write_bytes(label.read_bytes()[:-25])
    Image.fromarray(good.astype(np.uint16)).save(tmp_path / "SegmentationClass/deep.png")
    put(tmp_path, "colour", voc_palette()[good])
    put(tmp_path, "high", [[0, 9, 3]])
    put(tmp_path, "turned", good, size=(3, 2))
    put(tmp_path, "good", good)
    report = tmp_path / "report.json"
    status, text = check(tmp_path, capsys, "--num-classes", 3, "--json", report)
    assert status == 1
    found = json.loads(report.read_text())
    assert {kind: row["count"] for kind, row in found["problems"].items() if row["count"]} == {
        "missing picture": 1,
        "unreadable picture": 1,
        "missing label": 1,
        "unreadable label": 2,
        "colour label": 1,
        "wrong values": 1,
        "other size": 1,
        "duplicate id": 1,
    }
    assert found["good"] == 1
    assert found["ids"] == 10
    for part in (
        "high.png holds the values 3, 9; expected class indices 0..2; 255 is ignored",
        "colour: mode RGB, 3 colours (0, 0, 0), (0, 128, 0), (128, 0, 0)",  # two pixels each
        "turned.png is 3x2 pixels, its image 2x3; both must have the same size: the sides are swapped",
        "good (2 times)",
        "Pillow mode I",
        "1 labels look like a colour rendering of the classes: `python scripts/masks_to_indices.py`",
        "WRONG: 1 good pairs, 10 lines in the list",
    ):
        assert part in text


def test_examples_are_bounded(tmp_path, capsys):
    for k in range(9):
        put(tmp_path, f"id{k}", [[0, 1]])
        (tmp_path / f"JPEGImages/id{k}.jpg").rename(tmp_path / f"JPEGImages/id{k}.gif")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert line(text, "missing image")[-1] == "9"
    assert text.count("/JPEGImages/id") == 5 + 1  # five examples and the likely cause
    assert "and 4 more" in text
    assert "no id of the list has its image" in text
    assert ".gif" in text


def test_an_unsupported_format_is_named(tmp_path, capsys):
    for name in ("a", "b[1]"):
        put(tmp_path, name, [[0, 1]])
    (tmp_path / "JPEGImages/b[1].jpg").rename(tmp_path / "JPEGImages/b[1].heic")
    (tmp_path / "SegmentationClass/a.png").rename(tmp_path / "SegmentationClass/a.tif")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert "JPEGImages/b[1].heic has an unsupported format; expected .jpg, .jpeg, .png" in text
    assert "SegmentationClass/a.tif has an unsupported format; expected .png\n" in text


def test_grey_levels_as_opencv_writes_them(tmp_path, capsys):
    label = np.array([[0, 4, 15, 20, 255]])
    put(tmp_path, "a", label, mode="P")
    read = cv2.imread(str(tmp_path / "SegmentationClass/a.png"), cv2.IMREAD_GRAYSCALE)
    put(tmp_path, "a", read)
    put(tmp_path, "good", [[0, 1, 2, 3]], mode="P")
    status, text = check(tmp_path, capsys)
    assert status == 1
    assert "grey levels of the VOC palette" in text
    assert "palette PNGs were read as grey" in text


def counts(**pixels):
    values = np.zeros(256, dtype=np.int64)
    for name, number in pixels.items():
        values[int(name[1:])] = number
    return values


@pytest.mark.parametrize(
    ("found", "num_classes", "ignore_label", "cause"),
    [
        (counts(v0=5, v38=2, v113=1), 21, 255, "(38 = aeroplane)"),
        (counts(v0=5, v128=2, v147=1, v220=1), 21, 255, "(128 = car)"),
        (counts(v0=5, v255=7), 2, 255, "binary masks 0/255"),
        (counts(v0=5, v255=7), 2, 255, "`python scripts/masks_to_indices.py --binary MASKS NEW`"),
        (
            counts(v0=5, v1=7, v255=2),
            21,
            255,
            "classes.txt in the data set's folder, 2 lines such as `background` and `object`",
        ),
        (counts(v0=5, v128=2, v255=7), 21, 255, "three levels (a trimap: 0, 128, 255)"),
        (counts(v0=5, v127=2, v255=7), 2, 255, "three levels (a trimap: 0, 127, 255)"),
        (counts(**{f"v{i}": 1 for i in range(1, 16)}), 21, 255, "class 0 never occurs: if the labels count from 1, `python"),
        (counts(**{f"v{i}": 1 for i in range(1, 16)}), 21, 255, "--num-classes 15"),
        (counts(v0=5, v85=2, v170=1, v255=4), 4, 255, "multiples of 85"),
        (counts(v0=5, v17=2, v34=1), 21, 255, "multiples of 17"),
        (counts(v1=5, v2=7, v3=1), 3, 255, "count from 1 to 3: `python scripts/masks_to_indices.py --zero-is-void"),
        (counts(v1=5, v2=7, v3=1, v255=4), 4, 255, "class 0 never occurs"),
        (counts(v0=5, v3=7, v11=1), 11, 255, "--ignore-label 11 to ignore it"),
        (counts(v0=5, v1=2, v33=7), 19, 255, "pass --num-classes 34"),
        (counts(v0=5, v21=2, v56=7, v113=1), 11, 255, "4 values so far apart may be grey levels of colours"),
        (counts(v2=5), 3, 255, "only class 2 occurs"),
        (np.ones(256, dtype=np.int64), 21, 255, "255 different values"),
    ],
)
def test_likely_causes(found, num_classes, ignore_label, cause):
    causes = check_dataset.likely_causes(found, found, Counter(), num_classes, ignore_label)
    assert len(causes) == 1
    assert cause in causes[0]


def test_good_labels_have_no_cause():
    good = counts(v0=5, v1=2, v20=1, v255=1)
    assert check_dataset.likely_causes(good, counts(), Counter(), 21) == []
    assert check_dataset.likely_causes(counts(v0=5, v3=7, v11=1), counts(), Counter(), 11, 11) == []
    assert check_dataset.likely_causes(counts(v0=5, v1=7), counts(), Counter(), 2) == []
    assert check_dataset.likely_causes(counts(), counts(), Counter(), 21) == []


def test_colour_labels_of_each_kind(tmp_path, capsys):
    put(tmp_path, "voc", voc_palette()[np.array([[0, 15, 255]])])
    put(tmp_path, "grey", np.repeat(np.array([[[1], [2], [7]]]), 3, axis=2))
    put(tmp_path, "other", np.array([[[1, 2, 3], [70, 70, 71]]]))
    put(tmp_path, "camvid", np.array([[[128, 128, 128], [0, 0, 192]]]))  # rows 7 and 36 of the palette; VOC has 21 classes
    status, text = check(tmp_path, capsys)
    assert status == 1
    assert "1 labels look like a colour rendering of the classes: `python scripts/masks_to_indices.py`" in text
    assert "1 labels are grey, saved with three channels" in text
    assert "2 labels are colour images" in text


def test_binary_masks_are_wrong_although_each_file_is_valid(tmp_path, capsys):
    put(tmp_path, "a", [[0, 255, 255]])
    put(tmp_path, "void", [[255, 255]])
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert "binary masks 0/255" in text
    assert "labels with only ignored pixels: 1" in text
    assert "WRONG: 2 good pairs" in text


def save_png(root, image_id, data):
    (root / f"SegmentationClass/{image_id}.png").write_bytes(data)


def test_re_ordered_palettes(tmp_path, capsys):
    black, red, green, void = (0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)
    put(tmp_path, "good", [[0, 1, 255]], mode="P")
    put(tmp_path, "bad", [[0, 1, 2]])
    save_png(tmp_path, "bad", png([[0, 1, 2]], 2, PALETTE, [black, green, void]))
    status, text = check(tmp_path, capsys)
    assert status == 1
    assert line(text, "re-ordered palette")[-1] == "1"
    assert "bad.png has a palette that a tool re-ordered: index 1 has the colour of 2, 2 has the colour of 255" in text
    # without colours for four classes, only differing palettes can be detected
    status, text = check(tmp_path, capsys, "--num-classes", 4)
    assert status == 1
    assert "index 1: (0, 128, 0) in 1, as bad; (128, 0, 0) in 1, as good" in text
    assert "index 2" not in text  # only one file has it
    (tmp_path / "classes.txt").write_text("ground 0 0 0\nred 128 0 0\ngreen 0 128 0\nblue 0 0 128\n")
    assert line(check(tmp_path, capsys, "--num-classes", 4)[1], "re-ordered palette")[-1] == "1"
    (tmp_path / "classes.txt").unlink()
    # grey labels have no palette, and a shortened palette is no other one
    put(tmp_path, "grey", [[0, 1, 3]])
    save_png(tmp_path, "bad", png([[0, 1, 1]], 1, PALETTE, [black, red]))
    status, text = check(tmp_path, capsys, "--num-classes", 4)
    assert (status, line(text, "palettes differ")[-1]) == (0, "0")


def test_warnings_of_the_decoder(tmp_path, capfd):
    for name in ("good", "damaged"):
        put(tmp_path, name, np.arange(64 * 64).reshape(64, 64) % 2)
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"JPEGImages/{name}.jpg")
    path = tmp_path / "JPEGImages/damaged.jpg"
    data = bytearray(path.read_bytes())
    data[-600:-400] = bytes(200)
    path.write_bytes(data)
    assert read_image(path).shape == (64, 64, 3)  # OpenCV only prints a line to standard error
    assert "Corrupt JPEG data" in capfd.readouterr().err
    for workers in (0, 1):
        words = ["--data-dir", str(tmp_path), "--num-classes", "2", "--workers", str(workers)]
        assert check_dataset.main(words) == 1
        text, errors = capfd.readouterr()
        assert line(text, "damaged image")[-1] == "1"
        assert "JPEGImages/damaged.jpg: Corrupt JPEG data" in text
        assert "Corrupt" not in errors


def test_files_beyond_the_limits_do_not_stop_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # Pillow refuses more than twice as many
    for name in ("a", "b", "c"):
        put(tmp_path, name, [[0, 1, 0], [1, 0, 1]])
    (tmp_path / "JPEGImages/b.jpg").write_bytes(png([[0, 0]], size=(40000, 30000)))
    save_png(tmp_path, "c", png([[0, 0]], size=(40000, 30000)))
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert "b.jpg has more than 1073741824 pixels" in text
    assert "c.png is 30000x40000 pixels" in text
    assert "WRONG: 1 good pairs, 3 lines" in text


def test_orientation_and_lossy_labels(tmp_path, capsys):
    for name in ("turned", "lossy"):
        put(tmp_path, name, [[0, 1, 0], [1, 0, 1]])
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (3, 2)).save(tmp_path / "JPEGImages/turned.jpg", exif=exif)
    Image.new("L", (3, 2)).save(tmp_path / "SegmentationClass/lossy.png", "JPEG")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert line(text, "EXIF orientation")[-1] == "1"
    assert "lossy.png is a JPEG file despite its name" in text


def test_images_with_a_fraction_of_the_value_range_are_named(tmp_path, capsys):
    for name, top in (("fourteen", 16383), ("sixteen", 65535)):
        put(tmp_path, name, [[0, 1, 0], [1, 0, 1]])
        (tmp_path / f"JPEGImages/{name}.jpg").unlink()
        pixels = np.array([[[0] * 3, [top // 2] * 3, [top] * 3], [[1] * 3, [2] * 3, [3] * 3]])
        (tmp_path / f"JPEGImages/{name}.png").write_bytes(png(pixels, 16, RGB))
    # one bright pixel in a thousand does not make an image bright
    put(tmp_path, "spark", np.arange(1200).reshape(30, 40) % 2)
    (tmp_path / "JPEGImages/spark.jpg").unlink()
    pixels = np.full((30, 40, 3), 255)
    pixels[0, 0] = 60000
    (tmp_path / "JPEGImages/spark.png").write_bytes(png(pixels, 16, RGB))
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 0
    assert "2 images have hardly a value above 63 of 255 (fourteen, spark)" in text


def test_images_that_a_net_cannot_use_are_named(tmp_path, capsys):
    """8-bit values in a 16-bit file, which training also refuses, even with one bright no-data pixel."""
    for name, value in (("dark", 200), ("right", 60000)):
        put(tmp_path, name, [[0, 1, 0], [1, 0, 1]])
        (tmp_path / f"JPEGImages/{name}.jpg").unlink()
        pixels = np.full((2, 3, 3), value)
        pixels[0, 0] = 65535
        (tmp_path / f"JPEGImages/{name}.png").write_bytes(png(pixels, 16, RGB))
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert "dark.png holds 3 bands of uint16 with values from 0 to 200" in text
    assert "right.png" not in text


def test_the_files_that_a_list_names_are_checked(tmp_path, capsys):
    put(tmp_path, "a", [[0, 1, 0]])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(png([[0, 9, 0]]))
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("/JPEGImages/a.jpg /other/a.png\n", encoding="utf-8-sig")
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 0
    status, text = check(tmp_path, capsys, "--num-classes", 2, "--data-list", pairs)
    assert status == 1
    assert "other/a.png holds the value 9" in text


def test_files_that_pass_can_be_read_for_training(tmp_path, capsys):
    put(tmp_path, "a", [[0, 1, 7]])
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 1
    assert check(tmp_path, capsys, "--num-classes", 2, "--ignore-label", 7)[0] == 0
    Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "SegmentationClass/a.png")  # one bit per pixel
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 0


def test_a_truncated_png_image_is_unreadable(tmp_path, capsys):
    put(tmp_path, "a", np.arange(64 * 64).reshape(64, 64) % 2)
    (tmp_path / "JPEGImages/a.jpg").unlink()
    image = tmp_path / "JPEGImages/a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image)
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 0
    image.write_bytes(image.read_bytes()[:4000])
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert line(text, "unreadable image")[-1] == "1"


def test_misuse(tmp_path, capsys):
    with pytest.raises(DatasetError, match="does not exist"):
        check(tmp_path / "nowhere", capsys)
    put(tmp_path, "a", [[0, 1]])
    with pytest.raises(DatasetError, match=r"missing\.txt does not exist; pass a file"):
        check(tmp_path, capsys, "--data-list", tmp_path / "missing.txt")
    with pytest.raises(DatasetError, match="holds no Pictures/"):
        check(tmp_path, capsys, "--image-dir", "Pictures")
    for number in (1, 256):
        with pytest.raises(SystemExit) as end:
            check(tmp_path, capsys, "--num-classes", number)
        assert end.value.code == 2
    (tmp_path / "classes.txt").write_text("sky\nroad\nsea\n")
    with pytest.raises(DatasetError, match="leave --num-classes out to use all 3"):
        check(tmp_path, capsys, "--num-classes", 2)
    assert "1 ids, 3 classes\n" in check(tmp_path, capsys)[1]
    (tmp_path / "classes.txt").unlink()
    assert "1 ids, 21 classes (VOC's: neither classes.txt nor --num-classes is given)\n" in check(tmp_path, capsys)[1]


def test_several_lists(tmp_path, capsys):
    for name, label in (("a", [[0, 1]]), ("b", [[1, 2]]), ("c", [[0, 3]]), ("d", [[0, 0]])):
        put(tmp_path, name, label)
    folder = tmp_path / "ImageSets/Segmentation"
    (folder / "train.txt").write_text("a\nb\nb\n")
    (folder / "val.txt").write_text("b\nc\n")
    (tmp_path / "classes.txt").write_text("w\nx\ny\nz\n")
    names = ["ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"]
    report = tmp_path / "report.json"
    status, text = check(tmp_path, capsys, "--data-list", *names, "--json", report)
    assert status == 1  # for the id that is twice in one list
    assert f"{folder / 'train.txt'}, {folder / 'val.txt'}: 5 ids, 4 classes" in text
    assert "b (2 times)" in text
    assert f"warning: 1 ids are on both {folder / 'train.txt'} and {folder / 'val.txt'}: b" in text
    assert f"classes that never occur in {folder / 'train.txt'}: 3\n" in text
    assert f"classes that never occur in {folder / 'val.txt'}: none\n" in text
    assert "classes that never occur: none" in text
    assert f"balanced class weights of {folder / 'train.txt'}: 2 0.666667 1 1\n" in text  # 1, 3 and 2 pixels: b is drawn twice
    found = json.loads(report.read_text())
    assert [row["pixels"] for row in found["classes"]] == [2, 2, 1, 1]  # each pair counts once
    (folder / "train.txt").write_text("a\nd\n")
    status, text = check(tmp_path, capsys, "--data-list", *names)
    assert (status, "warning" in text) == (0, False)
    assert f"classes that never occur in {folder / 'train.txt'}: 2, 3\n" in text


LISTS = "ImageSets/Segmentation"


def write_list(root, name, *lines):
    (root / LISTS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(root / LISTS / f"{name}.txt")


def test_both_lists_are_read_unless_one_is_named(tmp_path, capsys):
    for name, label in (("a", [[0, 1]]), ("b", [[1, 0]]), ("c", [[0, 9]])):
        put(tmp_path, name, label)
    train, report = write_list(tmp_path, "train", "a", "b"), tmp_path / "report.json"
    words = ["--num-classes", 2, "--json", report]
    status, text = check(tmp_path, capsys, *words)
    alone = json.loads(report.read_text())
    assert (status, alone["data_list"], alone["lists"]) == (0, [train], None)
    assert "no val list (ImageSets/SegmentationAug/val.txt or ImageSets/Segmentation/val.txt): only train is checked\n" in text
    val = write_list(tmp_path, "val", "c")
    status, text = check(tmp_path, capsys, *words)
    both = json.loads(report.read_text())
    assert (status, both["data_list"], both["ids"], both["good"]) == (1, [train, val], 3, 2)
    assert "c.png holds the value 9" in text
    assert "no val list" not in text
    assert text.endswith("WRONG: 2 good pairs, 3 lines in the lists\n")
    # the report of two lists has the keys of a report of one
    assert {key: type(value) for key, value in both.items() if key != "lists"} == {
        key: type(value) for key, value in alone.items() if key != "lists"
    }
    for name, expected in (("train", 0), ("val", 1)):
        status, text = check(tmp_path, capsys, *words, "--data-list", f"{LISTS}/{name}.txt")
        assert (status, json.loads(report.read_text())["data_list"]) == (expected, [str(tmp_path / LISTS / f"{name}.txt")])


def test_images_that_are_in_both_lists_under_other_names(tmp_path, capsys):
    for name in ("a", "b", "c", "d", "same_size"):
        put(tmp_path, name, [[0, 1, 0], [1, 0, 1]])
    images = tmp_path / "JPEGImages"
    for copy in ("b", "c"):
        (images / f"{copy}.jpg").write_bytes((images / "a.jpg").read_bytes())
    data = bytearray((images / "a.jpg").read_bytes())
    data[data.index(b"\xff\xfe") + 4] ^= 1  # the comment
    (images / "same_size.jpg").write_bytes(data)
    train, val = write_list(tmp_path, "train", "d", "a"), write_list(tmp_path, "val", "b", "c", "same_size", "d")
    report = tmp_path / "report.json"
    for workers in (0, 1):
        words = ["--data-dir", str(tmp_path), "--num-classes", "2", "--workers", str(workers), "--json", str(report)]
        assert check_dataset.main(words) == 0
        text, found = capsys.readouterr().out, json.loads(report.read_text())
        assert f"warning: 1 ids are on both {train} and {val}: d\n" in text
        assert f"warning: 2 images are on both {train} and {val} under other names, byte for byte: a = b, a = c; " in text
        assert found["lists"]["shared"] == [{"lists": [train, val], "ids": ["d"]}]
        assert found["lists"]["copies"] == [{"lists": [train, val], "ids": [["a", "b"], ["a", "c"]]}]
        assert (found["wrong"], len(found["warnings"])) == (False, 2)
        assert "OK: 5 good pairs, 6 lines in the lists" in text
        assert check_dataset.main([*words, "--strict"]) == 1
        assert "WRONG: 5 good pairs" in capsys.readouterr().out
        assert json.loads(report.read_text())["wrong"]
    write_list(tmp_path, "val", "same_size")
    status, text = check(tmp_path, capsys, "--num-classes", 2, "--strict")
    assert (status, "warning" in text) == (0, False)


def test_ids_belong_to_their_list(tmp_path, capsys):
    """Bare ids and pairs of the same files are equal; one id may mean other files in another list."""
    for name in ("t0", "t1"):
        put(tmp_path, name, [[0, 1, 0], [1, 0, 1]])
    train = write_list(tmp_path, "train", "t0", "t1")
    val = write_list(tmp_path, "val", "/JPEGImages/t0.jpg /SegmentationClass/t0.png")
    report = tmp_path / "report.json"
    status, text = check(tmp_path, capsys, "--num-classes", 2, "--json", report)
    found = json.loads(report.read_text())
    assert (status, found["lists"]["shared"]) == (0, [{"lists": [train, val], "ids": ["t0"]}])
    assert [row["pixels"] for row in found["classes"]] == [6, 6]  # each pair counts once
    for folder in ("val_images", "val_masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "JPEGImages/t1.jpg").rename(tmp_path / "val_images/t0.jpg")
    (tmp_path / "SegmentationClass/t1.png").rename(tmp_path / "val_masks/t0.png")
    write_list(tmp_path, "train", "t0")
    write_list(tmp_path, "val", "val_images/t0.jpg val_masks/t0.png")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert (status, "warning" in text) == (0, False)
    assert "OK: 2 good pairs, 2 lines in the lists" in text


def test_faults_of_one_list_alone(tmp_path, capsys):
    """The labels of the other list hide neither cause nor fault."""
    for name, label in (("a", [[0, 255]]), ("b", [[255, 0]]), ("c", [[0, 1]]), ("d", [[1, 2]])):
        put(tmp_path, name, label)
    train, val = write_list(tmp_path, "train", "a", "b"), write_list(tmp_path, "val", "c")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert f"likely cause ({train}): the labels are binary masks 0/255" in text
    write_list(tmp_path, "train", "c")
    write_list(tmp_path, "val", "d")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert f"likely cause ({val}): the labels count from 1 to 2: `python" in text


def test_every_colour_of_colour_masks_is_listed(tmp_path, capsys):
    colors = np.array([[k, 2 * k, 3 * k] for k in range(40)], dtype=np.uint8)
    put(tmp_path, "a", colors[np.repeat(np.arange(40), np.arange(1, 41))].reshape(20, 41, 3))  # colour k on k + 1 pixels
    put(tmp_path, "b", colors[np.full((1, 1000), 7)])
    status, text = check(tmp_path, capsys)
    assert status == 1
    rows = text.splitlines()
    first = next(k for k, row in enumerate(rows) if row.startswith("colours of the colour labels"))
    found = {tuple(map(int, row.split()[:3])): tuple(map(int, row.split()[3:])) for row in rows[first + 1 : first + 41]}
    assert found == {(k, 2 * k, 3 * k): (k + 1 + 1000 * (k == 7), 1 + (k == 7)) for k in range(40)}


def test_command_line(tmp_path):
    put(tmp_path, "a", [[0, 1, 1], [0, 0, 1]])
    put(tmp_path, "b", [[1, 1, 0]])
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    words = [sys.executable, str(SCRIPT), "--data-dir", str(tmp_path), "--num-classes", "2", "--workers", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert line(done.stdout, "1") == ["1", "road", "55.556%", "2"]
    done = subprocess.run([*words, "--data-list", "nowhere.txt"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nowhere.txt do not exist" in done.stderr
    assert "Traceback" not in done.stderr
