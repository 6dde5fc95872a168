import os
import pickle
import struct

import pytest
import torch

from deeplab.weights import WeightsError, load_weights
from deeplab.weights.legacy_tar import read_tar_torch
from tests.helpers_legacy_tar import tar_torch
from tests.helpers_published import narrow_state, seeded_and_tidy  # noqa: F401


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


def test_a_tensor_that_begins_inside_a_part_of_a_storage(tmp_path):
    numbers = {"a.weight": torch.rand(4), "b.weight": torch.rand(3)}
    whole, layout = tar_torch(numbers, view=("a.weight", "b.weight")), struct.pack("<ixxxx3q", 1, 3, 1, 0)
    assert whole.count(layout) == 1
    (tmp_path / "x.pth").write_bytes(whole.replace(layout, struct.pack("<ixxxx3q", 1, 2, 1, 1)))
    assert torch.equal(read_tar_torch(tmp_path / "x.pth")["b.weight"], numbers["b.weight"][1:])


def test_torch_files_of_early_2017_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = narrow_state("resnet18")
    path = tmp_path / "x.pth"
    for member in ("pickle", "storages", "tensors"):
        path.write_bytes(tar_torch(state, **{member: pickle.dumps(Evil(), protocol=2)}))
        refused(path, r"holds Python objects \((posix|nt)\.system\) besides tensors")
    net = b"ctorchvision.models.resnet\nResNet\n)\x81."
    path.write_bytes(tar_torch(state, pickle=net))
    refused(path, r"holds Python objects \(torchvision\.models\.resnet\.ResNet\)")
    assert not (tmp_path / "evil.txt").exists()


def test_broken_torch_files_of_early_2017(tmp_path):
    state = {"a.weight": torch.rand(3, 4)}
    path = tmp_path / "x.pth"
    path.write_bytes(tar_torch(state))
    refused(path, r"its keys \(a\.weight\)")  # read, but not a net
    far = tar_torch(state).replace(struct.pack("<ixxxx5q", 2, 3, 4, 4, 1, 0), struct.pack("<ixxxx5q", 2, 3, 4, 4, 1, 1))
    path.write_bytes(far)
    refused(path, "cut off or damaged")
    path.write_bytes(tar_torch(state, storages=b""))
    refused(path, "cut off or damaged")


def test_tensors_without_numbers(tmp_path):
    """They are empty, also with no dimensions; a tensor with more numbers than its storage is refused."""
    path = tmp_path / "x.pth"
    whole = tar_torch({"a": torch.empty(0), "b": torch.empty(2, 0, 3)})
    path.write_bytes(whole)
    assert {key: value.tolist() for key, value in read_tar_torch(path).items()} == {"a": [], "b": []}
    layout = struct.pack("<ixxxx3q", 1, 0, 1, 0)
    assert whole.count(layout) == 1
    path.write_bytes(whole.replace(layout, struct.pack("<ixxxx3q", 1, 1, 1, 0)))
    with pytest.raises(WeightsError, match="cut off or damaged"):
        read_tar_torch(path)
    tensors = tar_torch({"a": torch.rand(1)}).replace(struct.pack("<ixxxx3q", 1, 1, 1, 0), struct.pack("<ixxxxq16x", 0, 0))
    path.write_bytes(tensors)
    assert read_tar_torch(path)["a"].tolist() == []
