"""COCO-Stuff: its table and labels, in every command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as evaluate_script
import train as train_script
from dataset import DATASETS, COCOStuffSegmentation, DatasetError, VOCSegmentation, voc_palette
from dataset.classes import COCO_COLORS, COCO_NAMES, COCO_UNUSED
from scripts import check_dataset, predict
from tests.helpers_cocostuff import IDS, NEVER, SIZE, make_10k, make_164k
from tests.helpers_published import kazuto_state, random_net
from tests.helpers_readme import new_files, section
from utils.command import UserError
from utils.metrics import ConfusionMatrix
from utils.training.log import is_ours

pytestmark = pytest.mark.usefixtures("thin_nets")


@pytest.fixture
def coco(tmp_path) -> Path:
    return make_164k(tmp_path / "coco")


@pytest.fixture(scope="module")
def run(thin_nets, tmp_path_factory) -> Path:
    """Two steps of the real command, validated once."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--dataset", "cocostuff", "--data-dir", make_164k(folder / "coco"), "--snapshot-dir", folder, "--backbone",
             "resnet18", "--input-size", "17,25", "--restore-from", "none", "--batch-size", "3", "--num-steps", "2",
             "--device", "cpu", "--num-workers", "0", "--random-scale", "--random-mirror", "--save-num-images", "1",
             "--val-every", "2"]  # fmt: skip
    assert train_script.main([*map(str, words)]) == 0
    return folder


def data_of(root: Path, path: str = "images/val2017", **options) -> COCOStuffSegmentation:
    entries = COCOStuffSegmentation.read_list(root / path, "images")
    return COCOStuffSegmentation(root, entries, num_classes=182, **options)


def evaluate(root: Path, snapshot: Path, *options: object) -> int:
    common = ["--data-dir", root, "--restore-from", snapshot, "--device", "cpu", "--num-workers", "0"]
    return evaluate_script.main([*map(str, common), *map(str, options)])


# ---- reading


def test_the_table():
    assert (len(COCO_NAMES), len(set(COCO_NAMES))) == (182, 182)
    never = "street sign; hat; shoe; eye glasses; plate; mirror; window; desk; door; blender; hair brush"
    assert ([COCO_NAMES[i] for i in COCO_UNUSED], list(COCO_UNUSED)) == (never.split("; "), NEVER)
    known = {
        0: "person",
        15: "bird",
        56: "carrot",
        89: "toothbrush",
        91: "banner",
        123: "grass",
        148: "road",
        168: "tree",
        181: "wood",
    }
    assert {i: COCO_NAMES[i] for i in known} == known
    assert set(COCO_COLORS) == {*range(182), 255}
    assert all(color == tuple(voc_palette()[i]) for i, color in COCO_COLORS.items())


def test_a_list_is_a_folder(coco):
    (coco / "images/val2017/._000000000139.jpg").touch()  # macOS leaves such files
    data = data_of(coco)
    assert data.ids == [f"val2017/{id}" for id in IDS["val2017"]]
    assert data.image_path(data.ids[0]) == coco / "images/val2017/000000000139.jpg"
    assert data.label_path(data.ids[0]) == coco / "annotations/val2017/000000000139.png"
    data.check_files()
    (coco / "one.txt").write_text("train2017/000000000025\nimages/val2017/000000000285.jpg\n")
    assert data_of(coco, "one.txt").ids == ["train2017/000000000025", "val2017/000000000285"]
    (coco / "images/test2017").mkdir()
    with pytest.raises(DatasetError, match="test2017 holds no image; expected"):
        data_of(coco, "images/test2017")
    (coco / "annotations/val2017/000000000285.png").unlink()
    with pytest.raises(DatasetError, match="no label for 000000000285 in"):
        data_of(coco).check_files()


