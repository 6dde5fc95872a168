"""From the arrays of a file to :class:`Weights`: recognise the source by names and shapes, and rename to canonical names."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeplab.nets import NETS, make_net
from deeplab.weights.caffemodel import CAFFE_EPS, COCO_HEAD
from deeplab.weights.names import (
    FROM_KAZUTO,
    FROM_SEMSEG,
    HEAD_KEY,
    IN_CAFFE_BACKBONE,
    TOOLBOX,
    canonical_from_caffe,
    canonical_from_tensorflow,
    find_net,
    find_stem,
    is_layer,
    other_head,
    refuse_extras,
    renamed,
    strip_wrappers,
)
from deeplab.weights.neighbours import backbone_of_another_net, refuse_by_name, refuse_other_nets, settle_semseg
from deeplab.weights.stem import IMAGE_VARIANCE_LIMIT, image_variance, turn_stem
from deeplab.weights.weights import CONFIG, NO_PLACE, OTHER_HEAD, SNAPSHOT, Weights, WeightsError, check_version, some

ABN_EPS = 1e-5  # of the toolbox's InPlace-ABN, added to the variance and to the weight
TENSORFLOW_EPS = 1e-3  # TF-Slim's default, which DrSleep's nets do not override
CONVERTED_TO_TENSORFLOW = ("deeplab_resnet.ckpt", "deeplab_resnet.npy", "deeplab_resnet.npz", "deeplab_resnet_init.npz")
"""Files with Caffe's arrays under TensorFlow's names, no matter which program saved them last."""

OURS = {"backbone", "stride_in_3x3"}
"""A file with either of these in its meta is one of ours."""

_DEEPLAB_PREFIX = re.compile(r"(^|\.)Scale[123]?\.")  # of isht7's multi-scale module, which only wraps DeepLab nets
TRUNK_KINDS = {  # --trunk -> whether it is over RGB, whether the stride of the stages is in the 3x3 convolutions
    "torchvision": (True, True),
    "caffe": (False, False),
    "rgb-1x1": (True, False),
    "bgr-3x3": (False, True),
}
_TITLES = {
    "deeplabv3": "DeepLabv3",
    "pspnet": "PSPNet",
    "torchvision": "torchvision ResNet",
    "caffe": "Caffe-like ResNet under torchvision's names",
}
_FOREIGN: dict[str, tuple[str, Mapping[str, str], bool, Callable[..., None] | None]] = {
    r"layer[2-5]\.block1\.(reduce|conv3x3|increase)\.": ("kazuto1011 DeepLab-v2", FROM_KAZUTO, False, None),
    r"layer0\.6\.weight$": ("hszhao/semseg PSPNet", FROM_SEMSEG, True, settle_semseg),
}
"""A pattern for a key of another naming scheme -> the name of the net, the canonical names of its modules, whether its stride
is in the 3x3 convolutions, and a function that converts the rest."""
_CLASSIFIER = ("fc.weight", "fc.bias")
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def from_snapshot(state: Mapping[Any, Any], meta: Mapping[str, Any]) -> Weights | None:
    """One of our own files that holds exactly the tensors of the net in its meta, so there is nothing to recognise.

    Returns:
        None for other files, such as one of a wrapped net; :func:`from_torch` reads those.
    """
    if not meta.keys() & OURS:
        return None
    config = _read_config(meta)
    try:
        with torch.device("meta"):
            net = make_net(config, "full")
    except (KeyError, TypeError, ValueError):  # there is no such net
        return None
    expected = net.state_dict()
    needed = {key for key in expected if not key.endswith(".num_batches_tracked")}  # a frozen net counts no batches
    if not needed <= state.keys() <= expected.keys() or not all(map(torch.is_tensor, state.values())):
        return None
    for key, tensor in state.items():
        _refuse_odd(key, tensor)
        if tensor.shape != expected[key].shape:
            return None
    tensors = {key: tensor.detach().float() if key in needed else tensor for key, tensor in state.items()}
    return Weights(tensors, SNAPSHOT, dict(net.config), dict(meta), seen_voc_val=str(meta.get("seen_voc_val") or ""))


def _read_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a snapshot's meta that describe its net, by the names in ``CONFIG``.

    Raises:
        WeightsError: the version is unknown, or no net can be built from the entries.
    """
    check_version(meta)
    config: dict[str, Any] = {"stride_in_3x3": False, "batch_norm_eps": CAFFE_EPS}
    config |= {name: meta[name] for name in CONFIG if meta.get(name) is not None}
    wrong = [name for name, value in config.items() if not isinstance(value, CONFIG[name])]
    if not wrong and not all(isinstance(rate, int) and rate > 0 for rate in config.get("atrous_rates", ())):
        wrong = ["atrous_rates"]
    if not wrong and not 0 < config["batch_norm_eps"] < math.inf:
        wrong = ["batch_norm_eps"]
    if not wrong and not 0 <= config.get("negative_slope", 0) < 1:
        wrong = ["negative_slope"]
    if not wrong and not 0 < config.get("auxiliary_channels", 1) <= 1 << 16:
        wrong = ["auxiliary_channels"]
    if not wrong and config.get("net", "deeplabv2") not in NETS:
        raise WeightsError(
            f"its meta says net {config['net']!r:.40}, which is none of {', '.join(NETS)}; add it to deeplab/nets.py"
        )
    if wrong:
        raise WeightsError(f"its meta says {wrong[0]} {config[wrong[0]]!r:.40}, which no net has; save the file again")
    return config


