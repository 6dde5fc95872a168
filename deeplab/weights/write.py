"""From the canonical names to the files of other programs.

Every conversion that this module allows can be undone exactly, except that of the first layer to RGB input: its values are
rounded to float32 in both directions.
"""

from typing import Any

from deeplab.deeplabv2 import ATROUS_RATES
from deeplab.resnet import BACKBONES, Bottleneck
from deeplab.weights.names import HEAD_KEY, IN_HEAD, TOOLBOX, is_counter, kazuto_from_canonical, net_shapes
from deeplab.weights.recognise import ABN_EPS
from deeplab.weights.stem import STEM, to_rgb_input
from deeplab.weights.weights import Weights, WeightsError

EXPORTS = ("snapshot", "published", "kazuto", "torchvision-trunk", "safetensors")
"""The schemes that :func:`export` writes."""


def export(weights: Weights, scheme: str) -> dict[str, Any]:
    """Convert the weights to the format of another program.

    Args:
        scheme: ``"snapshot"`` (ours: ``{"model", "meta"}``), ``"safetensors"`` (the tensors of a snapshot), ``"published"``
            (a bare DeepLab-ResNet state_dict, or the toolbox's of a DeepLabv3 or PSPNet), ``"kazuto"`` (kazuto1011's names)
            or ``"torchvision-trunk"`` (RGB input, no head; to load it, remove ``fc`` or pass ``strict=False``).

    Returns:
        The argument of ``torch.save`` (or, for ``"safetensors"``, of ``safetensors.torch.save_file``).

    Raises:
        WeightsError: the weights are incomplete, or the other program's net is built differently.
    """
    if scheme not in EXPORTS:
        raise ValueError(f"scheme {scheme!r} is unknown; choose one of {', '.join(EXPORTS)}")
    config, state = weights.config, weights.state
    options = {name: config[name] for name in ("stem", "net", "num_classes", "auxiliary_channels") if name in config}
    shapes = net_shapes(config["backbone"], **options)
    wrong = [key for key, shape in shapes.items() if key not in state or tuple(state[key].shape) != shape]
    if wrong:
        raise WeightsError(f"{weights.path}: {len(wrong)} tensors of the net are missing or misshapen, such as {wrong[0]}")
    features = 512 * BACKBONES[config["backbone"]].block.expansion
    heads = [(key, value.shape[1]) for key, value in state.items() if HEAD_KEY.match(key) and value.ndim == 4]
    if other := [(key, channels) for key, channels in heads if channels != features]:
        key, channels = other[0]
        raise WeightsError(
            f"{weights.path}: {key} takes {channels} channels, the backbone gives {features}; another net's head"
        )
    state = {key: value for key, value in state.items() if key in shapes or HEAD_KEY.match(key) or is_counter(key, shapes)}
    if scheme == "safetensors":
        return state
    if scheme == "snapshot":
        meta = {"scheme": weights.scheme} | weights.meta | config | {"seen_voc_val": weights.seen_voc_val}
        return {"model": state, "meta": meta}
    reasons = _reasons_against(weights, scheme)
    if reasons:
        raise WeightsError(f"{weights.path}: it cannot be converted to {scheme}: {'; '.join(reasons)}")
    if scheme == "published":
        return _with_abn_weights(state) if config.get("net") in TOOLBOX else state
    if scheme == "kazuto":
        return {kazuto_from_canonical(key): value for key, value in state.items()}
    backbone = {key: value for key, value in state.items() if not IN_HEAD.match(key)}
    return backbone | dict(zip(STEM, to_rgb_input(*(backbone[key] for key in STEM))))


def _norm_weights(state: dict[str, Any]) -> list[str]:
    return [key.replace(".running_var", ".weight") for key in state if key.endswith(".running_var")]


def _with_abn_weights(state: dict[str, Any]) -> dict[str, Any]:
    """A DeepLabv3's or PSPNet's tensors for InPlace-ABN, which multiplies by |weight| + eps and counts no batches."""
    state = {key: value for key, value in state.items() if not key.endswith(".num_batches_tracked")}
    return state | {key: state[key] - ABN_EPS for key in _norm_weights(state)}


def _reasons_against(weights: Weights, scheme: str) -> list[str]:
    config = weights.config
    backbone, at_3x3 = BACKBONES[config["backbone"]], bool(config.get("stride_in_3x3"))
    bottleneck, other_blocks = issubclass(backbone.block, Bottleneck), (backbone.groups, backbone.width) != (1, 64)
    rates, deep = config.get("atrous_rates"), config.get("stem") == "deep"
    to_trunk = scheme == "torchvision-trunk"
    if config.get("net", "deeplabv2") != "deeplabv2" and not to_trunk:
        if scheme != "published" or config["net"] not in TOOLBOX:
            return [f"the scheme is for DeepLab-v2, not for {config['net']}"]
        low = [key for key in _norm_weights(weights.state) if bool((weights.state[key] < ABN_EPS).any())]
        toolbox = (
            (not deep or not at_3x3, "the toolbox's nets have a deep stem and their stride in the 3x3 convolutions"),
            (config.get("negative_slope", 0.01) != 0.01, "the toolbox's heads have a leaky ReLU of slope 0.01"),
            (config.get("auxiliary_channels", 512) != 512, "the toolbox's auxiliary head has 512 channels"),
            (other_blocks, f"the toolbox's nets are plain ResNets, {config['backbone']} is not"),
            (bool(low), f"its {low[0] if low else ''} holds weights below 1e-05, which InPlace-ABN cannot represent"),
        )
        return [reason for failed, reason in toolbox if failed]
    eps, published, places = config["batch_norm_eps"], list(ATROUS_RATES), ("first 1x1", "3x3")
    checks = (
        (deep, "its stem is three 3x3 convolutions, not one 7x7"),
        (abs(eps - 1e-5) > 1e-9, f"its batch-norm epsilon is {eps:g}, not 1e-05"),
        (
            bottleneck and at_3x3 != to_trunk,
            f"its stride sits in the {places[at_3x3]} convolutions, not in the {places[not at_3x3]}",
        ),
        (not to_trunk and not bottleneck, f"the scheme is for bottleneck blocks, which {config['backbone']} does not have"),
        (not to_trunk and bottleneck and other_blocks, f"the scheme is for plain ResNets, which {config['backbone']} is not"),
        (not to_trunk and rates is None, "it has no head, which the scheme requires"),
        (not to_trunk and rates not in (None, published), f"its head has the rates {rates}, not {published}"),
    )
    return [reason for failed, reason in checks if failed]
