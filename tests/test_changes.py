"""Each change that the READMEs beside the code show: made in a copy of the project, trained, resumed and evaluated."""

import importlib
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.resnet import Bottleneck, ResNet

from tests.helpers import ROOT, TOY_CLASSES, make_toy_voc
from tests.helpers_readme import blocks, make_changes, section
from tests.helpers_runs import equal

FOLDERS, SCRIPTS = ("dataset", "deeplab", "scripts", "utils"), ("train.py", "train_msc.py", "evaluate.py")
HERE = ["--device", "cpu", "--num-workers", "0"]
STEPS = ["--snapshot-dir", "run", "--input-size", "33,33", "--batch-size", "2", "--num-steps", "2", "--save-num-images", "0",
         "--restore-from", "none", *HERE]  # fmt: skip
VOC = ["--data-dir", "voc", "--num-classes", str(TOY_CLASSES)]
THIN = ["--backbone", "resnet18"]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The folder of a copy of the project. Imports find the copy's modules, and ``resnet18`` is a thin net there."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder)
    for script in SCRIPTS:
        shutil.copy2(ROOT / script, tmp_path / "copy")
    make_toy_voc(tmp_path / "voc")

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] in {*FOLDERS, "train", "train_msc", "evaluate"}]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)  # until the end of the test
    monkeypatch.syspath_prepend(tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "copy"
    for name in ours():
        del sys.modules[name]


@pytest.fixture
def run(copy, capsys, monkeypatch):
    """Run a script of the copy as a command, but in this process: (script, *words) -> its output."""

    def call(script, *words):
        statuses = []
        resnet = importlib.import_module("deeplab.resnet")
        resnet.BACKBONES["resnet18"] = resnet.Backbone(resnet.BasicBlock, (2, 2, 2, 2), groups=32, width=2)
        command = importlib.import_module("utils.command")
        monkeypatch.setattr(command, "run_command", lambda main: statuses.append(main() or 0))
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(copy / script), run_name="__main__")
        said = capsys.readouterr()
        assert statuses == [0], said
        return said.out

    return call


def make(copy, readme, title, end="\n\n\n\n"):
    """Make the change, and check its size."""
    text = section(readme, title).partition(end)[0]
    touched, added = make_changes(text, copy)
    assert 1 <= len(touched) <= 2
    assert added <= 30
    assert all(sum(bool(line.strip()) for line in block.splitlines()[1:]) <= 15 for block in blocks(text, "python"))


def trained(run, *words, script="train.py", evaluated=("--data-dir", "voc")):
    """Train two steps, resume for a third, and evaluate; returns the path of the snapshot."""
    run(script, *STEPS, *words)
    assert "resumed from run/last.ckpt at step 2" in run(script, "--snapshot-dir", "run", "--resume", "--num-steps", "3", *HERE)
    (path,) = Path("run").glob("*_scenes_3.pth")
    assert "mean IoU" in run("evaluate.py", "--restore-from", str(path), *evaluated, *HERE)
    return path


def test_a_loss(copy, run):
    make(copy, "deeplab/README.md", "Adding a loss")
    path = trained(run, *VOC, *THIN, script="train_dice.py")
    assert torch.load(path, weights_only=True)["meta"]["args"]["loss"] == "train_dice.dice_loss"
    user_error = importlib.import_module("utils.command").UserError
    with pytest.raises(user_error, match=r"the run was begun with the loss train_dice\.dice_loss"):
        run("train.py", "--snapshot-dir", "run", "--resume", "--num-steps", "4", *HERE)
    loss = runpy.run_path(str(copy / "train_dice.py"))["dice_loss"]
    logits, labels = torch.randn(2, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]], [[1, 1], [0, 0]]])
    p, dice = logits.softmax(1), []
    for k in range(3):  # naively, one pixel at a time
        both, each = 0.0, 0.0
        for n, i, j in np.ndindex(2, 2, 2):
            if labels[n, i, j] != 255:
                both += float(p[n, k, i, j]) * (labels[n, i, j] == k)
                each += float(p[n, k, i, j]) + (labels[n, i, j] == k)
        dice.append(2 * both / each)
    assert float(loss(lambda _: logits, None, labels)["loss"]) == pytest.approx(1 - float(sum(dice)) / 3)


