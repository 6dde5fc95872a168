"""Weights of other projects: the logits or features equal those of the source's own net; others are refused by name."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from deeplab import BACKBONES, fold_batch_norm, load_net, make_net
from deeplab.batch_norm import fold
from deeplab.resnet import Backbone, Bottleneck
from deeplab.weights import WeightsError, apply_weights, build_net, export, load_weights
from scripts import convert_weights, export_onnx
from tests.helpers_neighbours import (
    CLASSES,
    SemsegPSPNet,
    features,
    mean_subtracted,
    over_torchvision,
    random_image,
    resnet,
    trained,
)
from tests.helpers_published import narrow_state, random_net, seeded_and_tidy  # noqa: F401
from tests.helpers_weights import save

SIZE = (97, 65)  # 8k + 1


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """A ResNet-50 with one block per stage."""
    monkeypatch.setitem(BACKBONES, "resnet50", Backbone(Bottleneck, (1, 1, 1, 1)))


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


@pytest.mark.parametrize(("size", "mode"), [(SIZE, "frozen"), ((41, 57), "full")])
def test_both_heads_of_semsegs_pspnet(semseg, size, mode, tmp_path):
    source, content = semseg
    path, rgb = save(tmp_path / "train_epoch_200.pth", content), random_image(*size)
    before = path.read_bytes()
    with torch.no_grad():
        exact, original = source(rgb, our_border=True), source(rgb)
        weights = load_weights(path)
        assert not weights.skipped
        net = build_net(weights, batch_norm=mode)[0].eval()
        for ours, theirs, at_the_border in zip(net(mean_subtracted(rgb), auxiliary=True), exact, original, strict=True):
            assert difference(ours, theirs) < 1e-5
            assert 1e-4 < difference(ours, at_the_border) < 0.05  # one pixel of padding has another colour
        for ours, theirs in zip(fold_batch_norm(net)(mean_subtracted(rgb), auxiliary=True), exact):
            assert difference(ours, theirs) < 1e-5
    assert path.read_bytes() == before  # although numbers move in torch's mapping of it


def test_a_snapshot_of_semsegs_pspnet_records_its_config(semseg, tmp_path):
    source, content = semseg
    path, rgb = save(tmp_path / "semseg.pth", content), random_image(*SIZE)
    with torch.no_grad():
        expected = source(rgb, our_border=True)[0]
        assert convert_weights.main([str(path), str(tmp_path / "ours.safetensors")]) == 0
        net = load_net(tmp_path / "ours.safetensors")
        assert (net.config["negative_slope"], net.config["auxiliary_channels"]) == (0.0, 256)
        assert difference(net(mean_subtracted(rgb)), expected) < 1e-5
    bare = load_weights(save(tmp_path / "bare.pth", net.state_dict()))  # its metadata say so
    assert bare.config == net.config
    reasons = "leaky ReLU of slope 0.01; the toolbox's auxiliary head has 512 channels"
    with pytest.raises(WeightsError, match=reasons):
        export(bare, "published")


def test_steps_from_semsegs_pspnet(semseg, tmp_path):
    """The gradients under both heads are those of the source."""
    source, content = semseg
    net = build_net(load_weights(save(tmp_path / "semseg.pth", content)))[0].eval()
    rgb, labels = random_image(33, 41), torch.randint(0, CLASSES, (1, 5, 6))
    source.zero_grad()
    for main, aux in (net(mean_subtracted(rgb), auxiliary=True), source(rgb, our_border=True)):
        (F.cross_entropy(main.double(), labels) + 0.4 * F.cross_entropy(aux.double(), labels)).backward()
    join = source.cls[0].weight.grad
    assert difference(net.head[0].bottleneck[0].weight.grad, torch.cat([join[:, 2048:], join[:, :2048]], 1)) < 1e-4
    assert difference(net.dsn[0].weight.grad, source.aux[0].weight.grad) < 1e-4
    assert difference(net.layer3[0].conv2.weight.grad, source.layer3[0].conv2.weight.grad) < 1e-4


def test_semsegs_pspnet_in_other_nets(semseg, tmp_path):
    _, content = semseg
    weights = load_weights(save(tmp_path / "semseg.pth", content))
    for name, slope in (("deeplabv2", None), ("deeplabv3", 0.01)):
        net, report = build_net(weights, net=name)
        assert net.config.get("negative_slope") == slope
        assert report.missing == [
            key for key in net.state_dict() if key.startswith(("layer5", "head", "dsn")) and "num_b" not in key
        ]
    net, report = build_net(weights, num_classes=3)
    assert (net.config["negative_slope"], net.dsn[0].out_channels, net.num_classes) == (0.0, 256, 3)
    assert all(key.startswith(("head", "dsn")) for key in report.missing)
    plain = make_net({"net": "pspnet", "backbone": "resnet50", "num_classes": CLASSES})
    with pytest.raises(WeightsError, match=r"slope is 0\.0, that of the net is 0\.01; build the net with negative_slope=0\.0"):
        apply_weights(plain, weights)


def test_batch_norms_of_semseg_are_plain(semseg, tmp_path):
    """Also from the time before batch counters; InPlace-ABN has none."""
    state = {key: value for key, value in semseg[1]["state_dict"].items() if not key.endswith("num_batches_tracked")}
    path = save(tmp_path / "semseg.pth", state)
    assert torch.equal(load_weights(path).state["bn2.weight"], state["module.layer0.4.weight"])
    with pytest.raises(WeightsError, match="use their weights unchanged; leave --abn out"):
        load_weights(path, abn="abs")


@pytest.mark.parametrize("change", ["PSANet", "a fifth bin", "no head"])
def test_other_nets_of_semseg_give_their_backbone(semseg, change, tmp_path):
    source, content = semseg
    state = content["state_dict"]
    if change == "PSANet":
        state = {key.replace("ppm.features", "psa"): value for key, value in state.items()}
    elif change == "a fifth bin":
        state = state | {"module.ppm.features.4.1.weight": torch.rand(2, 2, 1, 1)}
    else:
        state = {key: value for key, value in state.items() if key.startswith("module.layer")}
    net, report = build_net(weights := load_weights(save(tmp_path / "x.pth", state)), net="pspnet", num_classes=2)
    assert weights.scheme == "hszhao/semseg net"
    assert "num_classes" not in weights.config
    assert report.missing
    assert all(key.startswith(("head", "dsn")) for key in report.missing)
    assert not report.unexpected
    rgb = random_image(*SIZE)
    with torch.no_grad():
        expected = source.layer4(source.layer3(source.layer2(source.layer1(source.stem(rgb, our_border=True)))))
        assert difference(net.eval().features(mean_subtracted(rgb), fold(net))[1], expected) < 1e-5


# Segmentation nets over torchvision's ResNet


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("torchvision DeepLabv3", ""),
        ("torchvision FCN", "model."),
        ("VainF DeepLabv3", "module."),
        ("VainF DeepLabv3+", ""),
        ("jfzhang95 DeepLabv3+", ""),
    ],
)
def test_backbones_of_segmentation_nets(name, prefix, tmp_path):
    """The features of stage 4 equal the source's own once its blocks have our dilations."""
    source, rgb = over_torchvision(name), random_image(*SIZE)
    state = in_float32(source, prefix) | {"criterion.weight": torch.rand(CLASSES)}
    weights = load_weights(save(tmp_path / "x.pth", {"model_state": state}))
    assert weights.scheme == name
    assert weights.skipped.pop("criterion.weight") == "no place in the net"
    prefix = prefix.replace("module.", "")  # dropped
    assert weights.skipped.keys() == {prefix + key for key in source.state_dict() if not key.startswith("backbone.")}
    assert any("only the backbone is used" in note and "dilations" in note for note in weights.notes)
    with pytest.raises(WeightsError, match="leave --trunk out"):
        load_weights(tmp_path / "x.pth", "caffe")
    with torch.no_grad():
        own = features(source.backbone, rgb, our_border=True)
        for stage, dilation in ((source.backbone.layer3, 2), (source.backbone.layer4, 4)):
            for block in stage:
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        expected = features(source.backbone, rgb, our_border=True)
        for net_name in ("deeplabv2", "deeplabv3", "pspnet") if name == "torchvision FCN" else ("deeplabv2",):
            net, report = build_net(weights, net=net_name, num_classes=3)
            assert all(key.startswith(("layer5", "head", "dsn")) for key in report.missing)
            ours = net.eval().features(mean_subtracted(rgb), fold(net))[1]
            assert difference(ours, expected) < 1e-5
        assert (difference(ours, own) > 1e-3) == (name != "jfzhang95 DeepLabv3+")  # its single block here has our dilation


