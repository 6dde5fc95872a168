"""Weights into a net: the head, the report, and nets that do not fit."""

import re

import pytest
import torch

from deeplab import deeplabv2
from deeplab.batch_norm import fold
from deeplab.weights import WeightsError, apply_weights, load_weights
from tests.helpers_published import (
    narrow_state,
    random_net,
    seeded_and_tidy,  # noqa: F401
)
from tests.helpers_weights import HEAD, load_into_new_net, save


def test_untrained_heads_are_dropped_with_a_line(tmp_path):
    names = (
        "MS_DeepLab_resnet_pretrained_COCO_init.pth",
        "resnet101COCO-41f33a49.pth",
        "DeepLab_resnet_pretrained_init-f81d91e8.pth",
    )
    for name in names:
        weights = load_weights(save(tmp_path / name, narrow_state()))
        assert "num_classes" not in weights.config
        assert sorted(weights.skipped) == sorted(HEAD)
        assert "the head of these pretrained weights was never trained, so it is left out" in weights.notes
    state = {f"Scale.{key}": tensor.zero_() if "layer5" in key else tensor for key, tensor in narrow_state().items()}
    weights = load_weights(save(tmp_path / "renamed.pth", state))
    assert any("all zeros" in note for note in weights.notes)
    assert len(weights.state) == 520


def small_weights(tmp_path, **options):
    source = random_net("resnet18", **{"num_classes": 3} | options)
    return source, load_weights(save(tmp_path / "small.pth", {"model": source.state_dict(), "meta": dict(source.config)}))


def test_head_of_another_class_count(tmp_path):
    source, weights = small_weights(tmp_path)
    net = deeplabv2("resnet18", 4)
    before = net.layer5.conv2d_list[0].weight.clone()
    report = apply_weights(net, weights)
    assert report.notes == ["the file's head has 3 classes and the net 4: the head is left out"]
    assert report.missing == HEAD
    assert sorted(report.skipped) == sorted(HEAD)
    assert torch.equal(net.layer5.conv2d_list[0].weight, before)
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    assert report.lines()[0] == "loaded 100 of the net's 108 tensors; of the file, 8 skipped, 0 unexpected"
    assert all(len(line) < 300 for line in report.lines())


def test_not_restore_last(tmp_path):
    _, weights = small_weights(tmp_path)
    report = apply_weights(deeplabv2("resnet18", 3), weights, restore_last=False)
    assert report.missing == HEAD
    assert report.notes == ["the file's head (3 classes) is left out, as asked"]


def test_historic_two_branch_head(tmp_path):
    source, weights = small_weights(tmp_path)
    net = deeplabv2("resnet18", 3, atrous_rates=(6, 12)).eval()
    report = apply_weights(net, weights)
    assert report.notes == ["the branches of the file's head at rates 18, 24 are left out"]
    assert sorted(report.skipped) == sorted(HEAD[4:])
    image = torch.rand(1, 3, 33, 33)
    with torch.no_grad():
        features = source.features(image, fold(source))[1]
        first, second = source.layer5.conv2d_list[:2]
        torch.testing.assert_close(net(image), first(features) + second(features), rtol=1e-4, atol=1e-4)

    _, two = small_weights(tmp_path, atrous_rates=(6, 12))
    assert two.config["atrous_rates"] == [6, 12]
    report = apply_weights(deeplabv2("resnet18", 3), two)
    assert report.notes == ["the file's head has the rates [6, 12] and the net [6, 12, 18, 24]: the head is left out"]
    with pytest.raises(WeightsError, match=r"rates \[6, 12\], but the net \[6, 24\]; use --atrous-rates 6,12; in training"):
        apply_weights(deeplabv2("resnet18", 3, atrous_rates=(6, 24)), two)


def test_batch_counters_come_and_go(tmp_path):
    _, weights = small_weights(tmp_path)
    full = deeplabv2("resnet18", 3, batch_norm="full")
    report = apply_weights(full, weights)
    assert full.bn1.num_batches_tracked == 7
    assert report.missing == report.unexpected == []
    assert not any("num_batches" in key for key in report.loaded)
    weights.state = {key: value for key, value in weights.state.items() if "num_batches" not in key}
    full = deeplabv2("resnet18", 3, batch_norm="full")
    report = apply_weights(full, weights)
    assert full.bn1.num_batches_tracked == 0
    assert report.missing == report.unexpected == []


