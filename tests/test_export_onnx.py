"""Exported nets predict the same as the project's own at any size; without onnx installed, a sentence says so."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from dataset import MEAN_BGR, to_input
from deeplab import BACKBONES, NETS, fold_batch_norm, load_net
from deeplab.inference import predict_classes
from deeplab.resnet import Backbone, BasicBlock
from scripts import export_onnx
from tests.helpers import ROOT
from tests.helpers_nets import randomise_batch_norm
from utils import outputs
from utils.command import UserError

SIZES = [(1, 65, 130), (3, 33, 47), (2, 64, 64), (1, 9, 17), (1, 129, 90), (2, 3, 5)]


def random_images(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def logits_and_classes(net, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    images = to_input(np.ascontiguousarray(batch[..., ::-1]))
    with torch.no_grad():
        return net(images), predict_classes(net, images)


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_torch_export(with_preprocessing, snapshot, tmp_path):
    options = ["--with-preprocessing"] if with_preprocessing else []
    assert export_onnx.main([str(snapshot), str(tmp_path / "net.pt2"), *options]) == 0
    extra = {"contract.json": ""}
    assert outputs.is_output(tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    assert json.loads(extra["contract.json"])["classes"] == ["ground", "red", "green", "blue"]
    net = load_net(snapshot)
    for size in SIZES if with_preprocessing else SIZES[:-1]:
        batch = random_images(*size)
        logits, classes = logits_and_classes(net, batch)
        if with_preprocessing:
            assert (program(torch.from_numpy(batch)) == classes).float().mean() > 0.999
        else:
            torch.testing.assert_close(program(to_input(np.ascontiguousarray(batch[..., ::-1]))), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_onnx_runtime(with_preprocessing, snapshot, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = ["--with-preprocessing"] if with_preprocessing else []
    assert export_onnx.main([str(snapshot), str(tmp_path / "net.onnx"), *options]) == 0
    model = onnx.load(tmp_path / "net.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == ["ground", "red", "green", "blue"]
    assert ("uint8 RGB" in facts["input"]) == with_preprocessing
    assert outputs.is_output(tmp_path / "net.onnx")  # so a second export may replace it
    assert next(entry.version for entry in model.opset_import if not entry.domain) == 18
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    net, (given,), (result,) = load_net(snapshot), session.get_inputs(), session.get_outputs()
    axes = {given.name: given.shape, result.name: result.shape}
    if with_preprocessing:
        assert axes == {"images": ["batch", "height", "width", 3], "classes": ["batch", "height", "width"]}
    else:
        assert axes == {"images": ["batch", 3, "height", "width"], "logits": ["batch", 4, "logits_height", "logits_width"]}
    assert facts["channel_order"] == ("RGB" if with_preprocessing else "BGR")
    assert json.loads(facts["mean_bgr"]) == list(MEAN_BGR)
    assert json.loads(facts["net"]) == net.config
    for size in SIZES:
        batch = random_images(*size)
        logits, classes = logits_and_classes(net, batch)
        given = batch if with_preprocessing else to_input(np.ascontiguousarray(batch[..., ::-1])).contiguous().numpy()
        found = torch.from_numpy(session.run(None, {"images": given})[0])
        if with_preprocessing:
            assert found.dtype == torch.uint8
            assert (found == classes).float().mean() > 0.999
        else:
            torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_preprocessing", [False, True])
@pytest.mark.parametrize("name", sorted(NETS.keys() - {"deeplabv2"}))
def test_every_net_at_sizes_that_were_not_traced(name, with_preprocessing, tmp_path, monkeypatch):
    """In onnxruntime and torch.export, on maps smaller than, larger than and as large as PSPNet's bins. DeepLab-v2: above."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(BACKBONES, "resnet18", Backbone(BasicBlock, (1, 1, 1, 1)))
    torch.manual_seed(0)
    net = fold_batch_norm(randomise_batch_norm(NETS[name]("resnet18", 4, "frozen")).eval())
    program = export_onnx.export(export_onnx.with_preprocessing(net) if with_preprocessing else net, with_preprocessing)
    export_onnx.write_onnx(tmp_path / "net.onnx", program, {"made_by": "a test"}, with_preprocessing)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    for size in [(1, 65, 130), (3, 41, 17), (2, 64, 90)]:
        batch = random_images(*size)
        logits, classes = logits_and_classes(net, batch)
        given = torch.from_numpy(batch) if with_preprocessing else to_input(np.ascontiguousarray(batch[..., ::-1])).contiguous()
        for found in (session.run(None, {session.get_inputs()[0].name: given.numpy()})[0], program.module()(given)):
            if with_preprocessing:
                assert (torch.as_tensor(found) == classes).float().mean() > 0.999
            else:
                torch.testing.assert_close(torch.as_tensor(found), logits, rtol=1e-4, atol=1e-4 * float(logits.std()))


def test_wrong_files_are_refused(snapshot, tmp_path, monkeypatch):
    for source, target, message in (
        (snapshot, tmp_path / "net.tflite", r"ends in \'\.tflite\'; expected \.onnx, or \.pt2"),
        (snapshot, tmp_path / "net.pth", "expected .onnx"),
    ):
        with pytest.raises(UserError, match=message):
            export_onnx.main([str(source), str(target)])
    headless = {key: value for key, value in torch.load(snapshot, weights_only=True)["model"].items() if "layer5" not in key}
    torch.save(headless, tmp_path / "headless.pth")
    with pytest.raises(UserError, match="holds no usable head"):
        export_onnx.main([str(tmp_path / "headless.pth"), str(tmp_path / "a.pt2")])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        export_onnx.main([str(snapshot), str(tmp_path / "a.onnx")])
    result = subprocess.run([sys.executable, ROOT / "scripts/export_onnx.py"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert not list(tmp_path.glob("a.*"))


def test_a_torch_that_is_too_old_is_refused(snapshot, tmp_path, monkeypatch):
    monkeypatch.delattr("torch.export.Dim.AUTO")
    with pytest.raises(UserError, match=r"cannot export dynamic image sizes; install torch 2\.6"):
        export_onnx.main([str(snapshot), str(tmp_path / "net.pt2")])
    assert not (tmp_path / "net.pt2").exists()
