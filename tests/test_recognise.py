"""The source of a weights file: RGB or BGR backbones, two-level nets, nets with extra modules, NaN and infinite numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import deeplab
from deeplab.weights import WeightsError, apply_weights, build_net, load_net, load_weights
from deeplab.weights.stem import image_variance, to_bgr_input
from scripts import convert_weights
from tests.helpers_published import (
    blob,
    caffe_bytes,
    kazuto_state,
    layer,
    logits,
    narrow_state,
    random_net,
    seeded_and_tidy,  # noqa: F401
    tensorflow_arrays,
)

HEAD = [f"layer5.conv2d_list.{k}.{leaf}" for k in range(4) for leaf in ("weight", "bias")]


def save(path, content):
    torch.save(content, path)
    return path


def refused(path, match, **options):
    with pytest.raises(WeightsError, match=match):
        load_weights(path, **options)


# RGB or BGR: nets whose first layer was trained on either kind of input


def random_images(count=6, side=64):
    """(count, 3, side, side) RGB in 0..255, like photographs: amplitude 1 / frequency, correlated channels."""
    rng = np.random.default_rng(5)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1 / side
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((count, 4, side, side))) / frequency).real
    noise /= noise.std(axis=(2, 3), keepdims=True)
    colours = 115 + 60 * (0.93 * noise[:, :1] + 0.37 * noise[:, 1:])
    return torch.from_numpy(colours.clip(0, 255).round()).float()


def as_torchvision(rgb):
    return (rgb / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def as_caffe(rgb):
    return rgb.flip(1) - torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]


def kernels(form):
    """64 first-layer kernels: random, or edges and blobs of several frequencies and colours, as in trained nets."""
    generator = torch.Generator().manual_seed(6)
    if form == "random":
        return torch.randn(64, 3, 7, 7, generator=generator) * 0.02
    y, x = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    found = []
    for _ in range(64):
        angle, phase, pitch, size = (torch.rand(4, generator=generator) * torch.tensor([3.1, 6.3, 0.4, 0.2])).unbind()
        wave = torch.exp(-(x**2 + y**2) / 6) * torch.cos(6.28 * (0.02 + pitch) * (x * angle.cos() + y * angle.sin()) + phase)
        colour = 1 + 0.3 * torch.randn(3, generator=generator)
        found.append((0.01 + size) * colour[:, None, None] * wave)
    return torch.stack(found)


def backbone_of(kind, backbone="resnet50", form="trained", folded=False):
    """A state without a head, with a first layer and its statistics for input of one kind."""
    state = narrow_state(backbone, head=0)
    weight = kernels(form)
    x = (as_torchvision if kind == "torchvision" else as_caffe)(random_images())
    outputs = F.conv2d(x, weight, stride=2, padding=3).transpose(0, 1).flatten(1)
    gain = 0.1 + 0.4 * torch.rand(64)
    mean, var, shift = outputs.mean(1), outputs.var(1), torch.randn(64) * 0.2
    if folded:  # as in Detectron's files: statistics of 0 and 1, the rest in weight and bias
        scale = gain / (var + 1e-5).sqrt()
        gain, shift, mean, var = scale, shift - mean * scale, torch.zeros(64), torch.ones(64)
    names = ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv1.weight")
    return state | dict(zip(names, (gain, shift, mean, var, weight)))


def first_layer(state, x):
    stats = (state[f"bn1.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), *stats)


@pytest.mark.parametrize("kind", ["torchvision", "caffe"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
@pytest.mark.parametrize("form", ["random", "trained", "folded"])
def test_the_two_kinds_of_backbone_are_recognised(tmp_path, kind, backbone, form):
    state = backbone_of(kind, backbone, "trained" if form == "folded" else form, folded=form == "folded")
    weights = load_weights(save(tmp_path / "x.pth", state))
    assert weights.config.get("stride_in_3x3") == (None if backbone == "resnet18" else kind == "torchvision")
    assert weights.config["batch_norm_eps"] == 1e-5
    (line,) = [note for note in weights.notes if "read as" in note]
    other = "caffe" if kind == "torchvision" else "torchvision"
    assert f"--trunk {other}" in line
    assert ("BGR" if kind == "caffe" else "RGB") in line
    rgb = random_images(1)
    source = first_layer(state, (as_torchvision if kind == "torchvision" else as_caffe)(rgb))
    ours = first_layer(weights.state, as_caffe(rgb))
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(ours[inner], source[inner], rtol=1e-3, atol=1e-3)


def test_dead_channels_do_not_count(tmp_path):
    for kind in ("torchvision", "caffe"):
        state = backbone_of(kind)
        for key in ("conv1.weight", "bn1.running_var", "bn1.weight"):
            state[key][:40] *= 1e-12
        weights = load_weights(save(tmp_path / "x.pth", state))
        assert weights.config["stride_in_3x3"] == (kind == "torchvision")


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("kind", ["torchvision", "caffe"])
def test_the_option_overrides_the_guess(tmp_path, kind, classifier):
    state = backbone_of("caffe" if kind == "torchvision" else "torchvision")
    if classifier:
        state |= {"fc.weight": torch.rand(1000, 2), "fc.bias": torch.rand(1000)}
    weights = load_weights(save(tmp_path / "x.pth", state), trunk=kind)
    assert weights.config["stride_in_3x3"] == (kind == "torchvision")
    assert any("as asked" in note for note in weights.notes)
    stem = [state[key] for key in ("conv1.weight", "bn1.running_mean")]
    expected = to_bgr_input(*stem) if kind == "torchvision" else stem
    assert torch.equal(weights.state["conv1.weight"], expected[0])
    assert torch.equal(weights.state["bn1.running_mean"], expected[1])
    assert any("plain image classifier (1000 classes)" in note for note in weights.notes) == classifier
    assert weights.skipped == (dict.fromkeys(("fc.weight", "fc.bias"), "the image classifier") if classifier else {})


def test_the_option_does_not_override_a_recognised_file(tmp_path):
    path = save(tmp_path / "x.pth", narrow_state("resnet50"))
    assert load_weights(path, trunk="caffe").config["stride_in_3x3"] is False
    refused(
        path,
        "it is a DeepLab-ResNet, which is built as caffe's and not as torchvision's; leave --trunk out",
        trunk="torchvision",
    )
    meta = {"backbone": "resnet50", "stride_in_3x3": True}
    path = save(tmp_path / "x.pth", {"model": narrow_state("resnet50"), "meta": meta})
    assert load_weights(path, trunk="torchvision").config["stride_in_3x3"] is True
    refused(path, "a snapshot, which is built as torchvision's", trunk="caffe")


def test_convert_weights_has_the_option(tmp_path):
    state = backbone_of("torchvision")
    for key, value in random_net("resnet50", 3).state_dict().items():  # an export needs complete tensors
        if key not in ("conv1.weight",) and not key.startswith(("bn1.", "layer5.")):
            state[key] = value
    source = save(tmp_path / "in.pth", state)
    for trunk, at_3x3 in (("caffe", False), ("auto", True)):
        target = tmp_path / f"{trunk}.pth"
        convert_weights.main([str(source), str(target), "--trunk", trunk])
        assert torch.load(target, weights_only=True)["meta"]["stride_in_3x3"] is at_3x3


@pytest.mark.parametrize("prefix", ["Scale.", "module.Scale.", "Scale.module.", "Scale1."])
def test_a_headless_file_with_a_deeplab_prefix_is_a_deeplab(tmp_path, prefix):
    state = backbone_of("torchvision")  # the numbers say otherwise
    path = save(tmp_path / "x.pth", {prefix + key: value for key, value in state.items()})
    if prefix == "Scale1.":
        content = {f"Scale{n}.{key}": value for n in (1, 2, 3) for key, value in state.items()}
        path = save(tmp_path / "x.pth", content)
    weights = load_weights(path)
    assert weights.config["stride_in_3x3"] is False
    assert torch.equal(weights.state["conv1.weight"], state["conv1.weight"])
    assert weights.scheme.startswith("DeepLab-ResNet")
    refused(path, "leave --trunk out", trunk="torchvision")


@pytest.mark.parametrize("prefix", ["module.", "base.", "model.backbone.", "_orig_mod.module.encoder."])
def test_other_prefixes_have_no_meaning(tmp_path, prefix):
    for kind in ("torchvision", "caffe"):
        path = save(tmp_path / "x.pth", {prefix + key: value for key, value in backbone_of(kind).items()})
        assert load_weights(path).config["stride_in_3x3"] == (kind == "torchvision")
    path = save(tmp_path / "x.pth", {prefix + key: value for key, value in narrow_state("resnet50").items()})
    assert load_weights(path).config["num_classes"] == 21


# Two-level nets


@pytest.mark.parametrize("prefix", ["", "module.", "Scale."])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_head_of_a_two_level_net_is_layer6(tmp_path, prefix, auxiliary):
    source = random_net("resnet18", 3)
    state = {key.replace("layer5.", "layer6."): value for key, value in source.state_dict().items()}
    if auxiliary:
        state |= {key: torch.rand(3, 256, 3, 3) if key.endswith("weight") else torch.rand(3) for key in HEAD}
    path = save(tmp_path / "GTA2Cityscapes_multi.pth", {prefix + key: value for key, value in state.items()})
    weights = load_weights(path)
    net, report = build_net(weights)
    assert torch.equal(logits(net), logits(load_net(path)))
    torch.testing.assert_close(logits(net), logits(source), rtol=1e-4, atol=1e-4)
    assert report.missing == report.unexpected == []
    assert set(weights.skipped) == (set(HEAD) if auxiliary else set())
    (note,) = [note for note in report.notes if "layer6" in note]
    assert any("--atrous-rates 6,12" in line for line in report.notes)
    assert ("auxiliary" in note) == auxiliary
    target = tmp_path / "out.pth"
    convert_weights.main([str(path), str(target)])
    written = torch.load(target, weights_only=True)["model"]
    assert torch.equal(written["layer5.conv2d_list.3.weight"], source.layer5.conv2d_list[3].weight)


def test_a_two_level_net_with_swapped_names(tmp_path):
    """The head is the one with more input channels."""
    source = random_net("resnet18", 3)
    extra = {key.replace("layer5", "layer6"): torch.rand(3, 256, 3, 3) if "weight" in key else torch.rand(3) for key in HEAD}
    path = save(tmp_path / "x.pth", source.state_dict() | extra)
    weights = load_weights(path)
    net, report = build_net(weights)
    assert set(weights.skipped) == set(extra)
    assert report.missing == report.unexpected == []
    torch.testing.assert_close(logits(net), logits(source), rtol=1e-4, atol=1e-4)
    assert "layer5 is its head, since it has more input channels" in "".join(report.notes)


def test_two_heads_on_the_same_features_are_refused(tmp_path):
    state = narrow_state("resnet50")
    state |= {key.replace("layer5", "layer6"): state[key] + 1 for key in HEAD}
    refused(save(tmp_path / "x.pth", state), "two heads, layer5 and layer6, over the same features")


# Nets with extra modules


@pytest.mark.parametrize(
    ("backbone", "extra"),
    [
        ("resnet50", ("layer1.0.se.fc1.weight", "layer4.2.se.fc2.bias")),  # squeeze-and-excitation
        ("resnet18", ("layer2.1.eca.conv.weight",)),
        ("resnet50", ("layer1.0.bn1.IN.weight", "layer1.0.bn1.BN.running_mean")),  # IBN
        ("resnet50", ("layer3.0.downsample.2.weight",)),  # the averaging shortcut of ResNet-D
        ("resnet101", ("layer3.22.conv2.bias",)),
        ("resnet18", ("conv1.bias",)),
        ("resnet18", ("bn1.num_batches", "layer1.0.gamma")),
    ],
)
@pytest.mark.parametrize("form", ["DeepLab", "backbone", "prefixed", "snapshot"])
def test_nets_with_extra_modules_in_the_backbone_are_refused(tmp_path, backbone, extra, form):
    state = narrow_state(backbone, head=0 if form == "backbone" else 4) | {key: torch.rand(2) for key in extra}
    if form == "prefixed":
        state = {f"module.{key}": value for key, value in state.items()}
    content = {"model": state, "meta": {"backbone": backbone}} if form == "snapshot" else state
    refused(save(tmp_path / "x.pth", content), rf"holds tensors that a plain ResNet lacks \({', '.join(extra)}\)")


def test_extra_modules_under_other_naming_schemes(tmp_path):
    state = kazuto_state(narrow_state("resnet50"), "resnet50")
    for stage in (2, 5):  # kazuto1011's numbers
        more = {f"base.layer{stage}.block2.se.fc.weight": torch.rand(2)}
        refused(save(tmp_path / "x.pth", state | more), rf"\(layer{stage}\.block2\.se\.fc")
    canonical = narrow_state("resnet50")
    squeeze = layer("res2a_branch2a_se", "Convolution", blob(np.ones((2, 2, 1, 1))))
    (tmp_path / "x.caffemodel").write_bytes(caffe_bytes(canonical, "resnet50") + squeeze)
    refused(tmp_path / "x.caffemodel", r"\(res2a_branch2a_se\)")
    layers = tensorflow_arrays(canonical, "resnet50")
    layers["res2a_branch2a_se"] = {"weights": np.ones((1, 1, 2, 2), np.float32)}
    np.save(tmp_path / "x.npy", layers)
    refused(tmp_path / "x.npy", r"\(res2a_branch2a_se/weights\)")


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("prefix", ["", "base.", "module."])
def test_deeplab_v3_of_kazuto1011_is_refused(tmp_path, plus, prefix):
    state = kazuto_state(narrow_state("resnet101", head=0), "resnet101", prefix="")
    state |= {f"aspp.stages.c{k}.conv.weight": torch.rand(2, 2, 1, 1) for k in range(4)}
    state |= {"aspp.stages.imagepool.conv.conv.weight": torch.rand(2, 2, 1, 1), "fc1.conv.weight": torch.rand(2, 2, 1, 1)}
    if plus:
        state |= {"reduce.conv.weight": torch.rand(2, 2, 1, 1), "fc2.conv1.conv.weight": torch.rand(2, 2, 3, 3)}
    else:
        state |= {"fc2.weight": torch.rand(2, 2, 1, 1), "fc2.bias": torch.rand(2)}
    path = save(tmp_path / "x.pth", {prefix + key: value for key, value in state.items()})
    refused(path, rf"kazuto1011's DeepLabv3{'[+]' if plus else ''} .*dilations in the last stage")


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["conv1.weight", "layer3.1.conv1.weight", "layer5.conv2d_list.2.bias", "bn1.running_mean"])
def test_a_single_nan_or_infinite_value_is_refused(tmp_path, key, value):
    for head in (4, 0):
        state = narrow_state("resnet18", head)
        if key in state:
            state[key].view(-1)[-1] = value
            total = state[key].numel()
            refused(save(tmp_path / "x.pth", state), rf"its {key} holds 1 of {total} values that are infinite or not a number")


def test_numbers_of_every_format_are_checked(tmp_path):
    state = narrow_state("resnet50")
    state["layer2.0.bn1.bias"][1] = torch.inf
    state["layer2.0.bn2.bias"][:] = torch.nan
    words = r"its layer2\.0\.bn1\.bias holds 1 of 2 values .*and 1 more of its tensors are of this kind"
    (tmp_path / "x.caffemodel").write_bytes(caffe_bytes(state, "resnet50"))
    np.save(tmp_path / "x.npy", tensorflow_arrays(state, "resnet50"))
    save_file(state, tmp_path / "x.safetensors")
    save(tmp_path / "half.pth", {key: value.half() for key, value in state.items()})
    save(tmp_path / "kazuto.pth", kazuto_state(state, "resnet50"))
    save(tmp_path / "ours.pth", {"model": state, "meta": {"backbone": "resnet50"}})
    for path in tmp_path.iterdir():
        refused(path, words)


def test_negative_variances_are_refused_and_large_numbers_are_not(tmp_path):
    state = narrow_state("resnet18")
    state["layer4.0.bn1.running_var"][0] = -1e-3
    refused(save(tmp_path / "x.pth", state), r"its layer4\.0\.bn1\.running_var holds 1 of 2 variances below zero")
    state["layer4.0.bn1.running_var"][0] = -1e-5  # with the epsilon it is 0, and the scale 1 / 0
    refused(save(tmp_path / "x.pth", state), "holds 1 of 2 variances below zero")
    state["layer4.0.bn1.running_var"][0] = -1e-9  # Caffe's rounding of a dead channel; positive with the epsilon
    state["layer1.0.conv1.weight"][:] = 3e38  # finite, though their sum is infinite
    load_weights(save(tmp_path / "x.pth", state))


def test_integers_are_not_weights(tmp_path):
    state = narrow_state("resnet18")
    state["layer1.0.conv1.weight"] = torch.ones(2, 2, 1, 1, dtype=torch.int8)
    refused(save(tmp_path / "x.pth", state), r"its layer1\.0\.conv1\.weight is of type torch\.int8; expected floating point")


# From a file to a net


def test_load_net(tmp_path):
    source = random_net("resnet18", 3, atrous_rates=(2, 4))
    path = save(tmp_path / "x.pth", {"model": source.state_dict(), "meta": dict(source.config)})
    net = deeplab.load_net(path)
    assert not net.training
    assert net.config == source.config
    torch.testing.assert_close(logits(net), logits(source), rtol=1e-4, atol=1e-4)
    assert isinstance(deeplab.load_net(path, batch_norm="full").bn1, torch.nn.BatchNorm2d)
    assert deeplab.load_net is load_net
    with pytest.raises(AttributeError, match="no attribute 'load_nets'"):
        deeplab.load_nets  # noqa: B018
    backbone = {key: value for key, value in source.state_dict().items() if not key.startswith("layer5.")}
    with pytest.raises(WeightsError, match="gives no trained head"):
        load_net(save(tmp_path / "backbone.pth", backbone))


@pytest.mark.parametrize("options", [{"num_classes": 4}, {"atrous_rates": (6, 12, 18)}, {"restore_last": False}])
def test_a_head_that_is_left_out_is_missing(tmp_path, options):
    """Evaluation and prediction check the report."""
    source = random_net("resnet18", 3, atrous_rates=(6, 12))
    weights = load_weights(save(tmp_path / "x.pth", {"model": source.state_dict(), "meta": dict(source.config)}))
    net, report = build_net(weights, **options)
    assert report.missing == [key for key in net.state_dict() if key.startswith("layer5.")]
    assert set(report.skipped) == set(HEAD[:4])
    assert apply_weights(net, weights, restore_last=options.get("restore_last", True)).missing == report.missing


def test_build_net_without_a_file():
    net, report = build_net(None, backbone="resnet18", num_classes=2, atrous_rates=[1], batch_norm="full")
    assert (net.config["backbone"], net.num_classes, len(net.layer5.conv2d_list)) == ("resnet18", 2, 1)
    assert report.notes == ["initial weights: random"]
    assert net.training


def test_variance_of_images_by_hand():
    """Kernels of ones have an energy of 147."""
    kernel, ones = torch.ones(3, 7, 7), torch.ones(5)
    conv = torch.stack([kernel, kernel, kernel * 1e-5**0.5, kernel * 1e-7**0.5, kernel * 1e-7**0.5])  # the last two are dead
    state = {"conv1.weight": conv, "bn1.running_mean": 0 * ones, "bn1.weight": ones / 2}
    variances = torch.tensor([147 * 2, 147 * 4, 147e-5 * 6, 1.0, 1.0])
    assert image_variance(state | {"bn1.running_var": variances}) == pytest.approx(4)
    assert math.isnan(image_variance(state | {"conv1.weight": 0 * conv, "bn1.running_var": variances}))
    state["conv1.weight"] = kernel.expand(5, 3, 7, 7)
    for variance, expected in (
        (1.0005, 0.25),
        (1.002, 1.002),
    ):  # about 1 everywhere: folded; gain 2 * the usual
        assert image_variance(state | {"bn1.running_var": variance * ones}) == pytest.approx(expected / 147)


def test_a_deeplab_net_for_other_input_gets_a_warning(tmp_path):
    """The variance of the outputs is that of the images times the energy of the kernel, 147 * 4 here."""
    state = narrow_state("resnet18") | {"conv1.weight": torch.full((2, 3, 7, 7), 2.0)}
    for variance, words in ((3.0, ["variance 3, as normalised RGB has"]), (290.0, ["variance 290"]), (310.0, []), (4000.0, [])):
        state["bn1.running_var"] = torch.full((2,), 588 * variance)
        torch.save(state, tmp_path / "x.pth")
        found = [note for note in load_weights(tmp_path / "x.pth").notes if "worthless" in note]
        assert len(found) == len(words)
        assert all(word in note for word, note in zip(words, found))
    torch.save({"model": state, "meta": {"backbone": "resnet18", "seen_voc_val": "it saw all"}}, tmp_path / "x.pth")
    weights = load_weights(tmp_path / "x.pth")
    assert not weights.notes  # one of ours
    assert weights.seen_voc_val == "it saw all"


@pytest.mark.parametrize("lost", ["conv1.weight", "layer1.0.conv1.weight"])
def test_a_net_without_its_first_layers_is_not_recognised(tmp_path, lost):
    torch.save({key: value for key, value in narrow_state("resnet18").items() if key != lost}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="match no known scheme"):
        load_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("head", ["classifier", "neck"])
def test_a_prefix_backbone_means_torchvision_only_with_a_classifier(tmp_path, head):
    """The backbone of a detector has that prefix too."""
    torch.save({"backbone.stem.weight": torch.ones(2), f"{head}.weight": torch.ones(2)}, tmp_path / "x.pth")
    words = "it is a torchvision segmentation net" if head == "classifier" else "match no known scheme"
    with pytest.raises(WeightsError, match=words):
        load_weights(tmp_path / "x.pth")


# Heads of other nets


def proda(backbone):
    """ProDA's DeepLab-v2: five branches with group norm, a bottleneck with squeeze-and-excitation, preceded by a batch norm."""
    names = [f"layer5.conv2d_list.{n}.{m}.{leaf}" for n in range(5) for m in (0, 1) for leaf in ("weight", "bias")]
    names += ["layer5.bottleneck.0.se.0.weight", "layer5.bottleneck.1.bias", "layer5.head.1.weight", "bn_pretrain.running_mean"]
    return backbone | {name: torch.rand(3, 3) for name in names}


