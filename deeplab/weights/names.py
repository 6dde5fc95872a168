"""The published naming schemes of DeepLab-ResNet weights, and their way to the canonical names and back.

Canonical are the names of the published PyTorch files: torchvision's for the trunk (``conv1``, ``bn1``, ``layer1.0.conv1``,
``layer1.0.downsample.0`` ...) and ``layer5.conv2d_list.0`` to ``.3`` for the head. Everything here is about names, shapes and
the first layer's input; no file is read.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deeplab.deeplabv2 import DeepLabV2
from deeplab.resnet import BACKBONES, Bottleneck

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)  # what our nets subtract; the same numbers as dataset.MEAN_BGR
TORCHVISION_MEAN = (0.485, 0.456, 0.406)  # RGB, 0..1: torchvision/transforms/_presets.py
TORCHVISION_STD = (0.229, 0.224, 0.225)

HEAD_KEY = re.compile(r"layer5\.conv2d_list\.(\d+)\.(weight|bias)$")
STEM = ("conv1.weight", "bn1.running_mean")  # what differs between RGB and BGR input
NO_PLACE = "no place in DeepLab-v2"  # the reason for entries that no part of the net is waiting for

_WRAPPERS = ("module.", "_orig_mod.", "Scale.", "base.")  # DataParallel, torch.compile, isht7's and kazuto1011's MSC modules
_BLOCK_KEY = re.compile(r"layer([1-4])\.(\d+)\.")
_KAZUTO_BLOCK = re.compile(r"layer([2-5])\.block(\d+)\.(reduce|conv3x3|increase|shortcut)\.(conv|bn)\.(\w+)$")
_KAZUTO_UNITS = {"reduce": 1, "conv3x3": 2, "increase": 3}
_CANONICAL_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))\.(\w+)$")
_CAFFE_BLOCK = re.compile(r"(res|bn|scale)([2-5])([a-z])(\d*)_branch(1|2a|2b|2c)$")
_CAFFE_HEAD = re.compile(r"fc1_.+_c([0-3])$")


class WeightsError(ValueError):
    """A weights file that cannot be used, or not for this net: one sentence that says what was found and what to do."""

    exit_status = 2


def strip_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Remove the prefixes that all keys share because the net was saved inside a wrapper module; {key: bare key}."""
    bare = {key: key for key in keys}
    while prefix := next((p for p in _WRAPPERS if bare and all(name.startswith(p) for name in bare.values())), None):
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
    stage, block, kind, number, shortcut, leaf = _CANONICAL_BLOCK.match(key).groups()
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


def trunk_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Every parameter and running statistic of a trunk, without the batch counters: canonical name -> shape."""
    with torch.device("meta"):
        state = DeepLabV2(backbone).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith("layer5.")}


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


def one_weight_set(state: dict[str, Tensor], skipped: dict[str, str]) -> dict[str, Tensor]:
    """Take the one net out of a file with ``Scale1.``, ``Scale2.`` and ``Scale3.``; another state is returned as it is.

    Raises:
        WeightsError: the three sets differ, as in files made before June 2017.
    """
    if not state or not all(re.match(r"Scale[123]\.", key) for key in state):
        return state
    sets = [{key[7:]: value for key, value in state.items() if key.startswith(f"Scale{n}.")} for n in (1, 2, 3)]
    for n, other in enumerate(sets[1:], 2):
        unequal = [key for key in sets[0].keys() | other.keys() if not _same(sets[0].get(key), other.get(key))]
        if unequal:
            raise WeightsError(
                f"it holds a weight set of its own for each of three scales, and they differ ({len(unequal)} tensors, such as "
                f"{min(unequal)}); DeepLab-v2 shares one set between the scales, so use a file made after June 2017"
            )
        skipped.update((f"Scale{n}.{key}", "equal to those of Scale1") for key in other)
    return sets[0]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def refuse_other_nets(state: Mapping[str, Tensor]) -> None:
    """Raise :class:`WeightsError` for nets that cannot be turned into a DeepLab-v2, with the reason."""
    if any(key.startswith("backbone.") for key in state) and any(key.startswith("classifier.") for key in state):
        raise WeightsError(
            "it is a torchvision segmentation net (DeepLabv3 or FCN), whose head and dilations are others than DeepLab-v2's; "
            "start from torchvision's ImageNet resnet50, resnet101 or resnet152 instead"
        )
    conv1 = state.get("conv1.weight")
    if conv1 is not None and tuple(conv1.shape[2:]) == (3, 3):
        raise WeightsError(
            f"its first convolution is {_shape(conv1)}: a ResNet with the deep stem of three 3x3 convolutions (MIT, "
            "segmentation toolbox), which cannot be turned into the single 7x7 convolution of DeepLab-v2"
        )
    if conv1 is not None and tuple(conv1.shape[1:]) != (3, 7, 7):
        raise WeightsError(f"its first convolution is {_shape(conv1)}; DeepLab-v2's is 64x3x7x7")
    if (conv1 is None or "layer1.0.conv1.weight" not in state) and not any(".block1." in key for key in state):
        keys = ", ".join(list(state)[:3]) or "no tensors at all"
        raise WeightsError(f"its keys ({keys} ...) are of no scheme known here; expected a DeepLab-v2 or ResNet state_dict")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def to_bgr_input(weight: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """A torchvision stem made ready for mean-subtracted BGR pictures of 0..255.

    torchvision feeds x[r] = (p / 255 - mean[r]) / std[r], we feed p - MEAN_BGR[b]; so the kernel of channel b is that of r
    divided by 255 std[r], and the constant between 255 mean[r] and MEAN_BGR[b] moves into the running mean of ``bn1``.
    ``bn1(conv1(picture))`` stays the same but at the border, where the zero padding stands for another colour.

    Args:
        weight: (64, 3, 7, 7) ``conv1.weight`` over RGB.
        running_mean: (64,) of ``bn1``.

    Returns:
        Both as float32; computed in double precision, each number rounded once, so every machine finds the same bits.
    """
    std = torch.tensor(TORCHVISION_STD, dtype=torch.float64)[:, None, None]
    turned = (weight.double() / (255 * std)).flip(1).float()
    return turned, (running_mean.double() - _mean_response(turned)).float()


def to_rgb_input(weight: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The way back of :func:`to_bgr_input`, exact up to the rounding to float32."""
    std = torch.tensor(TORCHVISION_STD, dtype=torch.float64)[:, None, None]
    return (weight.double().flip(1) * (255 * std)).float(), (running_mean.double() + _mean_response(weight)).float()


def _mean_response(weight: Tensor) -> Tensor:
    """What each kernel over BGR answers to the constant picture MEAN_BGR - 255 TORCHVISION_MEAN; (64,) float64."""
    constant = [ours - 255 * theirs for ours, theirs in zip(MEAN_BGR, reversed(TORCHVISION_MEAN))]
    products = weight.double() * torch.tensor(constant, dtype=torch.float64)[:, None, None]
    return torch.tensor([math.fsum(kernel.flatten().tolist()) for kernel in products], dtype=torch.float64)