def from_torch(content: Mapping[Any, Any], meta: Mapping[str, Any], trunk: str) -> Weights:
    """Any state_dict, recognised by its keys. ``meta`` is that of a snapshot that :func:`from_snapshot` does not recognise."""
    skipped = {str(key): f"no tensor ({type(value).__name__})" for key, value in content.items() if not torch.is_tensor(value)}
    tensors = [key for key in content if str(key) not in skipped]
    skipped |= {str(key): NO_PLACE for key in tensors if not is_name(key)}  # such as AveragedModel's n_averaged
    names = [key for key in tensors if is_name(key)]
    bare = strip_wrappers(names, loose={key for key in names if not is_layer(key, content[key])})
    for key in bare:
        _refuse_odd(key, content[key])
    if len(names) != len(set(bare.values())):
        twice = next(name for name in bare.values() if list(bare.values()).count(name) > 1)
        raise WeightsError(f"it holds {twice} twice, under different prefixes of wrappers; save a single net")
    state = _one_weight_set({name: content[key].detach() for key, name in bare.items()}, skipped)
    state, notes = _main_head(state, skipped)
    refuse_by_name(state)
    foreign = next((scheme for mark, scheme in _FOREIGN.items() if any(re.match(mark, key) for key in state)), None)
    if foreign:
        weights = _from_names(state, *foreign)
    elif backbone_only := backbone_of_another_net(state):
        weights = backbone_only
    else:
        refuse_other_nets(state)
        head = other_head({key: value for key, value in state.items() if key not in _CLASSIFIER})
        for key in head:
            skipped[key] = OTHER_HEAD
            del state[key]
        if head:
            notes.append(
                f"the head of another net ({some(head)}) is left out: only the backbone is used, the head is untrained"
            )
        if meta.keys() & OURS:
            seen = str(meta.get("seen_voc_val") or "")
            weights = Weights(state, SNAPSHOT, _read_config(meta), dict(meta), seen_voc_val=seen)
        elif (net := find_net(state)) in TOOLBOX:  # the names of pytorch-segmentation-toolbox (CS_scenes_<step>.pth)
            weights = Weights(state, _TITLES[net], {"stride_in_3x3": True, "batch_norm_eps": ABN_EPS})
        elif any(map(HEAD_KEY.match, state)) or any(map(_DEEPLAB_PREFIX.search, bare)):
            prefix = next((key.removesuffix(name) for key, name in bare.items() if name == "conv1.weight"), "")
            scheme = f"DeepLab-ResNet with the prefix {prefix}" if prefix else "DeepLab-ResNet"
            weights = Weights(state, scheme, {"stride_in_3x3": False, "batch_norm_eps": CAFFE_EPS})
            if (variance := image_variance(state)) < IMAGE_VARIANCE_LIMIT:
                notes.append(
                    f"warning: its first layer was trained on images of variance {variance:.3g}, as normalised RGB has, but "
                    "its input here is BGR of 0..255: if it was trained on other input, its predictions are worthless"
                )
        else:
            weights = _from_bare_backbone(state, trunk, head)
    weights.skipped = skipped | weights.skipped
    weights.notes += notes
    return weights


