"""DeepLabv3 and PSPNet against a plain derivation: torchvision's backbone, InPlace-ABN as published, heads from the papers."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from dataset.classes import read_class_file
from deeplab import NETS, fold_batch_norm, load_net, make_net
from deeplab.pspnet import BINS, pyramid
from deeplab.weights import WeightsError, apply_weights, build_net, export, load_weights
from scripts import convert_weights, export_onnx, predict
from tests.helpers_published import random_net
from utils.evaluation.options import evaluation_parser
from utils.evaluation.predict import open_trained_net
from utils.training.options import settle, training_parser
from utils.training.start import begin

CLASSES = 5
load_toolbox, load_toolbox_net = partial(load_weights, abn="abs"), partial(load_net, abn="abs")


class Abn(nn.Module):
    """InPlace-ABN on running statistics: |weight| + eps, and in the heads a leaky ReLU of slope 0.01."""

    def __init__(self, channels, slope=1.0):
        super().__init__()
        self.slope = slope
        self.weight, self.bias = nn.Parameter(torch.randn(channels) / 2), nn.Parameter(torch.randn(channels) / 10)
        self.register_buffer("running_mean", torch.randn(channels) / 10)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        parts = (self.weight.abs() + 1e-5, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, var = (part[:, None, None].double() for part in parts)
        y = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        return torch.where(y >= 0, y, y * self.slope)


def leaky(channels):
    return Abn(channels, 0.01)


class Toolbox(nn.Module):
    """The published net in float64, unfolded; ``state_dict()`` has the published names."""

    def __init__(self, name, backbone):
        super().__init__()
        body = get_model(backbone, weights=None, norm_layer=Abn)
        width = body.fc.in_features
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False), Abn(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False), Abn(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 128, 3, 1, 1, bias=False), Abn(128)
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        first = self.layer1[0]
        first.conv1 = nn.Conv2d(128, 64, first.conv1.kernel_size, padding=first.conv1.padding, bias=False)
        out = 256 if width == 2048 else 64
        first.downsample = nn.Sequential(nn.Conv2d(128, out, 1, bias=False), Abn(out))
        for layer, dilation in ((self.layer3, 2), (self.layer4, 4)):
            for conv in layer.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (dilation, dilation)
        module = nn.Module()
        if name == "deeplabv3":
            module.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 256, 1, bias=False), leaky(256))
            module.conv2 = nn.Sequential(nn.Conv2d(width, 256, 1, bias=False), leaky(256))
            for number, rate in ((3, 12), (4, 24), (5, 36)):
                conv = nn.Conv2d(width, 256, 3, padding=rate, dilation=rate, bias=False)
                setattr(module, f"conv{number}", nn.Sequential(conv, leaky(256)))
            module.bottleneck = nn.Sequential(nn.Conv2d(1280, 512, 1, bias=False), leaky(512), nn.Dropout2d(0.1))
        else:
            module.stages = nn.ModuleList(
                nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(width, 512, 1, bias=False), leaky(512))
                for bins in (1, 2, 3, 6)
            )
            conv = nn.Conv2d(width + 2048, 512, 3, padding=1, bias=False)
            module.bottleneck = nn.Sequential(conv, leaky(512), nn.Dropout2d(0.1))
        self.head = nn.Sequential(module, nn.Conv2d(512, CLASSES, 1))
        auxiliary = nn.Conv2d(width // 2, 512, 3, padding=1)
        self.dsn = nn.Sequential(auxiliary, leaky(512), nn.Dropout2d(0.1), nn.Conv2d(512, CLASSES, 1))
        self.double().eval()

    def forward(self, x):
        x = self.bn1(self.conv1(x.double())).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        third = self.layer3(self.layer2(self.layer1(F.max_pool2d(x, 3, 2, 1, ceil_mode=True))))
        x, module = self.layer4(third), self.head[0]
        enlarge = lambda y: F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)  # noqa: E731
        if hasattr(module, "stages"):
            parts = [*(enlarge(stage(x)) for stage in module.stages), x]
        else:
            parts = [enlarge(module.conv1(x)), module.conv2(x), module.conv3(x), module.conv4(x), module.conv5(x)]
        return self.head[1](module.bottleneck(torch.cat(parts, 1))), self.dsn(third)


@pytest.fixture(scope="module", params=["deeplabv3", "pspnet"])
def toolbox(request):
    torch.manual_seed(3)
    return request.param, Toolbox(request.param, "resnet18"), Toolbox(request.param, "resnet50")


def save(path, net):
    torch.save({key: value.float() for key, value in net.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("size", [(41, 57), (97, 129)])
def test_logits_of_both_heads_equal_the_published_nets(toolbox, size, tmp_path):
    name, basic, bottleneck = toolbox
    images = torch.randn(1, 3, *size)
    for reference in [basic] if size == (97, 129) else [basic, bottleneck]:
        path = save(tmp_path / "CS_scenes_40000.pth", reference)
        weights = load_toolbox(path)
        assert (weights.config["net"], weights.config["stem"]) == (name, "deep")
        assert not weights.skipped
        with torch.no_grad():
            expected = reference(images)
            scale = max(float(logits.abs().max()) for logits in expected)
            for mode in ("frozen", "full") if reference is basic else ("frozen",):
                net = build_net(weights, batch_norm=mode)[0].eval()
                for ours, theirs in zip(net(images, auxiliary=True), expected):
                    assert float((ours - theirs).abs().max()) < 1e-5 * scale
                assert torch.equal(net(images), net(images, auxiliary=True)[0])
            for ours, theirs in zip(fold_batch_norm(net)(images, auxiliary=True), expected):
                assert float((ours - theirs).abs().max()) < 1e-5 * scale


def test_gradients_through_folded_heads_equal_those_without_folding(toolbox, tmp_path):
    _, reference, _ = toolbox
    net, _ = build_net(load_toolbox(save(tmp_path / "net.pth", reference)), batch_norm="frozen")
    net.eval()  # no dropout
    images, labels = torch.randn(2, 3, 41, 41), torch.randint(0, CLASSES, (2, 6, 6))
    for module, give in ((net, lambda: net(images, auxiliary=True)), (reference, lambda: reference(images))):
        module.zero_grad()
        main, aux = give()
        (F.cross_entropy(main.double(), labels) + 0.4 * F.cross_entropy(aux.double(), labels)).backward()
    theirs = dict(reference.named_parameters())
    compared = 0
    for key, parameter in net.named_parameters():  # of a frozen net: the convolutions
        expected = theirs[key].grad
        assert float((parameter.grad - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) + 1e-9, key
        compared += key.startswith(("head", "dsn"))
    assert compared > 6
    assert {"dsn.0.bias", "head.1.weight"} <= theirs.keys()


def test_a_map_that_is_larger_than_every_rate(toolbox, tmp_path):
    """On smaller maps the outer taps of the atrous branches see only padding."""
    _, reference, _ = toolbox
    head = load_toolbox_net(save(tmp_path / "net.pth", reference), "full").eval().head[0]
    features = torch.randn(1, 512, 41, 39)
    parts = [F.interpolate(stage(features.double()), (41, 39), mode="bilinear", align_corners=True)
             for stage in getattr(reference.head[0], "stages", [])]  # fmt: skip
    if parts:
        expected = reference.head[0].bottleneck(torch.cat([*parts, features], 1))
    else:
        mean, *branches = (getattr(reference.head[0], f"conv{number}")(features.double()) for number in range(1, 6))
        expected = reference.head[0].bottleneck(torch.cat([mean.expand_as(branches[0]), *branches], 1))
    with torch.no_grad():
        assert float((head(features, None) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    theirs = {name: module.p for name, module in reference.named_modules() if isinstance(module, nn.Dropout2d)}
    ours = {f"head.0.{name}": module.p for name, module in head.named_modules() if isinstance(module, nn.Dropout2d)}
    assert ours == {name: share for name, share in theirs.items() if name.startswith("head")}


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 6), (6, 6), (7, 11), (13, 25), (9, 64)])
def test_the_pyramid_pools_as_torch_does(size):
    """Means and gradients in float64 to its rounding, in each memory format, also of maps smaller than the bins."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        expected = [F.adaptive_avg_pool2d(x, bins) for bins in BINS]
        found = pyramid(x)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
        weights = [torch.randn_like(part) for part in expected]
        ours, theirs = (
            torch.autograd.grad([(part * w).sum() for part, w in zip(parts, weights)], x)[0] for parts in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pyramid_under_mixed_precision(dtype):
    """Only the results are rounded to the type, not the factors and sums, which may be too large for fp16."""
    x = (300 * torch.rand(1, 2, 97, 95)).to(dtype)  # the 9215 positions sum up to 1.4 million
    exact = [F.adaptive_avg_pool2d(x.double(), bins) for bins in BINS]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for autocast, theirs in zip(pyramid(x), exact):
            assert autocast.dtype == dtype
            assert float(((autocast - theirs) / theirs).abs().max()) < 0.51 * torch.finfo(dtype).eps + 1e-6
    for plain, theirs in zip(pyramid(x), exact):
        assert float(((plain - theirs) / theirs).abs().max()) < 0.51 * torch.finfo(dtype).eps + 1e-6


def test_auxiliary_logits_and_dropout_are_for_training_only():
    torch.manual_seed(0)
    net = make_net({"net": "pspnet", "backbone": "resnet18", "num_classes": 3}, "frozen")
    images = torch.randn(1, 3, 33, 33)
    main, aux = net.train()(images)
    assert main.shape == aux.shape == (1, 3, 5, 5)
    assert not torch.equal(main, net(images)[0])  # other channels are dropped
    assert torch.equal(net.eval()(images), net(images))


def test_published_counts():
    """The toolbox's own nets with 19 classes: the number of tensors without counters, and of parameters."""
    for name, tensors, parameters in (("deeplabv3", 570, 63_226_854), ("pspnet", 565, 70_437_350)):
        with torch.device("meta"):
            net = NETS[name]()
        assert net.config["batch_norm_eps"] == net.bn1.eps == net.dsn[1].eps == 1e-5
        assert sum(not key.endswith("num_batches_tracked") for key in net.state_dict()) == tensors
        assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def test_one_group_and_every_parameter_in_it():
    net = NETS["deeplabv3"]("resnet18", batch_norm="full")
    (group,) = net.parameter_groups()
    assert len(group["params"]) == len(list(net.parameters()))
    assert group["lr_scale"] == group["decay_scale"] == 1


# files


def test_export_to_published_names(toolbox, tmp_path):
    _, _, deep = toolbox
    weights = load_toolbox(save(tmp_path / "net.pth", deep))
    back = export(weights, "published")
    assert back.keys() == deep.state_dict().keys()
    for key, value in deep.state_dict().items():
        assert torch.allclose(back[key].double().abs(), value.abs(), atol=2e-7), key  # ABN takes the absolute value
    with pytest.raises(WeightsError, match="the scheme is for DeepLab-v2"):
        export(weights, "kazuto")


def test_a_file_with_batch_counters_has_plain_batch_norms(tmp_path):
    net = make_net({"net": "pspnet", "backbone": "resnet18", "num_classes": 3}, "full")
    with torch.no_grad():
        net.bn1.weight[0] = -0.5
    torch.save(dict(net.state_dict()), tmp_path / "net.pth")  # without the metadata of our own files
    assert load_weights(tmp_path / "net.pth").state["bn1.weight"][0] == -0.5


def test_backbone_of_mit_and_of_another_head(toolbox, tmp_path):
    name, reference, _ = toolbox
    state = {key: value.float() for key, value in reference.state_dict().items() if not key.startswith(("head", "dsn"))}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet18-imagenet.pth")
    for trunk, words in (("caffe", "BGR"), ("torchvision", "RGB")):
        weights = load_weights(tmp_path / "resnet18-imagenet.pth", trunk)
        assert weights.config["stem"] == "deep"
        assert words in "".join(weights.notes)
        assert weights.scheme == f"ResNet with a deep stem, over {'BGR 0..255' if trunk == 'caffe' else 'RGB'}"
    for kind in NETS:
        net, report = build_net(load_weights(tmp_path / "resnet18-imagenet.pth", "caffe"), net=kind, num_classes=7)
        assert all(key.startswith(("layer5", "head", "dsn")) for key in report.missing)
        assert report.missing
        assert all(bool(value.isfinite().all()) for value in net.state_dict().values())
    other = "pspnet" if name == "deeplabv3" else "deeplabv3"
    net, report = build_net(load_toolbox(save(tmp_path / "net.pth", reference)), net=other)
    assert f"the head of a {name}" in report.notes[-1].replace("that of", "the head of")
    assert report.missing


def test_backbones_with_the_7x7_stem(tmp_path):
    """torchvision's, and Caffe's in a published DeepLab-v2: stem and stride come from the file, the heads are new."""
    backbone = get_model("resnet50", weights=None)
    torch.save(backbone.state_dict(), tmp_path / "resnet50.pth")
    torch.save(random_net("resnet18", 3).state_dict(), tmp_path / "published.pth")
    for name, stride, note in (("resnet50.pth", True, "only its backbone"), ("published.pth", False, "is that of a deeplabv2")):
        weights = load_weights(tmp_path / name, "torchvision" if stride else "auto")
        net, report = build_net(weights, net="deeplabv3", num_classes=3)
        assert net.config["stem"] == "7x7"
        assert net.config["stride_in_3x3"] or not stride
        assert note in "".join(report.notes)
        assert all(key.startswith(("head", "dsn")) for key in report.missing)
        assert "layer4.1.conv2.weight" in report.loaded


def test_reset_head_equals_construction():
    net = make_net({"net": "deeplabv3", "backbone": "resnet18", "num_classes": 3}, "frozen")
    with torch.no_grad():
        for value in net.state_dict().values():
            value.fill_(float("nan"))
    torch.manual_seed(1)
    net.reset_head()
    torch.manual_seed(1)
    fresh = copy.deepcopy(net)
    fresh.reset_head()
    for key, value in net.state_dict().items():
        if key.startswith(("head", "dsn")):
            assert bool(value.isfinite().all())
            assert torch.equal(value, fresh.state_dict()[key])
    for norm in (net.head[0].conv2[1], net.dsn[1]):  # frozen ones need their own initial values
        for values, initial in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
            assert bool((values == initial).all())
    assert float(net.head[1].weight.detach().std()) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("head.1.weight"), "lacks a classifier"),
        (lambda s: s.pop("dsn.0.bias"), "its heads lack 1 tensors .dsn.0.bias"),
        (
            lambda s: s.update({"head.0.bottleneck.0.weight": torch.zeros(512, 3, 1, 1)}),
            "head.0.bottleneck.0.weight is .512, 3, 1, 1. in the file",
        ),
        (lambda s: s.pop("conv2.weight"), "lacks 1 of the backbone's tensors"),
        (lambda s: s.pop("conv3.weight"), "its first convolution is 64x3x3x3"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(toolbox, change, words, tmp_path):
    state = {key: value.float() for key, value in toolbox[1].state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=words):
        load_toolbox_net(tmp_path / "net.pth")


def test_stems_and_rates_that_do_not_fit(toolbox, tmp_path):
    weights = load_toolbox(save(tmp_path / "net.pth", toolbox[1]))
    with pytest.raises(WeightsError, match="its stem is three 3x3 convolutions, that of the net is one 7x7"):
        apply_weights(make_net({"net": toolbox[0], "backbone": "resnet18", "num_classes": CLASSES, "stem": "7x7"}), weights)
    with pytest.raises(WeightsError, match="--atrous-rates are those of DeepLab-v2's head"):
        build_net(weights, atrous_rates=[6, 12])
    for option in ({"negative_slope": -0.1}, {"negative_slope": 1.0}, {"auxiliary_channels": 0}):
        with pytest.raises(ValueError, match="expected 0 <= slope < 1 and one channel or more"):
            make_net({"net": toolbox[0], "backbone": "resnet18", **option})


# The kind of batch norm in a file


def frozen_net():
    """A frozen DeepLabv3 with batch-norm weights of both signs."""
    torch.manual_seed(5)
    net = make_net({"net": "deeplabv3", "backbone": "resnet18", "num_classes": 3}, "frozen").eval()
    for name, value in net.state_dict().items():
        if value.ndim == 1:
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value) / 2)
    return net


