"""From a weights file to :class:`Weights`: read, recognised, brought to the canonical names and checked."""

import fnmatch
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deeplab.deeplabv2 import ATROUS_RATES
from deeplab.resnet import BACKBONES, MARK, Bottleneck
from deeplab.weights.caffemodel import CaffeModel
from deeplab.weights.kinds import file_kind
from deeplab.weights.legacy_tar import read_tar_torch
from deeplab.weights.names import (
    HEAD_KEY,
    find_backbone,
    find_net,
    find_stem,
    head_shape,
    in_head,
    in_trunk,
    is_counter,
    refuse_extras,
    toolbox_head_shapes,
    trunk_shapes,
)
from deeplab.weights.read import check_sums, read_numpy, read_safetensors, read_torch
from deeplab.weights.recognise import CONVERTED_TO_TENSORFLOW, from_caffe, from_tensorflow, from_torch, is_name, settle_abn
from deeplab.weights.weights import NO_PLACE, SNAPSHOT, Weights, WeightsError, some

TRUNKS = ("auto", "torchvision", "caffe", "rgb-1x1", "bgr-3x3")
"""What a bare ResNet can be taken for."""
ABN = ("abs", "signed")
"""What its batch norms may do with a weight below zero."""

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
_DEPTH = 6  # of dictionaries in dictionaries
_LARGEST_HEAD = 255 * 2048 * 9  # numbers in one branch


def load_weights(path: str | Path, trunk: str = "auto", abn: str | None = None) -> Weights:
    """Read a weights file of any known scheme; the scheme is told by keys and shapes.

    Known are: bare or prefixed DeepLab-ResNet state dictionaries, the two-level ones of AdaptSegNet and ADVENT, kazuto1011's,
    ResNets under torchvision's names (torchvision's own and Caffe's), official caffemodels, caffe-tensorflow's ``.npy`` and
    ``.npz``, our snapshots and checkpoints, and any of the PyTorch ones as ``.safetensors``.

    Args:
        trunk: what to take a bare ResNet under torchvision's names for: ``"torchvision"`` (normalised RGB pictures, stride in
            the 3x3 convolutions), ``"caffe"`` (mean-subtracted BGR of 0..255, stride in the first 1x1), ``"rgb-1x1"`` and
            ``"bgr-3x3"`` (the other two pairs) or ``"auto"``: what its first layer tells. A file that says what it is may be
            asked for that alone.
        abn: what the batch norms of a trunk with a deep stem make of their weights: ``"abs"`` (|weight| + 1e-5, as
            InPlace-ABN), ``"signed"`` (the weight as it is) or None: what the file says; it is refused where it does not and
            has weights below zero.

    Raises:
        WeightsError: missing, damaged, no weights, numbers that are none, or weights that cannot fit a DeepLab-v2; one sentence
            with the path.
    """
    path = Path(path)
    if trunk not in TRUNKS or abn not in (None, *ABN):
        raise ValueError(f"trunk {trunk!r} or abn {abn!r} is unknown; choose of {', '.join(TRUNKS)} and {', '.join(ABN)}")
    try:
        weights = _read(path, trunk)
        weights.path = str(path)
        style = "torchvision" if weights.config.get("stride_in_3x3") else "caffe"
        if trunk not in ("auto", style) and not weights.bare:
            raise WeightsError(f"it is a {weights.scheme}, which is {style}'s in kind and not {trunk}'s; leave --trunk out")
        found = _keep_the_net(weights)
        classes = _judge_head(weights, path.name)
        _compare_with_meta(weights, found | classes)
        settle_abn(weights, abn)
        _refuse_bad_numbers(weights)
    except WeightsError as error:
        text = "".join(sign if sign.isprintable() else "?" for sign in str(error))  # names in a damaged file hold anything
        raise WeightsError(f"{path}: {text}") from None
    except OSError as error:
        raise WeightsError(f"{path}: it cannot be read ({error.strerror or error})") from None
    if path.name in _SEEN_VOC_VAL and not weights.seen_voc_val:
        weights.seen_voc_val = "it is the official train2 model, which was trained on VOC train and val together"
    return weights


