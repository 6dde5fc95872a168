"""Submissions to the VOC server: names, sizes, labels; what the server would refuse is not packed."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as evaluate_script
from dataset import DatasetError, VOCSegmentation, voc_palette
from deeplab import deeplabv2
from scripts import predict
from tests.helpers import TOY_SIZES
from tests.helpers_nets import randomise_batch_norm
from utils.checkpoint import make_meta, save_snapshot
from utils.command import UserError
from utils.evaluation.submission import pack
from utils.visualize import indexed_png


@pytest.fixture(scope="module")
def voc_net(tmp_path_factory) -> Path:
    torch.manual_seed(2)
    net = randomise_batch_norm(deeplabv2("resnet18", 21))
    path = tmp_path_factory.mktemp("voc") / "net.pth"
    save_snapshot(path, net, make_meta(net, None, 1, {}, seen_voc_val=""))
    return path


@pytest.fixture
def test_set(toy_voc) -> Path:
    """Images and a list, without labels."""
    shutil.rmtree(toy_voc / "SegmentationClassAug")
    lists = toy_voc / "ImageSets/Segmentation"
    (lists / "val.txt").rename(lists / "test.txt")
    return toy_voc


def submit(data: Path, net: Path, target: Path, *options: str) -> None:
    common = ["--data-dir", data, "--restore-from", net, "--device", "cpu", "--num-workers", 0, "--submission", target]
    assert evaluate_script.main([*map(str, common), *options]) == 0


@pytest.mark.parametrize("options", [("--scales", "1,0.5"), ("--crf", "--crf-workers", "1"), ("--batch-size", "4")])
def test_the_archive_has_the_servers_format(test_set, voc_net, tmp_path, options):
    """The masks equal those of predict.py."""
    submit(test_set, voc_net, tmp_path / "a.tgz", *options)
    common = [test_set / "JPEGImages", "--restore-from", voc_net, "--save-dir", tmp_path / "masks", "--device", "cpu"]
    predict.main([*map(str, common), "--num-workers", "0", *options])
    with tarfile.open(tmp_path / "a.tgz", "r:gz") as tar:
        names = tar.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/toy_{i}.png" for i in range(6)]
        for i, (height, width) in enumerate(TOY_SIZES):
            data = tar.extractfile(names[i]).read()
            mask = Image.open(io.BytesIO(data))
            assert np.array_equal(mask, Image.open(tmp_path / f"masks/toy_{i}.png"))
            assert (mask.size, mask.mode) == ((width, height), "P")
            assert mask.getpalette() == voc_palette().ravel().tolist()
            assert np.asarray(mask).max() <= 20


def test_masks_that_the_server_would_refuse_are_not_packed(test_set, voc_net, snapshot, tmp_path, capsys):
    files = {"toy_0": test_set / "JPEGImages/toy_0.jpg"}
    good = np.zeros(TOY_SIZES[0], np.uint8)
    for masks, message in (
        ({}, "1 images have no mask, for example toy_0"),
        ({"toy_0": indexed_png(good[1:])}, r"is \(55, 39\) P; expected \(55, 40\)"),
        ({"toy_0": indexed_png(good + 21)}, r"with the labels 0, 1, .*, 20"),
    ):
        with pytest.raises(UserError, match=message):
            pack(tmp_path / "a.tgz", masks, files, VOCSegmentation.SERVER)
    with pytest.raises(UserError, match=r"a\.zip: the PASCAL VOC server accepts gzipped tar files"):
        submit(test_set, voc_net, tmp_path / "a.zip")
    with pytest.raises(UserError, match="has 4 classes; the server expects PASCAL VOC's 21"):
        submit(test_set, snapshot, tmp_path / "a.tgz")
    with pytest.raises(UserError, match="among the data"):
        submit(test_set, voc_net, test_set / "JPEGImages/a.tgz")
    with pytest.raises(SystemExit):
        submit(test_set, voc_net, tmp_path / "a.tgz", "--save-json", "x.json")
    assert "--submission packs predictions" in capsys.readouterr().err
    (test_set / "JPEGImages/toy_3.jpg").unlink()
    with pytest.raises(DatasetError, match=r"toy_3\.jpg does not exist; the test images are a separate download"):
        submit(test_set, voc_net, tmp_path / "a.tgz")
    assert not (tmp_path / "a.tgz").exists()
