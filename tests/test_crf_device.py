"""The CRF on the net's device predicts the same classes as the pool of processes, or the pool takes over."""

import importlib.util
import json
from argparse import Namespace
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as evaluate_script
from scripts import predict as predict_script
from tests.helpers_data import samples_with_logits
from utils.command import UserError
from utils.evaluation import crf_device
from utils.evaluation.crf_device import DeviceCRF, open_crf
from utils.evaluation.crf_pool import CRFPool, refine


def assert_same(found, expected) -> None:
    """The same images in the same order, with the same classes; in noise, two classes are equal at a few pixels."""
    assert [sample.id for sample, _ in found] == [sample.id for sample, _ in expected]
    for (_, mask), (_, other) in zip(found, expected, strict=True):
        assert mask.dtype == np.uint8
        assert mask.shape == other.shape
        assert (mask != other).mean() < 0.01


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prune", [0.0, 0.3])
def test_classes_equal_those_of_the_pool(batch_size, prune):
    inputs = samples_with_logits(7)
    inputs += inputs[-1:] * 4  # five of one size in a row
    expected = [(sample, refine(sample.image, logits, prune)) for sample, logits in inputs]
    assert_same(list(DeviceCRF(batch_size, prune).refine(iter(inputs))), expected)
    assert list(DeviceCRF(batch_size, check=True).refine([])) == []


def test_check_of_the_first_image_decides(monkeypatch, capsys):
    """A device with wrong results: one warning, and the pool refines all images, the first one included."""
    inputs = samples_with_logits(4)
    expected = [(sample, refine(sample.image, logits)) for sample, logits in inputs]
    assert_same(list(DeviceCRF(check=True).refine(inputs)), expected)
    assert capsys.readouterr().err == ""

    def wrong(image, probabilities, prune=0.0, backend="pydensecrf"):
        refined = right(image, probabilities, prune=prune, backend=backend)
        return refined.roll(1, dims=1) if backend == "torch" else refined

    right = crf_device.dense_crf
    monkeypatch.setattr(crf_device, "dense_crf", wrong)
    assert_same(list(DeviceCRF(check=True, workers=1).refine(inputs)), expected)
    said = capsys.readouterr().err
    assert said.count("differs from pydensecrf's by") == said.count("in image 0; pydensecrf computes it, in 1 processes") == 1
    unchecked = list(DeviceCRF().refine(inputs))
    assert all((mask != other).any() for (_, mask), (_, other) in zip(unchecked, expected, strict=True))


def test_running_out_of_memory_is_one_sentence(monkeypatch):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(crf_device, "dense_crf", full)
    with pytest.raises(UserError, match=r"CRF of 1 images of 33x9 pixels and 4 classes .*--crf-backend pydensecrf"):
        list(DeviceCRF().refine(samples_with_logits(2)))


@pytest.mark.parametrize(
    ("backend", "device", "cuda", "expected"),
    [
        ("auto", "cpu", True, CRFPool),
        ("auto", "auto", True, DeviceCRF),
        ("auto", "auto", False, CRFPool),
        ("auto", "cuda:1", True, DeviceCRF),
        ("torch", "cpu", False, DeviceCRF),
        ("pydensecrf", "cuda", True, CRFPool),
    ],
)
def test_auto_is_torch_on_a_gpu(backend, device, cuda, expected, monkeypatch):
    if backend == "auto":  # its choice without pydensecrf is the next test's
        pytest.importorskip("pydensecrf")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = Namespace(crf=True, crf_backend=backend, device=device, crf_workers=1, crf_prune=0.0, window=None, batch_size=2)
    with ExitStack() as stack:
        crf = open_crf(args, stack)
        assert type(crf) is expected
        assert getattr(crf, "check", None) == {CRFPool: None, DeviceCRF: backend == "auto"}[expected]
        assert open_crf(Namespace(**{**vars(args), "crf": False}), stack) is None


def test_torch_computes_the_crf_where_pydensecrf_is_not_installed(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pydensecrf" else find(name, *rest))
    args = Namespace(crf=True, crf_backend="auto", device="cpu", crf_workers=1, crf_prune=0.0, window=None, batch_size=2)
    with ExitStack() as stack:
        crf = open_crf(args, stack)
    assert (type(crf), crf.check) == (DeviceCRF, False), "there is nothing to compare the first image with"
    assert capsys.readouterr().err == "pydensecrf is not installed, so torch computes the CRF\n"


@pytest.mark.parametrize("options", [[], ["--batch-size", "3"], ["--window", "33,41"], ["--crf-prune", "0.05"]])
def test_evaluation_gives_the_same_scores(options, toy_voc, snapshot, tmp_path):
    """In both commands: the scores and the masks."""
    scores, masks = {}, {}
    for backend in ("pydensecrf", "torch"):
        folder = tmp_path / backend
        common = ["--restore-from", str(snapshot), "--device", "cpu", "--crf", "--crf-backend", backend, "--crf-workers", "1"]
        common += [*options, "--num-workers", "0"]
        words = ["--data-dir", str(toy_voc), "--save-json", str(folder / "scores.json"), "--save-dir", str(folder / "masks")]
        assert not evaluate_script.main([*common, *words])
        result = json.loads((folder / "scores.json").read_text())
        scores[backend] = [result[name]["mean_iou"] for name in ("before_crf", "after_crf")]
        assert not predict_script.main([str(toy_voc / "JPEGImages"), *common, "--save-dir", str(folder / "predicted")])
        files = sorted([*folder.glob("masks/*.png"), *folder.glob("predicted/*.png")])
        masks[backend] = {path.relative_to(folder): np.array(Image.open(path)) for path in files}
    assert scores["torch"] == pytest.approx(scores["pydensecrf"], abs=5e-5)
    assert len(masks["torch"]) >= 6
    for name, mask in masks["pydensecrf"].items():
        assert (masks["torch"][name] != mask).mean() < 1e-3


@pytest.mark.cuda
def test_classes_on_a_gpu_equal_those_of_the_pool():
    inputs = samples_with_logits(6)
    expected = [(sample, refine(sample.image, logits)) for sample, logits in inputs]
    on_gpu = [(sample, logits.cuda()) for sample, logits in inputs]
    assert_same(list(DeviceCRF(2, check=True).refine(on_gpu)), expected)