# Weights trained with two of the four branches of a head


def two_rates(path, rgb):
    """A file like AdaptSegNet's, and the logits of its net, which sums the first two branches."""
    source = random_net("resnet18", 3)
    features = source.features(rgb, fold(source))[1]
    first, second = source.layer5.conv2d_list[:2]
    return save(path, dict(source.state_dict())), first(features) + second(features)


@torch.no_grad()
def test_every_reader_of_weights_accepts_two_rates(tmp_path, monkeypatch):
    rgb = torch.randn(1, 3, 33, 41)
    path, expected = two_rates(tmp_path / "x.pth", rgb)
    (note,) = [note for note in load_weights(path).notes if "--atrous-rates 6,12" in note]
    assert "sum only the first two" in note
    net = load_net(path, atrous_rates=(6, 12))
    assert net.config["atrous_rates"] == [6, 12]
    assert difference(net(rgb), expected) < 1e-5
    assert difference(load_net(path)(rgb), expected) > 0.1
    for target in ("ours.pth", "ours.safetensors"):
        assert convert_weights.main([str(path), str(tmp_path / target), "--atrous-rates", "6,12"]) == 0
        weights = load_weights(tmp_path / target)
        assert (weights.config["atrous_rates"], weights.notes, weights.skipped) == ([6, 12], [], {})
        assert difference(load_net(tmp_path / target)(rgb), expected) < 1e-5
    written = {}
    monkeypatch.setattr(export_onnx, "export", lambda module, _: module)
    monkeypatch.setattr(
        export_onnx, "write_pt2", lambda target, module, facts: (target.touch(), written.update(facts, net_=module))
    )
    assert export_onnx.main([str(path), str(tmp_path / "net.pt2"), "--atrous-rates", "6,12"]) == 0
    assert written["net"]["atrous_rates"] == [6, 12]
    assert difference(written["net_"](rgb), expected) < 1e-5


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((6, 24), r"the rates of its head are \[6, 12, 18, 24\], and \[6, 24\] are not the first of them"),
        ((), "are not the first"),
    ],
)
def test_rates_that_a_head_does_not_have(rates, words, tmp_path):
    path, _ = two_rates(tmp_path / "x.pth", torch.zeros(1, 3, 9, 9))
    with pytest.raises(WeightsError, match=words):
        load_net(path, atrous_rates=rates)
    backbone = {key: value for key, value in torch.load(path).items() if not key.startswith("layer5")}
    with pytest.raises(WeightsError, match="--atrous-rates are those of a DeepLab-v2's head, and it has none"):
        load_weights(save(path, backbone), atrous_rates=rates)


