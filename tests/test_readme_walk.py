"""The commands of the READMEs, run one after another on toy data and with few steps, in an empty folder."""

import dataclasses
import functools
import runpy
import shlex
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from deeplab import deeplabv2, make_net
from tests.helpers import ROOT, make_toy_voc
from tests.helpers_data import make_toy_cityscapes
from tests.helpers_nets import randomise_batch_norm
from tests.helpers_readme import AFTER_A_CHANGE, READMES, commands, script_and_options
from utils.checkpoint import make_meta, save_snapshot

HERE = ["--device", "cpu", "--num-workers", "0"]
STEPS = [*HERE, "--num-steps", "1", "--batch-size", "2", "--iter-size", "1", "--input-size", "33,33", "--save-num-images", "0"]
SHORTER = {  # options that are added, so that a command ends soon
    "train.py": STEPS,
    "train_msc.py": STEPS,
    "evaluate.py": [*HERE, "--crf-workers", "1"],
    "scripts/predict.py": [*HERE, "--crf-workers", "1"],
    "scripts/masks_to_indices.py": ["--workers", "0"],
    "scripts/check_dataset.py": ["--workers", "0"],
}
NOT_RUN = {  # scripts, or beginnings of commands, and why
    "scripts/benchmark.py": "takes minutes; tests/test_benchmark.py and test_memory.py run its parts",
    "scripts/prepare_cocostuff.py": "needs the archive; tests/test_prepare_cocostuff.py makes a small one",
    "scripts/prepare_voc.py": "needs both archives; tests/test_prepare_voc.py makes small ones",
    "tests/faults.py": "takes minutes; tests/test_faults.py runs a few of its kills",
    "tests/hostile.py": "takes minutes; tests/test_hostile.py runs a few hundred files",
    "scripts/masks_to_indices.py --": "each of its options has a test in tests/test_masks_to_indices.py",
    "scripts/masks_to_indices.py OLD NEW --suffix": "each of its options has a test in tests/test_masks_to_indices.py",
    "train.py --data-dir data/mine --image-dir": "needs folders of these names; tests/test_layouts.py makes some",
    **dict.fromkeys(
        (f"train.py {change}" for change in AFTER_A_CHANGE), "tests/test_changes.py makes the change and runs them"
    ),
}
FILES = {
    "WEIGHTS": "weights/resnet101COCO-41f33a49.pth",
    "IN": "bottlenecks.pth",
    "OLD": "MASKS",
    "NEW": "NEW_FOLDER",
    "FILE": "fetched.pth",
    "quickstart/snapshots": "snapshots",
    "OTHER": "weights/resnet101COCO-41f33a49.pth",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """An empty folder with the files of the README's reader: images, exports of labelling tools, a server for downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    make_toy_voc(tmp_path / "data/VOCdevkit/VOC2012")
    make_toy_voc(tmp_path / "camvid")
    make_toy_cityscapes(tmp_path / "data/cityscapes")
    for export in ("EXPORT", "MASKS"):
        folder = tmp_path / export
        toy = make_toy_voc(folder)
        shutil.rmtree(toy / "ImageSets")
        (toy / "SegmentationClassAug").rename(toy / "SegmentationClass")
        (toy / "labelmap.txt").write_text("background:0,0,0::\na:128,0,0::\nb:0,128,0::\nc:128,128,0::\n")
    shutil.copytree(tmp_path / "EXPORT/JPEGImages", tmp_path / "folder")
    shutil.copy(tmp_path / "folder/toy_0.jpg", tmp_path / "photo.jpg")
    film = cv2.VideoWriter("film.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, (48, 40))
    for _ in range(2):
        film.write(np.full((40, 48, 3), 90, np.uint8))
    film.release()
    torch.manual_seed(0)
    for name, backbone in (("fetched.pth", "resnet18"), ("bottlenecks.pth", "resnet50")):
        net = randomise_batch_norm(deeplabv2(backbone, 21))
        save_snapshot(name, net, make_meta(net, None, 0, {}, seen_voc_val=""))
    deep = make_net({"net": "pspnet", "backbone": "resnet18", "num_classes": 2}).state_dict()
    torch.save({key: value for key, value in deep.items() if not key.startswith(("head", "dsn"))}, "deep.pth")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}/fetched.pth"
    server.shutdown()
    server.server_close()


def test_the_readme_from_top_to_bottom(empty_folder, monkeypatch, capsys):
    folder, address = empty_folder
    from scripts import download

    unknown = dict.fromkeys(("about", "md5", "sha1", "sha256", "sha256_prefix", "unpack", "manual"), "")
    local = tuple(dataclasses.replace(item, urls=(address,), size=None, **unknown) for item in download.CATALOGUE)
    done = set()
    in_order = dict.fromkeys(
        command for text in READMES.values() for command in commands(text) if command.startswith("python ")
    )
    for command in in_order:
        script, options = script_and_options(command)
        if any(f"{shlex.join([script, *options])} ".startswith(f"{beginning}") for beginning in NOT_RUN):
            continue
        words = [FILES.get(word, word) for word in options]
        if script in ("train.py", "train_msc.py") and "--resume" not in words:
            shutil.rmtree("snapshots" if script == "train.py" else "snapshots_msc", ignore_errors=True)
        main = download.main if script == "scripts/download.py" else runpy.run_path(str(ROOT / script), run_name="read")["main"]
        if script == "scripts/download.py" and "mit-resnet101" in words:
            shutil.copy("deep.pth", "fetched.pth")
        with monkeypatch.context() as patch:
            patch.setattr(download, "CATALOGUE", local)
            small = ["--window", "65,65"] if "--window" in words else []
            status = main([*words, *SHORTER.get(script, []), *small])
        assert status in (0, None), f"{shlex.join([script, *words])}\n{capsys.readouterr()}"
        done.add(script)
        if script == "train.py" and "--resume" not in words:
            (made,) = (folder / "snapshots").glob("*_scenes_1.pth")
            made.rename(made.with_name(made.name.replace("1.pth", "40000.pth" if made.name.startswith("CS") else "20000.pth")))
    assert done >= {"train.py", "train_msc.py", "evaluate.py", "scripts/predict.py", "scripts/download.py"}
    left = [
        "report/index.html",
        "predictions/photo.png",
        "predictions/film.mp4",
        "curves.png",
        "net.onnx",
        "out.safetensors",
        "cityscapes.zip",
    ]
    assert [name for name in left if not (folder / name).is_file()] == []
    assert (folder / "data/mine/classes.txt").read_text().split()[:5] == ["background", "0", "0", "0", "a"]
    assert Image.open(folder / "NEW_FOLDER/SegmentationClass/toy_0.png").mode == "P"


def test_commands_that_are_not_run_are_still_in_the_readmes():
    python = [script_and_options(command) for command in commands() if command.startswith("python ")]
    named = [shlex.join([script, *options]) for script, options in python]
    assert [beginning for beginning in NOT_RUN if not any(command.startswith(beginning) for command in named)] == []
