"""Nets of other projects: which backbones can be used, how semseg's PSPNet is converted, and what is refused by its name."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deeplab.toolbox import FEATURES
from deeplab.weights.caffemodel import CAFFE_EPS
from deeplab.weights.names import IN_HEAD, find_net, find_stem, is_layer
from deeplab.weights.stem import turn_stem
from deeplab.weights.weights import NO_PLACE, OTHER_HEAD, Weights, WeightsError, some

_FIRST_BLOCKS = "the first blocks of its stages 3 and 4 have dilations 1 and 2, those of the nets here 2 and 4"
_AT_8 = "{}, if it was trained at output stride 8, which the file does not say; at 16 both stages differ"
_OVER_TORCHVISION = {
    # keys that only its head has -> the name of the net, and the difference between its backbone and ours
    ("classifier.0.project.0.weight",): ("torchvision DeepLabv3", _FIRST_BLOCKS),
    ("classifier.0.weight", "classifier.1.running_var"): ("torchvision FCN", _FIRST_BLOCKS),
    ("classifier.classifier.0.project.0.weight",): ("VainF DeepLabv3", _AT_8.format(_FIRST_BLOCKS)),
    ("classifier.aspp.project.0.weight",): ("VainF DeepLabv3+", _AT_8.format(_FIRST_BLOCKS)),
    ("aspp.aspp1.atrous_conv.weight", "decoder.last_conv.0.weight"): (
        "jfzhang95 DeepLabv3+",
        _AT_8.format("the three blocks of its stage 4 have dilations 4, 8 and 16, those of the nets here 4"),
    ),
}
"""Segmentation nets over torchvision's ResNet, with the prefix ``backbone.``, and torchvision's input.

Sources: torchvision's ``models/segmentation``, ``network`` of VainF/DeepLabV3Plus-Pytorch, ``modeling`` of
jfzhang95/pytorch-deeplab-xception.
"""
_ITS_RESNET = "to start from its ResNet, save only the keys under {} without that prefix, and give --trunk torchvision"
_REFUSED = (  # a pattern at the start of a key or after a dot -> the sentence
    (
        r"(weight|bias)_mask$",
        "it is a pruned net (torch.nn.utils.prune): it holds {}; call prune.remove(layer, 'weight') for each of its layers and "
        "save the state_dict() again",
    ),
    (
        r"(parametrizations\.|weight_[guv]$|weight_orig$)",
        "its weights are in parts ({}), as in weight and spectral normalisation; merge them "
        "(torch.nn.utils.parametrize.remove_parametrizations) and save the state_dict() again",
    ),
    (
        r"decode_head\.",
        "it is a net of the toolbox mmsegmentation ({}), which cannot be reproduced exactly here: its dilated stages begin "
        "with half the dilation, and it does not align corners; if its conv1 is 7x7: " + _ITS_RESNET.format("backbone."),
    ),
    (
        r"segmentation_head\.0\.",
        "it is a net of segmentation_models_pytorch ({}), with a head and a decoder that no net here has; if its encoder is a "
        "ResNet: " + _ITS_RESNET.format("encoder."),
    ),
    (
        r"classifier\.(cbr\.0|low_classifier|high_classifier)\.",
        "it is torchvision's LR-ASPP ({}), over a MobileNet; the nets here are over ResNets",
    ),
)


def refuse_by_name(state: Mapping[str, Tensor]) -> None:
    """Raise :class:`WeightsError` for nets that cannot be used as they are, even in part; the message names the net."""
    for pattern, what in _REFUSED:
        if found := [key for key in state if re.search(rf"(^|\.){pattern}", key)]:
            raise WeightsError(what.format(some(found[:2]) + " ..." * (len(found) > 2)))


def refuse_other_nets(state: Mapping[str, Tensor]) -> None:
    """Raise :class:`WeightsError`, with the reason, for nets without a ResNet under torchvision's names."""
    if any(key.startswith("backbone.") for key in state) and any(key.startswith("classifier.") for key in state):
        raise WeightsError(
            "it is a torchvision segmentation net (backbone. and classifier.) over another backbone than a ResNet; start from "
            "torchvision's ImageNet resnet50, resnet101 or resnet152 instead"
        )
    conv1 = state.get("conv1.weight")
    if conv1 is not None and tuple(conv1.shape[1:]) != ((3, 3, 3) if find_stem(state) == "deep" else (3, 7, 7)):
        shape = "x".join(map(str, conv1.shape))
        raise WeightsError(f"its first convolution is {shape}; expected 64x3x7x7, or 64x3x3x3 and conv2 and conv3 after it")
    if conv1 is None or "layer1.0.conv1.weight" not in state:
        for prefix in (key.removesuffix("conv1.weight") for key in state if key.endswith(".conv1.weight")):
            if f"{prefix}layer1.0.conv1.weight" in state:
                other = [key for key in state if not key.startswith(prefix)]
                raise WeightsError(
                    f"it holds a ResNet under {prefix} and parts of another net ({some(other[:2])} ...) that no net here has; "
                    f"to start from the ResNet, save only the keys under {prefix} without that prefix, and give --trunk"
                )
        raise WeightsError(f"its keys ({some(state)}) match no known scheme; expected a DeepLab-v2 or ResNet state_dict")