def test_values_are_classes(coco):
    path = coco / "annotations/val2017/000000000139.png"
    values = np.resize(np.array([0, 11, 90, 91, 181, 255], np.uint8), SIZE)
    Image.fromarray(values).save(path)
    image, label = data_of(coco)[0]
    assert (image.shape, label[0, :6].tolist()) == ((*SIZE, 3), [0, 11, 90, 91, 181, 255])
    assert (label == values).all()
    assert (data_of(coco, ignore_label=91)[0][1] == np.where(values == 91, 255, values)).all()
    data = data_of(coco)
    assert (data.names[91], data.colors[1], data.colors[255]) == ("banner", (128, 0, 0), (224, 224, 192))
    Image.fromarray(np.where(values == 181, 182, values).astype(np.uint8)).save(path)
    with pytest.raises(DatasetError, match=r"000000000139\.png holds the value 182; expected class indices 0\.\.181; 255"):
        data_of(coco).load(0)


def test_the_10k_is_prepared_first(tmp_path, capsys):
    root = make_10k(tmp_path / "ten")
    data = data_of(root, "imageLists/test.txt")
    with pytest.raises(DatasetError, match=r"holds the \.mat files of the 10k; `python scripts/prepare_cocostuff\.py"):
        data.check_files()
    words = ["--dataset", "cocostuff", "--data-dir", str(root), "--workers", "0"]
    assert check_dataset.main(words) == 1
    assert f"likely cause: {root / 'annotations'} holds the .mat files of the 10k" in capsys.readouterr().out


# ---- training and evaluation


def test_a_run_names_its_data_set(run, tmp_path, capsys):
    meta = torch.load(run / "COCO_scenes_2.pth", weights_only=True)["meta"]
    assert (meta["num_classes"], meta["classes"][123], meta["colors"][2]) == (182, "grass", [0, 128, 0])
    assert (meta["args"]["dataset"], meta["args"]["scale_range"]) == ("cocostuff", (0.5, 1.5))
    assert sorted(path.name for path in run.glob("*.pth")) == ["COCO_scenes_2.pth", "best.pth"]
    words = ["--snapshot-dir", str(run), "--resume", "--device", "cpu"]
    assert train_script.main(words) == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    shutil.copy(run / "COCO_scenes_2.pth", tmp_path)
    with pytest.raises(UserError, match=r"holds snapshots already \(COCO_scenes_2\.pth\), which this run would overwrite"):
        train_script.main(["--dataset", "cocostuff", "--data-dir", str(run / "coco"), "--snapshot-dir", str(tmp_path),
                           "--restore-from", "none", "--device", "cpu", "--backbone", "resnet18"])  # fmt: skip
    assert is_ours("COCO_scenes_2.pth")
    with pytest.raises(UserError, match="--dataset cocostuff has 182 classes; leave --num-classes 171 out"):
        train_script.main(["--dataset", "cocostuff", "--num-classes", "171"])


def test_scores_are_a_naive_count(run, tmp_path, capsys):
    """kazuto1011's mean is over the labelled classes only; classes that never occur are not reported as missing."""
    root = run / "coco"
    assert evaluate(root, run / "COCO_scenes_2.pth", "--save-dir", tmp_path, "--save-json", tmp_path / "scores.json",
                    "--report", tmp_path / "report") == 0  # fmt: skip
    out = capsys.readouterr().out
    folders = (root / "annotations/val2017", tmp_path / "val2017")
    pairs = [[np.array(Image.open(folder / f"{id}.png")) for folder in folders] for id in IDS["val2017"]]
    label, mask = (np.concatenate(arrays)[np.concatenate(pairs, axis=1)[0] != 255] for arrays in zip(*pairs))
    ious = {
        c: ((label == c) & (mask == c)).sum() / (((label == c) | (mask == c)).sum()) for c in {*label.tolist(), *mask.tolist()}
    }
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["mean_iou"] == pytest.approx(np.mean([*ious.values()]), abs=1e-12)
    assert scores["labelled_mean_iou"] == pytest.approx(np.mean([ious[c] for c in set(label.tolist())]), abs=1e-12)
    assert f"mean IoU of labelled classes {100 * scores['labelled_mean_iou']:8.2f}".replace(" ", "") in out.replace(" ", "")
    assert "mean IoU of labelled classes" in (tmp_path / "report/index.html").read_text()
    assert "513" not in out
    absent = out.split("no label has the classes ")[1]
    assert not [name for name in ("street sign", "eye glasses", "hair brush") if name in absent]


