"""The real loops on meta tensors and on fake CUDA devices."""

import sys
from contextlib import ExitStack, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset import VOCSegmentation, read_ids
from deeplab import deeplabv2, fold_batch_norm
from utils import checkpoint
from utils.evaluation import predict, score
from utils.training import loop, setup
from utils.training.monitor import Meter
from utils.training.stop import Ending


class Strict(TorchDispatchMode):
    """Refuses operators that would make the host and the device wait for each other, which meta and fake tensors allow.

    Only bytes are sent to the device: images and labels. Nothing is sent back, and no operator uses tensors of both. Scalars of
    the host are allowed, as in torch, since they are passed with the launch.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.launches, self.sent = device, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in inputs if x.device.type != self.device and x.dim()]
        there = [x for x in inputs if x.device.type == self.device]
        name = func._schema.name
        if here and there and not (name == "aten::copy_" and here[0] is args[1] and here[0].dtype == torch.uint8):
            raise AssertionError(f"{name} uses tensors of two devices")
        if name == "aten::_fused_sgd_" and self.device == "meta":  # it has no kernel for this, and nothing to compute
            self.launches += 1
            return None
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        arrived = [x for x in outputs if x.device.type == self.device]
        if there and len(arrived) < len(outputs):
            raise AssertionError(f"{name} copies to the host")
        if arrived and not there and here:
            if any(x.dtype != torch.uint8 for x in here):
                raise AssertionError(f"{name} sends {here[0].dtype} to the device")
            self.sent += sum(x.nbytes for x in here)
        self.launches += bool(arrived)
        return result


class NoConstants(TorchFunctionMode):
    """Refuses tensors on the device that are made from numbers of the host: each copy is a host sync."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device.type == self.device:
            raise AssertionError("a tensor is made on the device from numbers of the host")
        return result


class Unread(Meter):
    """A meter that is never read, as between two lines of the log."""

    def check(self) -> None:
        pass

    def means(self) -> dict[str, float]:
        return {"loss": 0.0}


@pytest.fixture
def on_meta(monkeypatch):
    """``on_meta(script, toy_voc, folder, *options)``: a real training run on meta tensors, checked from the first step on.

    Returns:
        The :class:`Strict` that checked it.
    """

    def run(script, *arguments, **options) -> Strict:
        strict, read = Strict("meta"), Ending.read
        with ExitStack() as stack, monkeypatch.context() as patch:

            def watched_read(*args):
                patch.setattr(Ending, "read", read)
                stack.enter_context(NoConstants("meta"))
                stack.enter_context(strict)
                return read(*args)

            patch.setattr(Ending, "read", watched_read)
            assert script(*arguments, **options) == 0
        return strict

    monkeypatch.setattr(setup, "Meter", Unread)
    monkeypatch.setattr(loop, "check_weights", lambda *args: None)  # reads values, once per snapshot
    monkeypatch.setattr(checkpoint, "_copy", lambda value: value)
    monkeypatch.setattr(checkpoint, "_save", lambda *args, **kwargs: None)
    monkeypatch.setattr(setup, "select_device", lambda *args: torch.device("meta"))
    monkeypatch.setattr(loop, "autocast", lambda device, amp: nullcontext())
    sgd = sys.modules["torch.optim.sgd"]
    monkeypatch.setattr(sgd, "_device_dtype_check_for_fused", lambda *args, **kwargs: None, raising=False)
    return run


STEP = ["--restore-from", "none", "--random-scale", "--random-mirror", "--num-steps", "2", "--log-every", "9"]
VARIANTS = {
    "plain": [],
    "loss-size": ["--loss-size", "input"],
    "iter-size": ["--iter-size", "2"],
    "grad-checkpoint": ["--grad-checkpoint"],
    "added": ["--class-weights", "balanced", "--warmup-steps", "2", "--clip-grad-norm", "1", "--ohem"],
    "pspnet": ["--net", "pspnet", "--ohem"],
    "deeplabv3": ["--net", "deeplabv3", "--one-scale-at-a-time", "--ohem"],
    "one-scale-at-a-time": ["--one-scale-at-a-time", "--loss-size", "input", "--iter-size", "2"],
}


def unread(sample, *pending):
    """Replaces :func:`utils.evaluation.predict.arrived`: fake tensors have no values to copy to the host."""
    sample.prediction = np.zeros(sample.classes.shape, dtype=np.uint8)
    return sample


@pytest.fixture
def fake_cuda(monkeypatch):
    """The real prediction on fake CUDA tensors, up to the copy of the classes to the host."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(score, "reading", lambda data, order, *args: nullcontext(data[index] for index in order))
        monkeypatch.setattr(predict, "to_host", lambda tensor: lambda: tensor)
        monkeypatch.setattr(predict, "arrived", unread)
        with torch.device("cuda"):
            net = fold_batch_norm(deeplabv2("resnet18", 4).eval())
        with Strict("cuda") as strict, NoConstants("cuda"):
            yield net, strict


def data_of(toy_voc) -> VOCSegmentation:
    return VOCSegmentation(toy_voc, read_ids(toy_voc / "ImageSets/Segmentation/val.txt"), num_classes=4)
