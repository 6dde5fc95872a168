"""Weights files of every published scheme, built from names and shapes, for the tests of weights.

Only the net comes from the code under test: the names are written out in loops, and caffemodels are built byte by byte.
"""

import functools
import re
import struct

import numpy as np
import pytest
import torch

from deeplab import DeepLabV2

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
BN_LEAVES = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture(autouse=True)
def seeded_and_tidy(tmp_path):
    """Delete the weights files: they are big, and pytest would keep those of three runs."""
    torch.manual_seed(0)
    yield
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()


@functools.lru_cache(maxsize=4)
def random_net(backbone, num_classes=21, batch_norm="full", **options):
    """A net in eval mode with random parameters and statistics; tests share it and must not change it."""
    with torch.device("meta"):
        net = DeepLabV2(backbone, num_classes, batch_norm, **options)
    net.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(len(backbone) + num_classes)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim == 4:
                tensor.uniform_(-1, 1, generator=generator).mul_(1.5 / tensor[0].numel() ** 0.5)
            elif name.endswith(("running_var", "weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return net


def logits(net, side=33):
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3)) * 255 - 110
    with torch.no_grad():
        return net.eval()(image)


def narrow_state(backbone="resnet101", head=4):
    """A canonical state of tiny tensors with the right names, for tests that load no net."""
    state = {}
    for module, is_bn in canonical_modules(backbone):
        for leaf in BN_LEAVES if is_bn else ("weight",):
            state[f"{module}.{leaf}"] = torch.rand(2) + 0.5 if is_bn else torch.rand(2, 2, 1, 1)
    state["conv1.weight"] = torch.rand(2, 3, 7, 7)
    for k in range(head):
        state[f"layer5.conv2d_list.{k}.weight"] = torch.rand(21, 2, 3, 3)
        state[f"layer5.conv2d_list.{k}.bias"] = torch.rand(21)
    return state


def canonical_modules(backbone):
    """(module, whether it is a batch norm) of the backbone."""
    yield "conv1", False
    yield "bn1", True
    units = 2 if backbone == "resnet18" else 3
    for stage, depth in enumerate(DEPTHS[backbone], 1):
        for block in range(depth):
            for n in range(1, units + 1):
                yield f"layer{stage}.{block}.conv{n}", False
                yield f"layer{stage}.{block}.bn{n}", True
            if block == 0 and (units == 3 or stage > 1):
                yield f"layer{stage}.{block}.downsample.0", False
                yield f"layer{stage}.{block}.downsample.1", True


def caffe_blocks(backbone):
    """The Caffe names of the blocks of each stage, such as 3a, 3b1, 3b2, 3b3."""
    if backbone == "resnet50":
        return [["2a", "2b", "2c"], ["3a", "3b", "3c", "3d"], ["4a", "4b", "4c", "4d", "4e", "4f"], ["5a", "5b", "5c"]]
    third, fourth = DEPTHS[backbone][1:3]
    return [
        ["2a", "2b", "2c"],
        ["3a"] + [f"3b{n}" for n in range(1, third)],
        ["4a"] + [f"4b{n}" for n in range(1, fourth)],
        ["5a", "5b", "5c"],
    ]


def caffe_layers(backbone):
    """(canonical convolution, canonical batch norm, Caffe's name for the pair: its convolution is res<name> and so on)."""
    for stage, names in enumerate(caffe_blocks(backbone), 1):
        for block, name in enumerate(names):
            for n, branch in enumerate(("2a", "2b", "2c"), 1):
                yield f"layer{stage}.{block}.conv{n}", f"layer{stage}.{block}.bn{n}", f"{name}_branch{branch}"
            if block == 0:
                yield f"layer{stage}.0.downsample.0", f"layer{stage}.0.downsample.1", f"{name}_branch1"


def kazuto_state(state, backbone, prefix="base."):
    """A canonical state under kazuto1011's names."""
    renamed = {}

    def move(theirs, ours):
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{ours}.{leaf}" in state:
                renamed[f"{prefix}{theirs}.{leaf}"] = state[f"{ours}.{leaf}"]

    move("layer1.conv1.conv", "conv1")
    move("layer1.conv1.bn", "bn1")
    for stage, depth in enumerate(DEPTHS[backbone], 1):
        for block in range(depth):
            theirs, ours = f"layer{stage + 1}.block{block + 1}", f"layer{stage}.{block}"
            for n, unit in enumerate(("reduce", "conv3x3", "increase"), 1):
                move(f"{theirs}.{unit}.conv", f"{ours}.conv{n}")
                move(f"{theirs}.{unit}.bn", f"{ours}.bn{n}")
        move(f"layer{stage + 1}.block1.shortcut.conv", f"layer{stage}.0.downsample.0")
        move(f"layer{stage + 1}.block1.shortcut.bn", f"layer{stage}.0.downsample.1")
    for k in range(4):
        move(f"aspp.c{k}", f"layer5.conv2d_list.{k}")
    assert len(renamed) == len(state)
    return renamed


