"""The shapes data set: layout, labels, ignored borders, and the same bytes for the same seed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from scripts.data import landscapes
from scripts.make_shapes import CLASSES, main, make_image, outline, texture
from utils.command import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "make_shapes.py"


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The data set made by the command line, with twelve training images and six for validation."""
    out = tmp_path_factory.mktemp("shapes") / "not" / "there"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--train", "12", "--val", "6", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 12 training and 6 validation images of 7 classes (background, disc, ")
    return out


def read_list(root, split):
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().splitlines()


def test_layout(shapes):
    assert (shapes / "classes.txt").read_text().splitlines() == list(CLASSES)
    train, val = read_list(shapes, "train"), read_list(shapes, "val")
    assert (len(train), len(val)) == (12, 6)
    ids = train + val
    assert len(set(ids)) == 18
    assert sorted(os.listdir(shapes / "JPEGImages")) == sorted(f"{i}.jpg" for i in ids)
    assert sorted(os.listdir(shapes / "SegmentationClassAug")) == sorted(f"{i}.png" for i in ids)


def test_images_and_labels(shapes):
    sizes = set()
    for split in ("train", "val"):
        met = set()
        for image_id in read_list(shapes, split):
            image = Image.open(shapes / "JPEGImages" / f"{image_id}.jpg")
            label = Image.open(shapes / "SegmentationClassAug" / f"{image_id}.png")
            assert (image.format, image.mode, label.format, label.mode) == ("JPEG", "RGB", "PNG", "P")
            assert image.size == label.size
            width, height = image.size
            assert height % 2 == 1
            assert width % 2 == 1
            assert 161 <= height <= 193
            assert 187 <= width <= 225
            sizes.add(image.size)
            labels = np.array(label)
            assert set(np.unique(labels)) <= {*range(len(CLASSES)), 255}
            met |= set(np.unique(labels)) - {255}
            objects, parts = cv2.connectedComponents((labels > 0).astype(np.uint8))
            assert 2 <= objects - 1 <= 4
            for part in range(1, objects):
                assert len(set(np.unique(labels[parts == part])) - {255}) == 1  # one class per object
                rows, columns = np.nonzero(parts == part)
                assert max(np.ptp(rows), np.ptp(columns)) + 1 >= 45
                assert np.hypot(np.ptp(rows), np.ptp(columns)) <= 190
                assert rows.min() > 0
                assert columns.min() > 0
                assert rows.max() < height - 1
                assert columns.max() < width - 1
        assert met == set(range(len(CLASSES)))
    assert len(sizes) > 5


def test_ignored_pixels_separate_every_object_from_the_background(shapes):
    for image_id in read_list(shapes, "train"):
        labels = np.array(Image.open(shapes / "SegmentationClassAug" / f"{image_id}.png")).astype(int)
        for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()
        assert 0.02 < (labels == 255).mean() < 0.15  # thin
        assert (labels == 0).mean() > 0.4


def test_labels_fit_the_image():
    """An object has the strong pattern of its class (except the plain ring), the background has only weak contrast."""

    def contrast(gray, mask):
        return gray[mask].std()

    for number in range(6):
        image, labels = make_image(1, 0, number, (193, 225))
        gray = image.astype(float).mean(axis=2)
        soft = gray - cv2.blur(gray, (13, 13))
        ground = contrast(soft, labels == 0)
        for label in set(np.unique(labels)) - {0, 255}:
            away_from_edge = cv2.erode((labels == label).astype(np.uint8), np.ones((9, 9), np.uint8)) == 1
            if CLASSES[label] != "ring" and away_from_edge.sum() > 50:
                assert contrast(soft, away_from_edge) > 2 * ground


def test_same_seed_same_bytes(shapes, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "again"), "--train", "12", "--val", "6", "--seed", "5"]) == 0
    assert digests(tmp_path / "again") == digests(shapes)

    # fewer images are the first ones of more
    assert main(["--out", str(tmp_path / "fewer"), "--train", "3", "--val", "2", "--seed", "5"]) == 0
    first, full = digests(tmp_path / "fewer"), digests(shapes)
    images = [name for name in first if name.endswith((".jpg", ".png"))]
    assert len(images) == 10
    assert all(first[name] == full[name] for name in images)

    # with another seed no two images are equal
    assert main(["--out", str(tmp_path / "other"), "--train", "12", "--val", "6", "--seed", "6"]) == 0
    assert not set(digests(tmp_path / "other" / "JPEGImages").values()) & set(digests(shapes / "JPEGImages").values())
    assert len(set(digests(shapes / "JPEGImages").values())) == 18
    capsys.readouterr()