@torch.no_grad()
def test_rates_of_a_head_with_three_branches_are_given(tmp_path):
    """The file does not say them."""
    source, rgb = random_net("resnet18", 3, atrous_rates=(2, 4, 6)), torch.randn(1, 3, 33, 41)
    path = save(tmp_path / "x.pth", dict(source.state_dict()))
    assert "num_classes" not in load_weights(path).config
    net = load_net(path, atrous_rates=(2, 4, 6))
    assert difference(net(rgb), source(rgb)) < 1e-5


# Wrappers


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "Scale.", "_orig_mod.net.module."])
@torch.no_grad()
def test_a_prefix_that_a_few_keys_lack(prefix, tmp_path):
    source, rgb = random_net("resnet18", 3), torch.randn(1, 3, 33, 41)
    more = {"n_averaged": torch.tensor(3), "criterion.weight": torch.rand(3), "normalize.mean": torch.rand(1, 3, 1, 1)}
    path = save(tmp_path / "x.pth", {prefix + key: value for key, value in source.state_dict().items()} | more)
    net, report = build_net(load_weights(path))
    assert set(report.unexpected) == more.keys()
    assert report.missing == []
    assert difference(net.eval()(rgb), source(rgb)) < 1e-5
    backbone = {f"{prefix}{key}": value for key, value in backbone_state(source).items()} | more
    weights = load_weights(save(tmp_path / "backbone.pth", backbone), trunk="caffe")
    assert {key: reason for key, reason in weights.skipped.items() if key in more} == dict.fromkeys(more, "no place in the net")


