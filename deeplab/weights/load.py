"""From a weights file to :class:`Weights`: read, recognised, renamed to the canonical names and checked."""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeplab.deeplabv2 import ATROUS_RATES
from deeplab.resnet import BACKBONES, MARK, BasicBlock
from deeplab.weights.caffemodel import CaffeModel, from_caffe
from deeplab.weights.legacy_tar import read_tar_torch
from deeplab.weights.names import (
    HEAD_KEY,
    IN_BACKBONE,
    IN_HEAD,
    TOOLBOX,
    find_backbone,
    find_net,
    find_stem,
    head_shape,
    is_counter,
    net_shapes,
    refuse_extras,
)
from deeplab.weights.neighbours import refuse_fada
from deeplab.weights.read import check_sums, file_kind, read_numpy, read_safetensors, read_torch
from deeplab.weights.recognise import (
    CONVERTED_TO_TENSORFLOW,
    OURS,
    TRUNK_KINDS,
    from_snapshot,
    from_tensorflow,
    from_torch,
    is_name,
    settle_abn,
)
from deeplab.weights.weights import NO_PLACE, OF_HEAD, SNAPSHOT, Weights, WeightsError, printable, some

TRUNKS = ("auto", *TRUNK_KINDS)
"""How a bare ResNet can be read."""
ABN = ("abs", "signed")
"""How its batch norms can use weights below zero."""