def test_size_and_a_second_run_into_the_same_folder(tmp_path, capsys):
    out = tmp_path / "s"
    assert main(["--out", str(out), "--train", "4", "--val", "0", "--size", "97,140"]) == 0
    assert main(["--out", str(out), "--train", "2", "--val", "1", "--size", "97,140", "--seed", "9"]) == 0
    assert len(read_list(out, "train")) == 2
    assert len(read_list(out, "val")) == 1
    for image_id in read_list(out, "train"):
        width, height = Image.open(out / "JPEGImages" / f"{image_id}.jpg").size
        assert 81 <= height <= 97
        assert 117 <= width <= 139
        assert height % 2 == width % 2 == 1
    capsys.readouterr()


def test_outlines_fill_the_unit_circle():
    for label in range(1, len(CLASSES)):
        for points in outline(label):
            assert np.hypot(*points.T).max() <= 1.001
        assert np.hypot(*outline(label)[0].T).max() > 0.9
    # areas computed by hand; _area uses the shoelace formula
    area = {CLASSES[label]: _area(outline(label)[0]) for label in range(1, len(CLASSES))}
    assert area["square"] == pytest.approx(2)
    assert area["triangle"] == pytest.approx(3 * np.sqrt(3) / 4)
    assert area["disc"] == pytest.approx(np.pi, rel=0.01)
    assert area["star"] == pytest.approx(10 * 0.5 * np.sin(np.pi / 5) / 2)
    assert area["cross"] == pytest.approx(2 * (2 * 0.38) * (2 * 0.92) - (2 * 0.38) ** 2)


def _area(points):
    x, y = points.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def test_textures_lie_in_the_unit_interval():
    u, v = np.mgrid[-3:3:61j, -3:3:61j]
    patterns = [texture(label, u, v) for label in range(1, len(CLASSES))]
    for pattern in patterns:
        assert pattern.shape == u.shape
        assert pattern.min() >= 0
        assert pattern.max() <= 1
    for i, a in enumerate(patterns):
        for b in patterns[:i]:
            assert np.abs(a - b).mean() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "--train is -1"),
        (["--train", "0", "--val", "0"], "at least one image"),
        (["--seed", "-3"], "--seed is -3"),
        (["--size", "33,500"], "--size is 33,500; expected sides of at least 97"),
    ],
)
def test_wrong_options(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["--out", str(tmp_path / "s"), *arguments])
    assert not (tmp_path / "s").exists()


def test_other_folders_are_not_changed(tmp_path):
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("mine\n")
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    before = digests(tmp_path)
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--train", "1", "--val", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"make_shapes.py: error: {tmp_path} holds other files; choose an empty or new folder with --out\n"
    assert digests(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file: .*; choose another folder"):
        main(["--out", str(tmp_path / "file"), "--train", "1", "--val", "0"])


def test_the_camera_agrees_with_geometry_over_flat_ground():
    """On flat ground at height 0, a ray b pixels below the horizon meets the ground at distance focal * eye / b."""
    flat = np.zeros((landscapes.SIDE, landscapes.SIDE), np.float32)
    terrain = landscapes.Terrain(flat, np.zeros((*flat.shape, 3), np.float32), flat.astype(np.uint8))
    distance, x, y = landscapes.look(np.random.default_rng(0), terrain, 97, 129, horizon=0.4)
    falls = np.arange(97) + 0.5 - 0.4 * 97  # pixels below the horizon
    expected = 0.9 * 129 * 16 / falls
    inside = (expected > landscapes.NEAR) & (expected < landscapes.FAR)
    assert inside.sum() > 40
    np.testing.assert_allclose(distance[inside], np.broadcast_to(expected[inside, None], (inside.sum(), 129)), rtol=1e-3)
    assert np.isinf(distance[falls < 0]).all()
    steps = np.hypot(x[inside][:, 1:] - x[inside][:, :-1], y[inside][:, 1:] - y[inside][:, :-1])
    np.testing.assert_allclose(steps, np.broadcast_to(expected[inside, None] / (0.9 * 129), steps.shape), rtol=2e-3, atol=1e-3)


def test_landscapes(tmp_path):
    command = ["--kind", "landscapes", "--train", "9", "--val", "1", "--size", "97,129", "--out"]
    for name in ("a", "b"):
        assert main([*command, str(tmp_path / name)]) == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    lines = (tmp_path / "a/classes.txt").read_text().splitlines()
    assert lines[0] == "sky 70 130 180"
    assert [line.split()[0] for line in lines] == list(landscapes.CLASSES)
    images, labels = zip(*(landscapes.make_landscape(0, 0, number, 97, 129) for number in range(9)))
    assert set(np.unique(labels)) == set(range(7))
    blue = [np.mean([image[label == name][:, 0].mean() for image, label in zip(images, labels)]) for name in (0, 3)]
    assert blue[0] > blue[1] + 50, "the sky is bluer than the woods"
    for label in labels:
        ground = (label != landscapes.SKY) & (label != landscapes.BALLOON)
        assert (np.diff(ground.astype(int), axis=0) >= 0).all(), "there is no sky below the ground"
