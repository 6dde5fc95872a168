"""Weights of neighbouring projects: the logits, or the features, of the source's own net, and what is refused by its name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deeplab import BACKBONES, fold_batch_norm, load_net, make_net
from deeplab.batch_norm import fold
from deeplab.resnet import Bottleneck
from deeplab.weights import WeightsError, apply_weights, build_net, export, load_weights
from scripts import convert_weights
from tests.helpers_neighbours import CLASSES, SemsegPSPNet, mean_subtracted, picture
from tests.helpers_published import seeded_and_tidy  # noqa: F401
from tests.helpers_weights import save

SIZE = (97, 65)  # 8k + 1


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """A ResNet-50 of one block a stage."""
    monkeypatch.setitem(BACKBONES, "resnet50", (Bottleneck, (1, 1, 1, 1)))


def in_float32(net, prefix="module."):
    return {prefix + key: value.float() if value.is_floating_point() else value for key, value in net.state_dict().items()}


def difference(ours, theirs):
    """The largest difference over the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


# hszhao/semseg


@pytest.fixture(scope="module")
def semseg():
    torch.manual_seed(0)
    net = SemsegPSPNet()
    return net, {"epoch": 200, "state_dict": in_float32(net), "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("size", [SIZE, (41, 57)])
def test_both_heads_of_semsegs_pspnet(semseg, size, tmp_path):
    source, content = semseg
    rgb = picture(*size)
    with torch.no_grad():
        exact, own = source(rgb, our_border=True), source(rgb)
        weights = load_weights(save(tmp_path / "train_epoch_200.pth", content))
        assert not weights.skipped
        for mode in ("frozen", "full"):
            net = build_net(weights, batch_norm=mode)[0].eval()
            for ours, theirs, at_the_border in zip(net(mean_subtracted(rgb), auxiliary=True), exact, own, strict=True):
                print(difference(ours, theirs), difference(ours, at_the_border))
                assert difference(ours, theirs) < 1e-5
                assert 1e-4 < difference(ours, at_the_border) < 0.05  # a pixel's width of another colour
        for ours, theirs in zip(fold_batch_norm(net)(mean_subtracted(rgb), auxiliary=True), exact):
            assert difference(ours, theirs) < 1e-5
