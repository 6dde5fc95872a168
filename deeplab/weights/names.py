"""The published naming schemes of DeepLab-ResNet weights, in one table, and what names and shapes alone show of a net.

Canonical are the names of the published PyTorch files: torchvision's for the backbone (``conv1``, ``bn1``, ``layer1.0.conv1``,
``layer1.0.downsample.0`` ...) and ``layer5.conv2d_list.0`` to ``.3`` for the head. This module reads no files and no values.
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deeplab.nets import make_net
from deeplab.resnet import BACKBONES
from deeplab.weights.weights import WeightsError, some

TOOLBOX = ("deeplabv3", "pspnet")
"""The nets of pytorch-segmentation-toolbox."""
HEAD_KEY = re.compile(r"layer5\.conv2d_list\.(\d+)\.(weight|bias)$")
"""Keys of a DeepLab-v2's head."""
IN_HEAD = re.compile(rf"{HEAD_KEY.pattern}|(head|dsn)\.")
"""Keys of the heads of all nets, auxiliary heads included."""
IN_BACKBONE = re.compile(r"(conv[123]|bn[123]|layer[1-4])\.")
IN_CAFFE_BACKBONE = re.compile(r"(res|bn|scale)[2-5][a-z]\d*_?\w*$")
"""Caffe's layers inside the stages, also those that our nets do not have."""

_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Prefixes that torch's own wrappers (DataParallel, compile, checkpoint_wrapper, FSDP) add to names."""
_FIRST_BLOCK = re.compile(r"(.*\.)(?:layer1\.0\.conv1|layer2\.block1\.reduce\.conv)\.weight$")

_MODULES = (
    # s, t: the stage, counted from 1 and from 2; n, m: the block or branch, counted from 0 and from 1; x: Caffe's name of
    # the block: a, b, c ... in short stages; a, b1, b2 ... in those of ResNet-101 and -152
    # canonical                   kazuto1011/deeplab-pytorch           Caffe (Scale layers are named like batch norms)
    ("conv1",                     "layer1.conv1.conv",                 "conv1"),
    ("bn1",                       "layer1.conv1.bn",                   "bn_conv1"),
    ("layer{s}.{n}.conv1",        "layer{t}.block{m}.reduce.conv",     "res{t}{x}_branch2a"),
    ("layer{s}.{n}.bn1",          "layer{t}.block{m}.reduce.bn",       "bn{t}{x}_branch2a"),
    ("layer{s}.{n}.conv2",        "layer{t}.block{m}.conv3x3.conv",    "res{t}{x}_branch2b"),
    ("layer{s}.{n}.bn2",          "layer{t}.block{m}.conv3x3.bn",      "bn{t}{x}_branch2b"),
    ("layer{s}.{n}.conv3",        "layer{t}.block{m}.increase.conv",   "res{t}{x}_branch2c"),
    ("layer{s}.{n}.bn3",          "layer{t}.block{m}.increase.bn",     "bn{t}{x}_branch2c"),
    ("layer{s}.{n}.downsample.0", "layer{t}.block{m}.shortcut.conv",   "res{t}{x}_branch1"),
    ("layer{s}.{n}.downsample.1", "layer{t}.block{m}.shortcut.bn",     "bn{t}{x}_branch1"),
    ("layer5.conv2d_list.{n}",    "aspp.c{n}",                         "fc1_*_c{n}"),
)  # fmt: skip
"""Sources: kazuto1011's ``libs/models/{resnet,deeplabv2}.py``, the prototxts of the official DeepLab-v2 archive."""
_TENSORFLOW_LEAVES = {
    "weights": "weight", "biases": "bias", "gamma": "weight", "beta": "bias",
    "moving_mean": "running_mean", "moving_variance": "running_var",
}  # fmt: skip
_MOST = 40  # blocks in a stage; ResNet-152 has 36
_ALL = [
    [name.format(s=stage, t=stage + 1, n=block, m=block + 1, x=x) for name in row]
    for row in _MODULES
    for stage in range(1, 5)
    for block in range(_MOST)
    for x in (chr(ord("a") + block), f"b{block}")
]
FROM_KAZUTO, _FROM_CAFFE = ({row[column]: row[0] for row in _ALL} for column in (1, 2))
_TO_KAZUTO = {ours: theirs for theirs, ours in FROM_KAZUTO.items()}

