"""Images beside masks: the folders used, which are the same in training, evaluation and the check."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError
from dataset.folders import Folders, choose_folders, find_folders, split_of
from dataset.voc import TRAIN_LISTS
from scripts import check_dataset, masks_to_indices
from tests.helpers import ROOT
from tests.helpers_data import save
from tests.helpers_runs import evaluate
from tests.helpers_runs import train as train_run

pytestmark = pytest.mark.usefixtures("thin_nets")


def make(root: Path, *folders: str, count: int = 3) -> Path:
    """For each ``"images:masks"``: ``count`` images of three classes, and their masks."""
    rng = np.random.default_rng(0)
    for images, masks in (folder.split(":") for folder in folders):
        for i in range(count):
            save(root / images / f"{i}.png", rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            save(
                root / masks / f"{i}.png",
                np.kron(rng.permutation(6).reshape(2, 3) % 3, np.ones((12, 11))).astype(np.uint8)[:, :32],
            )
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    return root


LAYOUTS = {
    "whole": (["images:masks"], {"": ("images", "masks")}),
    "other names": (["IMG:Labels"], {"": ("IMG", "Labels")}),
    "singular": (["image:mask"], {"": ("image", "mask")}),
    "annotations": (["imgs:Annotations"], {"": ("imgs", "Annotations")}),
    "below": (
        ["images/training:labels/train", "images/valid:labels/validation"],
        {"": ("images", "labels"), "train": ("images/training", "labels/train"), "val": ("images/valid", "labels/validation")},
    ),
    "above": (
        ["train/images:train/masks", "Val/img:Val/label", "test/images:test/masks"],
        {"train": ("train/images", "train/masks"), "val": ("Val/img", "Val/label"), "test": ("test/images", "test/masks")},
    ),
    "split before": (
        ["train_images:train_masks", "val:val_labels", "more_images:more_masks"],
        {"train": ("train_images", "train_masks"), "val": ("val", "val_labels")},
    ),
    "none": (["photos:truth"], {}),
    "one alone": (["images:images"], {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folders_that_are_found(tmp_path, name):
    folders, expected = LAYOUTS[name]
    assert find_folders(make(tmp_path, *folders)) == {split: Folders(*pair) for split, pair in expected.items()}


def test_folders_without_such_files_do_not_count(tmp_path):
    """Boxes as text and an empty folder do not make masks ambiguous; a second folder of masks does."""
    make(tmp_path, "images:masks")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "imgs").mkdir()
    assert find_folders(tmp_path)[""] == ("images", "masks")
    save(tmp_path / "labels/0.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DatasetError, match=r"labels/ and masks/.*--image-dir images --label-dir labels --data-list"):
        find_folders(tmp_path)


@pytest.mark.parametrize(
    "folders",
    [
        ["images/val:masks/val", "images/valid:masks/validation"],
        ["val/images:val/masks", "valid/images:valid/masks"],
        ["val_images:val_masks", "val:val_labels"],
        ["val2014/images:val2014/masks", "val2017/images:val2017/masks"],
    ],
)
def test_two_folders_for_one_split_are_ambiguous(tmp_path, folders):
    with pytest.raises(
        DatasetError, match=r"for val; choose with, for example, `--image-dir \S+ --label-dir \S+ --data-list \S+`"
    ):
        find_folders(make(tmp_path, *folders))


def test_splits_with_a_year(tmp_path):
    """As in COCO, with the year; a given list chooses among the splits."""
    root = make(tmp_path, "images/train2017:masks/train2017", "images/val2017:masks/val2017")
    assert find_folders(root)["val"] == ("images/val2017", "masks/val2017")
    assert choose_folders(root, "val", root / "images/train2017", TRAIN_LISTS)[0] == ("images/train2017", "masks/train2017")


def test_the_list_of_a_split(tmp_path):
    root = make(tmp_path, "images:masks")
    whole = Folders("images", "masks")
    assert choose_folders(root, "train", None, TRAIN_LISTS) == (whole, root / "images")
    with pytest.raises(DatasetError, match=r"no split for val: `python scripts/masks_to_indices.py .* NEW`"):
        choose_folders(root, "val", None, TRAIN_LISTS)
    (root / "Train.txt").write_text("0\n1\n")
    (root / "val.txt").write_text("2\n")
    assert choose_folders(root, "train", None, TRAIN_LISTS) == (whole, root / "Train.txt")
    assert choose_folders(root, "val", None, TRAIN_LISTS) == (whole, root / "val.txt")
    (root / TRAIN_LISTS[1]).parent.mkdir(parents=True)
    (root / TRAIN_LISTS[1]).write_text("0\n")
    assert choose_folders(root, "train", None, TRAIN_LISTS) == (whole, None)
    named = root / "named.txt"
    named.write_text("/images/0.png /truth/0.png\n")
    assert choose_folders(root, "train", named, TRAIN_LISTS) is None


@pytest.mark.parametrize(
    ("folders", "train", "val"),
    [
        (["images/train:masks/train", "images/val:masks/val"], "images/train", "images/val"),
        (["train/Images:train/Masks", "valid/Images:valid/Masks"], "train/Images", "valid/Images"),
        (["img:Labels"], "img", None),
        (["images/a:masks/a"], "images", None),
    ],
)
def test_every_command_uses_them_without_options(tmp_path, capsys, folders, train, val):
    root = make(tmp_path / "data", *folders)
    assert check_dataset.main(["--data-dir", str(root), "--workers", "0"]) == 0
    assert f"3 images of {root / train}, masks in {root}/" in capsys.readouterr().out
    options = ["--num-classes", "3", "--batch-norm", "full", "--num-steps", "1", *(["--val-every", "1"] if val else [])]
    assert train_run(root, tmp_path / "run", "--restore-from", "none", *options) == 0
    text = capsys.readouterr().out
    assert f"3 images of {root / train}, masks in {root}/" in text
    snapshot = next((tmp_path / "run").glob("*_scenes_1.pth"))
    if val:
        assert f"on the 3 images of {root / val}" in text
        assert "LIST" not in text
        evaluate(root, snapshot)
        assert f"3 images of {root / val}, masks in" in capsys.readouterr().out
        return
    assert "--data-list LIST" in text
    with pytest.raises(DatasetError, match="no split for val"):
        evaluate(root, snapshot)
    assert masks_to_indices.main([str(root), str(tmp_path / "new"), "--workers", "0"]) == 0
    evaluate(tmp_path / "new", snapshot)
    assert "1 images of" in capsys.readouterr().out


def test_missing_folders_are_named(tmp_path):
    root = make(tmp_path, "photos:truth")
    words = ["--data-dir", str(root), "--workers", "0"]
    expected = r"photos/ with .png files, truth/ with .png files, `python .* NEW` makes a data set .*`--image-dir images "
    with pytest.raises(DatasetError, match=expected):
        check_dataset.main(words)
    with pytest.raises(DatasetError, match=rf"looks like the data set: pass --data-dir {re.escape(str(tmp_path / 'up/data'))}"):
        check_dataset.main(["--data-dir", str(make(tmp_path / "up/data", "images:masks").parent)])
    options = ["--image-dir", "photos", "--label-dir", "truth", "--data-list", str(root / "photos")]
    assert check_dataset.main([*words, *options]) == 0
    assert check_dataset.main([*words[:1], str(make(tmp_path / "b", "images:masks")), *words[2:], "--data-list", "images"]) == 0
    (tmp_path / "b/masks/1.png").rename(tmp_path / "b/masks/1_mask.png")
    with pytest.raises(DatasetError, match=r"no label for 1 in .*masks_to_indices.py .* NEW` copies the pairs"):
        train_run(tmp_path / "b", tmp_path / "run", "--restore-from", "none", "--num-classes", "3")


def test_names_of_splits():
    assert [split_of(name) for name in ("Training", "valid", "val2017", "TEST", "street")] == [
        "train",
        "val",
        "val",
        "test",
        None,
    ]


def test_other_formats_are_no_masks(tmp_path):
    """JPEG masks, and those beside a folder of PNGs that are images."""
    save(tmp_path / "images/a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "masks").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "masks/a.jpg")
    assert find_folders(tmp_path) == {}


README = (ROOT / "dataset/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", [line for line in README.splitlines() if re.match(r"\| `?(images|train)", line)])
def test_the_layouts_of_the_readme_are_found(tmp_path, line):
    folders = re.findall(r"`([\w/]+)/`", line.split("|")[1])
    images = [name for name in folders if "images" in name]
    make(tmp_path, *(f"{name}:{name.replace('images', 'masks')}" for name in images))
    assert sorted(folders) == sorted([*images, *(name.replace("images", "masks") for name in images)])
    for split in ("train", "val"):
        if "train.txt" in line:
            (tmp_path / f"{split}.txt").write_text("0\n")
        if split == "train" or "none;" not in line:
            found = choose_folders(tmp_path, split, None, TRAIN_LISTS)
            assert found
            assert found[0].images in images


def test_the_names_of_folders_in_the_readme(tmp_path):
    text = " ".join(README.split())
    also = re.search(
        r"`images` may also be called (.*?); `masks` may be called (.*?); `train` also (.*?), `val` also (.*?);", text
    )
    images, masks, train, val = (re.findall(r"`(\w+)`", part) for part in also.groups())
    assert images == ["image", "img", "imgs"]
    for k, (image, mask) in enumerate(zip([*images, *images], masks, strict=False)):
        assert find_folders(make(tmp_path / str(k), f"{image}:{mask}"))[""] == (image, mask)
    assert {split_of(name) for name in train} == {"train"}
    assert {split_of(name) for name in val} == {"val"}


def test_the_commands_of_the_readme_are_understood():
    for command in re.findall(r"python (scripts/masks_to_indices\.py [^`\n]+)", README):
        masks_to_indices.parse_args(shlex.split(command)[1:])