def same_logits(path, net, **options):
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        return torch.equal(load_net(path, **options)(images), net(images))


@pytest.mark.parametrize("wrap", ["nothing", "DataParallel", "compile", "AveragedModel", "dictionary"])
def test_a_state_dict_of_ours_describes_itself(tmp_path, wrap):
    """Its metadata survive torch.save, in both formats, and wrappers around the net."""
    net = frozen_net()
    wrapped = {
        "DataParallel": nn.DataParallel,
        "compile": torch.compile,
        "AveragedModel": torch.optim.swa_utils.AveragedModel,
    }.get(wrap, lambda net: net)(net)
    content = wrapped.state_dict()
    path = tmp_path / "net.pth"
    saved = {"state": content, "epoch": 3} if wrap == "dictionary" else content
    torch.save(saved, path, _use_new_zipfile_serialization=wrap != "dictionary")
    assert same_logits(path, net)
    with pytest.raises(WeightsError, match="a snapshot, whose batch norms use their weights unchanged; leave --abn out"):
        load_weights(path, abn="abs")


def test_files_with_an_unknown_kind_of_batch_norm_need_the_option(tmp_path):
    """Saved without metadata: as a plain dictionary, as safetensors, by an earlier version."""
    net = frozen_net()
    torch.save(dict(net.state_dict()), tmp_path / "net.pth")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for path in (tmp_path / "net.pth", tmp_path / "net.safetensors"):
        with pytest.raises(WeightsError, match=r"weights below zero \(bn1.weight .*give --abn abs or --abn signed"):
            load_net(path)
        assert same_logits(path, net, abn="signed")
        assert not same_logits(path, net, abn="abs")
        state, stored = load_weights(path, abn="abs").state, net.state_dict()["head.0.bottleneck.1.weight"]
        assert torch.equal(state["head.0.bottleneck.1.weight"], stored.abs() + 1e-5)
    with pytest.raises(ValueError, match="abn 'both' is unknown"):
        load_net(path, abn="both")
    options = ("negative_slope", "auxiliary_channels")  # earlier versions did not write these
    meta = {name: value for name, value in net.config.items() if name not in options}
    torch.save({"model": dict(net.state_dict()), "meta": meta}, tmp_path / "snapshot.pth")
    assert same_logits(tmp_path / "snapshot.pth", net)
    counters = {"bn1.num_batches_tracked": torch.tensor(1)}  # InPlace-ABN has none
    torch.save(net.state_dict() | counters, tmp_path / "counted.pth")
    assert same_logits(tmp_path / "counted.pth", net)


