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

from dataset.classes import voc_palette
from dataset.voc import DatasetError
from scripts import check_dataset

SCRIPT = Path(check_dataset.__file__)


def put(root, image_id, label, size=None, mode=None):
    """A picture and its label: an array (mode L, or P, or RGB by its shape), or raw bytes."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    height, width = size or np.shape(label)[:2]
    Image.fromarray(np.full((height, width, 3), 77, dtype=np.uint8)).save(root / f"JPEGImages/{image_id}.jpg")
    image = Image.fromarray(np.asarray(label, dtype=np.uint8))
    if mode == "P":
        image.putpalette(voc_palette().tobytes())
    image.save(root / f"SegmentationClass/{image_id}.png")
    with open(root / "ImageSets/Segmentation/train.txt", "a", encoding="utf-8") as file:
        file.write(image_id + "\n")


def check(root, capsys, *options):
    """(exit status, what was printed)."""
    status = check_dataset.main(["--data-dir", str(root), "--workers", "0", *map(str, options)])
    return status, capsys.readouterr().out


def line(text, start):
    return next(row.split() for row in text.splitlines() if row.strip().startswith(start))


def test_a_good_set_counted_by_hand(tmp_path, capsys):
    put(tmp_path, "a", [[0, 0, 1], [255, 2, 1]])
    put(tmp_path, "b", [[1, 1, 1, 1, 1]], mode="P")
    report = tmp_path / "report.json"
    status, text = check(tmp_path, capsys, "--num-classes", 4, "--json", report)
    assert status == 0
    found = json.loads(report.read_text())
    assert (found["wrong"], found["good"], found["absent"], found["width"], found["height"]) == (False, 2, [3], [3, 5], [1, 2])
    assert [row["pixels"] for row in found["classes"]] == [2, 7, 1, 0]
    # 10 pixels that are not void: 2 of class 0, 7 of class 1, 1 of class 2; one of 11 pixels is void
    assert line(text, "0")[-2:] == ["20.000%", "1"]
    assert line(text, "1")[-2:] == ["70.000%", "2"]
    assert line(text, "2")[-2:] == ["10.000%", "1"]
    assert line(text, "3")[-2:] == ["0.000%", "0"]
    assert line(text, "void")[-1] == "9.091%"
    assert "classes that never occur: 3" in text
    assert line(text, "picture width") == ["picture", "width", "3", "to", "5", "pixels"]
    assert line(text, "picture height") == ["picture", "height", "1", "to", "2", "pixels"]
    assert text.endswith("OK: 2 good pairs, 2 lines in the list\n")


def test_every_fault_is_counted_and_named(tmp_path, capsys):
    good = np.array([[0, 1, 2], [2, 1, 0]])
    for name in ("good", "nopicture", "cutpicture", "nolabel", "cutlabel", "deep"):
        put(tmp_path, name, good)
    (tmp_path / "JPEGImages/nopicture.jpg").unlink()
    picture = tmp_path / "JPEGImages/cutpicture.jpg"
    picture.write_bytes(picture.read_bytes()[:-30])
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
    assert {kind: row["count"] for kind, row in found["problems"].items()} == {
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
        "high: 3, 9",
        "colour: mode RGB, 3 colours (0, 0, 0), (0, 128, 0), (128, 0, 0)",
        "turned: label 3x2, picture 2x3, sides swapped",
        "good (2 times)",
        "Pillow mode I;16",
        "1 labels look like a colour rendering of the VOC palette",
        "WRONG: 1 good pairs, 10 lines in the list",
    ):
        assert part in text


def test_examples_are_bounded(tmp_path, capsys):
    for k in range(9):
        put(tmp_path, f"id{k}", [[0, 1]])
        (tmp_path / f"JPEGImages/id{k}.jpg").rename(tmp_path / f"JPEGImages/id{k}.jpeg")
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert line(text, "missing picture")[-1] == "9"
    assert text.count("/JPEGImages/id") == 5 + 1  # five examples and the likely cause
    assert "and 4 more" in text
    assert "no id of the list has its picture" in text
    assert ".jpeg" in text


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
        (counts(v1=5, v2=7, v3=1), 3, 255, "count from 1 to 3: subtract 1"),
        (counts(v1=5, v2=7, v3=1, v255=4), 4, 255, "class 0 never occurs"),
        (counts(v0=5, v3=7, v11=1), 11, 255, "--ignore-label 11 if it is void"),
        (counts(v0=5, v1=2, v33=7), 19, 255, "pass --num-classes 34"),
        (counts(v2=5), 3, 255, "nothing but class 2 occurs"),
        (np.ones(256, dtype=np.int64), 21, 255, "255 different values"),
    ],
)
def test_likely_causes(found, num_classes, ignore_label, cause):
    causes = check_dataset.likely_causes(found, found, Counter(), num_classes, ignore_label)
    assert len(causes) == 1
    assert cause in causes[0]


def test_no_cause_is_made_up_for_good_labels():
    good = counts(v0=5, v1=2, v20=1, v255=1)
    assert check_dataset.likely_causes(good, counts(), Counter(), 21) == []
    assert check_dataset.likely_causes(counts(v0=5, v3=7, v11=1), counts(), Counter(), 11, 11) == []
    assert check_dataset.likely_causes(counts(), counts(), Counter(), 21) == []


def test_colour_labels_of_each_kind(tmp_path, capsys):
    put(tmp_path, "voc", voc_palette()[np.array([[0, 15, 255]])])
    put(tmp_path, "grey", np.repeat(np.array([[[1], [2], [7]]]), 3, axis=2))
    put(tmp_path, "other", np.array([[[1, 2, 3], [70, 70, 71]]]))
    put(tmp_path, "camvid", np.array([[[128, 128, 128], [0, 0, 192]]]))  # rows 7 and 36 of the palette, of which VOC has 21
    status, text = check(tmp_path, capsys)
    assert status == 1
    assert "1 labels look like a colour rendering of the VOC palette" in text
    assert "1 labels are grey pictures saved with three channels" in text
    assert "2 labels are colour pictures" in text


def test_binary_masks_are_wrong_although_each_file_can_be_read(tmp_path, capsys):
    put(tmp_path, "a", [[0, 255, 255]])
    put(tmp_path, "void", [[255, 255]])
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert "binary masks 0/255" in text
    assert "labels with nothing but void: 1" in text
    assert "WRONG: 2 good pairs" in text


def test_what_passes_here_can_be_read_for_training(tmp_path, capsys):
    put(tmp_path, "a", [[0, 1, 7]])
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 1
    assert check(tmp_path, capsys, "--num-classes", 2, "--ignore-label", 7)[0] == 0
    Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "SegmentationClass/a.png")  # one bit a pixel
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 0


def test_a_cut_png_picture_is_unreadable(tmp_path, capsys):
    put(tmp_path, "a", np.arange(64 * 64).reshape(64, 64) % 2)
    (tmp_path / "JPEGImages/a.jpg").unlink()
    picture = tmp_path / "JPEGImages/a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    assert check(tmp_path, capsys, "--num-classes", 2)[0] == 0
    picture.write_bytes(picture.read_bytes()[:4000])
    status, text = check(tmp_path, capsys, "--num-classes", 2)
    assert status == 1
    assert line(text, "unreadable picture")[-1] == "1"


def test_misuse(tmp_path, capsys):
    with pytest.raises(DatasetError, match="does not exist"):
        check(tmp_path / "nowhere", capsys)
    put(tmp_path, "a", [[0, 1]])
    with pytest.raises(DatasetError, match=r"missing\.txt does not exist"):
        check(tmp_path, capsys, "--data-list", tmp_path / "missing.txt")
    with pytest.raises(DatasetError, match="holds no Pictures/"):
        check(tmp_path, capsys, "--image-dir", "Pictures")
    (tmp_path / "classes.txt").write_text("sky\nroad\nsea\n")
    with pytest.raises(DatasetError, match="pass --num-classes 3"):
        check(tmp_path, capsys, "--num-classes", 2)


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
    assert "nowhere.txt does not exist" in done.stderr
    assert "Traceback" not in done.stderr
