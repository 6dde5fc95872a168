"""scripts/reproduce.sh in a copy of the project, with weights from a loopback server and toy data in VOC's place."""

import functools
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from deeplab import deeplabv2
from tests.helpers import ROOT, make_toy_voc
from tests.helpers_nets import randomise_batch_norm
from tests.helpers_published import caffe_bytes, random_net
from utils.checkpoint import make_meta, save_snapshot

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="a script for bash")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the project with toy data, and a server with weights files."""
    house, shop = tmp_path_factory.mktemp("house"), tmp_path_factory.mktemp("shop")
    for name in ("deeplab", "dataset", "utils", "scripts"):
        shutil.copytree(ROOT / name, house / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("evaluate.py", "train_msc.py", "requirements.txt"):
        shutil.copy(ROOT / name, house)
    (house / "scripts/environment.sh").write_text("environment() { :; }\n")  # the packages are those of the tests
    data = make_toy_voc(house / "data/VOCdevkit/VOC2012")
    (data / "ImageSets/Segmentation").rename(data / "ImageSets/SegmentationAug")
    (data / "ImageSets/SegmentationAug/train.txt").rename(data / "ImageSets/SegmentationAug/train_aug.txt")
    torch.manual_seed(3)
    net = randomise_batch_norm(deeplabv2("resnet18", 21))
    for name in ("deeplabv2_resnet101_msc-vocaug-20000.pth", "resnet101COCO-41f33a49.pth"):
        save_snapshot(shop / name, net, make_meta(net, None, 1, {}, seen_voc_val=""))
    official = random_net("resnet50", 21).state_dict()
    with zipfile.ZipFile(shop / "prototxt_and_model.zip", "w") as archive:
        archive.writestr("train_iter_20000.caffemodel", caffe_bytes(official, "resnet50"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shop)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    catalogue = house / "scripts/data/catalogue.py"
    url = f'"http://127.0.0.1:{server.server_address[1]}/"'
    lines = [
        line.split(" = ")[0] + f" = {url}" if line.startswith(("KAZUTO =", "VLLAB =")) else line
        for line in catalogue.read_text().splitlines()
    ]
    text = "\n".join(lines).replace("177 MB", "46 MB").replace('about="over 1 GB", ', "")
    catalogue.write_text(text.replace('"http://liangchiehchen.com/projects/released/deeplab_aspp_resnet101/', url[:-1]) + "\n")
    yield house
    server.shutdown()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def reproduce(house: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment}
    command = ["bash", house / "scripts/reproduce.sh", *options]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240)


def test_weights_are_fetched_evaluated_and_compared_with_published_results(house):
    common = ["kazuto", "--device", "cpu", "--num-workers", "0", "--crf-workers", "1"]
    first = reproduce(house, *common)
    assert first.returncode == 0, first.stderr
    assert "without CRF                                 76.65" in first.stdout
    assert (house / "results/kazuto/report/index.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in house.rglob("*.pth")}
    again = reproduce(house, *common)  # all steps are done already
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-4:] == first.stdout.splitlines()[-4:]
    assert "image/s" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in house.rglob("*.pth")} == before


def test_the_authors_model_from_its_archive(house):
    result = reproduce(house, "official", "--device", "cpu", "--num-workers", "0", "--crf-workers", "1")
    assert result.returncode == 0, result.stderr
    assert "without CRF                                 76.35" in result.stdout
    assert (house / "weights/caffe/train_iter_20000.caffemodel").is_file()
    assert (house / "results/official/report/index.html").is_file()


def test_training_with_the_recipe(house):
    options = "--device cpu --num-workers 0 --iter-size 1 --input-size 33,33 --save-num-images 0"
    common = ["train", "--device", "cpu", "--num-workers", "0", "--crf-workers", "1"]
    result = reproduce(house, *common, STEPS="1", TRAIN_OPTIONS=options)
    assert result.returncode == 0, result.stderr
    assert "with CRF                                    77.69" in result.stdout
    assert (house / "snapshots_reproduce/VOC12_scenes_1.pth").is_file()


def test_an_unknown_argument(house):
    result = reproduce(house, "everything")
    assert result.returncode == 2
    assert "reproduce.sh kazuto" in result.stderr
