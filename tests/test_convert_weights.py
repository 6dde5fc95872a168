import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file

from dataset import MEAN_BGR
from deeplab import DeepLabV2
from deeplab.weights import EXPORTS, TRUNKS, VERSION, WeightsError, load_weights
from deeplab.weights.stem import STEM
from scripts import convert_weights
from tests.helpers_published import kazuto_state, random_net, seeded_and_tidy, tensorflow_arrays  # noqa: F401
from utils.command import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "convert_weights.py"


def convert(source, target, *options):
    assert convert_weights.main([str(source), str(target), *options]) == 0
    return target


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_bits(ours, theirs, rounded=()):
    """Bit for bit, but for the keys in ``rounded``: those to a few units in the last place of the largest number."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype, key
        if key in rounded:
            assert (ours[key] - tensor).abs().max() <= 4 * torch.finfo(torch.float32).eps * tensor.abs().max(), key
        else:
            assert torch.equal(ours[key], tensor), key


def snapshot(tmp_path, **options):
    net = random_net(**({"backbone": "resnet50", "num_classes": 3} | options))
    meta = {**net.config, "classes": ["a", "b", "c"], "step": 5, "args": {"seed": [1, 2]}, "seen_voc_val": "it saw val"}
    torch.save({"model": net.state_dict(), "meta": meta}, tmp_path / "ours.pth")
    return tmp_path / "ours.pth", net.state_dict(), meta


@pytest.mark.parametrize("scheme", ["published", "kazuto", "safetensors"])
def test_our_snapshot_there_and_back(tmp_path, scheme):
    path, state, meta = snapshot(tmp_path, backbone="resnet18" if scheme == "safetensors" else "resnet50")
    there = convert(path, tmp_path / ("x.safetensors" if scheme == "safetensors" else "x.pth"), "--to", scheme)
    back = load(convert(there, tmp_path / "back.pth"))
    assert_same_bits(back["model"], state)
    if scheme == "published":
        DeepLabV2("resnet50", 3, "full").load_state_dict(load(there), strict=True)
        DeepLabV2("resnet50", 3, "frozen").load_state_dict(load(there), strict=True)
    elif scheme == "kazuto":
        assert_same_bits(load(there), kazuto_state(state, "resnet50"))
    else:
        assert back["meta"] == meta | {"scheme": "snapshot", "mean": list(MEAN_BGR), "version": VERSION}
        with safe_open(there, "pt") as file:
            assert set(file.keys()) == set(state)
            assert json.loads(file.metadata()["meta"])["args"] == {"seed": [1, 2]}


@pytest.mark.parametrize("scheme", ["published", "kazuto"])
def test_published_files_there_and_back(tmp_path, scheme):
    state = random_net("resnet50", 3).state_dict()
    theirs = kazuto_state(state, "resnet50") if scheme == "kazuto" else dict(state)
    torch.save(theirs, tmp_path / "theirs.pth")
    there = convert(tmp_path / "theirs.pth", tmp_path / "ours.pth")
    meta = load(there)["meta"]
    assert (meta["backbone"], meta["num_classes"], meta["atrous_rates"]) == ("resnet50", 3, [6, 12, 18, 24])
    assert_same_bits(load(convert(there, tmp_path / "back.pth", "--to", scheme)), theirs)


@pytest.mark.parametrize(
    ("backbone", "form"),
    [("resnet50", "snapshot"), ("resnet18", "snapshot"), ("resnet18", "safetensors"), ("resnet18", "none")],
)
def test_torchvision_there_and_back(tmp_path, backbone, form):
    net = getattr(torchvision.models, backbone)(weights=None)
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.1, 1)
    theirs = net.state_dict()
    there = tmp_path / "theirs.pth"
    torch.save(theirs, there)
    if form != "none":
        there = convert(there, tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth"), "--to", form)
        assert not torch.equal(load_weights(there).state["conv1.weight"], theirs["conv1.weight"])
    back = load(convert(there, tmp_path / "back.pth", "--to", "torchvision-trunk"))
    assert_same_bits(back, {key: value for key, value in theirs.items() if not key.startswith("fc.")}, rounded=STEM)
    net.fc = torch.nn.Identity()
    net.load_state_dict(back, strict=True)


def test_our_trained_backbone_to_torchvision_and_back(tmp_path):
    path, state, _ = snapshot(tmp_path, stride_in_3x3=True)
    there = convert(path, tmp_path / "backbone.pth", "--to", "torchvision-trunk")
    net = torchvision.models.resnet50(weights=None)
    net.fc = torch.nn.Identity()
    net.load_state_dict(load(there), strict=True)
    back = load(convert(there, tmp_path / "back.pth"))
    backbone = {key: value for key, value in state.items() if not key.startswith("layer5.")}
    assert_same_bits(back["model"], backbone, rounded=STEM)


@pytest.mark.parametrize("form", ["snapshot", "safetensors", "backbone"])
def test_files_that_carry_the_unrounded_stem_still_load(tmp_path, form):
    """Earlier versions wrote the exact first layer too: beside the model, or in the state_dict's _metadata."""
    path, state, meta = snapshot(tmp_path, backbone="resnet18")
    backbone = {key: value for key, value in state.items() if not key.startswith("layer5.")}
    stem = {key: state[key] * 2 for key in STEM}
    if form == "snapshot":
        torch.save({"model": state, "meta": meta, "origin": stem}, path)
    elif form == "safetensors":
        path = tmp_path / "x.safetensors"
        origin = {f"origin.{key}": value for key, value in stem.items()}
        save_file(state | origin, path, {"meta": json.dumps(meta)})
    else:
        content = OrderedDict(backbone)
        content._metadata = OrderedDict(deeplab=stem)
        torch.save(content, path)
    weights = load_weights(path)
    assert weights.skipped == {}
    if form != "backbone":
        assert_same_bits(weights.state, dict(state))