def is_name(key: Any) -> bool:
    """Whether a key of a dictionary can be the name of a parameter."""
    return isinstance(key, str) and "." in key


def _refuse_odd(key: str, tensor: Tensor) -> None:
    """Raise :class:`WeightsError` for a tensor that is not a plain array, or for weights that are integers."""
    kinds = {"nested": tensor.is_nested, "quantised": tensor.is_quantized, "meta": tensor.is_meta}
    kinds |= {"sparse": tensor.layout != torch.strided, "complex": tensor.is_complex()}
    if kind := next((name for name, true in kinds.items() if true), ""):
        raise WeightsError(f"its {key} is a {kind} tensor; expected a plain one, with all its numbers: save it as such")
    try:
        tensor.new_empty(1).float()
    except RuntimeError:  # packed types, such as two 4-bit numbers in one byte
        raise WeightsError(f"its {key} is of type {tensor.dtype}; expected floating point of 8 bits or more") from None
    if key.endswith(_PARAMETERS) and not tensor.is_floating_point():
        raise WeightsError(f"its {key} is of type {tensor.dtype}; expected floating point")


def _one_weight_set(state: dict[str, Tensor], skipped: dict[str, str]) -> dict[str, Tensor]:
    """Take the net out of a file with ``Scale1.``, ``Scale2.`` and ``Scale3.``; any other state is returned unchanged."""
    if not state or not all(re.match(r"Scale[123]\.", key) for key in state):
        return state
    first, *others = [{key[7:]: value for key, value in state.items() if key.startswith(f"Scale{n}.")} for n in (1, 2, 3)]
    for n, other in enumerate(others, 2):
        both = first.keys() & other.keys()
        unequal = [key for key in both if first[key].dtype != other[key].dtype or not torch.equal(first[key], other[key])]
        if unequal := sorted([*unequal, *first.keys() ^ other.keys()]):
            raise WeightsError(
                f"it holds three sets of weights, one per scale, and they differ ({len(unequal)} tensors, such as "
                f"{unequal[0]}); DeepLab-v2 shares one set between the scales, so use a file made after June 2017"
            )
        skipped.update((f"Scale{n}.{key}", "equal to those of Scale1") for key in other)
    return first


