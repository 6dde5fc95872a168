"""Cityscapes: the official folders, label ids and train ids, in every command."""

import io
import json
import shutil
import zipfile
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

import evaluate as evaluate_script
import train as train_script
from dataset import CityscapesSegmentation, DatasetError, find_list, to_input
from dataset.classes import CITYSCAPES_CLASSES, CITYSCAPES_COLORS
from deeplab import CRFParams, dense_crf, load_net, predict_windows
from deeplab.nets import make_net
from scripts import check_dataset, predict
from tests.helpers_data import CITIES, IMAGE, LABEL, SIZE, make_toy_cityscapes, place, save
from tests.helpers_runs import log_lines
from utils import options
from utils.command import UserError
from utils.evaluation.options import evaluation_parser
from utils.evaluation.submission import encode, pack
from utils.training.options import settle, training_parser

# label id -> train id, written by hand
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip


def to_train_ids(ids: np.ndarray) -> np.ndarray:
    return np.array([[TRAIN_IDS.get(value, 255) for value in row] for row in ids.tolist()], dtype=np.uint8)


@pytest.fixture
def city(tmp_path) -> Path:
    return make_toy_cityscapes(tmp_path / "city")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of the real command on a separate data set."""
    folder = tmp_path_factory.mktemp("run")
    root = make_toy_cityscapes(folder / "city")
    words = ["--dataset", "cityscapes", "--data-dir", root, "--snapshot-dir", folder, "--backbone", "resnet18", "--input-size",
             "33,41", "--restore-from", "none", "--batch-size", "3", "--num-steps", "2", "--device", "cpu", "--num-workers",
             "0", "--random-scale", "--random-mirror", "--save-num-images", "1", "--val-every", "2"]  # fmt: skip
    assert train_script.main([*map(str, words)]) == 0
    return folder


def data_of(root: Path, path: Path | str = "leftImg8bit/val", **options) -> CityscapesSegmentation:
    entries = CityscapesSegmentation.read_list(root / path, "leftImg8bit")
    return CityscapesSegmentation(root, entries, num_classes=19, **options)


def evaluate(root: Path, run: Path, *options: object) -> None:
    common = ["--data-dir", root, "--restore-from", run / "CS_scenes_2.pth", "--device", "cpu", "--num-workers", "0"]
    assert evaluate_script.main([*map(str, common), *map(str, options)]) == 0


# ---- reading


def test_the_table():
    assert {row.id: index for index, row in enumerate(CITYSCAPES_CLASSES)} == TRAIN_IDS
    theirs = {row.train_id: (row.id, row.name, row.color) for row in Cityscapes.classes if not row.ignore_in_eval}
    assert dict(enumerate(CITYSCAPES_CLASSES)) == theirs  # torchvision's table
    assert {**{index: row[2] for index, row in theirs.items()}, 255: (0, 0, 0)} == CITYSCAPES_COLORS


def test_label_ids_become_train_ids(city):
    values = np.append(np.arange(34), 255).astype(np.uint8)
    save(city / place(LABEL, "val", "lindau_000000_000019"), np.resize(values, SIZE))
    void = [255]
    row = [*void * 7, 0, 1, *void * 2, 2, 3, 4, *void * 3, 5, *void, *range(6, 16), *void * 2, 16, 17, 18, *void]
    expected = np.resize(row, SIZE)
    image, label = data_of(city)[0]
    assert (label == expected).all()
    assert image.shape == (*SIZE, 3)
    _, label = data_of(city, ignore_label=13)[0]  # an ignored class is given by its train id
    assert (label == np.where(expected == 13, 255, expected)).all()
    data = data_of(city)
    assert (data.names[0], data.colors[0], data.colors[255]) == ("road", (128, 64, 128), (0, 0, 0))


def test_files_of_train_ids_are_recognised_by_name(city):
    path = city / place(LABEL, "val", "lindau_000000_000019")
    other = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
    values = np.resize(np.append(np.arange(19), 255).astype(np.uint8), SIZE)
    save(other, values)
    assert (data_of(city)[0][1] == to_train_ids(np.array(Image.open(path)))).all()  # label ids come first
    path.unlink()
    assert (data_of(city)[0][1] == values).all()
    save(other, values + 1)
    with pytest.raises(DatasetError, match=r"labelTrainIds\.png holds the value 19; expected class indices 0\.\.18"):
        data_of(city).load(0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full(SIZE, 34, np.uint8), r"lindau\S*_labelIds\.png holds the value 34; expected label ids 0\.\.33; 255"),
        (np.zeros((*SIZE, 3), np.uint8), "lindau.* mode RGB"),
        (np.zeros((8, 8), np.uint8), "lindau.* is 8x8 pixels, its image 80x48"),
    ],
)
def test_labels_that_are_refused(city, label, message):
    save(city / place(LABEL, "val", "lindau_000000_000019"), label)
    with pytest.raises(DatasetError, match=message):
        data_of(city).load(0)


def test_lists(city):
    (city / "leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png").touch()  # macOS leaves such files
    data = data_of(city, "leftImg8bit/train")
    assert data.ids == [*CITIES["train"]]
    assert data.image_path(data.ids[2]) == city / "leftImg8bit/train/bochum/bochum_000000_000313_leftImg8bit.png"
    assert data.label_path(data.ids[2]) == city / "gtFine/train/bochum/bochum_000000_000313_gtFine_labelIds.png"
    data.check_files()
    # the toolbox's two columns, and its single column of the test set, for images with labels
    pairs = [(split, id) for split in ("val", "train") for id in CITIES[split]]
    both, one = city / "trainval.lst", city / "one.lst"
    both.write_text("".join(f"{place(IMAGE, *pair)}\t{place(LABEL, *pair)}\n" for pair in pairs))
    one.write_text("".join(f"{place(IMAGE, *pair)}\n" for pair in pairs))
    for path in (both, one):
        listed = data_of(city, path)
        assert listed.ids == [id for _, id in pairs]
        assert [listed.label_path(id) for id in listed.ids] == [city / place(LABEL, *pair) for pair in pairs]
    # files in other folders are named after those
    (city / "gtFine").rename(city / "gtCoarse")
    for path in (city / "gtCoarse").rglob("*.png"):
        path.rename(path.with_name(path.name.replace("gtFine", "gtCoarse")))
    coarse = data_of(city, both, label_dir="gtCoarse")
    coarse.check_files()
    assert coarse.label_path(coarse.ids[0]).name == "lindau_000000_000019_gtCoarse_labelIds.png"


def test_lists_that_are_refused(city, tmp_path):
    (tmp_path / "ids.txt").write_text("lindau_000000_000019\n")
    with pytest.raises(DatasetError, match=r"ids\.txt holds 'lindau_000000_000019', which names no image; expected lines"):
        data_of(city, tmp_path / "ids.txt")
    (city / "leftImg8bit/demo/cologne").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"demo holds no image; expected <city>/<city>_<sequence>_<frame>_leftImg8bit\.png"):
        data_of(city, "leftImg8bit/demo")
    (city / place(LABEL, "val", "munster_000000_000019")).unlink()
    with pytest.raises(DatasetError, match=r"no label for munster_000000_000019_gtFine_labelIds in \S*gtFine/val/munster"):
        data_of(city).check_files()


def test_archives_in_folders_of_their_own_are_named(city, tmp_path):
    """As after `unzip -d` of each archive, or with desktop programs."""
    for name in ("leftImg8bit", "gtFine"):
        (tmp_path / "data" / f"{name}_trainvaltest").mkdir(parents=True)
        shutil.copytree(city / name, tmp_path / "data" / f"{name}_trainvaltest" / name)
    images, labels = (tmp_path / "data" / f"{name}_trainvaltest" for name in ("leftImg8bit", "gtFine"))
    lists = CityscapesSegmentation.lists("val", "leftImg8bit")
    for given in (None, "leftImg8bit/val"):
        with pytest.raises(DatasetError, match=f"val exists: move the contents of {images} to {tmp_path}/data"):
            find_list(tmp_path / "data", given, lists, CityscapesSegmentation.SOURCE)
    with pytest.raises(DatasetError, match=f"holds no gtFine/; .* exists: move the contents of {labels} to {images}"):
        data_of(images)
    with pytest.raises(DatasetError, match=r"nowhere does not exist; unpack"):
        find_list(images, None, ["leftImg8bit/nowhere"], "unpack")


def test_another_data_set_beside_an_incomplete_one_is_left_out_of_the_advice(city, tmp_path):
    shutil.copytree(city, tmp_path / "whole")
    shutil.copytree(city / "leftImg8bit", tmp_path / "half" / "leftImg8bit")
    with pytest.raises(DatasetError, match=r"half holds no gtFine/; .* but it holds leftImg8bit/; for --dataset cityscapes"):
        data_of(tmp_path / "half")


# ---- training


def test_a_run_names_its_data_set(run, capsys):
    content = torch.load(run / "CS_scenes_2.pth", weights_only=True)
    meta = content["meta"]
    assert (meta["num_classes"], meta["classes"][13], meta["colors"][13]) == (19, "car", [0, 0, 142])
    assert (meta["args"]["dataset"], meta["args"]["scale_range"], meta["seen_voc_val"]) == ("cityscapes", (0.7, 2.1), "")
    assert content["model"]["layer5.conv2d_list.0.bias"].shape == (19,)
    assert [line["val_mean_iou"] for line in log_lines(run) if "val_mean_iou" in line]
    assert sorted(path.name for path in run.glob("*.pth")) == ["CS_scenes_2.pth", "best.pth"]
    # continuing needs no --dataset, and refuses another one
    words = ["--snapshot-dir", str(run), "--resume", "--device", "cpu"]
    assert train_script.main(words) == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    with pytest.raises(UserError, match="--dataset cityscapes -> voc"):
        train_script.main([*words, "--dataset", "voc"])
    with pytest.raises(UserError, match="--dataset cityscapes has 19 classes; leave --num-classes 5 out"):
        train_script.main(["--dataset", "cityscapes", "--num-classes", "5", "--data-dir", str(run / "city"), "--device", "cpu",
                           "--restore-from", "none", "--snapshot-dir", str(run / "other")])  # fmt: skip


def test_the_printed_command_runs(city, tmp_path, capsys, monkeypatch):
    """Training images that are in val and classes that never occur are reported; the printed command runs."""
    for id in CITIES["val"]:
        path = city / place(LABEL, "val", id)
        labels = np.array(Image.open(path))
        save(path, np.where(labels == 33, 0, labels))
    words = ["--dataset", "cityscapes", "--data-dir", city, "--data-list", "leftImg8bit/val", "--snapshot-dir", tmp_path,
             "--backbone", "resnet18", "--input-size", "9,9", "--restore-from", "none", "--batch-size", "2", "--num-steps", "1",
             "--device", "cpu", "--num-workers", "0", "--save-num-images", "0"]  # fmt: skip
    assert train_script.main([*map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "19 classes, those of Cityscapes" in out
    assert "none of the 2 labels read so far has the classes 18 bicycle\n" in out
    next_words = out.split("next: python evaluate.py ")[1].split("\n")[0].split()
    assert next_words[-2:] == ["--dataset", "cityscapes"]
    assert evaluate_script.main([*next_words, "--device", "cpu", "--num-workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "scores on Cityscapes val mean nothing here: 2 of the images that it was trained on are on val" in out
    assert "traffic light" in out


def test_runs_on_two_data_sets(city, run, tmp_path, capsys):
    """Having trained on VOC val does not concern Cityscapes val; a checkpoint from before --dataset is for VOC."""
    content = torch.load(run / "CS_scenes_2.pth", weights_only=True)
    words = ["--data-dir", str(city), "--dataset", "cityscapes", "--device", "cpu", "--num-workers", "0"]
    for dataset, reported in (("voc", False), ("cityscapes", True)):
        content["meta"]["args"]["dataset"] = dataset
        torch.save({**content, "meta": {**content["meta"], "seen_voc_val": "it saw val"}}, tmp_path / "seen.pth")
        assert evaluate_script.main([*words, "--restore-from", str(tmp_path / "seen.pth")]) == 0
        assert ("val mean nothing here: it saw val" in capsys.readouterr().out) == reported
        more = ["--restore-from", str(tmp_path / "seen.pth"), "--snapshot-dir", str(tmp_path / dataset), "--num-steps", "1",
                "--batch-size", "1", "--input-size", "9,9", "--save-num-images", "0"]  # fmt: skip
        assert train_script.main([*words, *more]) == 0
        meta = torch.load(tmp_path / dataset / "CS_scenes_1.pth", weights_only=True)["meta"]
        assert meta["seen_voc_val"] == ("it saw val" if reported else "")
    content = torch.load(tmp_path / "voc/last.ckpt", weights_only=True)
    del content["meta"]["args"]["dataset"]
    torch.save(content, tmp_path / "voc/last.ckpt")
    with pytest.raises(UserError, match="--dataset voc -> cityscapes"):
        train_script.main([*words, "--resume", "--snapshot-dir", str(tmp_path / "voc")])


def test_defaults_depend_on_the_data_set():
    def settled(*words: str) -> dict:
        parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
        return vars(settle(parser.parse_args([*words])))

    names = ("data_dir", "image_dir", "input_size", "scale_range")
    voc, cityscapes = settled(), settled("--dataset", "cityscapes")
    assert [voc[name] for name in names] == ["data/VOCdevkit/VOC2012", "JPEGImages", (321, 321), (0.5, 1.5)]
    assert [cityscapes[name] for name in names] == ["data/cityscapes", "leftImg8bit", (769, 769), (0.7, 2.1)]
    given = settled("--dataset", "cityscapes", "--data-dir", "x", "--input-size", "321,321")
    assert [given[name] for name in names] == ["x", "leftImg8bit", (321, 321), (0.7, 2.1)]
    found = vars(options.dataset_defaults(evaluation_parser("").parse_args([]), "cityscapes"))
    assert (found["dataset"], found["data_dir"], found["input_size"]) == ("cityscapes", "data/cityscapes", None)
    with pytest.raises(
        DatasetError,
        match=r"data/cityscapes does not exist; for --dataset \S* unpack leftImg8bit_trainvaltest\.zip .*--data-dir",
    ):
        train_script.main(["--dataset", "cityscapes", "--device", "cpu", "--restore-from", "none"])


# ---- evaluation


def windowed(run: Path, path: Path, **options) -> torch.Tensor:
    with torch.inference_mode():
        image = to_input(cv2.imread(str(path)))[None]
        return predict_windows(load_net(str(run / "CS_scenes_2.pth")), image, (33, 41), **options)[0]


def test_scores_masks_and_report_in_tiles(city, run, tmp_path):
    """The masks equal those of predict.py, and the scores equal a naive count."""
    tiles = ["--window", "33,41", "--scales", "1,0.5", "--fuse", "mean", "--mirror", "--batch-size", "2"]
    evaluate(city, run, *tiles, "--save-dir", tmp_path / "masks", "--save-json", tmp_path / "scores.json",
             "--report", tmp_path / "report", "--save-panels", tmp_path / "panels")  # fmt: skip
    pairs = []
    for id in CITIES["val"]:
        mask = Image.open(tmp_path / f"masks/{id}.png")
        assert mask.getpalette()[3 * 13 : 3 * 14] == [0, 0, 142]
        logits = windowed(run, city / place(IMAGE, "val", id), scales=(1.0, 0.5), fuse="mean", mirror=True)
        best, second = logits.topk(2, dim=0).values
        assert (np.array(mask) == logits.argmax(0).numpy())[(best - second).numpy() > 1e-4].all()
        pairs.append((to_train_ids(np.array(Image.open(city / place(LABEL, "val", id)))), np.array(mask)))
        assert (tmp_path / f"panels/{id}.png").exists()
    label, mask = (np.concatenate(arrays) for arrays in zip(*pairs))
    counted = label != 255
    ious = [((label == c) & (mask == c)).sum() / union for c in range(19)
            if (union := (((label == c) | (mask == c)) & counted).sum())]  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"]["mean_iou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert (scores["window"], scores["fuse"], scores["overlap"]) == ([33, 41], "mean", "1/3")
    assert "window (33, 41)" in (tmp_path / "report/index.html").read_text()

    words = [city / "leftImg8bit/val/lindau", city / "leftImg8bit/val/munster", "--restore-from", run / "CS_scenes_2.pth",
             "--save-dir", tmp_path / "predicted", "--device", "cpu", "--num-workers", "0", "--probabilities"]  # fmt: skip
    assert predict.main([*map(str, words), *tiles]) == 0
    for id in CITIES["val"]:
        mask = np.array(Image.open(tmp_path / f"predicted/{id}_leftImg8bit.png"))
        assert (mask == np.array(Image.open(tmp_path / f"masks/{id}.png"))).all()
        saved = np.load(tmp_path / f"predicted/{id}_leftImg8bit.npz")
        assert list(saved["classes"]) == [row.name for row in CITYSCAPES_CLASSES]
        logits = windowed(run, city / place(IMAGE, "val", id), scales=(1.0, 0.5), fuse="mean", mirror=True)
        np.testing.assert_allclose(saved["probabilities"], logits.softmax(0).numpy(), atol=1e-3)


def test_the_crf_uses_the_sums_of_the_tiles(city, run, tmp_path):
    evaluate(city, run, "--window", "33,41", "--overlap", "1/2", "--crf", "--crf-workers", "1", "--save-dir", tmp_path)
    path = city / place(IMAGE, "val", CITIES["val"][0])
    probabilities = windowed(run, path, overlap=Fraction(1, 2)).softmax(dim=0).numpy()
    expected = dense_crf(cv2.imread(str(path))[:, :, ::-1], probabilities, CRFParams()).argmax(0)
    assert (np.array(Image.open(tmp_path / f"{CITIES['val'][0]}.png")) == expected).mean() > 0.99


def test_options_that_exclude_each_other(city, run, toy_voc, capsys):
    with pytest.raises(SystemExit):
        evaluate(city, run, "--window", "33,33", "--input-size", "505,505")
    assert "--window cuts images into tiles of one size; leave --input-size out" in capsys.readouterr().err
    for words in (("--overlap", "1"), ("--overlap", "1/0"), ("--window", "33")):
        with pytest.raises(SystemExit):
            evaluate(city, run, *words)
    with pytest.raises(UserError, match="among the data of"):
        evaluate(city, run, "--save-dir", city / "gtFine/val/lindau")


def test_a_net_of_other_classes_is_refused(city, tmp_path):
    from deeplab import deeplabv2

    torch.save(deeplabv2("resnet18", 4).state_dict(), tmp_path / "net.pth")
    words = ["--restore-from", str(tmp_path / "net.pth"), "--dataset", "cityscapes", "--device", "cpu"]
    with pytest.raises(UserError, match="a net for 4 classes, but Cityscapes names 19"):
        evaluate_script.main([*words, "--data-dir", str(city)])
    with pytest.raises(UserError, match="has 4 classes, not the 19 of Cityscapes"):
        predict.main([str(city / "leftImg8bit/val/lindau"), *words, "--save-dir", str(tmp_path / "out")])


def test_a_bare_file_is_drawn_in_the_colours_of_the_option(city, run, tmp_path):
    torch.save(torch.load(run / "CS_scenes_2.pth", weights_only=True)["model"], tmp_path / "bare.pth")
    words = [city / "leftImg8bit/val/lindau", "--restore-from", tmp_path / "bare.pth", "--device", "cpu", "--num-workers", "0",
             "--save-dir", tmp_path, "--probabilities", "--dataset", "cityscapes"]  # fmt: skip
    assert predict.main([*map(str, words)]) == 0
    mask = tmp_path / "lindau_000000_000019_leftImg8bit.png"
    assert Image.open(mask).getpalette()[3 * 13 : 3 * 14] == [0, 0, 142]
    assert np.load(mask.with_suffix(".npz"))["classes"][18] == "bicycle"


# ---- submission


def test_the_zip_holds_label_ids(city, run, tmp_path, capsys):
    """The masks equal those of predict.py, with label ids instead of train ids."""
    evaluate(city, run, "--submission", tmp_path / "a.zip", "--window", "33,41")
    assert "a.zip: 1 masks" in capsys.readouterr().out
    words = [city / "leftImg8bit/test/berlin", "--restore-from", run / "CS_scenes_2.pth", "--save-dir", tmp_path / "masks",
             "--device", "cpu", "--num-workers", "0", "--window", "33,41"]  # fmt: skip
    assert predict.main([*map(str, words)]) == 0
    regular = {train_id: id for id, train_id in TRAIN_IDS.items()}
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        name = "berlin_000000_000019_leftImg8bit.png"
        assert packed.namelist() == [name]
        mask = Image.open(io.BytesIO(packed.read(name)))
    assert (mask.size, mask.mode) == (SIZE[::-1], "L")
    expected = [[regular[value] for value in row] for row in np.array(Image.open(tmp_path / "masks" / name)).tolist()]
    assert np.array(mask).tolist() == expected
    evaluate(city, run, "--submission", tmp_path / "a.zip")  # an earlier archive may be replaced


def test_what_the_server_would_refuse_is_never_packed(city, run, tmp_path):
    files = {"berlin": city / place(IMAGE, "test", "berlin_000000_000019")}
    classes = np.resize(np.arange(19, dtype=np.uint8), SIZE)
    server = CityscapesSegmentation.SERVER
    pack(tmp_path / "good.zip", {"berlin": encode(classes, server)}, files, server)
    for values, message in ((classes, r"is \(80, 48\) L; .* with the labels 7, 8, 11,"), (classes[1:], r"is \(80, 47\) L")):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG")  # train ids
        with pytest.raises(UserError, match=message):
            pack(tmp_path / "a.zip", {"berlin": file.getvalue()}, files, server)
    with pytest.raises(UserError, match=r"the Cityscapes server accepts zip files; end the name in \.zip"):
        evaluate(city, run, "--submission", tmp_path / "a.tgz")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as packed:
        packed.writestr("a.txt", "mine")
    with pytest.raises(UserError, match="no earlier output"):
        evaluate(city, run, "--submission", tmp_path / "mine.zip")
    assert not (tmp_path / "a.zip").exists()


# ---- check_dataset.py


def check(root: Path, *options: str) -> tuple[int, dict]:
    words = ["--dataset", "cityscapes", "--data-dir", str(root), "--workers", "0", "--json", str(root / "report.json")]
    return check_dataset.main([*words, *options]), json.loads((root / "report.json").read_text())


def test_check_dataset(city, capsys):
    status, report = check(city)
    assert status == 0
    assert (report["ids"], report["good"], report["likely_causes"]) == (5, 5, [])
    labels = [Image.open(path) for path in city.glob("gtFine/*/*/*.png")]
    values = np.concatenate([to_train_ids(np.array(label)).ravel() for label in labels])
    assert [row["pixels"] for row in report["classes"]] == [int((values == c).sum()) for c in range(19)]
    assert report["void"]["pixels"] == int((values == 255).sum())
    assert "traffic light" in capsys.readouterr().out
    assert report["data_list"] == [str(city / "leftImg8bit" / split) for split in ("train", "val")]
    assert check(city, "--data-list", "leftImg8bit/train", "leftImg8bit/val")[1] == report


def test_check_dataset_finds_faults(city):
    paths = [city / place(LABEL, "train", id) for id in CITIES["train"]]
    save(paths[0], np.full(SIZE, 200, np.uint8))
    save(paths[1], np.zeros((*SIZE, 3), np.uint8))
    paths[2].unlink()
    status, report = check(city)
    assert status == 1
    found = {kind: problem["count"] for kind, problem in report["problems"].items() if problem["count"]}
    assert found == {"wrong values": 1, "colour label": 1, "missing label": 1}
    assert any("expected *_labelIds.png" in cause for cause in report["likely_causes"])
    assert any("label ids are 0..33" in cause for cause in report["likely_causes"])


def test_check_dataset_suspects_train_ids(city):
    for id in CITIES["train"]:
        path = city / place(LABEL, "train", id)
        save(path, to_train_ids(np.array(Image.open(path))))
    _, report = check(city)
    assert report["likely_causes"] == [
        "no class after the pole occurs: if the files hold train ids, rename them to end in _labelTrainIds.png"
    ]


def test_without_labels_their_own_names_are_expected(city):
    for folder in ("gtFine", "gtCoarse"):
        if (city / folder).exists():
            (city / folder).rename(city / "elsewhere")
        with pytest.raises(DatasetError) as error:
            data_of(city, label_dir=folder)
        expected = f"<split>/<city>/<city>_<sequence>_<frame>_{folder}_labelIds.png label masks there"
        assert f"holds no {folder}/; expected {expected}" in str(error.value)
        assert "gtFine_trainvaltest.zip" in str(error.value)


def test_a_net_of_19_classes_is_not_sent_to_vocs_downloads(tmp_path, monkeypatch):
    """A published net whose file does not name its data set, with and without a folder of VOC's lists."""
    torch.save(make_net({"backbone": "resnet18", "num_classes": 19}).state_dict(), tmp_path / "cs.pth")
    monkeypatch.chdir(tmp_path)
    options = ["--restore-from", "cs.pth", "--device", "cpu"]
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"19 classes of Cityscapes pass --dataset cityscapes") as error:
            evaluate_script.main(options)
        assert "download.py" not in str(error.value)
        (tmp_path / "data/VOCdevkit/VOC2012").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=r"has 19 classes; the server expects .* 21; see --dataset"):
        evaluate_script.main([*options, "--submission", "x.zip"])
    with pytest.raises(DatasetError, match=r"leftImg8bit_trainvaltest\.zip"):
        evaluate_script.main([*options, "--dataset", "cityscapes"])
