import os
import pickle
import struct

import pytest
import torch

from deeplab.weights import WeightsError, load_weights
from tests.legacy_tar import tar_torch
from tests.published import narrow_state, seeded_and_tidy  # noqa: F401


def assert_loads(path, state):
    weights = load_weights(path)
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[key], tensor.float()) for key, tensor in state.items())


def refused(path, match):
    with pytest.raises(WeightsError, match=match):
        load_weights(path)


class Evil:
    def __reduce__(self):
        return os.system, ("echo loaded > evil.txt",)


@pytest.mark.parametrize("wrap", [None, "argument", "state"])
def test_torch_files_of_early_2017(tmp_path, wrap):
    state = narrow_state("resnet18")
    state["layer1.0.bn1.bias"] = state["layer1.0.bn1.bias"].double()
    state["layer1.0.bn2.bias"] = state["layer1.0.bn2.bias"].half()
    path = tmp_path / "resnet18-5c106cde.pth"
    path.write_bytes(tar_torch(state, wrap, view=("conv1.weight", "bn1.weight")))
    assert_loads(path, state)
    path.write_bytes(tar_torch(state, wrap, module="torch.cuda"))
    assert_loads(path, state)


def test_torch_files_of_early_2017_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = narrow_state("resnet18")
    path = tmp_path / "x.pth"
    for member in ("pickle", "storages", "tensors"):
        path.write_bytes(tar_torch(state, **{member: pickle.dumps(Evil(), protocol=2)}))
        refused(path, r"holds Python objects \((posix|nt)\.system\) beside tensors")
    net = b"ctorchvision.models.resnet\nResNet\n)\x81."
    path.write_bytes(tar_torch(state, pickle=net))
    refused(path, r"holds Python objects \(torchvision\.models\.resnet\.ResNet\)")
    assert not (tmp_path / "evil.txt").exists()


def test_broken_torch_files_of_early_2017(tmp_path):
    state = {"a.weight": torch.rand(3, 4)}
    path = tmp_path / "x.pth"
    path.write_bytes(tar_torch(state))
    refused(path, r"its keys \(a\.weight\)")  # read, but no net
    far = tar_torch(state).replace(struct.pack("<ixxxx5q", 2, 3, 4, 4, 1, 0), struct.pack("<ixxxx5q", 2, 3, 4, 4, 1, 1))
    path.write_bytes(far)
    refused(path, "cut off or damaged")
    path.write_bytes(tar_torch(state, storages=b""))
    refused(path, "cut off or damaged")