def _main_head(state: dict[str, Tensor], skipped: dict[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename ``layer6``, the head of a two-level DeepLab-v2, to ``layer5``, and leave out its auxiliary head.

    Source: ``deeplab_multi.py`` of AdaptSegNet and ``deeplabv2.py`` of ADVENT, whose ``layer5`` is a head on layer3's features.
    """
    main = {key: f"layer5{key[6:]}" for key in state if key.startswith("layer6.") and HEAD_KEY.match(f"layer5{key[6:]}")}
    if not main:
        return state, []
    auxiliary = [key for key in state if HEAD_KEY.match(key)]
    channels = [[state[key].shape[1] for key in head if state[key].ndim == 4] for head in (main, auxiliary)]
    of_main, of_auxiliary = (max(found, default=0) for found in channels)
    if 0 < of_main == of_auxiliary:
        raise WeightsError(
            "it has two heads, layer5 and layer6, over the same features, and its program (CLAN) adds their logits; DeepLab-v2 "
            "has one head, so add their weights and biases, save the sums as layer5, and leave layer6 out"
        )
    if of_auxiliary > of_main:  # the names are swapped
        skipped.update((key, "an auxiliary head on the features of an earlier layer") for key in main)
        note = "two-level DeepLab-v2: layer5 is its head, since it has more input channels; the auxiliary layer6 is left out"
        return {key: value for key, value in state.items() if key not in main}, [note]
    skipped.update((key, "the auxiliary head on the features of layer3") for key in auxiliary)
    kind = "two-level DeepLab-v2: layer6 is its head; the auxiliary layer5 is left out"
    note = f"a {kind if auxiliary else 'DeepLab-v2 whose head is called layer6'}"
    return {main.get(key, key): value for key, value in state.items() if not HEAD_KEY.match(key)}, [note]


def _from_names(
    state: Mapping[str, Tensor], title: str, names: Mapping[str, str], at_3x3: bool, settle: Callable[..., None] | None
) -> Weights:
    """A net of another naming scheme: ``names`` maps its modules to canonical ones, ``settle`` converts the rest."""
    if names is FROM_KAZUTO and (v3 := [key for key in state if re.match(r"(aspp\.stages|fc1|fc2|reduce|decoder)\.", key)]):
        plus = "+" if any(re.match(r"(reduce|decoder|fc2\.conv\d)\.", key) for key in v3) else ""
        raise WeightsError(
            f"it is kazuto1011's DeepLabv3{plus} ({v3[0]} ...); its head and the dilations in the last stage differ from "
            "DeepLab-v2; use one of its DeepLab-v2 files"
        )
    weights = Weights({}, title, {"stride_in_3x3": at_3x3, "batch_norm_eps": CAFFE_EPS})
    for key, tensor in state.items():
        if name := renamed(key, names):
            weights.state[name] = tensor
        elif key.startswith("fc.") and tensor.shape[:1] == (91,):
            weights.skipped[key] = "the head of another net"
            weights.notes = [COCO_HEAD]
        else:
            weights.skipped[key] = NO_PLACE
    refuse_extras(key for key in weights.skipped if re.match(r"layer\d\.", key))
    if settle:
        settle(weights, state)
    return weights


def settle_abn(weights: Weights, abn: str | None) -> None:
    """Convert the weights of InPlace-ABN, which nets of other projects with a deep stem may have, to plain batch norm.

    InPlace-ABN multiplies by |weight| + eps (pytorch-segmentation-toolbox, ``libs/src/bn.cu``) and has no batch counters.
    Frozen batch norms have none either, nor had any before PyTorch 0.4.1, as in MIT's classifiers: those weights do not change.

    Raises:
        WeightsError: ``abn`` is None, the file does not say which kind it has, and the two differ.
    """
    state = weights.state
    norms = [key.replace(".running_var", ".weight") for key in state if key.endswith(".running_var")]
    norms = [key for key in norms if key in state]
    counted = any(key.endswith(".num_batches_tracked") for key in state)
    if abn is None and not counted and "fc.weight" not in weights.skipped:
        if negative := [key for key in norms if bool((state[key] < 0).any())]:
            raise WeightsError(
                f"{len(negative)} of its batch norms have weights below zero ({negative[0]} ...); InPlace-ABN, as in "
                "pytorch-segmentation-toolbox, uses their absolute value, a frozen batch norm keeps the sign, and the file "
                "does not say which it had: give --abn abs or --abn signed"
            )
        abn = "abs"
    if abn == "abs":
        weights.scheme += " of pytorch-segmentation-toolbox" if find_net(state) in TOOLBOX else ""
        state.update({key: state[key].abs() + ABN_EPS for key in norms})
        weights.notes.append("InPlace-ABN: the weights of its batch norms are |weight| + 1e-05")


def _from_bare_backbone(state: dict[str, Tensor], trunk: str, head: list[str]) -> Weights:
    """A ResNet under torchvision's names, without its ``head``, for torchvision's input or for Caffe's.

    With the head of a segmentation net, the kind of input does not determine the stride: ProDA's net has RGB input and the
    stride in the first 1x1.
    """
    weights = Weights(state, "", {"batch_norm_eps": CAFFE_EPS}, bare=True)
    if "fc.weight" in state:
        classes = next(iter(state["fc.weight"].shape), 0)
        weights.notes.append(
            f"a plain image classifier ({classes} classes), not a segmentation net: only its backbone is used, the head is "
            "untrained"
        )
        for key in _CLASSIFIER:
            if key in state:
                weights.skipped[key] = "the image classifier"
                del state[key]
    elif not head:
        weights.notes.append("a backbone without a head")
    variance, deep = image_variance(state), find_stem(state) == "deep"
    kind, why = trunk, "as asked"
    if trunk == "auto":
        kind, other = ("caffe", "torchvision") if variance > IMAGE_VARIANCE_LIMIT else ("torchvision", "caffe")
        why = f"by its first layer, trained on images of variance {variance:.3g}; --trunk {other} chooses the other kind"
        if head and not deep and "layer1.0.conv3.weight" in state:
            one, three = ("caffe", "bgr-3x3") if kind == "caffe" else ("rgb-1x1", "torchvision")
            raise WeightsError(
                f"it is a ResNet under another net's head ({some(head[:2])} ...); only its backbone can be used, to start "
                "training, and the file does not say which convolutions of a stage have the stride: give train.py or "
                f"convert_weights.py --trunk {one} if the first 1x1, --trunk {three} if the 3x3"
            )
    rgb, at_3x3 = TRUNK_KINDS[kind]
    at_3x3 = at_3x3 or (deep and kind == "caffe")  # every published net with a deep stem has it there
    weights.config["stride_in_3x3"] = at_3x3
    title = f"ResNet {'with a deep stem, ' * deep}over {'RGB' if rgb else 'BGR 0..255'}"
    weights.scheme = title if deep or head else _TITLES.get(kind, title)
    weights.notes.append(
        f"read as a net over {'normalised RGB' if rgb else 'mean-subtracted BGR of 0..255'} with the stride of its stages in "
        f"the {'3x3' if at_3x3 else 'first 1x1'} convolutions: {why}"
    )
    if rgb:
        turn_stem(weights)
    return weights


def from_tensorflow(arrays: Mapping[str, np.ndarray], converted: bool) -> Weights:
    """caffe-tensorflow's names: those of Caffe's layers, with Scale merged into batch norm; kernels (height, width, in, out).

    Args:
        converted: the arrays were trained by Caffe, with its epsilon; else by TensorFlow, with its own.
    """
    eps = CAFFE_EPS if converted else TENSORFLOW_EPS
    source = "Caffe's own arrays, converted" if converted else "variables that TensorFlow trained"
    weights = Weights({}, "caffe-tensorflow DeepLab-v2", {"stride_in_3x3": False, "batch_norm_eps": eps})
    weights.notes.append(f"read as {source}: the batch norms keep the epsilon of that training, {eps:g}")
    for key, array in arrays.items():
        name = canonical_from_tensorflow(key)
        if name is None or array.dtype.kind != "f":
            weights.skipped[key] = NO_PLACE
            continue
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        weights.state[name] = torch.from_numpy(np.array(array, np.float32, order="C"))
    layers = {key: key.removesuffix(":0").rpartition("/")[0] for key in weights.skipped}
    refuse_extras(key for key, name in layers.items() if IN_CAFFE_BACKBONE.match(name) and not canonical_from_caffe(name))
    return weights
