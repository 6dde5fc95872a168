"""The published naming schemes of DeepLab-ResNet weights, and their way to the canonical names and back.

Canonical are the names of the published PyTorch files: torchvision's for the trunk (``conv1``, ``bn1``, ``layer1.0.conv1``,
``layer1.0.downsample.0`` ...) and ``layer5.conv2d_list.0`` to ``.3`` for the head. Everything here is about names and shapes;
no file is read and no number looked at.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deeplab.nets import make_net
from deeplab.resnet import BACKBONES, Bottleneck, DilatedResNet
from deeplab.weights.weights import WeightsError, some

HEAD_KEY = re.compile(r"layer5\.conv2d_list\.(\d+)\.(weight|bias)$")

_WRAPPERS = ("module.", "_orig_mod.", "Scale.", "base.")  # DataParallel, torch.compile, isht7's and kazuto1011's MSC modules
_INNER_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")  # around a part
_FIRST_BLOCK = re.compile(r"(.*\.)(?:layer1\.0\.conv1|layer2\.block1\.reduce\.conv)\.weight$")
_TRUNK_KEY = re.compile(r"(conv[123]|bn[123]|layer[1-4])\.")
_TOOLBOX_HEAD = re.compile(r"(head|dsn)\.")
_BLOCK_KEY = re.compile(r"layer([1-4])\.(\d+)\.")
_KAZUTO_BLOCK = re.compile(r"layer([2-5])\.block(\d+)\.(reduce|conv3x3|increase|shortcut)\.(conv|bn)\.(\w+)$")
_KAZUTO_UNITS = {"reduce": 1, "conv3x3": 2, "increase": 3}
_CANONICAL_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))\.(\w+)$")
_CAFFE_BLOCK = re.compile(r"(res|bn|scale)([2-5])([a-z])(\d*)_branch(1|2a|2b|2c)$")
_CAFFE_HEAD = re.compile(r"fc1_.+_c([0-3])$")
_CAFFE_TRUNK = re.compile(r"(res|bn|scale)[2-5][a-z]\d*_?\w*$")


def strip_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Remove what all keys begin with because the net was saved inside other modules; {key: bare key}."""
    bare = {key: _INNER_WRAPPERS.sub("", key) for key in keys}
    while prefix := next((p for p in _WRAPPERS if bare and all(name.startswith(p) for name in bare.values())), None):
        bare = {key: name[len(prefix) :] for key, name in bare.items()}
    others = {match[1] for name in bare.values() if (match := _FIRST_BLOCK.match(name))}
    if len(others) == 1 and all(name.startswith(tuple(others)) for name in bare.values()):
        (prefix,) = others
        bare = {key: name[len(prefix) :] for key, name in bare.items()}
    return bare


def canonical_from_kazuto(key: str) -> str | None:
    """``layer3.block2.reduce.conv.weight`` -> ``layer2.1.conv1.weight``; None for a key that has no place in the net.

    Source: kazuto1011/deeplab-pytorch, ``libs/models/{resnet,deeplabv2}.py``. Its ``layer1`` is the stem, and a leading
    ``base.`` must be gone.
    """
    if match := re.match(r"layer1\.conv1\.(conv|bn)\.(\w+)$", key):
        return f"{match[1]}1.{match[2]}"
    if match := re.match(r"aspp\.c(\d+)\.(weight|bias)$", key):
        return f"layer5.conv2d_list.{match[1]}.{match[2]}"
    if not (match := _KAZUTO_BLOCK.match(key)):
        return None
    stage, block, unit, kind, leaf = match.groups()
    where = f"layer{int(stage) - 1}.{int(block) - 1}"
    if unit == "shortcut":
        return f"{where}.downsample.{int(kind == 'bn')}.{leaf}"
    return f"{where}.{kind}{_KAZUTO_UNITS[unit]}.{leaf}"


def kazuto_from_canonical(key: str) -> str:
    """The way back of :func:`canonical_from_kazuto`, with the ``base.`` of the released files."""
    if match := HEAD_KEY.match(key):
        return f"base.aspp.c{match[1]}.{match[2]}"
    if match := re.match(r"(conv|bn)1\.(\w+)$", key):
        return f"base.layer1.conv1.{match[1]}.{match[2]}"
    if not (match := _CANONICAL_BLOCK.match(key)):
        raise ValueError(f"{key!r} is no canonical name")
    stage, block, kind, number, shortcut, leaf = match.groups()
    if shortcut is not None:
        unit, kind = "shortcut", ("conv", "bn")[int(shortcut)]
    else:
        unit = next(name for name, n in _KAZUTO_UNITS.items() if n == int(number))
    return f"base.layer{int(stage) + 1}.block{int(block) + 1}.{unit}.{kind}.{leaf}"