def _read(path: Path, trunk: str) -> Weights:
    kind = file_kind(path)
    sums = check_sums(path)
    if kind == "caffe":
        weights = from_caffe(CaffeModel(path))
    elif kind in ("npy", "npz"):
        arrays, nested = read_numpy(path, kind)
        weights = from_tensorflow(arrays, converted=nested or path.name in CONVERTED_TO_TENSORFLOW)
    elif kind == "safetensors":
        tensors, meta = read_safetensors(path)
        old = [key for key in tensors if key.startswith("origin.")]  # written until the stem's rounding was let go
        weights = from_torch({key: value for key, value in tensors.items() if key not in old}, meta, trunk)
    else:
        content = read_tar_torch(path) if kind == "tar torch" else read_torch(path, old=kind == "old torch")
        weights = from_torch(*_find_state(content), trunk)
    weights.notes += [sums] if sums else []
    return weights


def _find_state(content: Any) -> tuple[Mapping[Any, Any], Mapping[str, Any]]:
    """The one state_dict in what ``torch.save`` was given, however deep, and the meta that goes with it in our own files."""
    if not isinstance(content, (Mapping, list, tuple)):
        raise WeightsError(f"it holds a {type(content).__name__}; expected a state_dict")
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        meta = content.get("meta")
        if isinstance(meta, Mapping) and meta.keys() & {"backbone", "stride_in_3x3"}:
            return content["model"], meta
    found = list(_state_dicts((), content))
    if not found:
        keys = some(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise WeightsError(f"it holds no tensors under the names of parameters ({keys}); expected a state_dict")
    if len(found) > 1:
        names = [".".join(map(str, where)) or "the outermost" for where, _ in found]
        index = "".join(f"[{key!r}]" for key in next(where for where, _ in found if where))
        raise WeightsError(
            f"it holds {len(found)} state_dicts ({some(names)}), and which is meant only you can say; save that one alone, "
            f"as in torch.save(torch.load(PATH){index}, OUT)"
        )
    return found[0][1], _marked(found[0][1])


def _marked(state: Mapping[Any, Any]) -> Mapping[str, Any]:
    """What our nets say of themselves in the metadata of their state_dict, whatever they were wrapped in; {} of others."""
    metadata = getattr(state, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    marks = [entry[MARK] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get(MARK), Mapping)]
    return marks[0] if len(marks) == 1 else {}


def _state_dicts(where: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    """The dictionaries in ``value`` that hold tensors under dotted names, an optimiser's left out, and the way to each."""
    if isinstance(value, Mapping):
        if any(torch.is_tensor(entry) and is_name(key) for key, entry in value.items()):
            yield where, value
        entries = [(key, entry) for key, entry in value.items() if not str(key).lower().startswith("optim")]
    elif isinstance(value, (list, tuple)):
        entries = list(enumerate(value))
    else:
        return
    for key, entry in entries if len(where) < _DEPTH else ():
        yield from _state_dicts((*where, key), entry)


def _keep_the_net(weights: Weights) -> dict[str, str]:
    """Leave in ``state`` what the net has a place for, as float32; its backbone and its stem."""
    state = weights.state
    if not state:
        raise WeightsError("none of its entries has a name that is known here; expected the layers of a DeepLab-ResNet")
    backbone = find_backbone(state)
    stem = find_stem(state)
    shapes = trunk_shapes(backbone, stem)
    if find_net(state) in ("deeplabv3", "pspnet"):
        shapes |= toolbox_head_shapes(find_net(state), backbone, _classes(state))
    foreign = [key for key in state if not (key in shapes or HEAD_KEY.match(key) or is_counter(key, shapes))]
    refuse_extras(key for key in foreign if in_trunk(key))
    for key in foreign:
        weights.skipped[key] = NO_PLACE
        del state[key]
    for key, tensor in state.items():
        most = math.prod(shapes[key]) if key in shapes else _LARGEST_HEAD if HEAD_KEY.match(key) else 1
        if tensor.numel() > most:  # views of one number can be of any size
            raise WeightsError(f"its {key} is {tuple(tensor.shape)}; expected at most {most} numbers")
        if tensor.is_floating_point():
            state[key] = tensor.float()
    return {"backbone": backbone, "stem": stem}


def _classes(state: Mapping[str, torch.Tensor]) -> int:
    """Of a DeepLabv3 or PSPNet."""
    classifier = state.get("head.1.weight")
    count = classifier.shape[0] if classifier is not None and classifier.ndim == 4 else 0
    if not 1 <= count <= 255:
        raise WeightsError("its head lacks a classifier (head.1.weight) of 1..255 classes; fetch or save the file again")
    return count


def _judge_head(weights: Weights, filename: str) -> dict[str, Any]:
    """Drop a head that was never trained or does not tell its rates; ``{"net": ..., "num_classes": n}`` of one that is kept,
    else {}."""
    net = find_net(weights.state)
    if net in ("deeplabv3", "pspnet"):
        return {"net": net, "num_classes": _check_toolbox_head(weights, net)}
    count, classes = head_shape(weights.state)
    if count and not 1 <= classes <= 255:
        raise WeightsError(f"its head has {classes} classes; expected 1..255")
    reason = ""
    if count and weights.scheme != SNAPSHOT:
        if any(fnmatch.fnmatchcase(filename, pattern) for pattern in _UNTRAINED_HEADS):
            reason = "the head of this initial file was never trained"
        elif not any(tensor.any() for key, tensor in weights.state.items() if in_head(key)):
            reason = "its head is all zeros (never trained)"
        elif count not in (4, 2):
            reason = f"its head has {count} convolutions and does not tell their rates"
    if reason:
        head = [key for key in weights.state if in_head(key)]
        weights.skipped.update((key, reason) for key in head)
        weights.notes.append(f"{reason}, so it is left out")
        for key in head:
            del weights.state[key]
    if reason or not count:
        weights.config.pop("net", None)
        weights.config.pop("num_classes", None)
        weights.config.pop("atrous_rates", None)
        return {}
    weights.config.setdefault("atrous_rates", ATROUS_RATES[:count])
    rates = weights.config["atrous_rates"] = list(weights.config["atrous_rates"])
    if len(rates) != count:
        raise WeightsError(f"its meta tells of the rates {rates}, but its head has {count} convolutions")
    return {"net": net, "num_classes": classes}


def _check_toolbox_head(weights: Weights, net: str) -> int:
    """Both heads are whole; the number of classes."""
    count = _classes(weights.state)
    shapes = toolbox_head_shapes(net, find_backbone(weights.state), count)
    if lost := [key for key in shapes if key not in weights.state]:
        raise WeightsError(f"its heads lack {len(lost)} tensors ({some(lost)}); fetch or save the file again")
    for key, shape in shapes.items():
        if tuple(weights.state[key].shape) != shape:
            raise WeightsError(f"its {key} is {tuple(weights.state[key].shape)}; expected {shape}, as a {net} has")
    return count


def _compare_with_meta(weights: Weights, found: dict[str, Any]) -> None:
    """What the tensors say goes into ``config``, unless the file's meta says otherwise: then one of them is wrong."""
    config = weights.config
    for name, value in found.items():
        if config.setdefault(name, value) != value:
            raise WeightsError(f"its meta says {name} {config[name]}, but its tensors are those of {name} {value}")
    if BACKBONES[config["backbone"]][0] is not Bottleneck:
        config.pop("stride_in_3x3", None)  # a basic block has no 1x1 convolution, so there is no choice


def _refuse_bad_numbers(weights: Weights) -> None:
    """Every weight is a finite number, and every variance has a root. A sum is quick, and not finite if one number is not."""
    eps = weights.config["batch_norm_eps"]
    bad = {}
    for key, tensor in weights.state.items():
        if not tensor.sum().isfinite() and (count := int((~tensor.isfinite()).sum())):
            bad[key] = f"{count} of {tensor.numel()} values that are infinite or not a number"
        elif key.endswith("running_var") and (count := int((tensor <= -eps).sum())):
            bad[key] = f"{count} of {tensor.numel()} variances below zero"
    if bad:
        key, what = next(iter(bad.items()))
        more = f", and {len(bad) - 1} more of its tensors are of this kind" if len(bad) > 1 else ""
        raise WeightsError(f"its {key} holds {what}{more}; the training that saved it had failed, or the file is damaged")
