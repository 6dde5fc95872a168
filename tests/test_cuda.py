"""Tests that need a GPU. The other tests check the same on the CPU."""

import os
import signal
from functools import wraps

import pytest
import torch

from dataset import VOCSegmentation, read_ids, to_input
from deeplab import deeplabv2, fold_batch_norm, make_net, multi_scale_loss, predict, single_scale_loss
from deeplab.loss import Ohem
from scripts.bench.memory import step_memory
from tests.helpers import TOY_CLASSES
from tests.helpers_nets import randomise_batch_norm
from tests.helpers_runs import SCRATCH, model, train, train_msc
from utils.evaluation.score import score
from utils.training.optimizer import GuardedSGD

pytestmark = pytest.mark.cuda
CUDA = "cuda"
LOSSES = {"one scale": single_scale_loss, "three scales": multi_scale_loss}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("batch_norm", ["frozen", "full"])
@pytest.mark.parametrize("size", ["output", "input"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_those_of_the_cpu(name, size, batch_norm):
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2("resnet50", 5, batch_norm)).train()
    images, labels = 50 * torch.randn(2, 3, 97, 113), torch.randint(0, 5, (2, 97, 113))
    labels[0, :40] = 255
    found = {}
    for device in ("cpu", CUDA):
        net.to(device)
        found[device] = {
            part: loss.item() for part, loss in LOSSES[name](net, images.to(device), labels.to(device), size=size).items()
        }
    assert found[CUDA] == pytest.approx(found["cpu"], rel=1e-4)


@pytest.mark.parametrize("ohem", [None, Ohem(0.7, 500)])
@pytest.mark.parametrize("name", ["deeplabv3", "pspnet"])
def test_losses_of_two_heads_equal_those_of_the_cpu(name, ohem):
    torch.manual_seed(0)
    net = randomise_batch_norm(make_net({"net": name, "backbone": "resnet18", "num_classes": 5})).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # the devices draw different numbers
    images, labels = 50 * torch.randn(2, 3, 97, 113), torch.randint(0, 5, (2, 97, 113))
    found = {}
    for device in ("cpu", CUDA):
        net.to(device)
        losses = multi_scale_loss(net, images.to(device), labels.to(device), "input", ohem, 0.4)
        found[device] = {part: loss.item() for part, loss in losses.items()}
    assert found[CUDA] == pytest.approx(found["cpu"], rel=1e-4)


@pytest.mark.parametrize(
    "options", ["--amp fp16", "--amp bf16", "--compile", "--compile --amp bf16", "--grad-checkpoint --amp bf16"]
)
def test_steps_under_each_option(options, toy_voc, tmp_path):
    """fp16 skips its first steps until the loss scale fits."""
    steps = "2" if "fp16" not in options else "8"
    common = ["--device", CUDA, "--no-tf32", "--restore-from", "none", "--learning-rate", "1e-5", "--num-steps", steps]
    for script in (train, train_msc):
        folder = tmp_path / script.__name__
        assert script(toy_voc, folder, *common, *options.split()) == 0
        assert all(bool(value.isfinite().all()) for value in model(folder / f"VOC12_scenes_{steps}.pth").values())


def test_a_resumed_run_continues(toy_voc, tmp_path):
    """Four steps at once against two and two; only nearly equal, since the order of sums on a GPU varies."""
    options = [*SCRATCH, "--device", CUDA, "--no-tf32", "--save-pred-every", "2", "--learning-rate", "1e-4"]
    train(toy_voc, tmp_path / "once", *options, "--num-steps", "4")
    train(toy_voc, tmp_path / "twice", *options, "--num-steps", "4", loss=ending_after(2))
    assert not (tmp_path / "twice/VOC12_scenes_4.pth").exists()
    train(toy_voc, tmp_path / "twice", "--device", CUDA, "--resume")
    once, twice, start = (
        model(tmp_path / f"{name}.pth") for name in ("once/VOC12_scenes_4", "twice/VOC12_scenes_4", "once/VOC12_scenes_2")
    )
    for key in (key for key in once if "conv" in key):
        moved = float((once[key] - start[key]).abs().max())
        torch.testing.assert_close(twice[key], once[key], rtol=0, atol=0.02 * moved, msg=lambda m, key=key: f"{key}: {m}")


def test_classes_equal_those_of_the_cpu(toy_voc):
    """Except where the two largest logits are almost equal."""
    torch.manual_seed(0)
    net = fold_batch_norm(randomise_batch_norm(deeplabv2("resnet18", TOY_CLASSES)).eval())
    data = VOCSegmentation(toy_voc, read_ids(toy_voc / "ImageSets/Segmentation/val.txt"), num_classes=TOY_CLASSES)
    options = {"scales": (1.0, 0.75), "mirror": True, "batch_size": 2}
    found: dict[str, dict] = {"cpu": {}, CUDA: {}}
    for device, classes in found.items():
        score(net.to(device), data, torch.device(device), **options,
              finish=lambda sample, prediction, classes=classes: classes.update({sample.id: prediction}))  # fmt: skip
    net.cpu()
    for index, image_id in enumerate(data.ids):
        with torch.inference_mode():
            logits = predict(net, to_input(data.load(index)[0]), (1.0, 0.75), mirror=True)
        best, second = logits.topk(2, dim=0).values
        differ = torch.from_numpy(found["cpu"][image_id] != found[CUDA][image_id])
        assert float((best - second)[differ].max() if differ.any() else 0.0) < 1e-3


@pytest.mark.parametrize("options", [{}, {"grad_checkpoint": True}, {"amp": True}, {"scales": 3}])
def test_a_step_needs_the_predicted_memory(options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # it would try kernels with any workspace
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    net = deeplabv2("resnet101", 21).to(CUDA).to(memory_format=torch.channels_last).train()
    net.grad_checkpoint = options.get("grad_checkpoint", False)
    optimizer, loss = GuardedSGD(net, 0.0), multi_scale_loss if "scales" in options else single_scale_loss
    images = torch.randn(4, 3, 321, 321, device=CUDA).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 21, (4, 321, 321), device=CUDA)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(CUDA, torch.bfloat16, enabled="amp" in options):
            losses = loss(net, images, labels)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert step_memory("resnet101", 21, (321, 321), 4, **options).peak == pytest.approx(measured, rel=0.15)


def ending_after(steps: int):
    """A single-scale loss that sends a stop signal in step ``steps``."""
    calls = 0

    @wraps(single_scale_loss)
    def single(net, images, labels, **options):
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return single_scale_loss(net, images, labels, **options)

    return single