def test_a_backbone(copy, run):
    """A ResNeXt-50 with one block per stage, otherwise as in the README's entry."""
    make(copy, "deeplab/README.md", "Adding a backbone")
    backbones = importlib.import_module("deeplab").BACKBONES
    assert backbones["resnext50"].depths == (3, 4, 6, 3)
    backbones["resnext50"] = backbones["resnext50"]._replace(depths=(1, 1, 1, 1))
    path = trained(run, *VOC, "--backbone", "resnext50")
    run("scripts/convert_weights.py", str(path), "net.safetensors", "--to", "safetensors")
    run("scripts/convert_weights.py", "net.safetensors", "back.pth")
    saved, back = (torch.load(name, weights_only=True) for name in (path, "back.pth"))
    assert back["meta"]["backbone"] == "resnext50"
    assert equal(saved["model"], back["model"])
    run(
        "scripts/predict.py", "voc/JPEGImages/toy_0.jpg", "--restore-from", "back.pth", "--save-dir", "masks", "--device", "cpu"
    )
    torch.save(ResNet(Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4).state_dict(), "resnext50.pth")
    words = [*STEPS, *VOC, "--backbone", "resnext50", "--snapshot-dir", "tuned", "--num-steps", "1"]
    assert "resnext50.pth: torchvision ResNet" in run(
        "train.py", *words, "--restore-from", "resnext50.pth", "--trunk", "torchvision"
    )


def test_a_backbone_becomes_onnx(copy, run):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    make(copy, "deeplab/README.md", "Adding a backbone")
    deeplab = importlib.import_module("deeplab")
    deeplab.BACKBONES["resnext50"] = deeplab.BACKBONES["resnext50"]._replace(depths=(1, 1, 1, 1))
    net = deeplab.make_net({"backbone": "resnext50", "num_classes": 2})
    torch.save({"model": net.state_dict(), "meta": net.config}, "net.pth")
    run("scripts/export_onnx.py", "net.pth", "net.onnx")
    groups = [
        attribute.i for node in onnx.load("net.onnx").graph.node for attribute in node.attribute if attribute.name == "group"
    ]
    assert groups.count(32) == 4  # one block per stage


def test_a_head(copy, run):
    make(copy, "deeplab/README.md", "Adding a head")
    path = trained(run, *VOC, *THIN, "--net", "fcn", "--batch-norm", "frozen")
    deeplab = importlib.import_module("deeplab")
    net = deeplab.load_net(path)
    assert (type(net).__name__, net.config["net"]) == ("FCN", "fcn")
    run("scripts/convert_weights.py", str(path), "fcn.safetensors", "--to", "safetensors")
    assert equal(deeplab.load_net("fcn.safetensors").state_dict(), net.state_dict())
    words = [*STEPS, *THIN, "--data-dir", "voc", "--num-classes", "5", "--num-steps", "1", "--snapshot-dir", "other"]
    said = run("train.py", *words, "--restore-from", str(path))  # the same net, with another number of classes
    assert "the file's head has 4 classes and the net 5: the head is left out" in said
    batch_norm = importlib.import_module("deeplab.batch_norm")
    assert net.head[0].bn in batch_norm.fold(net).constants


PLAIN = """
from types import MappingProxyType

from torch import nn

from deeplab.batch_norm import fold
from deeplab.resnet import DilatedResNet


class Plain(DilatedResNet):
    defaults = MappingProxyType({})

    def __init__(self, backbone="resnet101", num_classes=21, batch_norm="frozen", **build):
        super().__init__(backbone, batch_norm, **build)
        self.num_classes, self.head = num_classes, nn.Conv2d(self.out_channels, num_classes, 1)
        build = {"stride_in_3x3": False, "batch_norm_eps": 1e-5, "stem": "7x7"} | build
        self.config = {"net": "plain", "backbone": backbone, "num_classes": num_classes, **build}

    def forward(self, images, folded=None):
        return self.head(self.features(images, fold(self) if folded is None else folded)[1])

    def reset_head(self):
        self.head.reset_parameters()

    def parameter_groups(self):
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0, "decay_scale": 1.0}]
"""