def test_labelled_classes_by_hand():
    """Class 0: 2 of 4 pixels, class 1: 1 of 2; class 2 is only predicted, class 3 absent."""
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 0, 0, 1, 1, 255]), torch.tensor([0, 0, 2, 1, 0, 3]))
    scores = matrix.scores()
    assert (scores.mean_iou, scores.labelled_mean_iou) == (pytest.approx((0.5 + 0.5 + 0) / 3), 0.5)
    assert "labelled_mean_iou" not in scores.as_dict("abcd")
    assert "labelled" not in scores.table("abcd")


def test_the_lists_of_the_10k_are_found(run, tmp_path, capsys):
    from scripts import prepare_cocostuff

    root = make_10k(tmp_path / "ten")
    assert prepare_cocostuff.main(["--data-dir", str(root), "--workers", "0"]) == 0
    assert evaluate(root, run / "COCO_scenes_2.pth") == 0
    out = capsys.readouterr().out
    assert f"1 images of {root / 'imageLists/test.txt'}" in out
    assert "images and labels warped to 513x513; here they keep their sizes" in out
    words = ["--dataset", "cocostuff", "--data-dir", str(root), "--workers", "0"]
    assert check_dataset.main([*words, "--data-list", "imageLists/train.txt"]) == 0
    assert "OK: 2 good pairs" in capsys.readouterr().out