def test_the_backbone_under_another_head_needs_the_option_too(tmp_path):
    """CCNet's head, and DeepLab-v2's over the deep stem."""
    backbone = {key: value for key, value in frozen_net().state_dict().items() if not key.startswith(("head.", "dsn."))}
    heads = {
        "ccnet": {"head.conva.0.weight": torch.zeros(2, 3), "dsn.0.bias": torch.zeros(2)},
        "deeplabv2": {
            f"layer5.conv2d_list.{k}.{leaf}": torch.rand(3, 512, 3, 3) if leaf == "weight" else torch.rand(3)
            for k in range(4)
            for leaf in ("weight", "bias")
        },
        "none": {},
    }
    for name, head in heads.items():
        path = tmp_path / f"{name}.pth"
        torch.save(backbone | head, path)
        with pytest.raises(WeightsError, match="give --abn abs or --abn signed"):
            load_weights(path)
        for abn in ("abs", "signed"):
            weights = load_weights(path, "auto" if name == "deeplabv2" else "caffe", abn)
            for key, value in backbone.items():
                is_norm = key.endswith(("bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight"))
                expected = value.abs() + 1e-5 if is_norm and abn == "abs" else value
                assert torch.equal(weights.state[key], expected), key
        assert ("another net" in "".join(weights.notes)) == (name == "ccnet")
    torch.save(backbone | {"fc.weight": torch.zeros(9, 2)}, path)  # MIT's ImageNet net
    assert torch.equal(load_weights(path, "caffe").state["bn2.weight"], backbone["bn2.weight"])


