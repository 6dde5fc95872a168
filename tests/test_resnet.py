import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from deeplab import BACKBONES, BATCH_NORM_MODES, NETS, DeepLabV2, conv_bn, deeplabv2, fold_batch_norm
from deeplab.batch_norm import fold, kept_statistics
from deeplab.resnet import Backbone, Bottleneck, DilatedResNet
from deeplab.weights.names import find_backbone
from tests.helpers_nets import naive_forward, randomise_batch_norm
from utils import options
from utils.training.options import training_parser


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_folded_net_equals_unfolded_net_in_float64(backbone):
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2(backbone, 5).double()).train()
    x = torch.randn(2, 3, 41, 33, dtype=torch.float64)
    weight = torch.randn(2, 5, 6, 5, dtype=torch.float64)
    parameters = list(net.parameters())

    folded = net(x)
    folded_grads = torch.autograd.grad((folded * weight).sum(), parameters)
    naive = naive_forward(net, x)
    naive_grads = torch.autograd.grad((naive * weight).sum(), parameters)

    assert folded.shape == weight.shape
    torch.testing.assert_close(folded, naive, rtol=1e-10, atol=1e-10 * float(naive.detach().abs().max()))
    for (name, _), a, b in zip(net.named_parameters(), folded_grads, naive_grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * float(b.abs().max()), msg=lambda m, name=name: f"{name}: {m}")


def blocks_of(net: DilatedResNet) -> list[nn.Module]:
    return [*net.layer1, *net.layer2, *net.layer3, *net.layer4]


def test_conv_bn_leaves_other_norms_alone():
    conv, bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    x = torch.randn(2, 3, 7, 7)
    y = conv(x)
    expected = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(conv_bn(x, conv, bn), expected)
    frozen = randomise_batch_norm(FrozenBatchNorm2d(4))
    folded = fold(nn.Sequential(nn.Conv2d(3, 3, 1), bn, conv, frozen, nn.Conv2d(4, 3, 1)))
    assert set(folded.constants) == {frozen}
    torch.testing.assert_close(conv_bn(x, conv, frozen, folded), frozen(y))