@pytest.mark.parametrize("kind", ["torchvision", "caffe"])
def test_the_stride_under_another_head_must_be_given(tmp_path, kind):
    """ProDA's net has torchvision's input and its stride in the first 1x1: the first layer does not determine it."""
    state = backbone_of(kind)
    path = save(tmp_path / "x.pth", {"ResNet101": {"model_state": proda(state)}, "iter": 5})
    one, three = ("rgb-1x1", "torchvision") if kind == "torchvision" else ("caffe", "bgr-3x3")
    refused(path, rf"another net's head \(layer5.*--trunk {one} if the first 1x1, --trunk {three} if the 3x3$")
    rgb = random_images(1)
    source = first_layer(state, (as_torchvision if kind == "torchvision" else as_caffe)(rgb))
    for trunk, at_3x3 in ((one, False), (three, True)):
        weights = load_weights(path, trunk)
        assert weights.config["stride_in_3x3"] is at_3x3
        assert weights.skipped.keys() == proda({}).keys()
        assert set(weights.skipped.values()) == {"another net's head"}
        assert not any("backbone without a head" in note for note in weights.notes)
        assert "another net" in "".join(weights.notes)
        inner = (..., slice(2, -2), slice(2, -2))
        ours = first_layer(weights.state, as_caffe(rgb))
        torch.testing.assert_close(ours[inner], source[inner], rtol=1e-3, atol=1e-3)
        assert all(torch.equal(weights.state[key], state[key]) for key in state if key.startswith("layer"))