def test_every_command_that_reads_weights_has_the_option(tmp_path, monkeypatch):
    net, path = frozen_net(), str(tmp_path / "net.pth")
    torch.save(dict(net.state_dict()), path)
    images = torch.randn(1, 3, 33, 33)
    stored = net.state_dict()
    with pytest.raises(WeightsError, match="--abn"):
        open_trained_net(predict.parse_args(["a.jpg", "--restore-from", path]))
    found = open_trained_net(evaluation_parser("").parse_args(["--restore-from", path, "--abn", "signed"]))[0]
    with torch.no_grad():
        torch.testing.assert_close(found(images), net(images), rtol=1e-3, atol=1e-3 * float(net(images).abs().max()))
    assert predict.parse_args(["a.jpg", "--abn", "abs"]).abn == "abs"
    options = {"batch_size": 1, "iter_size": 1, "snapshot_dir": str(tmp_path / "run")}
    args = ["--restore-from", path, "--num-classes", "3", "--batch-norm", "frozen"]
    settled = settle(training_parser("", **options).parse_args([*args, "--abn", "abs"]))
    start = begin(settled, "loss", read_class_file(tmp_path))
    assert torch.equal(start.net.bn3.weight, stored["bn3.weight"].abs() + 1e-5)
    assert start.options.abn == "abs"

    target = str(tmp_path / "out.pth")
    with pytest.raises(WeightsError, match="--abn"):
        convert_weights.main([path, target])
    convert_weights.main([path, target, "--abn", "signed"])
    assert same_logits(target, net)
    assert torch.load(target, weights_only=True)["meta"]["args"]["abn"] == "signed"

    written = []
    monkeypatch.setattr(export_onnx, "export", lambda module, _: written.append(module))
    monkeypatch.setattr(export_onnx, "write_atomically", lambda path, write: path.write_bytes(b""))
    export_onnx.main([path, str(tmp_path / "net.pt2"), "--abn", "signed"])
    with torch.no_grad():
        torch.testing.assert_close(written[0](images), found(images))


def test_a_toolbox_head_with_extra_modules_is_another_head(toolbox, tmp_path):
    state = {key: value.float() for key, value in toolbox[1].state_dict().items()} | {"head.0.gate.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "net.pth")
    weights = load_toolbox(tmp_path / "net.pth")
    assert "num_classes" not in weights.config
    assert weights.skipped["head.1.weight"] == weights.skipped["dsn.3.bias"] == "another net's head"
    assert not any(key.startswith(("head.", "dsn.")) for key in weights.state)