def backbone_state(net):
    return {key: value for key, value in net.state_dict().items() if not key.startswith("layer5")}


@torch.no_grad()
def test_wrappers_are_dropped_anywhere_in_a_name(tmp_path):
    source, rgb = random_net("resnet18", 3), torch.randn(1, 3, 33, 41)
    names = {
        key: key.replace("layer1.", "layer1._fsdp_wrapped_module._checkpoint_wrapped_module.", 1)
        .replace("layer2.1.", "layer2.module.1._orig_mod.", 1)
        .replace("layer5.conv2d_list.", "layer5.module.conv2d_list.module.", 1)
        for key in source.state_dict()
    }
    state = {f"_orig_mod.module.{names[key]}": value for key, value in source.state_dict().items()}
    net, report = build_net(load_weights(save(tmp_path / "x.pth", state)))
    assert report.missing == report.unexpected == []
    assert difference(net.eval()(rgb), source(rgb)) < 1e-5
    both = {"module.conv1.weight": source.conv1.weight} | dict(source.state_dict())
    with pytest.raises(WeightsError, match=r"holds conv1\.weight twice"):
        load_weights(save(tmp_path / "x.pth", both))


# Refused nets are named


def bottlenecks(prefix):
    return {prefix + key: value for key, value in narrow_state("resnet101", head=0).items()}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (narrow_state("resnet18") | {"layer1.0.conv1.weight_mask": torch.ones(2)}, r"a pruned net .*call prune\.remove"),
        ({"conv1.weight_orig": torch.rand(2), "conv1.weight_mask": torch.ones(2)}, "a pruned net"),
        ({"conv1.weight_g": torch.rand(2), "conv1.weight_v": torch.ones(2)}, "weights are in parts .*remove_parametrizations"),
        ({"conv1.parametrizations.weight.original0": torch.rand(2)}, "its weights are in parts"),
        (bottlenecks("encoder.") | {"segmentation_head.0.weight": torch.rand(2, 2)}, "a net of segmentation_models_pytorch"),
        (bottlenecks("module.backbone.") | {"module.decode_head.conv_seg.bias": torch.rand(2)}, "mmsegmentation .*half the"),
        (
            {f"backbone.{key}": torch.rand(2, 2) for key in ("layer1.0.conv1.weight", "stage4.0.fuse_layers.0.1.0.weight")}
            | {"classifier.aspp.project.0.weight": torch.rand(2, 2)},  # VainF's, over HRNet
            "over another backbone than a ResNet",
        ),
        ({"backbone.0.0.weight": torch.rand(2, 2), "classifier.cbr.0.weight": torch.rand(2, 2)}, "torchvision's LR-ASPP"),
        ({"features.block1.reduce.weight": torch.rand(2, 2)}, "no known scheme"),
        ({"x.block1.conv.weight": torch.rand(2, 2), "layer2.block1.weight": torch.rand(2, 2)}, "no known scheme"),
        (
            {"feature_extractor": bottlenecks("module.backbone."), "classifier": {"module.conv2d_list.0.bias": torch.rand(2)}},
            r"FADA's net in two parts.*\['feature_extractor'\]",
        ),
    ],
)  # fmt: skip
def test_refused_nets_are_named(state, words, tmp_path):
    with pytest.raises(WeightsError, match=words):
        load_weights(save(tmp_path / "x.pth", state))


def test_the_advice_for_fada_works(tmp_path):
    state = bottlenecks("module.backbone.")
    weights = load_weights(save(tmp_path / "x.pth", state), trunk="torchvision")
    assert torch.equal(weights.state["layer4.0.conv2.weight"], state["module.backbone.layer4.0.conv2.weight"])
    assert weights.config["stride_in_3x3"] is True