def test_nothing_is_half_loaded(tmp_path):
    source, weights = small_weights(tmp_path)
    net = deeplabv2("resnet18", 3)
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def refused(match):
        with pytest.raises(WeightsError, match=match):
            apply_weights(net, weights)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    lost = weights.state.pop("layer4.1.conv2.weight")
    refused(r"lacks 1 of the backbone's tensors \(layer4\.1\.conv2\.weight\); nothing was loaded")
    weights.state["layer4.1.conv2.weight"] = lost[:, :, :1]
    refused(r"layer4\.1\.conv2\.weight is \(512, 512, 1, 3\) in the file and \(512, 512, 3, 3\) in the net; nothing")
    weights.state["bn1.weight"] = (scale := weights.state["bn1.weight"])[:3]
    refused(r" in the net \(and 1 more such\); nothing was loaded")
    weights.state |= {"layer4.1.conv2.weight": lost, "bn1.weight": scale}
    assert apply_weights(net, weights).missing == []
    assert torch.equal(net.conv1.weight, source.conv1.weight)


def test_nets_that_are_built_differently(tmp_path):
    def refused(match, net_options, **config):
        with torch.device("meta"):
            net = deeplabv2(**{"backbone": "resnet50", "num_classes": 21} | net_options)
        weights = load_weights(
            save(tmp_path / "x.pth", {"model": narrow_state("resnet50"), "meta": {"backbone": "resnet50"} | config})
        )
        with pytest.raises(WeightsError, match=match):
            apply_weights(net, weights)

    refused(r"its backbone is resnet50, that of the net is resnet101; use --backbone resnet50", {"backbone": "resnet101"})
    refused(
        r"in the 3x3 convolutions, that of the net is in the first 1x1 convolutions; build the net with stride_in_3x3=True",
        {},
        stride_in_3x3=True,
    )
    refused(r"epsilon is 0\.001, that of the net is 1e-05; build the net with batch_norm_eps=0\.001", {}, batch_norm_eps=1e-3)
    refused(r"epsilon is 1\.001e-05, that", {}, batch_norm_eps=1.001e-5)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_the_rates_of_a_bare_head(tmp_path, branches):
    """Four branches are the published rates, two the first of them (AdaptSegNet); the rates of others are unknown."""
    state = {key: value for key, value in narrow_state("resnet18").items() if not re.search(rf"list\.[{branches}-9]", key)}
    weights = load_weights(save(tmp_path / "x.pth", state))
    assert weights.config.get("atrous_rates") == {2: [6, 12], 4: [6, 12, 18, 24]}.get(branches)
    assert (f"its head has {branches} convolutions and does not say" in "".join(weights.notes)) == (branches in (1, 3))


@pytest.mark.parametrize("depth", [6, 7])
def test_how_deeply_a_net_may_be_nested(tmp_path, depth):
    content = narrow_state("resnet18")
    for _ in range(depth):
        content = {"net": content}
    path = save(tmp_path / "x.pth", content)
    if depth == 6:
        assert "conv1.weight" in load_weights(path).state
    else:
        with pytest.raises(WeightsError):
            load_weights(path)


def test_every_key_is_accounted_for(tmp_path):
    source = random_net("resnet18", 3)
    state = source.state_dict() | {"layer6.weight": torch.ones(2), "epoch": 3}
    _, weights, report = load_into_new_net(save(tmp_path / "x.pth", state))
    assert report.unexpected == ["layer6.weight"]
    assert report.skipped == {"epoch": "no tensor (int)"}
    listed = {*report.loaded, *report.skipped, *report.unexpected}
    assert listed == {key for key in state if "num_batches" not in key}
    assert "unexpected in the file: layer6.weight" in report.lines()
    assert len(weights.state) + len(weights.skipped) == len(state)


def test_one_weight_set_per_scale(tmp_path):
    one = narrow_state()
    state = {f"Scale{n}.{key}": tensor.clone() for n in (1, 2, 3) for key, tensor in one.items()}
    weights = load_weights(save(tmp_path / "x.pth", state))
    assert len(weights.state) == 528
    assert len(weights.skipped) == 2 * 528
    state["Scale3.layer2.0.bn1.bias"] += 1
    with pytest.raises(
        WeightsError, match=r"they differ \(1 tensors, such as layer2\.0\.bn1\.bias\); DeepLab-v2 shares one set"
    ):
        load_weights(save(tmp_path / "x.pth", state))


def test_half_precision_is_widened(tmp_path):
    state = {key: tensor.half() for key, tensor in narrow_state().items()}
    weights = load_weights(save(tmp_path / "x.pth", state))
    assert {tensor.dtype for tensor in weights.state.values()} == {torch.float32}