def test_a_contaminated_file_stays_marked(tmp_path):
    theirs = tmp_path / "deeplabv2_resnet101_msc-vocaug.pth"
    torch.save(dict(random_net("resnet18", 3).state_dict()), theirs)
    ours = convert(theirs, tmp_path / "renamed.pth")
    assert "train and val" in load(ours)["meta"]["seen_voc_val"]
    assert "train and val" in load_weights(ours).seen_voc_val
    safe = convert(ours, tmp_path / "renamed.safetensors", "--to", "safetensors")
    assert "train and val" in load_weights(safe).seen_voc_val


def test_ways_back_from_tensorflow(tmp_path):
    """Weights trained by TensorFlow have an epsilon that no other scheme allows; Caffe's own arrays fit all schemes."""
    state = random_net("resnet50", 3).state_dict()
    layers = tensorflow_arrays(state, "resnet50")
    np.savez(tmp_path / "x.npz", **{f"{layer}/{leaf}": v for layer, entry in layers.items() for leaf, v in entry.items()})
    with pytest.raises(WeightsError, match=r"cannot be converted to kazuto: its batch-norm epsilon is 0\.001, not 1e-05"):
        convert(tmp_path / "x.npz", tmp_path / "y.pth", "--to", "kazuto")
    assert load(convert(tmp_path / "x.npz", tmp_path / "y.pth"))["meta"]["batch_norm_eps"] == 1e-3
    np.save(tmp_path / "x.npy", layers)
    published = load(convert(tmp_path / "x.npy", tmp_path / "z.pth", "--to", "published"))
    assert_same_bits(published, {key: value for key, value in state.items() if "num_batches" not in key})


def test_targets_that_are_refused(tmp_path):
    path, _, _ = snapshot(tmp_path, backbone="resnet18")
    before = path.read_bytes()
    other = tmp_path / "other.pth"
    other.write_bytes(b"somebody's work")
    with pytest.raises(UserError, match="exists; choose another name or add --force"):
        convert(path, other)
    assert other.read_bytes() == b"somebody's work"
    (tmp_path / "sub").mkdir()
    for target in (path, tmp_path / "sub" / ".." / "ours.pth"):
        with pytest.raises(UserError, match="is the file to read, which is never overwritten"):
            convert(path, target, "--force")
    assert path.read_bytes() == before
    for target, match in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.pth", "does not exist; make it first"),
        (tmp_path / "x.caffemodel", "--to snapshot writes .pth files"),
    ):
        with pytest.raises(UserError, match=match):
            convert(path, target)
    with pytest.raises(UserError, match=r"--to safetensors writes \.safetensors files"):
        convert(path, tmp_path / "x.pth", "--to", "safetensors")
    with pytest.raises(UserError, match=r"--to snapshot writes \.pth files"):
        convert(path, tmp_path / "x.safetensors", "--to", "snapshot")
    convert(path, other, "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.pth", "ours.pth", "sub"]
    assert load_weights(other).config["num_classes"] == 3


def test_the_choices_are_those_of_the_package():
    assert convert_weights.SCHEMES == EXPORTS
    assert convert_weights.TRUNKS == TRUNKS


def test_command_line(tmp_path, monkeypatch, capsys):
    path, _, _ = snapshot(tmp_path, backbone="resnet18")
    monkeypatch.chdir(tmp_path)
    convert(path, "out.safetensors")  # the suffix sets the scheme
    lines = capsys.readouterr().out
    assert "snapshot: 128 tensors; net deeplabv2, backbone resnet18, num_classes 3" in lines
    assert "do not evaluate it on val: it saw val" in lines
    assert "wrote out.safetensors (safetensors, " in lines
    command = [sys.executable, SCRIPT, path, "x.pth", "--to", "kazuto"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("convert_weights.py: error: ")
    assert "is for bottleneck blocks, which resnet18 does not have" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth", "out.safetensors"]