def test_no_server_accepts_masks(coco, run, tmp_path):
    with pytest.raises(UserError, match="--submission: COCO-Stuff has no server that accepts masks"):
        evaluate(coco, run / "COCO_scenes_2.pth", "--submission", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_published_weights_are_read_with_their_182_classes(coco, tmp_path, capsys):
    """kazuto1011's file does not name its data set: the class names come from --dataset."""
    source = random_net("resnet50", 182)
    path = tmp_path / "deeplabv2_resnet101_msc-cocostuff164k-100000.pth"
    torch.save(kazuto_state(source.state_dict(), "resnet50"), path)
    assert evaluate(coco, path, "--dataset", "cocostuff", "--save-json", tmp_path / "scores.json") == 0
    assert "kazuto1011 DeepLab-v2" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert (len(scores["classes"]), scores["classes"][181]["name"]) == (182, "wood")


def test_a_net_of_182_classes_without_meta(run, toy_voc, tmp_path, capsys):
    """If data is missing, the message names --dataset; predict.py uses its names and colours."""
    path = tmp_path / "bare.pth"
    torch.save(torch.load(run / "COCO_scenes_2.pth", weights_only=True)["model"], path)
    with pytest.raises(DatasetError, match="for the 182 classes of COCO-Stuff pass --dataset cocostuff"):
        evaluate(tmp_path, path)
    advice = "for the 182 classes of COCO-Stuff pass --dataset cocostuff"
    for dataset, reported in (("voc", True), ("cocostuff", False)):  # labels 0..3 would be evaluated as person, bicycle, ...
        assert evaluate(toy_voc if dataset == "voc" else run / "coco", path, "--dataset", dataset) == 0
        assert (advice in capsys.readouterr().out) == reported
    words = [run / "coco/images/val2017/000000000139.jpg", "--restore-from", path, "--device", "cpu", "--num-workers", "0",
             "--save-dir", tmp_path / "masks", "--probabilities", "--dataset", "cocostuff"]  # fmt: skip
    assert predict.main([*map(str, words)]) == 0
    mask = tmp_path / "masks/000000000139.png"
    assert Image.open(mask).getpalette()[: 3 * 182] == voc_palette()[:182].ravel().tolist()
    assert tuple(np.load(mask.with_suffix(".npz"))["classes"]) == COCO_NAMES
    with pytest.raises(UserError, match="has 182 classes, not the 19 of Cityscapes; leave --dataset out"):
        predict.main([*map(str, words[:-1]), "cityscapes"])


# ---- check_dataset.py


def test_check_dataset(coco, capsys):
    words = ["--dataset", "cocostuff", "--data-dir", str(coco), "--workers", "0", "--json", str(coco / "report.json")]
    assert check_dataset.main(words) == 0
    report = json.loads((coco / "report.json").read_text())
    assert report["data_list"] == [str(coco / f"images/{split}") for split in IDS]
    labels = np.stack([np.array(Image.open(path)) for path in coco.glob("annotations/*/*.png")])
    assert [row["pixels"] for row in report["classes"]] == [int((labels == c).sum()) for c in range(182)]
    assert report["absent"] == [c for c in range(182) if c not in NEVER and not (labels == c).any()]
    path = coco / "annotations/train2017/000000000009.png"
    Image.fromarray(np.full(SIZE, 182, np.uint8)).save(path)
    assert check_dataset.main(words) == 1
    assert "if they count from 1, as in the .mat files, subtract 1" in capsys.readouterr().out


# ---- another data set is one file and one line


def test_the_worked_example_is_a_data_set(tmp_path, monkeypatch, capsys):
    """The example file in dataset/README.md is trained and evaluated unchanged."""
    scope: dict = {}
    exec(new_files(section("dataset/README.md", "Adding a data set"))["dataset/context.py"], scope)
    kind = scope["PascalContextSegmentation"]
    monkeypatch.setitem(DATASETS, "context", kind)
    root, rng = tmp_path / "context", np.random.default_rng(3)
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (root / folder).mkdir(parents=True)
    for name in ("train", "val"):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        Image.fromarray(np.resize(np.arange(60, dtype=np.uint8), SIZE)).save(root / f"SegmentationClassContext/{name}.png")
        (root / f"ImageSets/SegmentationContext/{name}.txt").write_text(f"{name}\n")
    data = kind(root, ["val"], num_classes=len(kind.NAMES))
    assert data[0][1].ravel()[:60].tolist() == [255, *range(59)]  # 0 is what has no class
    words = ["--dataset", "context", "--data-dir", root, "--snapshot-dir", tmp_path, "--backbone", "resnet18", "--input-size",
             "9,9", "--restore-from", "none", "--batch-size", "2", "--num-steps", "1", "--device", "cpu", "--num-workers", "0",
             "--save-num-images", "0"]  # fmt: skip
    assert train_script.main([*map(str, words)]) == 0
    assert "59 classes, those of PASCAL-Context" in capsys.readouterr().out
    assert evaluate(root, tmp_path / "CONTEXT_scenes_1.pth") == 0
    assert "bedclothes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_script.main(["--help"])
    assert f"context: {kind.ABOUT}" in " ".join(capsys.readouterr().out.split())


def test_the_readmes_table_is_complete():
    """Each property of a data set is an attribute of the base class, and each is in the table."""
    table = "".join(re.findall(r"^\|(.*?)\|", section("dataset/README.md", "Adding a data set"), re.MULTILINE))
    named = set(re.findall(r"`(\w+)", table))
    assert {name for name in vars(VOCSegmentation) if name.isupper()} - named == {"LABEL", "TOOLBOX_TRAINING"}  # Cityscapes'
    assert named <= vars(VOCSegmentation).keys()


def test_the_properties_of_a_data_set():
    for kind in DATASETS.values():
        assert issubclass(kind, VOCSegmentation)
        assert kind.COLORS.keys() == ({*range(len(kind.NAMES)), 255} if kind.NAMES else set())
        assert all(kind.lists(split, kind.IMAGE_DIR) for split in ("train", "val", "test"))
        assert kind.SERVER is None or not kind.NAMES or len(kind.SERVER.classes) == len(kind.NAMES)
    assert (
        len({kind.SHORT for kind in DATASETS.values()}) == len({kind.DATA_DIR for kind in DATASETS.values()}) == len(DATASETS)
    )