FROM_SEMSEG = {row[0]: row[0] for row in _ALL if re.match(r"layer[1-4]\.", row[0])} | {
    "layer0.0": "conv1", "layer0.1": "bn1", "layer0.3": "conv2", "layer0.4": "bn2", "layer0.6": "conv3", "layer0.7": "bn3",
    **{f"ppm.features.{k}.{m}": f"head.0.stages.{k}.{m}" for k in range(4) for m in (1, 2)},
    "cls.0": "head.0.bottleneck.0", "cls.1": "head.0.bottleneck.1", "cls.4": "head.1",
    "aux.0": "dsn.0", "aux.1": "dsn.1", "aux.4": "dsn.3",
}  # fmt: skip
"""hszhao/semseg's names (``model/pspnet.py``); its stages are named as in torchvision."""


def strip_wrappers(keys: Iterable[str], loose: Container[str] = ()) -> dict[str, str]:
    """Remove the prefixes of modules that the net was wrapped in; returns {key: bare key}.

    The prefixes of torch's own wrappers are removed anywhere in a name. Any other prefix is read off the ResNet's first block
    and removed only if all keys have it, except those in ``loose``.
    """
    bare = {key: _WRAPPERS.sub("", key) for key in keys}
    prefixes = {match[1] for name in bare.values() if (match := _FIRST_BLOCK.match(name))}
    if len(prefixes) == 1 and all(name.startswith(tuple(prefixes)) or key in loose for key, name in bare.items()):
        bare = {key: name.removeprefix(*prefixes) for key, name in bare.items()}
    return bare


def renamed(key: str, names: Mapping[str, str]) -> str | None:
    """``layer3.block2.reduce.conv.weight`` -> ``layer2.1.conv1.weight``; None for a module that is not in ``names``."""
    module, _, leaf = key.rpartition(".")
    return f"{names[module]}.{leaf}" if module in names else None


def kazuto_from_canonical(key: str) -> str:
    """``layer2.1.conv1.weight`` -> ``base.layer3.block2.reduce.conv.weight``, as in the released files."""
    return f"base.{renamed(key, _TO_KAZUTO)}"


def canonical_from_caffe(layer: str) -> str | None:
    """``res3b1_branch2a`` -> ``layer2.1.conv1``, ``bn...`` and ``scale...`` -> ``layer2.1.bn1``; None for other layers.

    The head is ``fc1_<name>_c0`` to ``_c3``; the official name is ``voc12``.
    """
    layer = re.sub(r"^fc1_.+_c(?=[0-3]$)", "fc1_*_c", layer)
    return _FROM_CAFFE.get(re.sub("^scale", "bn", layer))


def canonical_from_tensorflow(variable: str) -> str | None:
    """``res3b1_branch2a/weights`` -> ``layer2.1.conv1.weight``: Caffe's layers and TensorFlow's leaves; None for others."""
    layer, _, leaf = variable.removesuffix(":0").rpartition("/")
    module = canonical_from_caffe(layer)
    return f"{module}.{_TENSORFLOW_LEAVES[leaf]}" if module and leaf in _TENSORFLOW_LEAVES else None


def refuse_extras(keys: Iterable[str]) -> None:
    """Raise :class:`WeightsError` for parameters inside the backbone that a plain ResNet does not have."""
    if extras := list(keys):
        raise WeightsError(
            f"its backbone holds tensors that a plain ResNet lacks ({some(extras)}), so it is another net "
            "(squeeze-and-excitation, instance normalisation, biases ...); use the weights of a plain ResNet"
        )


def is_counter(key: str, names: Iterable[str]) -> bool:
    """Whether this is the batch counter of a batch norm in ``names``; old PyTorch files and frozen nets have none."""
    module, _, leaf = key.rpartition(".")
    return leaf == "num_batches_tracked" and f"{module}.running_var" in names