def semseg_state(narrow):
    """hszhao/semseg's names of a PSPNet over the stages of a narrow state."""
    state = {key: value for key, value in narrow.items() if re.match(r"layer[1-4]", key)}
    norms = ["layer0.1", "layer0.4", "layer0.7", *(f"ppm.features.{k}.2" for k in range(4)), "cls.1", "aux.1"]
    state |= {f"{norm}.{leaf}": torch.rand(2) + 0.5 for norm in norms for leaf in BN_LEAVES}
    for conv in ("layer0.0", "layer0.3", "layer0.6", *(f"ppm.features.{k}.1" for k in range(4)), "cls.0", "aux.0"):
        state[f"{conv}.weight"] = torch.rand(2, 3 if conv == "layer0.0" else 2, 3, 3)
    for conv in ("cls.4", "aux.4"):
        state |= {f"{conv}.weight": torch.rand(3, 2, 1, 1), f"{conv}.bias": torch.rand(3)}
    return state


def tensorflow_arrays(state, backbone):
    """A canonical state as caffe-tensorflow's {layer: {parameter: array}}; kernels (height, width, in, out)."""
    layers = {"conv1": {"weights": state["conv1.weight"].permute(2, 3, 1, 0)}, "bn_conv1": _tf_bn(state, "bn1")}
    for conv, bn, name in caffe_layers(backbone):
        layers[f"res{name}"] = {"weights": state[f"{conv}.weight"].permute(2, 3, 1, 0)}
        layers[f"bn{name}"] = _tf_bn(state, bn)
    for k in range(4):
        conv = f"layer5.conv2d_list.{k}"
        weights = state[f"{conv}.weight"].permute(2, 3, 1, 0)
        layers[f"fc1_voc12_c{k}"] = {"weights": weights, "biases": state[f"{conv}.bias"]}
    return {layer: {name: np.ascontiguousarray(t.numpy()) for name, t in entry.items()} for layer, entry in layers.items()}


def _tf_bn(state, bn):
    return dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), (state[f"{bn}.{leaf}"] for leaf in BN_LEAVES)))


# Caffe's format: a field is a varint of number << 3 | wire type, then its value.


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(number, content):
    """A length-delimited field: a string, a packed array or a nested message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(array, shape=None):
    """A BlobProto as Caffe writes it: a packed shape and packed floats."""
    array = np.asarray(array, np.float32)
    dims = b"".join(varint(side) for side in (array.shape if shape is None else shape))
    return message(7, message(1, dims)) + message(5, array.astype("<f4").tobytes())


def layer(name, kind, *blobs, more=b""):
    content = message(1, name.encode()) + message(2, kind.encode()) + b"".join(message(7, each) for each in blobs) + more
    return message(100, content)


def batch_norm_layer(name, mean, var, factor=1.0, eps=None):
    """With ``eps`` None the parameter is left out, as in all published prototxts."""
    more = b"" if eps is None else message(139, b"\x08\x01\x1d" + struct.pack("<f", eps))
    factors = np.full(1, factor, np.float32)
    return layer(name, "BatchNorm", blob(mean * np.float32(factor)), blob(var * np.float32(factor)), blob(factors), more=more)


def caffe_bytes(state, backbone, suffixes=("",), factor=1.0, eps=None, head="voc12"):
    """A canonical state as the bytes of a caffemodel; a suffix such as ``_res05`` writes the layers of that scale."""
    parts = [message(1, b"deeplab"), message(100, message(1, b"data") + message(2, b"ImageSegData"))]

    def pair(conv, bn, names):
        parts.append(layer(names[0], "Convolution", blob(state[f"{conv}.weight"])))
        parts.append(batch_norm_layer(names[1], *(state[f"{bn}.{leaf}"].numpy() for leaf in BN_LEAVES[2:]), factor, eps))
        parts.append(layer(names[2], "Scale", *(blob(state[f"{bn}.{leaf}"]) for leaf in BN_LEAVES[:2])))

    for suffix in suffixes:
        pair("conv1", "bn1", [name + suffix for name in ("conv1", "bn_conv1", "scale_conv1")])
        for conv, bn, name in caffe_layers(backbone):
            pair(conv, bn, [kind + name + suffix for kind in ("res", "bn", "scale")])
        for k in range(4):
            if f"layer5.conv2d_list.{k}.weight" in state:
                blobs = (blob(state[f"layer5.conv2d_list.{k}.{leaf}"]) for leaf in ("weight", "bias"))
                parts.append(layer(f"fc1_{head}{suffix}_c{k}", "Convolution", *blobs))
    return b"".join(parts)