def refuse_fada(content: Any) -> None:
    """Raise :class:`WeightsError` for a net of FADA (JDAI-CV/FADA, ``core/models``), which is saved in two parts."""
    if isinstance(content, Mapping) and all(
        isinstance(content.get(part), Mapping) for part in ("feature_extractor", "classifier")
    ):
        raise WeightsError(
            "it holds FADA's net in two parts, feature_extractor and classifier, which cannot be reproduced exactly here: "
            f"{_FIRST_BLOCKS}; to start from its ResNet, torch.save(torch.load(PATH)['feature_extractor'], OUT) and give "
            "--trunk torchvision"
        )


def backbone_of_another_net(state: Mapping[str, Tensor]) -> Weights | None:
    """The ResNet of a segmentation net over torchvision's ResNet; None for other nets."""
    block = "backbone.layer1.0.conv1.weight"
    prefix = next((key.removesuffix(block) for key in state if key.endswith(block)), "")
    needed = (block, "backbone.layer4.0.conv1.weight")  # HRNet has the first as well
    marks = {mark for mark in _OVER_TORCHVISION if all(f"{prefix}{key}" in state for key in (*needed, *mark))}
    if not marks:
        return None
    title, difference = _OVER_TORCHVISION[marks.pop()]
    backbone: dict[str, Tensor] = {}
    start = f"{prefix}backbone."
    weights = Weights(backbone, title, {"stride_in_3x3": True, "batch_norm_eps": CAFFE_EPS})
    for key, tensor in state.items():
        if key.startswith(start):
            backbone[key.removeprefix(start)] = tensor
        else:
            of_head = key.startswith(tuple(f"{prefix}{part}." for part in ("classifier", "aux_classifier", "aspp", "decoder")))
            weights.skipped[key] = OTHER_HEAD if of_head else NO_PLACE
    weights.notes.append(f"a {title}: its head fits no net here, so only the backbone is used; {difference}")
    turn_stem(weights)
    return weights


def settle_semseg(weights: Weights, source: Mapping[str, Tensor]) -> None:
    """Convert a PSPNet of hszhao/semseg (``model/pspnet.py``), under canonical names, to ours with the same logits.

    Its heads end with ReLU, it concatenates the features before their means, its auxiliary convolution has no bias, and its
    input is normalised RGB. For its other nets, such as PSANet, only the backbone is used.

    Args:
        source: the tensors of the file under their original names.
    """
    state = weights.state
    weights.signed = True  # plain batch norm
    turn_stem(weights)
    foreign = [key for key in weights.skipped if is_layer(key, source[key])]
    if foreign or find_net(state) != "pspnet":
        weights.scheme = "hszhao/semseg net"
        weights.skipped |= {key: OTHER_HEAD for key in source if not key.startswith("layer")}
        for key in filter(IN_HEAD.match, list(state)):
            del state[key]
        head = f"the head of another net ({some(foreign)}) is left out: only the backbone is used"
        weights.notes.append(head if foreign else "a backbone without a complete head")
        return
    weights.config["negative_slope"] = 0.0
    join, auxiliary = state.get("head.0.bottleneck.0.weight"), state.get("dsn.0.weight")
    if join is not None and join.shape == (FEATURES, 2048 + 4 * FEATURES, 3, 3):  # another shape is refused later
        join = state["head.0.bottleneck.0.weight"] = join.float().contiguous()
        for kernel in join:  # in place: torch's mapping of a file is private
            kernel.copy_(kernel.roll(4 * FEATURES, dims=0))
    if auxiliary is not None and auxiliary.ndim == 4 and auxiliary.shape[0] <= FEATURES:
        state["dsn.0.bias"] = torch.zeros(auxiliary.shape[0])
        weights.config["auxiliary_channels"] = auxiliary.shape[0]
    weights.notes.append("its heads end with ReLU; its max pooling rounds sizes down, which is the same for sides of 8k + 1")
