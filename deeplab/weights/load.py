"""Every published DeepLab-ResNet weights file: recognised, brought to the canonical names, and written back.

:func:`load_weights` reads a file, :func:`apply_weights` puts it into a net with a report, :func:`export` goes the other way.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeplab.weights.caffemodel import CaffeModel, caffe_state
from deeplab.deeplabv2 import ATROUS_RATES
from deeplab.weights.apply import LoadReport, apply_weights, group_by_reason
from deeplab.weights.names import (
    HEAD_KEY,
    NO_PLACE,
    STEM,
    WeightsError,
    canonical_from_caffe,
    canonical_from_kazuto,
    find_backbone,
    head_shape,
    is_counter,
    one_weight_set,
    refuse_other_nets,
    strip_wrappers,
    to_bgr_input,
    to_rgb_input,
    trunk_shapes,
)
from deeplab.resnet import BACKBONES, Bottleneck
from deeplab.weights.files import file_kind, read_numpy, read_safetensors, read_torch

__all__ = ["Weights", "load_weights"]

_SNAPSHOT = "DeepLab-v2 snapshot"
_COCO_HEAD = (
    "a net trained on COCO with another head (one 1x1 convolution, 91 classes), which is left out: the head is untrained"
)
_CONFIG = ("backbone", "num_classes", "atrous_rates", "stride_in_3x3", "batch_norm_eps")
_TENSORFLOW_EPS = 1e-3  # TF-Slim's default, which DrSleep's nets do not override
_TENSORFLOW_LEAVES = {
    "weights": "weight", "biases": "bias", "gamma": "weight", "beta": "bias",
    "moving_mean": "running_mean", "moving_variance": "running_var",
}  # fmt: skip
_SEEN_VOC_VAL = (  # copies of the official train2 model; kazuto1011's release ...-vocaug-20000.pth is another, honest one
    "train2_iter_20000.caffemodel",
    "deeplabv2_resnet101_msc-vocaug.pth",
    "deeplab_resnet.ckpt",
    "deeplab_resnet.npy",
    "deeplab_resnet.npz",
)
_UNTRAINED_HEADS = (
    "MS_DeepLab_resnet_pretrained_COCO_init*.pth",
    "resnet101COCO-*.pth",
    "DeepLab_resnet_pretrained_init-*.pth",
    "deeplab_resnet_init.*",
)


@dataclass
class Weights:
    """What a weights file holds.

    Attributes:
        state: canonical name -> tensor on the CPU, float32 where it is floating point.
        scheme: whose file it is, in words.
        config: what the file tells about the net, as keyword arguments of :func:`deeplab.deeplabv2`; no ``num_classes`` and
            ``atrous_rates`` where it has no usable head.
        meta: the meta of one of our own snapshots, else {}.
        skipped: key in the file, without a wrapper's prefix -> why it is not in ``state``.
        notes: sentences for the user.
        seen_voc_val: why a score on VOC val means nothing for this file; "" where it means something.
        origin: the stem before it was turned from RGB to BGR input or back, so that the way back is exact.
        path: where it was read.
    """

    state: dict[str, Tensor]
    scheme: str
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seen_voc_val: str = ""
    origin: dict[str, Tensor] = field(default_factory=dict)
    path: str = ""

    def lines(self) -> list[str]:
        """A short account of the file."""
        config = ", ".join(f"{name} {self.config[name]}" for name in _CONFIG if name in self.config)
        lines = [f"{self.scheme}: {len(self.state)} tensors; {config}"]
        lines += [f"skipped {text}" for text in group_by_reason(self.skipped)]
        lines += self.notes
        if self.seen_voc_val:
            lines.append(f"do not score it on VOC val: {self.seen_voc_val}")
        return lines


def load_weights(path: str | Path) -> Weights:
    """Read a weights file of any known scheme; the scheme is told by keys and shapes.

    Known are: bare or prefixed DeepLab-ResNet state dictionaries, kazuto1011's, torchvision's ImageNet ResNets, official
    caffemodels, caffe-tensorflow's ``.npy`` and ``.npz``, our snapshots and checkpoints, and any of the PyTorch ones as
    ``.safetensors``.

    Raises:
        WeightsError: missing, damaged, no weights, or weights that cannot fit a DeepLab-v2; one sentence with the path.
    """
    path = Path(path)
    try:
        weights = _read(path)
        weights.path = str(path)
        _complete(weights, path.name)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: it cannot be read ({error.strerror or error})") from None
    return weights


def _read(path: Path) -> Weights:
    kind = file_kind(path)
    if kind == "caffe":
        return _from_caffe(CaffeModel(path))
    if kind in ("npy", "npz"):
        return _from_tensorflow(read_numpy(path, kind))
    if kind == "safetensors":
        tensors, meta = read_safetensors(path)
        origin = {key: tensors.pop(f"origin.{key}") for key in STEM if f"origin.{key}" in tensors}
        return _from_torch(tensors, meta, origin)
    content = read_torch(path, old=kind == "old torch")
    if not isinstance(content, Mapping):
        raise WeightsError(f"it holds a {type(content).__name__}; expected a state_dict")
    meta, origin = content.get("meta"), content.get("origin")
    for name in ("model", "state_dict", "model_state_dict", "net"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    return _from_torch(content, meta if isinstance(meta, Mapping) else {}, origin if isinstance(origin, Mapping) else {})


def _from_torch(content: Mapping[Any, Any], meta: Mapping[str, Any], origin: Mapping[str, Tensor]) -> Weights:
    """Tell the PyTorch schemes apart: our own snapshots say what they are, the others by their keys."""
    skipped = {str(key): f"no tensor ({type(value).__name__})" for key, value in content.items() if not torch.is_tensor(value)}
    bare = strip_wrappers(key for key, value in content.items() if torch.is_tensor(value))
    state = one_weight_set({name: content[key].detach() for key, name in bare.items()}, skipped)
    refuse_other_nets(state)
    ours = getattr(content, "_metadata", {}).get("deeplab", {})
    if any(".block1." in key for key in state):
        weights = _from_kazuto(state)
    elif meta.keys() & {"backbone", "stride_in_3x3"}:
        config = {"stride_in_3x3": False, "batch_norm_eps": 1e-5}
        config |= {name: meta[name] for name in _CONFIG if meta.get(name) is not None}
        seen = str(meta.get("seen_voc_val") or "")
        weights = Weights(state, _SNAPSHOT, config, dict(meta), seen_voc_val=seen, origin=dict(origin))
    elif any(HEAD_KEY.match(key) for key in state):
        prefix = next(key.removesuffix(name) for key, name in bare.items())
        scheme = f"DeepLab-ResNet with the prefix {prefix}" if prefix else "DeepLab-ResNet"
        weights = Weights(state, scheme, {"stride_in_3x3": False, "batch_norm_eps": 1e-5})
    else:
        weights = _from_torchvision(state, ours)
    weights.skipped = skipped | weights.skipped
    return weights


def _from_kazuto(state: Mapping[str, Tensor]) -> Weights:
    weights = Weights({}, "kazuto1011 DeepLab-v2", {"stride_in_3x3": False, "batch_norm_eps": 1e-5})
    for key, tensor in state.items():
        if name := canonical_from_kazuto(key):
            weights.state[name] = tensor
        elif key.startswith("fc.") and tensor.shape[0] == 91:
            weights.skipped[key] = "the head of another net"
            weights.notes = [_COCO_HEAD]
        else:
            weights.skipped[key] = NO_PLACE
    return weights


def _from_torchvision(state: dict[str, Tensor], ours: Mapping[str, Tensor]) -> Weights:
    """A ResNet trunk for RGB pictures; ``ours`` is the exact BGR stem where :func:`export` left one with it."""
    weights = Weights(state, "torchvision ResNet trunk", {"stride_in_3x3": True, "batch_norm_eps": 1e-5})
    if "fc.weight" in state:
        weights.scheme = "torchvision ImageNet ResNet"
        classes = state["fc.weight"].shape[0]
        weights.notes.append(
            f"a plain image classifier ({classes} classes), no segmentation net: only its trunk is used, the head is untrained"
        )
        for key in ("fc.weight", "fc.bias"):
            if key in state:
                weights.skipped[key] = "the image classifier"
                del state[key]
    else:
        weights.notes.append("a trunk without a head: taken for torchvision's (RGB input, stride in the 3x3 convolutions)")
    weights.notes.append("its first layer is turned from RGB 0..1 to mean-subtracted BGR 0..255 input")
    if all(key in state for key in STEM) and len(state[STEM[0]]) == state[STEM[1]].numel():
        theirs = [state[key].float() for key in STEM]
        turned = to_bgr_input(*theirs)
        if ours and all(map(torch.equal, to_rgb_input(*(ours[key] for key in STEM)), theirs)):
            turned = tuple(ours[key] for key in STEM)
        weights.origin = dict(zip(STEM, theirs))
        state.update(zip(STEM, turned))
    return weights


def _from_caffe(model: CaffeModel) -> Weights:
    state, skipped, eps = caffe_state(model)
    weights = Weights(state, "Caffe DeepLab-v2", {"stride_in_3x3": False, "batch_norm_eps": eps}, skipped=skipped)
    for layer, reason in list(skipped.items()):
        if "fc" in layer and "InnerProduct" in reason:
            skipped[layer] = "the image classifier"
            weights.notes.append("a plain image classifier: only its trunk is used, the head is untrained")
        elif "fc" in layer and "Convolution of 91x" in reason:
            skipped[layer] = "the head of another net"
            weights.notes.append(_COCO_HEAD)
    return weights


def _from_tensorflow(arrays: dict[str, np.ndarray]) -> Weights:
    """caffe-tensorflow's names: Caffe's layers, Scale joined with batch norm, kernels height x width x in x out."""
    weights = Weights({}, "caffe-tensorflow DeepLab-v2", {"stride_in_3x3": False, "batch_norm_eps": _TENSORFLOW_EPS})
    weights.notes.append(f"its batch norms were trained with an epsilon of {_TENSORFLOW_EPS:g}, which is kept")
    for key, array in arrays.items():
        layer, _, leaf = key.removesuffix(":0").rpartition("/")
        module = canonical_from_caffe(layer)
        if module is None or leaf not in _TENSORFLOW_LEAVES or array.dtype.kind != "f":
            weights.skipped[key] = NO_PLACE
            continue
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        weights.state[f"{module}.{_TENSORFLOW_LEAVES[leaf]}"] = torch.from_numpy(np.array(array, np.float32, order="C"))
    return weights


def _complete(weights: Weights, filename: str) -> None:
    """What all schemes have in common: types, the backbone, the head and what is known about a file by its name."""
    state, config = weights.state, weights.config
    if not state:
        raise WeightsError("none of its entries has a name that is known here; expected the layers of a DeepLab-ResNet")
    found: dict[str, Any] = {"backbone": find_backbone(state)}
    shapes = trunk_shapes(found["backbone"])
    for key, tensor in list(state.items()):
        if key in shapes or HEAD_KEY.match(key) or is_counter(key, shapes):
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            weights.skipped[key] = NO_PLACE
            del state[key]
    count, classes = head_shape(state)
    if count and weights.scheme != _SNAPSHOT:
        if any(fnmatch.fnmatchcase(filename, pattern) for pattern in _UNTRAINED_HEADS):
            count = _drop_head(weights, "the head of this initial file was never trained")
        elif not any(tensor.any() for key, tensor in state.items() if HEAD_KEY.match(key)):
            count = _drop_head(weights, "its head is all zeros (never trained)")
        elif count not in (4, 2):
            count = _drop_head(weights, f"its head has {count} convolutions and does not tell their rates")
    if count:
        found["num_classes"] = classes
        config["atrous_rates"] = list(config.get("atrous_rates", ATROUS_RATES[:count]))
        if len(config["atrous_rates"]) != count:
            raise WeightsError(f"its meta tells of the rates {config['atrous_rates']}, but its head has {count} convolutions")
    else:
        config.pop("num_classes", None)
        config.pop("atrous_rates", None)
    for name, value in found.items():
        if config.setdefault(name, value) != value:
            raise WeightsError(f"its meta says {name} {config[name]}, but its tensors are those of {name} {value}")
    if BACKBONES[config["backbone"]][0] is not Bottleneck:
        config.pop("stride_in_3x3", None)  # a basic block has no 1x1 convolution, so there is no choice
    if filename in _SEEN_VOC_VAL and not weights.seen_voc_val:
        weights.seen_voc_val = "it is the official train2 model, which was trained on VOC train and val together"


def _drop_head(weights: Weights, reason: str) -> int:
    for key in [key for key in weights.state if HEAD_KEY.match(key)]:
        del weights.state[key]
        weights.skipped[key] = reason
    weights.notes.append(f"{reason}, so it is left out")
    return 0
