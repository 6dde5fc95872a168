"""The report of an evaluation, parsed as in a browser: its links, its numbers, and names that contain HTML."""

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as evaluate_script
from dataset import VOCSegmentation
from deeplab.weights import Weights
from tests.helpers import TOY_CLASSES, TOY_SIZES
from tests.helpers_nets import naive_scores
from tests.helpers_runs import SMALL, evaluate, scores, train
from utils.command import UserError
from utils.evaluation import report
from utils.evaluation.comparison import OtherReport, open_other
from utils.evaluation.images import Sample
from utils.evaluation.options import evaluation_parser
from utils.training.options import training_parser
from utils.visualize import Classes

NASTY = ["<script>alert(1)</script>", 'red" onload="x', "green & {{ 7 * 7 }}", "blue"]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, folder: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed((folder / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.tags[-1][0] in ("td", "th", "i", "span"):
            self.rows[-1][-1] += data.strip()

    def find(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


@pytest.fixture(scope="module")
def nasty(snapshot, tmp_path_factory) -> Path:
    """A net with class names that contain HTML and template code."""
    content = torch.load(snapshot, weights_only=True)
    content["meta"].update(classes=NASTY, colors=[[1, 2, 3], [200, 0, 0], [0, 200, 0], [0, 0, 200]], args={"note": "<i>"})
    torch.save(content, path := tmp_path_factory.mktemp("nasty") / "a&b.pth")
    return path


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


@pytest.mark.parametrize("crf", [False, True])
def test_the_page_needs_no_other_site_and_shows_the_saved_scores(toy_voc, nasty, tmp_path, crf):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (toy_voc / folder / f"toy_5.{suffix}").rename(toy_voc / folder / f"it's #5 & <b>.{suffix}")
    (tmp_path / "list.txt").write_text("toy_0\ntoy_1\ntoy_2\ntoy_3\ntoy_4\nit's #5 & <b>\n")
    out = tmp_path / "report"
    options = ["--report", str(out), "--data-list", str(tmp_path / "list.txt")] + (
        ["--crf", "--crf-workers", "1"] if crf else []
    )
    result = scores(toy_voc, nasty, tmp_path, *options)
    page = Page(out)
    parts = [result["before_crf"], result["after_crf"]] if crf else [result["scores"]]

    links = page.find("img", "src") + page.find("a", "href")
    assert len(links) == 12
    for link in links:
        assert re.fullmatch(r"pictures/\d{6}(_thumbnail)?\.jpg", link)
        Image.open(out / link).verify()
    for anchor in (attributes for tag, attributes in page.tags if tag == "a"):
        for layer in anchor["data-layers"].split()[1:]:
            Image.open(out / anchor["href"].replace(".jpg", f"_{layer}.png")).verify()
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base"} == set()
    assert [tag for tag, _ in page.tags].count("b") == 6  # one per image
    assert page.find("script", "src") == []
    assert not re.search(r"https?://|url\(|@import", (out / "index.html").read_text(encoding="utf-8"))

    assert [tag for tag, _ in page.tags].count("script") == 1  # none from a class name
    assert not page.find("th", "onload")
    assert page.find("option", "value")[-4:] == ["0", "1", "2", "3"]
    assert page.text.count(NASTY[0]) >= 3
    assert NASTY[2] in page.text
    assert "it's #5 & <b>" in page.find("a", "data-id")

    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["mean IoU %"] == [percent(part["mean_iou"]) for part in parts]
    assert rows["frequency-weighted IoU %"] == [percent(part["frequency_weighted_iou"]) for part in parts]
    counts = np.array(parts[-1]["confusion_matrix"])
    present = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    named = [row for row in page.rows if row and row[0] in NASTY]  # of the table of classes, then of the confusion matrix
    for i, row in enumerate(named[:TOY_CLASSES]):
        assert row[2 : 2 + len(parts)] == [percent(part["classes"][i]["iou"]) for part in parts]
        assert (row[0], row[-1]) == (NASTY[i], f"{counts[i].sum():,}")
    for i, row in zip(present, named[TOY_CLASSES:], strict=True):
        assert row == [NASTY[i], *(f"{100 * n / counts[i].sum():.1f}" if n else "" for n in counts[i][present])]
    ious = [float(value) for value in page.find("a", "data-iou")]
    assert ious == sorted(ious)
    assert "evaluate" in page.text or "pytest" in page.text  # the command
    assert f"torch {torch.__version__.split('+')[0]}" in page.text


def test_the_counts_of_the_images_sum_to_those_of_the_set(toy_voc, snapshot, tmp_path):
    """The IoU of an image is over its own pixels; the small matrices sum to the large one."""
    result = scores(toy_voc, snapshot, tmp_path, "--report", str(tmp_path / "r"), "--save-dir", str(tmp_path / "masks"))
    data = json.loads((tmp_path / "r/report.json").read_text())
    assert data["scores"] == result
    total = np.zeros((TOY_CLASSES, TOY_CLASSES), int)
    shown = {a["data-id"]: float(a["data-iou"]) for tag, a in Page(tmp_path / "r").tags if tag == "a"}
    for record in data["pictures"]:
        for label, prediction, count in record["matrix"]:
            total[label, prediction] += count
        files = [folder / f"{record['id']}.png" for folder in (toy_voc / "SegmentationClassAug", tmp_path / "masks")]
        label, prediction = (np.array(Image.open(path)) for path in files)
        assert shown[record["id"]] == pytest.approx(naive_scores([(label, prediction)])[1], abs=1e-6)
        layers = {name: tmp_path / f"r/pictures/{record['number']:06d}_{name}.png" for name in record["layers"]}
        assert list(layers) == ["label", "prediction", "errors"]
        assert (np.array(Image.open(layers["label"])) == label).all()
        assert (np.array(Image.open(layers["prediction"])) == prediction).all()
        wrong = np.where(label == 255, 2, label != prediction)
        assert (np.array(Image.open(layers["errors"])) == wrong).all()
    assert total.tolist() == result["scores"]["confusion_matrix"]


def test_two_evaluations_side_by_side(toy_voc, snapshot, tmp_path, capsys):
    """One has five images, the other six: differences are over the common ones. Differing settings are reported."""
    five = toy_voc / "five.txt"
    five.write_text("".join(f"toy_{i}\n" for i in range(5)))
    evaluate(toy_voc, snapshot, "--report", str(tmp_path / "a"), "--scales", "0.5")
    evaluate(toy_voc, snapshot, "--report", str(tmp_path / "b"), "--compare", str(tmp_path / "a"), "--data-list", str(five))
    lists = f"data_list {toy_voc / 'ImageSets/Segmentation/val.txt'} -> {five}"
    assert f"compared with {tmp_path / 'a'}: {lists}; scales 0.5 -> 1.0\n" in capsys.readouterr().out
    there = scores(toy_voc, snapshot, tmp_path, "--data-list", str(five), "--scales", "0.5")["scores"]
    here = scores(toy_voc, snapshot, tmp_path, "--data-list", str(five))["scores"]
    page = Page(tmp_path / "b")
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    for name, a, b in [("mean IoU", there["mean_iou"], here["mean_iou"])] + [
        (x["name"], x["iou"], y["iou"]) for x, y in zip(there["classes"], here["classes"])
    ]:
        assert rows[name] == [percent(a), percent(b), f"{100 * (b - a):+.2f}"]
    assert "over the 5 images in both reports" in page.text
    assert ["scales", "0.5", "1.0"] in page.rows
    ious = [{a["data-id"]: float(a["data-iou"]) for tag, a in Page(tmp_path / x).tags if tag == "a"} for x in ("a", "b")]
    for attributes in (a for tag, a in page.tags if tag == "a"):
        change = ious[1][attributes["data-id"]] - ious[0][attributes["data-id"]]
        assert float(attributes["data-change"]) == pytest.approx(change, abs=2e-6)
        number = int(attributes["data-number"])
        other = (tmp_path / f"b/pictures/{number:06d}_other.png").read_bytes()
        assert other == (tmp_path / f"a/pictures/{number:06d}_prediction.png").read_bytes()


def test_settings_that_differ(tmp_path):
    """Settings of the evaluation, the net and its training; JSON has lists for tuples; old reports only hold the scores."""
    args = {"learning_rate": 0.1, "num_workers": 4, "input_size": [33, 41], "num_steps": 7}
    weights = Weights({}, "x", {"backbone": "resnet18"}, {"step": 7, "args": args})
    options = evaluation_parser("").parse_args(["--scales", "0.5,1", "--crf", "--restore-from", "a.pth"])
    here = report.settings_of(options, weights, Path("val.txt"))
    other = OtherReport(tmp_path, {"scores": {}, "settings": json.loads(json.dumps(here))}, {})
    assert other.differing(here) == []
    options.scales, options.mirror, options.restore_from = (1.0,), True, "b.pth"
    weights.meta = {"step": 8, "args": {**args, "learning_rate": 0.2, "num_workers": 8, "new": 1}}
    weights.config = {"backbone": "resnet50"}
    now = report.settings_of(options, weights, Path("val.txt"))
    assert sorted(other.differing(now)) == [
        ("backbone", "resnet18", "resnet50"),
        ("mirror", "no", "yes"),
        ("restore_from", "a.pth", "b.pth"),
        ("scales", "0.5,1.0", "1.0"),
        ("step", "7", "8"),
        ("trained with learning_rate", "0.1", "0.2"),
    ]
    earlier = {"scores": {"scales": [0.5, 1.0], "mirror": True, "window": None, "step": 8, "scores": {"mean_iou": 0.5}}}
    assert OtherReport(tmp_path, earlier, {}).differing(now) == [("scales", "0.5,1.0", "1.0"), ("crf", "no", "yes")]


def test_given_options_come_before_the_defaults(toy_voc, snapshot, tmp_path):
    """The options of the training run; a resumed run keeps those of its start."""
    words = ["--restore-from", str(snapshot), "--num-steps", "1", "--random-mirror", "--random-seed", "7"]
    used = {word[2:].replace("-", "_") for word in [*SMALL, *words] if word.startswith("--")} | {"data_dir", "snapshot_dir"}
    train(toy_voc, tmp_path / "s", *words)
    train(toy_voc, tmp_path / "s", "--resume", "--num-steps", "2")
    for number in (1, 2):
        evaluate(toy_voc, tmp_path / f"s/VOC12_scenes_{number}.pth", "--report", str(tmp_path / "r"))
        text = " ".join(Page(tmp_path / "r").text.split())
        given, defaults = re.search("trained with(--.*) other options(.*) images6 of", text).groups()
        parsed = training_parser("", batch_size=1, iter_size=1, snapshot_dir="").parse_args(shlex.split(given))
        assert parsed.given == used
        assert (parsed.restore_from, parsed.random_seed, parsed.input_size) == (str(snapshot), 7, (33, 41))
        assert {"momentum 0.9", "random_scale no", "learning_rate 0.00025"} <= set(defaults.split(", "))
        assert not {entry.split()[0] for entry in defaults.split(", ")} & parsed.given


def test_reports_that_cannot_be_written_or_compared_are_refused(toy_voc, snapshot, nasty, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    evaluate(toy_voc, snapshot, "--report", str(tmp_path / "a"))
    first = toy_voc / "first.txt"
    first.write_text("toy_0\n")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for net, options, message in (
        (snapshot, ["--report", str(tmp_path / "full")], r"full holds other files \(thesis\.txt\); choose an empty"),
        (snapshot, ["--report", str(toy_voc / "JPEGImages")], "among the data"),
        (snapshot, ["--report", a, "--compare", a], "are both"),
        (snapshot, ["--report", b, "--compare", str(tmp_path / "full")], "is no report: expected a folder that evaluate.py"),
        (nasty, ["--report", b, "--compare", a], "has other classes"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(toy_voc, net, *options)
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"
    evaluate(toy_voc, snapshot, "--report", a, "--data-list", str(first))  # over an earlier report, whose images are deleted
    assert {path.name[:6] for path in (tmp_path / "a/pictures").iterdir()} == {"000000"}
    mine = tmp_path / "a/pictures/000001.jpg"  # added by the user afterwards
    mine.write_bytes((toy_voc / "JPEGImages/toy_0.jpg").read_bytes())
    with pytest.raises(UserError, match=r"a holds other files \(pictures/000001\.jpg\)"):
        evaluate(toy_voc, snapshot, "--report", a)
    assert mine.read_bytes() == (toy_voc / "JPEGImages/toy_0.jpg").read_bytes()
    mine.unlink()
    (tmp_path / "a/index.html").write_text("<!doctype html><p>mine")
    with pytest.raises(UserError, match=r"index\.html, over a file that is no earlier output"):
        evaluate(toy_voc, snapshot, "--report", a)
    first.write_text("toy_5\n")
    with pytest.raises(UserError, match="has none of the 1 images of this evaluation"):
        evaluate(toy_voc, snapshot, "--report", b, "--compare", a, "--data-list", str(first))


def test_the_images_of_a_report_have_a_total_size(tmp_path, monkeypatch):
    """Their side depends on their number: sqrt(160,000 bytes / 0.4 / 4) = 316; a large set shows every second image."""
    monkeypatch.setattr(report, "BYTES", 160_000)
    monkeypatch.setattr(report, "MOST_IMAGES", 4)
    report.prepare_folder(tmp_path)
    page = report.Report(tmp_path, [str(i) for i in range(8)], Classes(list("abc")), 255, False, None)
    rng = np.random.default_rng(0)
    for i in range(8):
        image = cv2.resize(rng.integers(0, 256, (45, 35, 3), dtype=np.uint8), (700, 900), interpolation=cv2.INTER_CUBIC)
        sample = Sample(str(i), image, np.zeros((900, 700), np.uint8))
        sample.prediction = np.zeros_like(sample.label)
        page.add(sample, sample.prediction)
    files = list((tmp_path / "pictures").iterdir())
    assert {path.name[:6] for path in files} == {"000000", "000002", "000004", "000006"}
    assert sum(path.stat().st_size for path in files) <= 160_000
    sizes = {Image.open(path).size for path in files if "thumbnail" not in path.name}
    assert sizes == {(round(700 * 316 / 900), 316)}
    assert len(page.records) == 8


def test_class_names_are_shown_in_their_regions(toy_voc, snapshot, tmp_path):
    """In thousandths of the image's width, so that they scale with it; without --names the page does not mention them."""
    evaluate(toy_voc, snapshot, "--report", str(tmp_path / "r"), "--names", "--save-panels", str(tmp_path / "p"))
    page = Page(tmp_path / "r")
    assert page.find("input", "id") == ["opacity", "captions"]
    found = [json.loads(text) for text in page.find("a", "data-captions")]
    assert [list(captions) for captions in found] == [["label", "prediction"]] * 6
    assert any(layer for captions in found for layer in captions.values())
    evaluate(toy_voc, snapshot, "--report", str(tmp_path / "r"))
    page = Page(tmp_path / "r")
    assert (page.find("input", "id"), page.find("a", "data-captions")) == (["opacity"], [])
    labels = np.zeros((40, 200), np.uint8)
    labels[:, 50:150] = 1
    ((label, x, y, size, width),) = report.captions_of(labels, {1: "cat"})
    assert (label, size) == (1, 55)  # 11 of 200 pixels
    assert (x, y) == (pytest.approx(500, abs=15), pytest.approx(100, abs=15))
    assert 80 < width < 150


def test_names_without_report_or_panels_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_script.main(["--names"])
    assert stop.value.code == 2
    assert "--names writes into the images of --report and --save-panels; add one of them" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["background", "cat"], ["road", "cat"]])
def test_the_background_shows_the_image(tmp_path, names):
    """In the masks of the viewer, which still hold class indices, and in the thumbnail."""
    report.prepare_folder(tmp_path)
    label = np.zeros((16, 24), np.uint8)
    label[4:12, 4:12] = 1
    sample = Sample("a", np.full((16, 24, 3), 200, np.uint8), label)
    sample.prediction = label[::-1].copy()
    report.Report(tmp_path, ["a"], Classes(names), 255, False, None).add(sample, sample.prediction)
    for name, mask in (("label", label), ("prediction", sample.prediction)):
        with Image.open(tmp_path / f"pictures/000000_{name}.png") as image:
            assert (np.array(image) == mask).all()
            assert (np.array(image.convert("RGBA"))[..., 3] == np.where((mask == 0) & (names[0] == "background"), 0, 255)).all()
    thumbnail = np.array(Image.open(tmp_path / "pictures/000000_thumbnail.jpg")).astype(int)
    assert (abs(thumbnail[:, 20:] - 200).max() < 10) == (names[0] == "background")


def test_an_image_without_labelled_pixels_has_no_iou(toy_voc, snapshot, tmp_path):
    Image.fromarray(np.full(TOY_SIZES[2], 255, np.uint8)).save(toy_voc / "SegmentationClassAug/toy_2.png")
    evaluate(toy_voc, snapshot, "--report", str(tmp_path / "r"))
    ious = Page(tmp_path / "r").find("a", "data-iou")
    assert ious[-1] == ""
    assert all(math.isfinite(float(value)) for value in ious[:-1])
    assert VOCSegmentation(toy_voc, ["toy_2"], num_classes=TOY_CLASSES).load(0)[1].min() == 255


def test_comparing_with_a_damaged_report_is_refused(tmp_path):
    """Whatever its JSON holds: negative classes would be counted as other classes, and numbers are used in file names."""
    record = {"id": "a", "matrix": [[0, 1, 5]], "number": 3, "layers": ["crf"]}
    whole = {"scores": {"restore_from": "x"}, "names": ["a", "b"], "pictures": [record]}
    folder, classes = tmp_path / "r", Classes(["a", "b"], np.zeros((256, 3), np.uint8))
    folder.mkdir()

    def opened(content: str):
        (folder / "report.json").write_text(content)
        return open_other(str(folder), tmp_path / "new", ["a"], classes)

    assert opened(json.dumps(whole)).iou("a", 255) == 0.0
    damaged = [{**whole, "pictures": [{**record, **change}]} for change in (
        {"matrix": [[-1, 1, 5]]}, {"matrix": [[0, 2, 5]]}, {"matrix": [[0, 1, -5]]}, {"matrix": [[0, 1, 10**30]]},
        {"matrix": [[0, 1, 0.5]]}, {"matrix": [[0, 1]]}, {"matrix": 7}, {"matrix": [7]}, {"matrix": [["a", "b", "c"]]},
        {"matrix": [[True, True, True]]}, {"number": "../../x"}, {"number": 10**400}, {"number": -1}, {"layers": 5}, {"id": 5},
        {"id": ["a"]},
    )]  # fmt: skip
    damaged += [{**whole, **change} for change in (
        {"scores": None}, {"scores": []}, {"names": {"a": 1}}, {"names": [1, 2]}, {"names": "ab"}, {"pictures": {"a": 1}},
        {"pictures": 5}, {"pictures": [5]}, {"pictures": [{"id": "a"}]},
    )]  # fmt: skip
    for text in [*map(json.dumps, damaged), "[]", "7", "null", "[" * 100000, "{", "\x00"]:
        with pytest.raises(UserError, match=r"is no report|report\.json is damaged at image"):
            opened(text)