def test_statistics_are_kept_if_there_are_any():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = torch.randn(2, 3, 5, 5)
    with kept_statistics(net):
        kept = net(x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.testing.assert_close(net(x), kept)
    assert int(net[0].num_batches_tracked) == 1
    torch.testing.assert_close(net[0].running_mean, 0.1 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("mode", BATCH_NORM_MODES)
def test_permanent_folding_gives_the_same_logits(mode):
    net = randomise_batch_norm(deeplabv2("resnet18", 3, batch_norm=mode).double()).eval()
    x = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = naive_forward(net, x)
        fold_batch_norm(net)
        torch.testing.assert_close(net(x), expected)
    assert not any(isinstance(m, (FrozenBatchNorm2d, nn.BatchNorm2d)) for m in net.modules())


@pytest.mark.parametrize(("side", "expected"), [(1, 1), (7, 2), (9, 2), (320, 41), (321, 41), (505, 64), (512, 65), (513, 65)])
def test_output_sizes(side, expected):
    """Published sizes; 8k + 1 pixels give k + 1 positions, and Caffe's pool rounds 320 and 512 up."""
    net = deeplabv2("resnet18", 2).to("meta")
    assert net(torch.zeros(1, 3, side, 33, device="meta")).shape == (1, 2, expected, 5)


def test_resnet101_has_the_published_keys_and_size():
    with torch.device("meta"):
        frozen, full = deeplabv2(), deeplabv2(batch_norm="full")
        backbone = torchvision.models.resnet101().state_dict()
    backbone = {key: tuple(value.shape) for key, value in backbone.items() if not key.startswith("fc.")}
    head = {f"layer5.conv2d_list.{k}.{name}" for k in range(4) for name in ("weight", "bias")}
    keys = {key: tuple(value.shape) for key, value in full.state_dict().items()}
    assert len(keys) == 632
    assert keys.keys() - backbone.keys() == head
    assert all(keys[key] == shape for key, shape in backbone.items())
    assert len(frozen.state_dict()) == 528
    assert keys["layer5.conv2d_list.3.weight"] == (21, 2048, 3, 3)
    assert sum(p.numel() for p in full.parameters()) == 44_048_532


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_have_torchvisions_names_and_shapes(backbone):
    with torch.device("meta"):
        ours = deeplabv2(backbone, batch_norm="full").state_dict()
        theirs = getattr(torchvision.models, backbone)().state_dict()
    ours, theirs = ({key: tuple(value.shape) for key, value in state.items()} for state in (ours, theirs))
    assert {key: shape for key, shape in ours.items() if not key.startswith("layer5.")} == {
        key: shape for key, shape in theirs.items() if not key.startswith("fc.")
    }


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_geometry(backbone):
    """Stage 2 has stride 2; stages 3 and 4 have dilations 2 and 4 in every block, the first included."""
    with torch.device("meta"):
        published, shifted = deeplabv2(backbone), deeplabv2(backbone, stride_in_3x3=True)
    for net in (published, shifted):
        for number, stride, dilation in ((1, 1, 1), (2, 2, 1), (3, 1, 2), (4, 1, 4)):
            for i, block in enumerate(getattr(net, f"layer{number}")):
                dilated = (block.conv1, block.conv2) if backbone in ("resnet18", "resnet34") else (block.conv2,)
                assert all(conv.dilation == conv.padding == (dilation, dilation) for conv in dilated)
                strides = [conv.stride[0] for name, conv in block.named_children() if re.fullmatch(r"conv\d", name)]
                assert sorted(strides) == sorted([stride if i == 0 else 1] + [1] * (len(strides) - 1))
    if backbone not in ("resnet18", "resnet34"):
        assert published.layer2[0].conv1.stride == (2, 2)
        assert shifted.layer2[0].conv2.stride == (2, 2)
    assert [conv.dilation[0] for conv in published.layer5.conv2d_list] == [6, 12, 18, 24]


def test_train_cannot_thaw_frozen_batch_norm():
    net = deeplabv2("resnet18", 3).train()
    before = {name: value.clone() for name, value in net.state_dict().items() if "bn" in name or "downsample.1" in name}
    loss = net(torch.randn(2, 3, 33, 33)).square().mean()
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert not any("bn" in name for name, _ in net.named_parameters())


def test_batch_norm_modes():
    x = torch.randn(2, 3, 33, 33)
    for mode in ("stats", "full"):
        net = deeplabv2("resnet18", 3, batch_norm=mode).train()
        assert net.bn1.weight.requires_grad == (mode == "full")
        net(x)
        y = net.conv1(x)
        torch.testing.assert_close(net.bn1.running_mean, 0.1 * y.mean((0, 2, 3)))


def test_initial_values():
    torch.manual_seed(0)
    net = deeplabv2("resnet18", 21)
    for conv in net.layer5.conv2d_list:
        assert not conv.bias.any()
        assert abs(conv.weight.std().item() - 0.01) < 2e-4
    weight = net.layer3[0].conv2.weight  # Kaiming, fan out, rectifier: variance 2 / (256 * 3 * 3)
    assert abs(weight.std().item() - (2 / (256 * 9)) ** 0.5) < 1e-3
    for backbone, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        for mode in BATCH_NORM_MODES:  # a block with trainable batch norm starts as its shortcut
            norms = [getattr(block, last) for block in blocks_of(DilatedResNet(backbone, mode))]
            assert all(bool((norm.weight == (0 if mode == "full" else 1)).all()) for norm in norms)


def test_the_stride_sits_where_the_published_nets_have_it():
    block = DilatedResNet("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.bn1.eps) == ((2, 2), (1, 1), 1e-5)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_blocks_are_recomputed_only_when_asked_and_needed(grad_checkpoint):
    net = deeplabv2("resnet18", 3)
    net.grad_checkpoint = grad_checkpoint
    passes = []
    for block in blocks_of(net):
        block.register_forward_pre_hook(lambda *_: passes.append(1))
    net(torch.randn(1, 3, 33, 33)).sum().backward()
    assert len(passes) == 8 * (1 + grad_checkpoint)
    passes.clear()
    with torch.no_grad():
        net(torch.randn(1, 3, 33, 33))
    assert len(passes) == 8


def test_grad_checkpoint_gives_the_same_gradients():
    net = randomise_batch_norm(deeplabv2("resnet18", 3).double()).train()
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    plain = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    net.grad_checkpoint = True
    recomputed = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_wrong_arguments_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"resnet99.*resnet101"):
        deeplabv2("resnet99")
    with pytest.raises(ValueError, match=r"thawed.*frozen, stats, full"):
        deeplabv2(batch_norm="thawed")
    with pytest.raises(ValueError, match=r"256; expected 1\.\.255"):
        deeplabv2("resnet18", 256)
    with pytest.raises(ValueError, match="atrous_rates"):
        deeplabv2("resnet18", atrous_rates=(6, 0))


def test_the_smallest_and_the_largest_net():
    with torch.device("meta"):
        assert [DeepLabV2("resnet18", classes, atrous_rates=[1]).num_classes for classes in (1, 255)] == [1, 255]
        for classes in (0, 256):
            with pytest.raises(ValueError, match=rf"num_classes is {classes}; expected 1\.\.255"):
                DeepLabV2("resnet18", classes)
        assert not DeepLabV2("resnet18").config["stride_in_3x3"]


def test_the_command_line_offers_what_the_net_has(capsys):
    assert options.BATCH_NORM_MODES == BATCH_NORM_MODES
    for option, names in (("--net", NETS), ("--backbone", BACKBONES)):
        parser = training_parser("", batch_size=1, iter_size=1, snapshot_dir="x")
        assert [getattr(parser.parse_args([option, name]), option[2:]) for name in names] == list(names)
        with pytest.raises(SystemExit):
            parser.parse_args([option, "vgg16"])
        assert f"'vgg16' is unknown; choose one of {', '.join(names)}" in capsys.readouterr().err
        (entry,) = re.findall(rf" {option} NAME (.*?)\(default", " ".join(parser.format_help().split()))
        assert re.findall(r"\w+", entry.replace(" or ", " ").replace("resnet", "")) == [
            name.removeprefix("resnet") for name in names
        ]


def test_grouped_and_wide_blocks_are_torchvisions(monkeypatch):
    """A ResNeXt and a wide ResNet are one entry each: the names, shapes and groups."""
    entries = {
        "resnext50_32x4d": Backbone(Bottleneck, (3, 4, 6, 3), groups=32, width=4),
        "resnext101_64x4d": Backbone(Bottleneck, (3, 4, 23, 3), groups=64, width=4),
        "wide_resnet50_2": Backbone(Bottleneck, (3, 4, 6, 3), width=128),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(BACKBONES, name, entry)
        with torch.device("meta"):
            ours, theirs = deeplabv2(name, batch_norm="full", stride_in_3x3=True), getattr(torchvision.models, name)()
        shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
        differ = [{key.split(".")[0] for key, _ in one.items() - other.items()} for one, other in (shapes, shapes[::-1])]
        assert differ == [{"layer5"}, {"fc"}]
        groups = [[m.groups for m in net.modules() if isinstance(m, torch.nn.Conv2d)] for net in (ours, theirs)]
        assert groups[0][:-4] == groups[1]  # except in the head's four
        assert find_backbone(ours.state_dict()) == name