_SEEN_VOC_VAL = (  # copies of the official train2 model; kazuto1011's ...-vocaug-20000.pth is another, without val
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
_DEPTH = 6  # of nested dictionaries
_LARGEST_HEAD = 255 * 2048 * 9  # values in one branch


def load_weights(
    path: str | Path, trunk: str = "auto", abn: str | None = None, atrous_rates: Sequence[int] | None = None
) -> Weights:
    """Read a weights file of any known scheme, recognised by its keys and shapes.

    Known schemes: bare or prefixed DeepLab-ResNet state_dicts, the two-level ones of AdaptSegNet and ADVENT, kazuto1011's,
    hszhao/semseg's PSPNet, ResNets under torchvision's names (torchvision's own, Caffe's, and those in segmentation nets of
    torchvision, VainF and jfzhang95), official caffemodels, caffe-tensorflow's ``.npy`` and ``.npz``, our snapshots and
    checkpoints, and any of the PyTorch ones as ``.safetensors``.

    Args:
        trunk: how to read a bare ResNet with torchvision's names, one of ``TRUNKS``: ``"torchvision"`` (normalised RGB,
            stride in the 3x3 convolutions), ``"caffe"`` (mean-subtracted BGR of 0..255, stride in the first 1x1), the other
            two combinations, or ``"auto"``: by its first layer. A file that says what it is accepts only that.
        abn: how the batch norms of a backbone with a deep stem use their weights: ``"abs"`` (|weight| + 1e-5, as
            InPlace-ABN), ``"signed"`` (the weight itself) or None: as the file says. A file that does not say is refused
            if it matters.
        atrous_rates: the rates of a DeepLab-v2's head, or the first of them; the other branches are then left out.

    Raises:
        WeightsError: the file is missing, damaged or no weights file, holds values that are not finite, or fits no net of
            ours; one sentence with the path.
    """
    path = Path(path)
    if trunk not in TRUNKS or abn not in (None, *ABN):
        raise ValueError(f"trunk {trunk!r} or abn {abn!r} is unknown; choose from {', '.join(TRUNKS)} and {', '.join(ABN)}")
    try:
        kind, sums = file_kind(path), check_sums(path)
        if kind == "caffe":
            weights = _settled(from_caffe(CaffeModel(path)), path.name, atrous_rates)
        elif kind in ("npy", "npz"):
            arrays, nested = read_numpy(path, kind)
            weights = from_tensorflow(arrays, converted=nested or path.name in CONVERTED_TO_TENSORFLOW)
            weights = _settled(weights, path.name, atrous_rates)
        else:
            state, meta = _read_state(path, kind)
            weights = from_snapshot(state, meta) or _settled(from_torch(state, meta, trunk), path.name, atrous_rates)
        if atrous_rates is not None:
            _keep_branches(weights, list(atrous_rates))
        weights.path = str(path)
        weights.notes += [sums] if sums else []
        config = weights.config
        style = "torchvision" if config["stride_in_3x3"] else "caffe"
        if trunk not in ("auto", style) and not weights.bare:
            raise WeightsError(f"it is a {weights.scheme}, which is built as {style}'s and not as {trunk}'s; leave --trunk out")
        if weights.scheme != SNAPSHOT and config["stem"] == "deep" and not weights.signed:
            settle_abn(weights, abn)
        elif abn == "abs":
            raise WeightsError(f"it is a {weights.scheme}, whose batch norms use their weights unchanged; leave --abn out")
        if issubclass(BACKBONES[config["backbone"]].block, BasicBlock):
            del config["stride_in_3x3"]  # a basic block has no 1x1 convolution, so there is no choice
        _refuse_bad_numbers(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {printable(str(error))}") from None
    except OSError as error:
        raise WeightsError(f"{path}: it cannot be read ({error.strerror or error})") from None
    if path.name in _SEEN_VOC_VAL and not weights.seen_voc_val:
        weights.seen_voc_val = "it is the official train2 model, which was trained on VOC train and val together"
    return weights


def _read_state(path: Path, kind: str) -> tuple[Mapping[Any, Any], Mapping[str, Any]]:
    """The only state_dict in a torch or safetensors file, at any depth, and its meta if the file is ours.

    A bare state_dict of our nets has its meta in its ``_metadata``, which ``torch.save`` keeps.
    """
    if kind == "safetensors":
        tensors, meta = read_safetensors(path)
        # earlier versions also wrote the stem before its rounding, as "origin."
        return {key: value for key, value in tensors.items() if not key.startswith("origin.")}, meta
    content = read_tar_torch(path) if kind == "tar torch" else read_torch(path, old=kind == "old torch")
    if not isinstance(content, (Mapping, list, tuple)):
        raise WeightsError(f"it holds a {type(content).__name__}; expected a state_dict")
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        ours = content.get("meta")
        if isinstance(ours, Mapping) and ours.keys() & OURS:
            return content["model"], ours
    found = list(_state_dicts((), content))
    if not found:
        keys = some(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise WeightsError(f"it holds no tensors under the names of parameters ({keys}); expected a state_dict")
    if len(found) > 1:
        refuse_fada(content)
        names = [".".join(map(str, where)) or "the outermost" for where, _ in found]
        index = "".join(f"[{key!r}]" for key in next(where for where, _ in found if where))
        raise WeightsError(
            f"it holds {len(found)} state_dicts ({some(names)}); save the one that you want alone, "
            f"as in torch.save(torch.load(PATH){index}, OUT)"
        )
    state = found[0][1]
    metadata = getattr(state, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    marks = [entry[MARK] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get(MARK), Mapping)]
    return state, marks[0] if len(marks) == 1 else {}


def _state_dicts(where: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    """Yield (path, dictionary) of each dictionary in ``value`` with tensors under dotted names, except an optimiser's."""
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


def _settled(weights: Weights, filename: str, rates: Sequence[int] | None) -> Weights:
    """Keep only the tensors of one of our nets in ``state``, as float32, and record that net in ``config``."""
    state = weights.state
    if not state:
        raise WeightsError("none of its entries has a known name; expected the layers of a DeepLab-ResNet")
    backbone = find_backbone(state, said=weights.config.get("backbone", ""))
    net, stem, classes = find_net(state), find_stem(state), 1
    if net in TOOLBOX:
        classifier = state.get("head.1.weight")
        classes = classifier.shape[0] if classifier is not None and classifier.ndim == 4 else 0
        if not 1 <= classes <= 255:
            raise WeightsError("its head lacks a classifier (head.1.weight) of 1..255 classes; fetch or save the file again")
    of_head = {name: weights.config[name] for name in OF_HEAD[3:] if net in TOOLBOX and name in weights.config}
    shapes = net_shapes(backbone, stem, net, classes, **of_head)
    _refuse_other_width(state, shapes, backbone)
    foreign = [key for key in state if not (key in shapes or HEAD_KEY.match(key) or is_counter(key, shapes))]
    refuse_extras(key for key in foreign if IN_BACKBONE.match(key))
    for key in foreign:
        weights.skipped[key] = NO_PLACE
        del state[key]
    for key, tensor in state.items():
        most = math.prod(shapes[key]) if key in shapes else _LARGEST_HEAD if HEAD_KEY.match(key) else 1
        if tensor.numel() > most:  # a view of one value can have any size
            raise WeightsError(f"its {key} is {tuple(tensor.shape)}; expected at most {most} numbers")
        if tensor.is_floating_point():
            state[key] = tensor.float()
    for name in OF_HEAD[2:3] if net in TOOLBOX else OF_HEAD[3:]:
        weights.config.pop(name, None)
    if net not in TOOLBOX:
        classes = _judge_head(weights, filename, rates)
    elif lost := [key for key in shapes if IN_HEAD.match(key) and key not in state]:
        raise WeightsError(f"its heads lack {len(lost)} tensors ({some(lost)}); fetch or save the file again")
    found = {"backbone": backbone, "stem": stem} | ({"net": net, "num_classes": classes} if classes else {})
    for name, value in found.items():
        if weights.config.setdefault(name, value) != value:
            raise WeightsError(f"its meta says {name} {weights.config[name]}, but its tensors are those of {name} {value}")
    return weights


def _refuse_other_width(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], backbone: str) -> None:
    """Raise :class:`WeightsError` for the blocks of a ResNeXt or a wide ResNet that is not in ``BACKBONES``."""
    inner, last = (state.get(f"layer1.0.conv{n}.weight", torch.empty(0)) for n in (2, 3))
    expected = shapes.get("layer1.0.conv3.weight", last.shape)
    if inner.ndim != 4 or last.ndim != 4 or last.shape[0] != expected[0] or last.shape[1] == expected[1]:
        return
    groups = inner.shape[0] // max(inner.shape[1], 1)
    raise WeightsError(
        f"its blocks have {inner.shape[0]} channels in {groups} groups, those of {backbone} {expected[1]} in one, so it is a "
        "ResNeXt, a wide ResNet or another net: add it to the table BACKBONES of deeplab/resnet.py, as "
        f"Backbone(Bottleneck, {BACKBONES[backbone].depths}, groups={groups}, width={inner.shape[1]})"
    )


def _judge_head(weights: Weights, filename: str, asked: Sequence[int] | None) -> int:
    """The number of classes of a DeepLab-v2's head; 0 without a head, or if it is left out (untrained, or of unknown rates)."""
    count, classes = head_shape(weights.state)
    if count and not 1 <= classes <= 255:
        raise WeightsError(f"its head has {classes} classes; expected 1..255")
    head = [key for key in weights.state if IN_HEAD.match(key)]
    reason = ""
    if count and weights.scheme != SNAPSHOT:
        if any(fnmatch.fnmatchcase(filename, pattern) for pattern in _UNTRAINED_HEADS):
            reason = "the head of these pretrained weights was never trained"
        elif not any(weights.state[key].any() for key in head):
            reason = "its head is all zeros (never trained)"
        elif count not in (4, 2) and (asked is None or len(asked) != count):
            reason = f"its head has {count} convolutions and does not say their rates"
        elif count == 4 and asked is None and weights.scheme.startswith("DeepLab-ResNet"):
            weights.notes.append(
                "its head has four branches; AdaptSegNet and other code from before October 2017 save all four but sum only "
                "the first two: weights trained by such code need --atrous-rates 6,12"
            )
    if reason:
        weights.skipped.update((key, reason) for key in head)
        weights.notes.append(f"{reason}, so it is left out")
        for key in head:
            del weights.state[key]
    if reason or not count:
        for name in OF_HEAD:
            weights.config.pop(name, None)
        return 0
    usual = ATROUS_RATES[:count] if count in (4, 2) else asked or ()
    rates = weights.config["atrous_rates"] = list(weights.config.get("atrous_rates", usual))
    if len(rates) != count:
        raise WeightsError(f"its meta says rates {rates}, but its head has {count} convolutions")
    return classes


def _keep_branches(weights: Weights, rates: list[int]) -> None:
    """Keep only the first branches of a DeepLab-v2's head, those with ``rates``."""
    found = weights.config.get("atrous_rates")
    if found is None:
        raise WeightsError("--atrous-rates are those of a DeepLab-v2's head, and it has none; leave the option out")
    found = list(found)
    if not rates or found[: len(rates)] != rates:
        raise WeightsError(
            f"the rates of its head are {found}, and {rates} are not the first of them; give those, or leave --atrous-rates out"
        )
    rest = [key for key in weights.state if (match := HEAD_KEY.match(key)) and int(match[1]) >= len(rates)]
    for key in rest:
        weights.skipped[key] = f"a branch of the head at another rate than {rates}"
        del weights.state[key]
    weights.config["atrous_rates"] = rates


def _refuse_bad_numbers(weights: Weights) -> None:
    """Raise :class:`WeightsError` for values that are not finite, found by one sum per tensor, and for variances below zero."""
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