def test_a_net_without_an_auxiliary_head(copy, run):
    """It needs only what deeplab/README.md names."""
    (copy / "deeplab/plain.py").write_text(PLAIN)
    nets = importlib.import_module("deeplab").NETS
    nets["plain"] = importlib.import_module("deeplab.plain").Plain
    path = trained(run, *VOC, *THIN, "--net", "plain")
    assert importlib.import_module("deeplab").load_net(path).config["net"] == "plain"
    plain = nets.pop("plain")
    with pytest.raises(ValueError, match=r"its meta says net 'plain', which is none of deeplabv2, .*; add it to"):
        importlib.import_module("deeplab").load_net(path)
    nets["plain"] = plain
    user_error = importlib.import_module("utils.command").UserError
    with pytest.raises(user_error, match="--aux-weight is for an auxiliary head, but plain has none"):
        run("train.py", *STEPS, *VOC, *THIN, "--net", "plain", "--aux-weight", "0", "--snapshot-dir", "other")


def test_an_augmentation(copy, run):
    make(copy, "dataset/README.md", "Adding an augmentation")
    path = trained(run, *VOC, *THIN, "--random-grey", "0.5")
    assert torch.load(path, weights_only=True)["meta"]["args"]["random_grey"] == 0.5
    with pytest.raises(importlib.import_module("utils.command").UserError, match=r"cannot change: --random-grey 0\.5 -> 1\.0"):
        run("train.py", "--snapshot-dir", "run", "--resume", "--num-steps", "4", "--random-grey", "1", *HERE)
    grey = importlib.import_module("dataset.transforms").RandomGrey(0.5)
    image, label = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8), np.zeros((5, 4), np.uint8)
    results = [grey(image, label, np.random.default_rng(seed)) for seed in range(20)]
    assert all(found is label for _, found in results)
    changed = [result for result, _ in results if result is not image]
    assert 0 < len(changed) < 20
    assert all((result == result[..., :1]).all() for result in changed)


def test_a_dataset_of_arrays(copy, run):
    make(copy, "dataset/README.md", "Training on any Dataset")
    for mask in Path("voc/SegmentationClassAug").iterdir():  # two classes
        label = np.array(Image.open(mask))
        Image.fromarray(np.where(label == 255, label, label > 0).astype(np.uint8)).save(mask)
    trained(run, *THIN, "--num-classes", "2", script="train_halves.py")


def test_a_data_set(copy, run, capsys):
    """Its folders and class names come from its class, without options."""
    make(copy, "dataset/README.md", "Adding a data set", end="\nPASCAL-Context")
    Path("data/streets").mkdir(parents=True)
    Path("voc/JPEGImages").rename("data/streets/photos")
    Path("data/streets/classes").mkdir()
    for mask in Path("voc/SegmentationClassAug").iterdir():
        Image.fromarray(np.array(Image.open(mask))).save(f"data/streets/classes/{mask.name}")
    for split in ("train", "val"):
        Path(f"voc/ImageSets/Segmentation/{split}.txt").rename(f"data/streets/{split}.txt")
    path = trained(run, *THIN, "--dataset", "streets", evaluated=())
    assert path.name == "STREETS_scenes_3.pth"
    assert torch.load(path, weights_only=True)["meta"]["classes"] == ["road", "car", "person", "sky"]
    assert "person" in run("evaluate.py", "--restore-from", str(path), *HERE)
    with pytest.raises(SystemExit):
        run("train.py", "--help")
    assert "streets: street scenes of four classes" in " ".join(capsys.readouterr().out.split())