def canonical_from_caffe(layer: str) -> str | None:
    """``res3b1_branch2a`` -> ``layer2.1.conv1``, ``bn...`` and ``scale...`` -> ``layer2.1.bn1``; None for other layers.

    Source: the prototxts of the official DeepLab-v2 archive. The blocks of a stage are a, b1, b2, ... in ResNet-101 and -152
    and a, b, c, ... in short stages. The head is ``fc1_<name>_c0`` to ``_c3``; the official name is ``voc12``.
    """
    if layer in ("conv1", "bn_conv1", "scale_conv1"):
        return "conv1" if layer == "conv1" else "bn1"
    if match := _CAFFE_HEAD.match(layer):
        return f"layer5.conv2d_list.{match[1]}"
    if not (match := _CAFFE_BLOCK.match(layer)):
        return None
    kind, stage, letter, digits, branch = match.groups()
    where = f"layer{int(stage) - 1}.{int(digits) if digits else ord(letter) - ord('a')}"
    if branch == "1":
        return f"{where}.downsample.{int(kind != 'res')}"
    return f"{where}.{'conv' if kind == 'res' else 'bn'}{'abc'.index(branch[1]) + 1}"


def refuse_extras(keys: Iterable[str]) -> None:
    """Raise :class:`WeightsError` for parameters inside the trunk that a plain ResNet has no place for."""
    if extras := list(keys):
        raise WeightsError(
            f"its trunk holds tensors that a plain ResNet lacks ({some(extras)}), so it is another net "
            "(squeeze-and-excitation, instance normalisation, biases ...); use the weights of a plain ResNet"
        )


def in_trunk(key: str) -> bool:
    """Whether a canonical name lies in the trunk."""
    return _TRUNK_KEY.match(key) is not None


def in_caffe_trunk(layer: str) -> bool:
    """Whether a Caffe name is that of a layer inside the trunk's blocks, whether or not our net has it."""
    return _CAFFE_TRUNK.match(layer) is not None


def is_counter(key: str, trunk: Iterable[str]) -> bool:
    """Whether this is the batch counter of a batch norm in ``trunk``; old PyTorch files and frozen nets have none."""
    module, _, leaf = key.rpartition(".")
    return leaf == "num_batches_tracked" and f"{module}.running_var" in trunk


def find_backbone(keys: Iterable[str]) -> str:
    """The name in ``BACKBONES`` whose blocks the canonical keys describe.

    Raises:
        WeightsError: no backbone has this number of blocks.
    """
    keys = list(keys)
    blocks = {(int(match[1]), int(match[2])) for key in keys if (match := _BLOCK_KEY.match(key))}
    depths = tuple(1 + max((block for stage, block in blocks if stage == wanted), default=-1) for wanted in (1, 2, 3, 4))
    bottleneck = any(re.match(r"layer[1-4]\.\d+\.conv3\.", key) for key in keys)
    for name, (block, expected) in BACKBONES.items():
        if expected == depths and (block is Bottleneck) == bottleneck:
            return name
    kind = "bottleneck" if bottleneck else "basic"
    raise WeightsError(
        f"it has {', '.join(map(str, depths))} {kind} blocks in its four stages, which fits none of {', '.join(BACKBONES)}; "
        "the file is cut off or belongs to another net"
    )


def find_net(keys: Iterable[str]) -> str:
    """Whose head the canonical keys describe: ``"deeplabv2"``, ``"deeplabv3"`` or ``"pspnet"``; ``""`` where there is none."""
    starts = {"layer5.conv2d_list.": "deeplabv2", "head.0.conv5.": "deeplabv3", "head.0.stages.": "pspnet"}
    keys = list(keys)
    return next((net for start, net in starts.items() if any(key.startswith(start) for key in keys)), "")


def other_head(keys: Iterable[str]) -> list[str]:
    """What lies outside the trunk and belongs to a head that none of our nets has; one of ours with more in it is none.

    Examples are ProDA's ``layer5.conv2d_list.0.0.weight``, CCNet's ``head.conva.0.weight``, and ``bn_pretrain``, a batch norm
    that ProDA puts before the head.
    """
    outside = [key for key in keys if not in_trunk(key)]
    net = find_net(outside)
    if net in ("deeplabv3", "pspnet"):
        known, starts = set(toolbox_head_shapes(net, "resnet18", 1)), ("head.", "dsn.")
    elif any(map(HEAD_KEY.match, outside)):
        known, starts = {key for key in outside if HEAD_KEY.match(key)}, ("layer5.", "bn_pretrain.")
    else:
        return outside
    head = [key for key in outside if key.startswith(starts)]
    return [] if all(key in known or is_counter(key, known) for key in head) else head


def find_stem(keys: Iterable[str]) -> str:
    """``"deep"`` where there are three convolutions before the pool, else ``"7x7"``."""
    return "deep" if "conv3.weight" in keys else "7x7"


def in_head(key: str) -> bool:
    """Whether a canonical name lies in the head of one of the nets, or in an auxiliary head."""
    return bool(HEAD_KEY.match(key) or _TOOLBOX_HEAD.match(key))


def trunk_shapes(backbone: str, stem: str = "7x7") -> dict[str, tuple[int, ...]]:
    """Every parameter and running statistic of a trunk, without the batch counters: canonical name -> shape."""
    with torch.device("meta"):
        return _shapes(DilatedResNet(backbone, stem=stem).state_dict())


def toolbox_head_shapes(net: str, backbone: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    """The same of the heads of a DeepLabv3 or PSPNet."""
    with torch.device("meta"):
        state = make_net({"net": net, "backbone": backbone, "num_classes": num_classes}).state_dict()
    return {key: shape for key, shape in _shapes(state).items() if in_head(key)}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith(".num_batches_tracked")}


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
