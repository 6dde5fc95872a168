import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open

from dataset import MEAN_BGR
from deeplab import DeepLabV2
from deeplab.weights import WeightsError, load_weights
from deeplab.weights.names import to_bgr_input, to_rgb_input
from scripts import convert_weights
from tests.published import kazuto_state, random_net, seeded_and_tidy, tensorflow_arrays  # noqa: F401
from utils.command import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "convert_weights.py"


def convert(source, target, *options):
    assert convert_weights.main([str(source), str(target), *options]) == 0
    return target


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype, key
        assert torch.equal(ours[key], tensor), key


def snapshot(tmp_path, **options):
    net = random_net(**({"backbone": "resnet50", "num_classes": 3} | options))
    meta = {**net.config, "classes": ["a", "b", "c"], "step": 5, "args": {"seed": [1, 2]}, "seen_voc_val": "it saw val"}
    torch.save({"model": net.state_dict(), "meta": meta}, tmp_path / "ours.pth")
    return tmp_path / "ours.pth", net.state_dict(), meta


@pytest.mark.parametrize("scheme", ["published", "kazuto", "safetensors"])
def test_our_snapshot_there_and_back(tmp_path, scheme):
    path, state, meta = snapshot(tmp_path)
    there = convert(path, tmp_path / ("x.safetensors" if scheme == "safetensors" else "x.pth"), "--to", scheme)
    back = load(convert(there, tmp_path / "back.pth"))
    assert_same_bits(back["model"], state)
    if scheme == "published":
        DeepLabV2("resnet50", 3, "full").load_state_dict(load(there), strict=True)
        DeepLabV2("resnet50", 3, "frozen").load_state_dict(load(there), strict=True)
    elif scheme == "kazuto":
        assert_same_bits(load(there), kazuto_state(state, "resnet50"))
    else:
        assert back["meta"] == meta | {"scheme": "DeepLab-v2 snapshot", "mean": list(MEAN_BGR), "version": 1}
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
    assert_same_bits(dict(back), {key: value for key, value in theirs.items() if not key.startswith("fc.")})
    net.fc = torch.nn.Identity()
    net.load_state_dict(back, strict=True)


def test_our_trained_trunk_to_torchvision_and_back(tmp_path):
    """After training, the RGB stem is rounded; the exact BGR stem must travel with it."""
    path, state, _ = snapshot(tmp_path, stride_in_3x3=True)
    there = convert(path, tmp_path / "trunk.pth", "--to", "torchvision-trunk")
    net = torchvision.models.resnet50(weights=None)
    net.fc = torch.nn.Identity()
    net.load_state_dict(load(there), strict=True)
    rounded = to_bgr_input(*(load(there)[key] for key in ("conv1.weight", "bn1.running_mean")))
    assert not torch.equal(rounded[0], state["conv1.weight"])
    torch.testing.assert_close(rounded[0], state["conv1.weight"], rtol=1e-6, atol=0)
    back = load(convert(there, tmp_path / "back.pth"))
    assert_same_bits(back["model"], {key: value for key, value in state.items() if not key.startswith("layer5.")})
    again = load(convert(tmp_path / "back.pth", tmp_path / "again.pth", "--to", "torchvision-trunk"))
    assert_same_bits(dict(again), dict(load(there)))


def test_a_trunk_changed_elsewhere_does_not_get_its_old_stem(tmp_path):
    path, _, _ = snapshot(tmp_path, stride_in_3x3=True)
    trunk = load(convert(path, tmp_path / "trunk.pth", "--to", "torchvision-trunk"))
    trunk["conv1.weight"] = trunk["conv1.weight"] * 2
    torch.save(trunk, tmp_path / "changed.pth")
    expected = to_bgr_input(trunk["conv1.weight"], trunk["bn1.running_mean"])
    assert torch.equal(load_weights(tmp_path / "changed.pth").state["conv1.weight"], expected[0])

    torchvision_file = tmp_path / "imagenet.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), torchvision_file)
    ours = load(convert(torchvision_file, tmp_path / "x.pth"))
    ours["model"]["conv1.weight"] *= 2  # as training would
    torch.save(ours, tmp_path / "trained.pth")
    back = load(convert(tmp_path / "trained.pth", tmp_path / "back.pth", "--to", "torchvision-trunk"))
    expected = to_rgb_input(ours["model"]["conv1.weight"], ours["model"]["bn1.running_mean"])
    assert torch.equal(back["conv1.weight"], expected[0])


def test_a_contaminated_file_stays_marked(tmp_path):
    theirs = tmp_path / "deeplabv2_resnet101_msc-vocaug.pth"
    torch.save(kazuto_state(random_net("resnet50", 3).state_dict(), "resnet50"), theirs)
    ours = convert(theirs, tmp_path / "renamed.pth")
    assert "train and val" in load(ours)["meta"]["seen_voc_val"]
    assert "train and val" in load_weights(ours).seen_voc_val
    safe = convert(ours, tmp_path / "renamed.safetensors", "--to", "safetensors")
    assert "train and val" in load_weights(safe).seen_voc_val


def test_no_way_back_from_tensorflow(tmp_path):
    arrays = tensorflow_arrays(random_net("resnet50", 3).state_dict(), "resnet50")
    np.save(tmp_path / "x.npy", arrays)
    with pytest.raises(WeightsError, match=r"no way to kazuto: its batch-norm epsilon is 0\.001, there it is 1e-05"):
        convert(tmp_path / "x.npy", tmp_path / "y.pth", "--to", "kazuto")
    assert load(convert(tmp_path / "x.npy", tmp_path / "y.pth"))["meta"]["batch_norm_eps"] == 1e-3


def test_targets_that_are_refused(tmp_path):
    path, _, _ = snapshot(tmp_path, backbone="resnet18")
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists; choose another name or add --force"):
        convert(path, path)
    assert path.read_bytes() == before
    for target, match in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.pth", "does not exist; make it first"),
        (tmp_path / "x.safetensors", "--to snapshot writes .pth files"),
        (tmp_path / "x.caffemodel", "--to snapshot writes .pth files"),
    ):
        with pytest.raises(UserError, match=match):
            convert(path, target)
    with pytest.raises(UserError, match=r"--to safetensors writes \.safetensors files"):
        convert(path, tmp_path / "x.pth", "--to", "safetensors")
    convert(path, path, "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth"]
    assert load_weights(path).config["num_classes"] == 3


def test_command_line(tmp_path):
    path, _, _ = snapshot(tmp_path, backbone="resnet18")

    def run(*args):
        return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, cwd=tmp_path)

    done = run(path, "out.safetensors", "--to", "safetensors")
    assert done.returncode == 0, done.stderr
    assert "DeepLab-v2 snapshot: 128 tensors; backbone resnet18, num_classes 3" in done.stdout
    assert "do not score it on VOC val: it saw val" in done.stdout
    assert "wrote out.safetensors (safetensors, " in done.stdout
    failed = run(path, "x.pth", "--to", "kazuto")
    assert failed.returncode == 2
    assert failed.stderr.startswith("convert_weights.py: error: ")
    assert "built of bottleneck blocks, resnet18 is not" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth", "out.safetensors"]