@pytest.mark.parametrize(
    "head",
    [
        ("layer5.stages.0.1.weight", "layer5.bottleneck.0.weight"),  # CE2P, MRNet
        ("classifier.0.convs.0.0.weight", "classifier.4.bias"),
        ("aspp.aspp1.atrous_conv.weight", "decoder.conv1.weight"),
        ("fc.0.weight", "fc.2.bias"),  # MoCo's projection
        ("projection_head.0.weight", "prototypes.weight"),  # SwAV
        ("cls.4.weight",),
    ],
)
def test_other_parameters_beside_the_backbone_are_another_head(tmp_path, head):
    state = narrow_state("resnet50", head=0) | {key: torch.rand(2, 2) for key in head}
    refused(save(tmp_path / "x.pth", {f"module.{key}": value for key, value in state.items()}), "under another net's head")
    basic = narrow_state("resnet18", head=0) | {key: torch.rand(2, 2) for key in head}  # only one place for the stride
    weights = load_weights(save(tmp_path / "x.pth", basic))
    assert weights.skipped == dict.fromkeys(head, "another net's head")
    assert any(head[0] in note and "head is untrained" in note for note in weights.notes)


@pytest.mark.parametrize("more", ["layer5.head.1.weight", "layer5.conv2d_list.0.0.weight", "bn_pretrain.weight"])
def test_our_head_with_extra_modules_is_another_head(tmp_path, more):
    """The extra modules change the logits."""
    refused(save(tmp_path / "x.pth", narrow_state("resnet50") | {more: torch.rand(2)}), "under another net's head")
    state = {"Scale." + key: value for key, value in (narrow_state("resnet50") | {more: torch.rand(2)}).items()}
    weights = load_weights(save(tmp_path / "x.pth", state))  # the prefix of a DeepLab determines the stride
    assert "num_classes" not in weights.config
    assert not any(key.startswith("layer5.") for key in weights.state)
    meta = {"backbone": "resnet50", "stride_in_3x3": True, "net": "deeplabv2", "num_classes": 21}
    content = {"model": narrow_state("resnet50") | {more: torch.rand(2)}, "meta": meta}
    assert "num_classes" not in load_weights(save(tmp_path / "x.pth", content)).config