def find_backbone(state: Mapping[str, Tensor], said: str = "") -> str:
    """The name in ``BACKBONES`` that fits the stages of the canonical state best, by names, then by shapes.

    Args:
        said: the name that the file gives; it decides between equally good fits.

    Raises:
        WeightsError: no backbone has this number of blocks.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items() if re.match(r"layer[1-4]\.\d+\.", key)}
    names = {key for key in shapes if not key.endswith(".num_batches_tracked")}
    blocks = {tuple(map(int, key[5:].split(".")[:2])) for key in shapes}
    depths = tuple(1 + max((block for stage, block in blocks if stage == wanted), default=-1) for wanted in (1, 2, 3, 4))
    bottleneck, misfits = any(".conv3." in key for key in names), {}
    for name, backbone in BACKBONES.items():
        if backbone.depths == depths:
            own = {key: shape for key, shape in net_shapes(name, find_stem(state)).items() if key.startswith("layer")}
            if name == said or bottleneck == any(".conv3." in key for key in own):
                differ = sum(shapes.get(key, shape) != shape for key, shape in own.items())
                misfits[len(names ^ own.keys()), differ, name != said] = name
    if misfits:
        return misfits[min(misfits)]
    kind = "bottleneck" if bottleneck else "basic"
    raise WeightsError(
        f"it has {', '.join(map(str, depths))} {kind} blocks in its four stages, which fits none of {', '.join(BACKBONES)}; "
        "the file is cut off or belongs to another net"
    )


def find_net(keys: Iterable[str]) -> str:
    """The net whose head has these canonical keys: ``"deeplabv2"``, ``"deeplabv3"`` or ``"pspnet"``; ``""`` without a head."""
    starts = {"layer5.conv2d_list.": "deeplabv2", "head.0.conv5.": "deeplabv3", "head.0.stages.": "pspnet"}
    keys = list(keys)
    return next((net for start, net in starts.items() if any(key.startswith(start) for key in keys)), "")


def other_head(state: Mapping[str, Tensor]) -> list[str]:
    """The keys of a head that none of our nets has; empty without such a head. One of ours with extra keys is such a head.

    Examples are ProDA's ``layer5.conv2d_list.0.0.weight``, CCNet's ``head.conva.0.weight``, and ``bn_pretrain``, a batch norm
    that ProDA puts before the head. Tensors of no layer, such as those of a loss, are no head.
    """
    outside = [key for key in state if not IN_BACKBONE.match(key)]
    net = find_net(outside)
    if net in TOOLBOX:
        known, starts = set(filter(IN_HEAD.match, net_shapes("resnet18", "deep", net))), ("head.", "dsn.")
    elif any(map(HEAD_KEY.match, outside)):
        known, starts = {key for key in outside if HEAD_KEY.match(key)}, ("layer5.", "bn_pretrain.")
    else:
        return outside if any(is_layer(key, state[key]) for key in outside) else []
    head = [key for key in outside if key.startswith(starts)]
    return [] if all(key in known or is_counter(key, known) for key in head) else head


def is_layer(key: str, tensor: Tensor) -> bool:
    """Whether this is the weight of a convolution or of a linear layer."""
    return key.endswith(".weight") and tensor.ndim > 1


def find_stem(keys: Iterable[str]) -> str:
    """``"deep"`` if there are three convolutions before the pool, else ``"7x7"``."""
    return "deep" if "conv3.weight" in keys else "7x7"


def net_shapes(
    backbone: str, stem: str = "7x7", net: str = "", num_classes: int = 1, **of_head: Any
) -> dict[str, tuple[int, ...]]:
    """The parameters and running statistics of a backbone and of a DeepLabv3's or PSPNet's heads: canonical name -> shape.

    Batch counters are left out, and so is a DeepLab-v2's head, which may have any number of branches. ``of_head`` are further
    options of the net.
    """
    with torch.device("meta"):
        options = {"net": net or "deeplabv2", "backbone": backbone, "stem": stem, "num_classes": num_classes}
        state = make_net(options | of_head).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not HEAD_KEY.match(key)}


def head_shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(number of head convolutions, number of classes) of a canonical state; (0, 0) without a head.

    Raises:
        WeightsError: the head is incomplete or its convolutions disagree.
    """
    found = {(int(match[1]), match[2]): state[key] for key in state if (match := HEAD_KEY.match(key))}
    count = 1 + max((k for k, _ in found), default=-1)
    lost = [f"layer5.conv2d_list.{k}.{leaf}" for k in range(count) for leaf in ("weight", "bias") if (k, leaf) not in found]
    if lost:
        raise WeightsError(f"its head has {count} convolutions but lacks {', '.join(lost)}; fetch or save the file again")
    classes = sorted({tensor.shape[0] if tensor.ndim else 0 for tensor in found.values()})
    if len(classes) > 1:
        raise WeightsError(f"its head convolutions disagree on the number of classes ({', '.join(map(str, classes))})")
    return count, classes[0] if classes else 0
