"""masks_to_indices.py on the exports of labelling tools: every pixel, every list, and the files that are kept."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dataset import VOCSegmentation, read_class_names, read_ids, read_label, read_list, voc_palette
from scripts import check_dataset, masks_to_indices
from scripts.data.splits import check_ids, write_lines
from tests.helpers_pngs import GREY, PALETTE, RGB, png
from utils.command import UserError

# Labels of 12 small images, all different: row k is k in four digits of base 4; class 3 is ignored if so stated.
LABELS = {f"p{k:02d}": np.array([[k % 4, k // 4 % 4, k // 16 % 4, 1], [0, 1, 2, 0]], dtype=np.uint8) for k in range(12)}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def save_image(folder, name, size=(2, 4)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), len(name), dtype=np.uint8)).save(folder / name)


def run(source, out, *options):
    before = contents(source)
    assert masks_to_indices.main([str(source), str(out), "--workers", "0", *map(str, options)]) == 0
    assert contents(source) == before  # the source does not change
    return out


def lists(out):
    return [(out / f"ImageSets/Segmentation/{name}.txt").read_text().split() for name in ("train", "val")]


def check_labels(out, expected, num_classes=4):
    assert {path.stem for path in (out / "SegmentationClass").iterdir()} == set(expected)
    for image_id, label in expected.items():
        assert np.array_equal(read_label(out / f"SegmentationClass/{image_id}.png", num_classes, colors={}), label), image_id


COLORS = [(0, 0, 0), (250, 50, 83), (52, 209, 183), (10, 20, 30)]


def make_cvat(root, form):
    put(
        root,
        "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nbig cat:250,50,83::\ndog:52,209,183::\nnever:10,20,30::\n",
    )
    for k, (image_id, label) in enumerate(LABELS.items()):
        drawn = np.array(COLORS, dtype=np.uint8)[label]
        # CVAT's palettes have any order
        order = [2, 0, 3, 1]
        place = np.argsort(order)
        indexed = png(place[label], 8, PALETTE, [COLORS[i] for i in order])
        put(root, f"SegmentationClass/{image_id}.png", png(drawn, 8, RGB) if form == "rgb" or k % 2 else indexed)
        put(root, f"SegmentationObject/{image_id}.png", png(drawn[::-1], 8, RGB))
        save_image(root, f"JPEGImages/{image_id}.{'JPG' if k % 2 else 'png'}")
    put(root, "ImageSets/Segmentation/default.txt", "".join(f"{i}\n" for i in list(LABELS)[:10]))


@pytest.mark.parametrize("form", ["rgb", "palette"])
def test_cvat(tmp_path, form):
    make_cvat(tmp_path / "in", form)
    out = run(tmp_path / "in", tmp_path / "out")
    check_labels(out, LABELS)
    assert (out / "classes.txt").read_text() == "background 0 0 0\nbig cat 250 50 83\ndog 52 209 183\nnever 10 20 30\n"
    train, val = lists(out)
    assert len(val) == 2
    assert sorted(train + val) == list(LABELS)[:10]
    assert {p.name for p in (out / "JPEGImages").iterdir()} == {p.name for p in (tmp_path / "in/JPEGImages").iterdir()}
    assert contents(out / "JPEGImages") == contents(tmp_path / "in/JPEGImages")
    assert not (out / "SegmentationObject").exists()
    before = contents(out)
    run(tmp_path / "in", out, "--seed", 7)  # again: nothing changes, not even the lists
    assert contents(out) == before
    # a folder of masks alone, with table and list beside it
    run(tmp_path / "in/SegmentationClass", tmp_path / "plain/SegmentationClass")
    check_labels(tmp_path / "plain", LABELS)
    assert lists(tmp_path / "plain") == [train, val]


def test_cvat_subsets_are_kept(tmp_path):
    make_cvat(tmp_path / "in", "rgb")
    (tmp_path / "in/ImageSets/Segmentation/default.txt").unlink()
    put(tmp_path / "in", "ImageSets/Segmentation/Train.txt", "p03\np01\nnowhere\n")
    put(tmp_path / "in", "ImageSets/Segmentation/Validation.txt", "p02\n")
    assert lists(run(tmp_path / "in", tmp_path / "out")) == [["p03", "p01"], ["p02"]]


@pytest.mark.parametrize("masks", ["SegmentationClassPNG", "SegmentationClass"])
@pytest.mark.parametrize("first", ["__ignore__\n_background_\n", "_background_\n"])
def test_labelme2voc(tmp_path, masks, first):
    root = tmp_path / "in"
    put(root, "class_names.txt", first + "cat\ndog\nbird")
    expected = {}
    for image_id, label in LABELS.items():
        expected[image_id] = np.where(label == 3, 255, label)
        put(root, f"{masks}/{image_id}.png", png(expected[image_id], 8, PALETTE, voc_palette().tolist()))
        put(root, f"SegmentationClass/{image_id}.npy", b"numbers")
        put(root, f"SegmentationClassVisualization/{image_id}.jpg", b"to look at")
        save_image(root, f"JPEGImages/{image_id}.jpg")
    out = run(root, tmp_path / "out", "--val-share", 0.5)
    check_labels(out, expected)
    assert (out / "classes.txt").read_text() == "_background_ 0 0 0\ncat 128 0 0\ndog 0 128 0\nbird 128 128 0\n"
    train, val = lists(out)
    assert (len(train), len(val), sorted(train + val)) == (6, 6, sorted(LABELS))


def test_pairs_in_one_folder(tmp_path, capsys):
    root = tmp_path / "in"
    put(root, "classes.txt", "ground 0 0 0\nthing 255 255 255\n")
    expected = {}
    for k, (image_id, label) in enumerate(LABELS.items()):
        expected[image_id] = (label > 1).astype(np.uint8)
        white = expected[image_id] * 255
        data = (
            png(white, 8, GREY) if k % 2 else png(np.repeat(white[..., None], 3, axis=2), 8, RGB)
        )  # binary masks of both kinds
        put(root, f"{image_id}_mask.png", data)
        save_image(root, f"{image_id}.{'png' if k % 3 else 'jpg'}")
    save_image(root, "unlabelled.jpg")
    (root / "p11.png").unlink()
    out = run(root, tmp_path / "out", "--suffix", "_mask", "--seed", 3)
    assert "1 masks have no image: put p11.jpg" in capsys.readouterr().out
    check_labels(out, expected, 2)
    train, val = lists(out)
    assert sorted(train + val) == list(LABELS)[:11]  # an id without image would stop the training
    assert {path.name for path in (out / "JPEGImages").iterdir()} == {
        f"{i}.{'png' if k % 3 else 'jpg'}" for k, i in enumerate(LABELS) if i != "p11"
    }
    run(root, tmp_path / "other", "--suffix", "_mask.png", "--seed", 4, "--val-share", 0)
    assert (tmp_path / "other/ImageSets/Segmentation/train.txt").read_text().split() == list(LABELS)[:11]
    assert not (tmp_path / "other/ImageSets/Segmentation/val.txt").exists()
    with pytest.raises(UserError, match=r"holds no PNG whose name ends in _seg\.png"):
        run(root, tmp_path / "more", "--suffix", "_seg")


def test_the_split_depends_on_the_seed(tmp_path):
    make_cvat(tmp_path / "in", "rgb")
    splits = [lists(run(tmp_path / "in", tmp_path / str(n), "--seed", seed)) for n, seed in enumerate((1, 1, 2))]
    assert splits[0] == splits[1] != splits[2]


def test_zero_is_void(tmp_path):
    """As in ADE20K: 0 is "other", 1..N are the classes."""
    stored = {"a": np.array([[0, 1, 150, 2]], dtype=np.uint8), "b": np.array([[3, 255, 0, 0]], dtype=np.uint8)}
    expected = {"a": np.array([[255, 0, 149, 1]]), "b": np.array([[2, 255, 255, 255]])}
    for image_id, values in stored.items():
        put(tmp_path, f"annotations/{image_id}.png", png(values, 8, GREY))
    run(tmp_path / "annotations", tmp_path / "ade/SegmentationClass", "--zero-is-void")
    check_labels(tmp_path / "ade", expected, 150)
    put(tmp_path, "classes.txt", "".join(f"name {i}\n" for i in range(150)))  # names without values belong to 1..N
    run(tmp_path / "annotations", tmp_path / "named/SegmentationClass", "--zero-is-void")
    check_labels(tmp_path / "named", expected, 150)
    assert (tmp_path / "named/classes.txt").read_text() == (tmp_path / "classes.txt").read_text()
    put(tmp_path, "classes.txt", "".join(f"name {i}\n" for i in range(149)))
    with pytest.raises(UserError, match="1 of 2 masks could not be converted"):
        run(tmp_path / "annotations", tmp_path / "few/SegmentationClass", "--zero-is-void")


def test_zero_is_void_in_colours(tmp_path):
    """A table of colours has a row for 0, which is then no class."""
    make_cvat(tmp_path / "in", "rgb")
    out = run(tmp_path / "in", tmp_path / "out", "--zero-is-void")
    check_labels(out, {i: np.where(label == 0, 255, label.astype(int) - 1) for i, label in LABELS.items()}, 3)
    assert (out / "classes.txt").read_text() == "big cat 250 50 83\ndog 52 209 183\nnever 10 20 30\n"
    with Image.open(out / "SegmentationClass/p01.png") as image:
        assert image.getpalette()[:9] == [250, 50, 83, 52, 209, 183, 10, 20, 30]


def test_incomplete_exports(tmp_path, capsys):
    """Without images the lists name all masks. A colour that is not in the table is refused, and no list is written."""
    make_cvat(tmp_path / "in", "rgb")
    for path in (tmp_path / "in/JPEGImages").iterdir():
        path.unlink()
    out = run(tmp_path / "in", tmp_path / "out")
    assert "12 masks have no image" in capsys.readouterr().out
    assert sorted(image_id for found in lists(out) for image_id in found) == list(LABELS)[:10]
    put(tmp_path / "in", "labelmap.txt", "background:0,0,0::\nbig cat:250,50,83::\nno colour:::\n")
    with pytest.raises(UserError, match="masks could not be converted"):
        run(tmp_path / "in", tmp_path / "refused")
    assert "(52, 209, 183) on 2 pixels" in capsys.readouterr().err
    assert not (tmp_path / "refused/ImageSets").exists()
    for bad in (tmp_path / "in", tmp_path / "in/new"):
        with pytest.raises(UserError, match="is inside the source folder"):
            run(tmp_path / "in", bad)


def masks_and_images(root, mask, image, count=5):
    """``count`` masks of three indices and their images; {} is the number in both names."""
    for k in range(count):
        put(root, mask.format(k), png([[0, 1, k % 3]], 8, GREY))
        save_image(root, image.format(k), (1, 3))


@pytest.mark.parametrize(
    ("mask", "image", "id"),
    [
        ("im/masks/{}.png", "im/images/{}.jpg", "im/{}"),
        ("im_masks/masks/{}_mask.png", "im_masks/images/{}.jpg", "im_masks/{}"),
        ("masks/{}_mask.png", "images/{}.png", "{}"),
        ("Labels/{}.png", "img/{}.png", "{}"),
        ("label/{}.png", "imgs/{}.JPG", "{}"),
        ("{}.png", "{}.jpg", "{}"),  # in one folder
        ("{}_mask.png", "{}.png", "{}"),
        ("truth/{}.png", "photos/{}.jpg", "{}"),
        ("train_masks/{}.png", "train_images/{}.jpg", "train/{}"),
        ("truth/{}_mask.png", "a/b/{}.bmp", "{}"),
    ],
)
def test_masks_beside_images_become_a_data_set(tmp_path, mask, image, id):
    masks_and_images(tmp_path / "in", mask, image)
    out = run(tmp_path / "in", tmp_path / "out")
    found = [image_id for each in lists(out) for image_id in each]
    assert sorted(found) == [id.format(k) for k in range(5)]
    VOCSegmentation(out, found, num_classes=3).check_files()


@pytest.mark.parametrize(
    ("mask", "image", "message"),
    [
        ("masks/{}_seg.png", "images/{}.jpg", r"5 masks, such as .*masks/0_seg\.png, and 5 images, .*; pass --suffix _seg"),
        ("masks/{}_seg.png", "images/{}.png", "no image has the name of a mask; pass --suffix _seg"),
        ("masks/m{}.png", "images/i{}.png", "pass their endings with --suffix and --image-suffix"),
        ("train-masks/{}.png", "photos/i{}.jpg", "pass their endings with --suffix and --image-suffix"),
        ("truth/m{}.png", "photos/i{}.jpg", "pass their endings with --suffix and --image-suffix"),
    ],
)
def test_images_with_other_names_than_masks_are_refused(tmp_path, mask, image, message):
    masks_and_images(tmp_path / "in", mask, image)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["images", "photos", "."])
@pytest.mark.parametrize("names", ["", "a\nb\n", "a 0 0 0\nb 1 2 3\n"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_photographs_are_no_masks(tmp_path, folder, mode, names):
    (tmp_path / "in" / folder).mkdir(parents=True)
    if names:
        (tmp_path / "classes.txt").write_text(names)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "in" / folder / "a.png")
    with pytest.raises(UserError, match=r"1 of 1 masks look like photographs.*a\.png.*holds images/ and masks/"):
        run(tmp_path / "in", tmp_path / "out")
    Image.fromarray(noise).save(tmp_path / "in" / folder / "b.jpg")
    (tmp_path / "in" / folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"holds no PNG, but \.jpg files"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_beside_the_folders_are_kept(tmp_path):
    masks_and_images(tmp_path / "in", "masks/{}.png", "images/{}.jpg")
    (tmp_path / "in/train.txt").write_text("0\n4.jpg\n")
    (tmp_path / "in/val.txt").write_text("2\n")
    assert lists(run(tmp_path / "in", tmp_path / "out")) == [["0", "4"], ["2"]]
    (tmp_path / "in/train.txt").write_text("other\n")  # no id of the masks
    train, val = lists(run(tmp_path / "in", tmp_path / "more"))
    assert sorted(train + val) == list("01234")


def test_masks_without_images_are_reported(tmp_path, capsys):
    """No failing command is printed; with images in place the printed command succeeds."""
    for k in range(5):
        put(tmp_path / "in", f"{k}.png", png([[0, 1, 2]], 8, GREY))
    run(tmp_path / "in", tmp_path / "indices")
    text = capsys.readouterr().out
    assert "no images were copied" in text
    assert "JPEGImages/" in text
    assert "check_dataset" not in text
    run(tmp_path / "in", tmp_path / "mine/SegmentationClass")
    text = capsys.readouterr().out
    assert f"5 masks have no image: put 0.jpg, .png or the like into {tmp_path / 'mine/JPEGImages'}/" in text
    assert "next:" not in text
    for k in range(5):
        save_image(tmp_path, f"mine/JPEGImages/{k}.png", (1, 3))
    run(tmp_path / "in", tmp_path / "mine/SegmentationClass")
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert last[:3] == ["next:", "python", "scripts/check_dataset.py"]
    assert check_dataset.main([*last[3:], "--workers", "0"]) == 0


def test_existing_files_are_kept(tmp_path):
    make_cvat(tmp_path / "in", "rgb")
    out = tmp_path / "out"
    put(out, "JPEGImages/p01.JPG", b"another image")
    with pytest.raises(UserError, match="1 of 12 masks"):
        run(tmp_path / "in", out)
    assert contents(out)["JPEGImages/p01.JPG"] == b"another image"
    put(tmp_path / "other", "classes.txt", "mine\n")
    with pytest.raises(UserError, match="names the classes mine, but the masks have background, big cat"):
        run(tmp_path / "in", tmp_path / "other")
    assert list(contents(tmp_path / "other")) == ["classes.txt"]


def test_colours_beside_the_new_folder_are_used(tmp_path):
    put(tmp_path, "drawn/a.png", png([[COLORS[2], COLORS[1]]], 8, RGB))
    put(tmp_path, "mine/classes.txt", "dog 52 209 183\ncat 250 50 83\n")
    run(tmp_path / "drawn", tmp_path / "mine/SegmentationClass")
    check_labels(tmp_path / "mine", {"a": np.array([[0, 1]])}, 2)


def test_the_data_set_is_ready_for_training(tmp_path):
    """From the export to a successful check with the command in the help and the printed one."""
    make_cvat(tmp_path / "in", "palette")
    put(tmp_path / "in", "labelmap.txt", "background:0,0,0::\nbig cat:250,50,83::\ndog:52,209,183::\nnever:10,20,30::\n")
    script = masks_to_indices.__file__
    done = subprocess.run(
        [sys.executable, script, str(tmp_path / "in"), str(tmp_path / "out")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    last = shlex.split(done.stdout.splitlines()[-1])
    assert last[:3] == ["next:", "python", "scripts/check_dataset.py"]
    assert check_dataset.main([*last[3:], "--workers", "0"]) == 0


@pytest.mark.parametrize("name", ["a\nb", "a\rb", " a", "a\t", "a\n", "a.jpg 3", "a.jpg b.png", "a.heic", "sub/a.jpg", "a\\b"])
def test_a_name_that_cannot_be_a_line_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot be a line of a list of ids; rename that file"):
        check_ids(["b", name])
    names = ["a b", "c\u2028d", "shot.png copy", "p0.5", "train/a_jpg.rf.0f3a", "a,b"]
    check_ids(names)
    write_lines(tmp_path / "train.txt", names)
    assert read_ids(tmp_path / "train.txt") == names


# ---- the data set reads the output for every layout

STEMS = [f"p{k}" for k in range(6)]
VALUES = {stem: np.array([[k % 3, k // 3, 2, 0], [0, 1, 2, k % 2]], dtype=np.uint8) for k, stem in enumerate(STEMS)}
HEX = [(0, 0, 0), (255, 0, 16), (1, 2, 3)]  # colours of the three classes in colour masks


def grey(stem):
    return png(VALUES[stem], 8, GREY)


def drawn(stem):
    return png(np.array(HEX, dtype=np.uint8)[VALUES[stem]], 8, RGB)


CSV = "name,r,g,b\nland,0,0,0\nsea,255,0,16\nice,1,2,3\n"
SUPERVISELY = {
    "obj_class_to_machine_color.json": '{"road": [2, 2, 2], "car": [1, 1, 1]}',
    "ds/masks_human/p0.jpg.png": "to look at",
}
SUPERANNOTATE = {
    "classes/classes.json": '[{"name": "car", "color": "#ff0010"}, {"name": "tree", "color": "#010203"}]',
    "p0.jpg___save.png": "another",
}
HASTY = '[{"class_name": "car", "png_index": 1}, {"class_name": "tree", "png_index": 2}]'
COCO = '{"categories": [{"id": 1, "name": "car"}, {"id": 0, "name": "x"}, {"id": 2, "name": "t"}]}'
ROBOFLOW = "Pixel Value, Class\n0, background\n1, crack\n2, spall\n"

# name -> id, image and mask of a stem; kind of mask; {file: content}, the first names the classes; their names; options
LAYOUTS = {
    "roboflow": ("train/{}_jpg.rf.0a1b", "train/{}_jpg.rf.0a1b.jpg", "train/{}_jpg.rf.0a1b_mask.png", grey,
                 {"train/_classes.csv": ROBOFLOW}, "background crack spall"),
    "supervisely": ("ds/{}", "ds/img/{}.jpg", "ds/masks_machine/{}.jpg.png", grey, SUPERVISELY, "background car road"),
    "supervisely, png": ("{}", "img/{}.png", "masks_machine/{}.png.png", grey, {}, ""),
    "superannotate": ("{}", "{}.jpg", "{}.jpg___fuse.png", drawn, SUPERANNOTATE, "background car tree"),
    "deepglobe": ("train/{}", "train/{}_sat.jpg", "train/{}_mask.png", drawn, {"class_dict.csv": CSV}, "land sea ice"),
    "deepglobe, said": ("{}", "{}_sat.jpg", "{}_m.png", drawn, {"class_dict.csv": CSV}, "land sea ice",
                        "--suffix", "_m", "--image-suffix", "_sat"),
    "camvid": ("train/{}", "train/{}.png", "train_labels/{}_L.png", drawn,
               {"label_colors.txt": "0 0 0\tGround\n255 0 16\tSky\n1 2 3\tTree\n"}, "Ground Sky Tree", "--suffix", "_L"),
    "segnet": ("train/{}", "train/{}.png", "trainannot/{}.png", grey, {}, ""),
    "ade": ("training/{}", "images/training/{}.jpg", "annotations/training/{}.png", grey, {}, ""),
    "two folders": ("a/{}", "Images/a/{}.JPG", "Masks/a/{}.png", grey, {"labels.txt": "a\nb\nc\n"}, "a b c"),
    "folders in splits": ("train/{}", "train/images/{}.jpg", "train/labels/{}.png", grey, {"notes.json": COCO}, "x car t"),
    "pairs": ("{}", "{}.jpg", "{}_mask.png", grey, {"label_classes.json": HASTY}, "background car tree"),
    "copy": ("{}.png copy", "{}.png copy.jpg", "{}.png copy_seg.png", grey, {}, "", "--suffix", "_seg"),
    "cvat": ("{}", "JPEGImages/{}.jpg", "SegmentationClass/{}.png", drawn,
             {"labelmap.txt": "bg:0,0,0::\ncar:255,0,16::\ntree:1,2,3::\n"}, "bg car tree"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_output_is_read(tmp_path, name, capsys):
    image_id, image, mask, kind, files, names, *options = LAYOUTS[name]
    for stem in STEMS:
        save_image(tmp_path / "in", image.format(stem))
        put(tmp_path / "in", mask.format(stem), kind(stem))
    for path, content in files.items():
        put(tmp_path / "in", path, content)
    out = run(tmp_path / "in", tmp_path / "out", *options)
    said = capsys.readouterr().out
    train, val = (read_list(out / f"ImageSets/Segmentation/{split}.txt") for split in ("train", "val"))
    assert [len(train), len(val)] == [5, 1]
    data = VOCSegmentation(out, train + val, num_classes=3)
    data.check_files()
    assert sorted(data.ids) == [image_id.format(stem) for stem in STEMS]
    for index, found in enumerate(data.ids):
        stem = next(stem for stem in STEMS if stem in found)
        assert np.array_equal(data.load(index)[1], VALUES[stem])
        assert data.image_path(found).read_bytes() == (tmp_path / "in" / image.format(stem)).read_bytes()
    assert (data.names or []) == names.split()
    assert not names or f"3 classes, from {tmp_path / 'in' / next(iter(files))}" in said
    before = contents(out)
    run(tmp_path / "in", out, *options)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("label_colors.txt", "0 0 0\tVoid\n255 0 16\tSky\n1 2 3\tTree\n"),  # CamVid
        ("class_dict.csv", "name,r,g,b\nSky,255,0,16\nvoid,0,0,0\nTree,1,2,3\n"),
        ("labelmap.txt", "Sky:255,0,16::\nTree:1,2,3::\nunlabelled:0,0,0::\n"),
    ],
)
def test_a_colour_of_the_ignore_label_is_no_class(tmp_path, capsys, name, lines):
    """HEX[0] is the ignore label, so the others are classes 0 and 1; class indices are ambiguous and refused."""
    for stem in STEMS:
        put(tmp_path / "in", f"{stem}.png", drawn(stem))
    put(tmp_path / "in", name, lines)
    run(tmp_path / "in", tmp_path / "out/SegmentationClass")
    assert "is the ignore label (255), not a class" in capsys.readouterr().out
    check_labels(tmp_path / "out", {stem: np.where(VALUES[stem] == 0, 255, VALUES[stem].astype(int) - 1) for stem in STEMS}, 2)
    assert (tmp_path / "out/classes.txt").read_text() == "Sky 255 0 16\nTree 1 2 3\n"
    put(tmp_path / "in", "p0.png", png([[0, 1]], 8, GREY))
    with pytest.raises(UserError, match=r"holds class indices, and .* has a line for"):
        run(tmp_path / "in", tmp_path / "other")


def test_masks_of_16_bits_become_8(tmp_path, capsys):
    put(tmp_path / "in", "a.png", png([[0, 1, 254, 255]], 16, GREY))
    run(tmp_path / "in", tmp_path / "out/SegmentationClass")
    assert read_label(tmp_path / "out/SegmentationClass/a.png", 255).tolist() == [[0, 1, 254, 255]]
    put(tmp_path / "in", "a.png", png([[0, 300]], 16, GREY))
    with pytest.raises(UserError):
        run(tmp_path / "in", tmp_path / "other")
    assert "is grey of 16 bits and holds 300; expected values of 0..255" in capsys.readouterr().err
    put(tmp_path / "in", "a.png", png([[0, 65535]], 16, GREY))
    run(tmp_path / "in", tmp_path / "two/SegmentationClass", "--binary")
    assert read_label(tmp_path / "two/SegmentationClass/a.png", 2).tolist() == [[0, 1]]


def test_folders_named_as_splits_become_the_lists(tmp_path, capsys):
    for k, stem in enumerate(STEMS):
        folder = ("Training", "Training", "VAL2017", "test", "test", "Training")[k]
        put(tmp_path, f"annotations/{folder}/{stem}.png", grey(stem))
    run(tmp_path / "annotations", tmp_path / "ade/SegmentationClass")
    assert lists(tmp_path / "ade") == [["Training/p0", "Training/p1", "Training/p5"], ["VAL2017/p2"]]
    assert read_ids(tmp_path / "ade/ImageSets/Segmentation/test.txt") == ["test/p3", "test/p4"]
    said = capsys.readouterr().out
    assert "3 ids, by the names of the folders" in said
    run(tmp_path / "annotations", tmp_path / "ade/SegmentationClass")  # again: the same lists are printed
    again = capsys.readouterr().out
    assert "the existing lists are kept: " in again
    assert again.splitlines()[-1] == said.splitlines()[-1]
    # without a folder for validation, val is drawn from train, never from test
    (tmp_path / "annotations/VAL2017/p2.png").unlink()
    put(tmp_path, "annotations/more/p2.png", grey("p2"))
    run(tmp_path / "annotations", tmp_path / "new/SegmentationClass", "--val-share", 0.4)
    train, val = lists(tmp_path / "new")
    assert (len(train), len(val), sorted(train + val)) == (2, 1, ["Training/p0", "Training/p1", "Training/p5"])
    out = capsys.readouterr().out
    assert "val drawn from train with seed 0" in out
    assert "1 ids are in no list" in out


def test_a_class_named_train_is_no_split(tmp_path):
    for stem, folder in zip(STEMS, ["train", "car", "bus"] * 2):
        put(tmp_path, f"masks/{folder}/{stem}.png", grey(stem))
    run(tmp_path / "masks", tmp_path / "out/SegmentationClass")
    train, val = lists(tmp_path / "out")
    assert (len(train), len(val)) == (5, 1)


def test_the_classes_of_ade20k(tmp_path):
    put(tmp_path, "ade/objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n"
                                           "2\t0.1072\t6046\t612\t1\tbuilding, edifice\n")  # fmt: skip
    for stem in STEMS:
        split = "validation" if stem == "p3" else "training"
        put(tmp_path, f"ade/annotations/{split}/{stem}.png", grey(stem))
        save_image(tmp_path, f"ade/images/{split}/{stem}.jpg")
    out = run(tmp_path / "ade", tmp_path / "out", "--zero-is-void")
    assert (out / "classes.txt").read_text() == "wall\nbuilding, edifice\n"
    assert lists(out) == [[f"training/{stem}" for stem in STEMS if stem != "p3"], ["validation/p3"]]
    expected = np.array([255, 0, 1])[VALUES["p3"]]
    assert np.array_equal(read_label(out / "SegmentationClass/validation/p3.png", 2, colors={}), expected)
    put(tmp_path, "named.csv", "Pixel Value, Class\n0, other\n1, wall\n2, house\n")  # also a name for 0
    out = run(tmp_path / "ade", tmp_path / "named", "--zero-is-void", "--classes", tmp_path / "named.csv")
    assert (out / "classes.txt").read_text() == "wall\nhouse\n"


def test_copies_of_one_source_stay_together(tmp_path):
    for source in range(6):
        for copy in "abc":
            put(tmp_path, f"in/s{source}_jpg.rf.{copy}F{source}_mask.png", grey("p0"))
            save_image(tmp_path, f"in/s{source}_jpg.rf.{copy}F{source}.jpg")
    train, val = lists(run(tmp_path / "in", tmp_path / "out", "--val-share", 0.3))
    sources = [{name.split(".rf.")[0] for name in found} for found in (train, val)]
    assert [len(found) for found in (train, val, *sources)] == [12, 6, 4, 2]
    assert not sources[0] & sources[1]


def test_files_of_classes_that_differ_or_cannot_be_written(tmp_path):
    for split, names in (("train", "0, a\n1, b\n2, c\n"), ("valid", "0, a\n1, c\n2, b\n")):
        put(tmp_path, f"in/{split}/x_mask.png", grey("p0"))
        save_image(tmp_path, f"in/{split}/x.jpg")
        put(tmp_path, f"in/{split}/_classes.csv", f"Pixel Value, Class\n{names}")
    with pytest.raises(UserError, match=r"train/_classes\.csv and .*valid/_classes\.csv have different classes"):
        run(tmp_path / "in", tmp_path / "out")
    for text, message in (
        ("0, a\n1, x: y\n2, c\n", "cannot be written into a classes.txt: it holds no class in line 2"),
        ("0, a\n1, a\n2, c\n", "cannot be written into a classes.txt: it names a twice"),
        ("1 2 300 c\n1 2 3 a\n", "gives c a colour above 255"),
        ("0, a\n1, b\n3, c\n", "gives classes the values 0, 1, 3; expected 0, 1, 2 and so on"),
    ):
        put(tmp_path, "csv", text)
        with pytest.raises(UserError, match=message):
            run(tmp_path / "in", tmp_path / "out", "--classes", tmp_path / "csv")
    for text in ("{", "[]", '[{"name": "a"}]', '{"categories": 3}', '{"a": 1}'):
        put(tmp_path, "c.json", text)
        with pytest.raises(UserError, match=r"c\.json is no JSON file of classes|names 0 classes"):
            run(tmp_path / "in", tmp_path / "out", "--classes", tmp_path / "c.json")
    assert not (tmp_path / "out").exists()


# ---- Label Studio: a mask per label


def layer(folder, task, label, rows, annotation=5, number=0):
    name = f"task-{task}-annotation-{annotation}-by-me@x.org-tag-{label}-{number}.png"
    put(folder, name, png(np.array(rows, dtype=np.uint8) * 255, 8, GREY))


def test_masks_of_single_labels_are_joined(tmp_path, capsys):
    layer(tmp_path / "in", 1, "traffic-light", [[1, 1, 0, 0]])
    layer(tmp_path / "in", 1, "car", [[0, 1, 1, 0]])
    layer(tmp_path / "in", 2, "car", [[0, 0, 1, 0]])
    layer(tmp_path / "in", 2, "car", [[0, 0, 1, 1]], number=1)
    out = run(tmp_path / "in", tmp_path / "out")
    check_labels(out, {"task-1": np.array([[2, 255, 1, 0]]), "task-2": np.array([[0, 0, 1, 1]])}, 3)
    assert (out / "classes.txt").read_text() == "background\ncar\ntraffic-light\n"
    assert "2 masks have no image: put task-1.jpg" in capsys.readouterr().out
    save_image(tmp_path / "in", "0f-my photo.jpg", (1, 4))
    put(tmp_path / "in", "tasks.json", '[{"id": 2, "data": {"image": "/data/upload/1/0f-my%20photo.jpg"}, "annotations": []}]')
    put(tmp_path / "in", "classes.txt", "traffic/light\ncar\nsky\n")  # without a background, the rest is ignored
    out = run(tmp_path / "in", tmp_path / "named")
    check_labels(out, {"task-1": np.array([[0, 255, 1, 255]]), "task-2": np.array([[255, 255, 1, 1]])}, 3)
    assert contents(out / "JPEGImages") == {"task-2.jpg": (tmp_path / "in/0f-my photo.jpg").read_bytes()}
    put(tmp_path / "in", "classes.txt", "background\ncar\n")
    with pytest.raises(UserError, match=r"has the label traffic-light, but .*classes\.txt names background, car"):
        run(tmp_path / "in", tmp_path / "few")
    layer(tmp_path / "in", 2, "car", [[0, 0, 1, 0]], annotation=9)
    with pytest.raises(UserError, match="holds two annotations of task-2, 5 and 9"):
        run(tmp_path / "in", tmp_path / "few")
    assert not (tmp_path / "few").exists()


def test_a_label_for_the_background(tmp_path):
    layer(tmp_path / "in", 1, "Background", [[1, 0, 0, 0]])
    layer(tmp_path / "in", 1, "car", [[0, 1, 0, 0]])
    put(tmp_path / "in", "result.json", '{"categories": [{"id": 0, "name": "car"}, {"id": 5, "name": "Background"}]}')
    put(tmp_path / "in", "notes.json", '{"other": "things"}')
    out = run(tmp_path / "in", tmp_path / "out")
    check_labels(out, {"task-1": np.array([[0, 1, 255, 255]])}, 2)
    assert (out / "classes.txt").read_text() == "Background\ncar\n"


def test_json_without_classes_is_skipped(tmp_path):
    known = '{"categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}'
    for text, names in (('{"scores": [1]}', None), (known, ["a", "b"])):
        put(tmp_path, "in/masks/a.png", png([[0, 1]], 8, GREY))
        save_image(tmp_path, "in/images/a.jpg", (1, 2))
        put(tmp_path, "in/result.json", text)
        out = run(tmp_path / "in", tmp_path / str(names))
        assert read_class_names(out, 2) == names


def test_bad_masks_of_single_labels(tmp_path, capsys):
    layer(tmp_path / "in", 1, "car", [[1, 0, 0, 0]])
    layer(tmp_path / "in", 1, "sky", [[1, 0]])
    put(tmp_path / "in", "task-2-annotation-6-by-1-tag-car-0.png", png([[0, 1]], 8, GREY))
    with pytest.raises(UserError, match="2 of 2 masks could not be converted"):
        run(tmp_path / "in", tmp_path / "out")
    err = capsys.readouterr().err
    assert "holds 1; expected 255 at the pixels of its label, else 0" in err
    assert "another mask of its image" in err


def test_polygons_are_refused_by_name(tmp_path):
    for text, message in (
        ('{"images": [{"file_name": "a.png"}], "annotations": []}', "is COCO JSON; it lacks `categories`"),
        ('{"a.png123": {"filename": "a.png", "regions": []}}', "is VIA's JSON"),
        ('{"_via_settings": {}, "_via_img_metadata": {"k": {"filename": "a.png", "regions": {}}}}', "is VIA's JSON"),
        ('{"shapes": [], "imagePath": "a.png"}', "is not labelme's JSON .* labelme2voc"),
        ('{"description": "", "objects": [], "size": {}}', "is Supervisely's JSON; export masks"),
        ('{"metadata": {"name": "a.png"}, "instances": []}', "is SuperAnnotate's JSON; export fused masks"),
        ('[{"id": 1, "annotations": [], "data": {}}]', "is Label Studio's JSON"),
    ):
        put(tmp_path, "in/export.json", text)
        for name in ("a.jpg", "a.png"):
            if name == "a.png" and name not in text:
                continue
            save_image(tmp_path, f"in/{name}")
            with pytest.raises(UserError, match=message):
                run(tmp_path / "in", tmp_path / "out")
            (tmp_path / "in" / name).unlink()
    assert not (tmp_path / "out").exists()