def test_a_backbone_under_another_prefix_is_named(tmp_path):
    state = {f"encoder.{key}": value for key, value in narrow_state("resnet50", head=0).items()}
    path = save(tmp_path / "x.pth", state | {"decoder.0.weight": torch.rand(2, 2)})
    refused(path, r"a ResNet under encoder\. and parts of another net \(decoder\.0\.weight")


def test_wrappers_around_parts_of_a_net(tmp_path):
    state = narrow_state("resnet50")
    inner = {
        key.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module.").replace("layer2.", "layer2._orig_mod."): value
        for key, value in state.items()
    }
    weights = load_weights(save(tmp_path / "x.pth", {f"_fsdp_wrapped_module.{key}": value for key, value in inner.items()}))
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[key], value) for key, value in state.items())


def test_a_bare_state_dict_of_ours_keeps_its_stride_and_rates(tmp_path):
    source = random_net("resnet50", 3, "frozen", stride_in_3x3=True, atrous_rates=(2, 4), batch_norm_eps=1e-3)
    net = load_net(save(tmp_path / "x.pth", source.state_dict()))
    assert net.config == source.config
    assert torch.equal(logits(net), logits(source))
    refused(tmp_path / "x.pth", "it is a snapshot, which is built as torchvision's and not as rgb-1x1's", trunk="rgb-1x1")
