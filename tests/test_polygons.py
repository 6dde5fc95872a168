"""Masks from polygons in COCO JSON against a naive test of each pixel, and refused files."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset import read_ids, read_label
from scripts import masks_to_indices
from scripts.data.polygons import Region
from utils.command import UserError

H, W = 9, 13


def naive(polygon, height, width):
    """Even-odd rule for the centre of each pixel: the number of edges to its left."""
    points = list(zip(polygon[::2], polygon[1::2]))
    mask = np.zeros((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            y, x = row + 0.5, column + 0.5
            left = 0
            for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
                if (y0 <= y) != (y1 <= y):
                    left += x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
            mask[row, column] = left % 2
    return mask


def test_polygons_against_a_naive_test_of_each_pixel():
    rng = np.random.default_rng(0)
    for corners in (3, 4, 7):
        for _ in range(20):
            polygon = rng.uniform(-3, 16, 2 * corners).tolist()  # also outside the image and crossing itself
            assert np.array_equal(Region((H, W), [polygon]).mask(), naive(polygon, H, W))
    square = Region((H, W), [[2, 1, 5, 1, 5, 4, 2, 4]]).mask()  # from corner to corner: 3 x 3 pixels
    assert np.argwhere(square).tolist() == [[y, x] for y in (1, 2, 3) for x in (2, 3, 4)]
    two = Region((H, W), [[2, 1, 5, 1, 5, 4, 2, 4], [3, 2, 7, 2, 7, 8, 3, 8]]).mask()
    assert two.sum() == 9 + 24 - 4  # parts of one annotation are joined
    runs = Region((2, 3), counts=[1, 2, 3]).mask()  # column by column
    assert runs.tolist() == [[False, True, False], [True, False, False]]
    assert not Region((H, W)).mask().any()


def square(x, y, side=2):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


CATEGORIES = [(0, "things", "none"), (3, "road", "things"), (7, "car", "things")]  # as in Roboflow; ids with gaps


def coco(path, names, categories=CATEGORIES, **more):
    """A road in each image, under a car."""
    images = [{"id": 10 + k, "file_name": name, "height": H, "width": W} for k, name in enumerate(names)]
    annotations = []
    for k, image in enumerate(images):
        annotations += [
            {"id": 2 * k, "image_id": image["id"], "category_id": 3, "segmentation": [square(k, 0, 6)]},
            {"id": 2 * k + 1, "image_id": image["id"], "category_id": 7, "segmentation": [square(k, 0)], **more},
        ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name, "supercategory": above} for number, name, above in categories],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H), (len(path.name), 2, 3)).save(path)


def run(source, out, *options):
    assert masks_to_indices.main([str(source), str(out), "--workers", "0", *map(str, options)]) == 0
    return out


def expected(k):
    labels = np.zeros((H, W), dtype=np.uint8)
    labels[0:6, k : k + 6] = 1
    labels[0:2, k : k + 2] = 2
    return labels


# paths of the JSON and of its images, and the ids
PLACES = {
    "roboflow": ("{}/_annotations.coco.json", "{}/{}.jpg", "{}/{}"),
    "coco": ("annotations/instances_{}2017.json", "{}2017/{}.jpg", "{}2017/{}"),
    "cvat": ("annotations/instances_{}.json", "images/{}/{}.png", "{}/{}"),
    "one folder of images": ("{}.json", "images/{}_{}.jpg", "{}/{}_{}"),
}


@pytest.mark.parametrize("name", PLACES)
def test_coco_json_becomes_a_data_set(tmp_path, name):
    json_file, pattern, image_id = PLACES[name]
    ids = {}
    for split in ("train", "val"):
        names = [pattern.format(split, f"p{k}") for k in range(3)]
        for each in names:
            image(tmp_path / "in" / each)
        coco(tmp_path / "in" / json_file.format(split), [each.rpartition("/")[2] for each in names])
        folder = image_id.count("{}") == 3
        ids[split] = [image_id.format(*[split] * (1 + folder), f"p{k}") for k in range(3)]
    out = run(tmp_path / "in", tmp_path / "out")
    assert (out / "classes.txt").read_text() == "background\nroad\ncar\n"
    for split, found in ids.items():
        assert read_ids(out / f"ImageSets/Segmentation/{split}.txt") == found
        for k, each in enumerate(found):
            assert np.array_equal(read_label(out / f"SegmentationClass/{each}.png", 3, colors={}), expected(k))
            assert [path.stem for path in (out / "JPEGImages").glob(f"{each}.*")] == [each.rpartition("/")[2]]
    run(tmp_path / "in", out)


def test_images_without_regions_and_names_in_a_file(tmp_path):
    coco(tmp_path / "in/result.json", ["images/p0.jpg", "images\\\\p1.jpg"])
    content = json.loads((tmp_path / "in/result.json").read_text())
    content["annotations"] = content["annotations"][:2]
    (tmp_path / "in/result.json").write_text(json.dumps(content))
    for k in range(2):
        image(tmp_path / f"in/images/p{k}.jpg")
    (tmp_path / "classes.txt").write_text("car\nroad\nbackground\nsky\n")
    out = run(tmp_path / "in", tmp_path / "out")
    order = np.array([2, 1, 0])
    assert np.array_equal(read_label(out / "SegmentationClass/p0.png", 4, colors={}), order[expected(0)])
    assert (read_label(out / "SegmentationClass/p1.png", 4, colors={}) == 2).all()


def labelme(path, shapes, name):
    rows = [{"label": label, "points": points, "shape_type": kind} for label, points, kind in shapes]
    content = {"version": "5.4", "shapes": rows, "imagePath": name, "imageHeight": H, "imageWidth": W, "imageData": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_labelme_json_becomes_a_data_set(tmp_path, suffix):
    """A rectangle, a polygon over it, ignored over both; an image without shapes is background; a circle by distance."""
    for k in range(3):
        image(tmp_path / f"in/p{k}{suffix}")
    corners = [[0, 0], [2, 0], [2, 2], [0, 2]]
    drawn = [
        ("road", [[6, 6], [0, 0]], "rectangle"),
        ("car", corners, "polygon"),
        ("__ignore__", [[0, 0], [1, 0], [1, 1], [0, 1]], None),
    ]
    labelme(tmp_path / "in/p0.json", drawn, f"..\\\\in\\\\p0{suffix}")
    labelme(tmp_path / "in/p1.json", [], f"p1{suffix}")
    labelme(tmp_path / "in/p2.json", [("road", [[5, 4], [5, 7]], "circle")], f"p2{suffix}")
    out = run(tmp_path / "in", tmp_path / "out")
    assert (out / "classes.txt").read_text() == "background\ncar\nroad\n"
    first = np.array([0, 2, 1])[expected(0)]
    first[0, 0] = 255
    assert np.array_equal(read_label(out / "SegmentationClass/p0.png", 3, colors={}), first)
    assert not read_label(out / "SegmentationClass/p1.png", 3, colors={}).any()
    y, x = np.mgrid[:H, :W] + 0.5
    assert np.array_equal(read_label(out / "SegmentationClass/p2.png", 3, colors={}) == 2, np.hypot(x - 5, y - 4) < 2.99)
    (tmp_path / "in/labels.txt").write_text("__ignore__\n_background_\nroad\ncar\n")
    out = run(tmp_path / "in", tmp_path / "named")
    first = expected(0)
    first[0, 0] = 255
    assert np.array_equal(read_label(out / "SegmentationClass/p0.png", 3, colors={}), first)
    labelme(tmp_path / "in/p1.json", [("road", [[1, 1], [2, 2]], "line")], f"p1{suffix}")
    with pytest.raises(UserError, match=r"p1\.json is not .* \(ValueError: a line of 2 points\); .*labelme2voc"):
        run(tmp_path / "in", tmp_path / "more")


def test_refused_files(tmp_path):
    image(tmp_path / "in/p0.jpg")
    for more, message in (
        (
            {"segmentation": {"size": [H, W], "counts": "abc"}},
            "annotation 1 .* is RLE of another kind or size; .*pycocotools",
        ),
        ({"segmentation": {"size": [H, W], "counts": [-1, H * W + 1]}}, "annotation 1 in .* is RLE of another kind or size"),
        ({"segmentation": [[1, 2, 3, float("nan"), 5, 6]]}, "annotation 1 in .* is no polygon"),
        ({"segmentation": [["x"] * 6]}, "is no complete COCO JSON"),
        ({"segmentation": [], "bbox": [1, 2, 3, 4]}, "annotation 1 in .* is a box without polygon"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 1 in .* is no polygon; expected polygons"),
        ({"category_id": 99}, "is no complete COCO JSON"),
    ):
        coco(tmp_path / "in/a.json", ["p0.jpg"], **more)
        with pytest.raises(UserError, match=message):
            run(tmp_path / "in", tmp_path / "out")
    coco(tmp_path / "in/a.json", ["p0.jpg"])
    coco(tmp_path / "in/b.json", ["p0.jpg"])
    with pytest.raises(UserError, match=r"b\.json annotates p0 again"):
        run(tmp_path / "in", tmp_path / "out")
    coco(tmp_path / "in/b.json", ["p1.jpg"], [(3, "road", ""), (7, "lorry", "")])
    with pytest.raises(UserError, match=r"b\.json has the categories \['road', 'lorry'\], but another JSON file has"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/b.json").unlink()
    for folder in "xy":
        image(tmp_path / f"in/{folder}/p5.jpg")
    coco(tmp_path / "in/a.json", ["p5.jpg"])
    with pytest.raises(UserError, match=r"p5\.jpg may be .*x/p5\.jpg or .*y/p5\.jpg"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