def test_files_in_parts(tmp_path):
    folder = tmp_path / "step_100"
    dcp.save({"model": {"conv1.weight": torch.rand(2)}}, checkpoint_id=folder, no_dist=True)
    for path in (folder, *folder.glob("*.distcp")):
        with pytest.raises(WeightsError, match=f"format_utils dcp_to_torch {folder} OUT"):
            load_weights(path)
    with pytest.raises(WeightsError, match="it is part 1 of 2"):
        load_weights(save(tmp_path / "model-00001-of-00002.safetensors", {}))
    path = save(tmp_path / "model-00001-of-00001.pth", narrow_state("resnet18"))
    assert load_weights(path).config["backbone"] == "resnet18"


def test_a_save_that_broke_off(tmp_path):
    path = save(tmp_path / "x.pth", narrow_state("resnet18"))
    data = path.read_bytes()
    for length in (100, 2000, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"a torch file whose end is missing: torch\.save, or a copy, broke off"):
            load_weights(path)
    end = data.rindex(b"PK\6\7")
    path.write_bytes(data[: end + 4] + b"\1" + data[end + 5 :])  # damage that zipfile.is_zipfile() does not notice
    with pytest.raises(WeightsError, match=r"cut off or damaged .*multiple disks"):
        load_weights(path)


# A custom backbone

RESNEXT = Backbone(Bottleneck, (1, 1, 1, 1), groups=32, width=4)


class Tanh(Bottleneck):
    """The names and shapes of a bottleneck, but another function."""

    def forward(self, x, folded=None):
        return super().forward(x, folded).tanh()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("entry", [RESNEXT, Backbone(Tanh, (1, 1, 1, 1))])
@torch.no_grad()
def test_a_snapshot_names_its_backbone(entry, wrapped, tmp_path, monkeypatch):
    """A net with as many blocks as a known one, but of another kind."""
    monkeypatch.setitem(BACKBONES, "own", entry)
    random_net.cache_clear()
    source = random_net("own", 3, stride_in_3x3=True)
    state = {f"module.{key}" if wrapped else key: value for key, value in source.state_dict().items()}
    path, rgb = save(tmp_path / "x.pth", {"model": state, "meta": source.config}), torch.randn(1, 3, 33, 41)
    net = load_net(path)
    assert net.config == source.config
    assert difference(net(rgb), source(rgb)) < 1e-5
    assert "the scheme is for plain ResNets, which own is not" in reason_against(path) or entry is not RESNEXT
    monkeypatch.delitem(BACKBONES, "own")
    expected = "128 channels in 32 groups" if entry is RESNEXT else "its meta says backbone own"
    with pytest.raises(WeightsError, match=expected):
        load_net(path)


def reason_against(path):
    with pytest.raises(WeightsError) as caught:
        export(load_weights(path), "published")
    return str(caught.value)


@torch.no_grad()
def test_backbone_of_torchvisions_resnext(tmp_path, monkeypatch):
    source, rgb = resnet(groups=32, width_per_group=4, replace_stride_with_dilation=[False, True, True]), random_image(*SIZE)
    trained(source, source)
    for stage, dilation in ((source.layer3, 2), (source.layer4, 4)):
        stage[0].conv2.dilation = stage[0].conv2.padding = (dilation, dilation)
    path = save(tmp_path / "resnext50_32x4d-1a0047aa.pth", in_float32(source, ""))
    line = r"Backbone\(Bottleneck, \(1, 1, 1, 1\), groups=32, width=4\)"
    with pytest.raises(WeightsError, match=line):  # what to add
        load_weights(path)
    monkeypatch.setitem(BACKBONES, "resnext50", RESNEXT)
    weights = load_weights(path, "torchvision")
    assert weights.config == {"backbone": "resnext50", "stem": "7x7", "stride_in_3x3": True, "batch_norm_eps": 1e-5}
    net, _ = build_net(weights, num_classes=3)
    expected = features(source, rgb, our_border=True)
    assert difference(net.eval().features(mean_subtracted(rgb), fold(net))[1], expected) < 1e-5
    theirs = export(weights, "torchvision-trunk")
    back = load_weights(save(tmp_path / "back.pth", theirs), "torchvision")
    assert back.config == weights.config
    assert all(torch.equal(back.state[key], value) for key, value in weights.state.items() if key != "conv1.weight")
