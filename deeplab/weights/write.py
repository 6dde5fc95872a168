"""From the canonical names to the files of other programs; the way back is exact wherever this module allows the way."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deeplab.deeplabv2 import ATROUS_RATES
from deeplab.weights.names import (
    HEAD_KEY,
    STEM,
    WeightsError,
    is_counter,
    kazuto_from_canonical,
    to_bgr_input,
    to_rgb_input,
    trunk_shapes,
)
from deeplab.resnet import BACKBONES, Bottleneck

if TYPE_CHECKING:
    from deeplab.weights.load import Weights

EXPORTS = ("snapshot", "published", "kazuto", "torchvision-trunk", "safetensors")
"""The schemes that :func:`export` writes."""


def export(weights: "Weights", scheme: str) -> dict[str, Any]:
    """The weights as another program wants them; nothing is lost on a way that is allowed.

    Args:
        scheme: ``"snapshot"`` (ours: ``{"model", "meta"}``), ``"safetensors"`` (the tensors of a snapshot), ``"published"``
            (a bare DeepLab-ResNet state_dict), ``"kazuto"`` (kazuto1011's names) or ``"torchvision-trunk"`` (RGB input, no
            head; its ``fc`` must be removed or ``strict=False`` given).

    Returns:
        What to give to ``torch.save`` (or, for ``"safetensors"``, to ``safetensors.torch.save_file``).

    Raises:
        WeightsError: the weights are incomplete, or the other net is built in a way that these weights do not fit.
    """
    config, state = weights.config, weights.state
    shapes = trunk_shapes(config["backbone"])
    wrong = [key for key, shape in shapes.items() if key not in state or tuple(state[key].shape) != shape]
    if wrong:
        raise WeightsError(f"{weights.path}: {len(wrong)} tensors of the trunk are missing or misshapen, such as {wrong[0]}")
    state = {key: value for key, value in state.items() if key in shapes or HEAD_KEY.match(key) or is_counter(key, shapes)}
    if scheme in ("snapshot", "safetensors"):
        if scheme == "safetensors":
            return state | {f"origin.{key}": value for key, value in weights.origin.items()}
        meta = {"scheme": weights.scheme} | weights.meta | config | {"seen_voc_val": weights.seen_voc_val}
        return {"model": state, "meta": meta} | ({"origin": weights.origin} if weights.origin else {})
    reasons = _reasons_against(weights, scheme)
    if reasons:
        raise WeightsError(f"{weights.path}: there is no way to {scheme}: {'; '.join(reasons)}")
    if scheme == "published":
        return state
    if scheme == "kazuto":
        return {kazuto_from_canonical(key): value for key, value in state.items()}
    return _to_torchvision(state, weights.origin)


def _reasons_against(weights: "Weights", scheme: str) -> list[str]:
    if scheme not in EXPORTS:
        raise ValueError(f"scheme {scheme!r} is unknown; choose one of {', '.join(EXPORTS)}")
    config = weights.config
    bottleneck = BACKBONES[config["backbone"]][0] is Bottleneck
    at_3x3 = bool(config.get("stride_in_3x3"))
    to_trunk = scheme == "torchvision-trunk"
    rates = config.get("atrous_rates")
    checks = (
        (
            abs(config["batch_norm_eps"] - 1e-5) > 1e-9,
            f"its batch-norm epsilon is {config['batch_norm_eps']:g}, there it is 1e-05",
        ),
        (to_trunk and bottleneck and not at_3x3, "its stride sits in the first 1x1 convolutions, there in the 3x3"),
        (not to_trunk and not bottleneck, f"that net is built of bottleneck blocks, {config['backbone']} is not"),
        (not to_trunk and bottleneck and at_3x3, "its stride sits in the 3x3 convolutions, there in the first 1x1"),
        (not to_trunk and rates is None, "it has no head, and that net is not loaded without one"),
        (
            not to_trunk and rates not in (None, list(ATROUS_RATES)),
            f"its head has the rates {rates}, there {list(ATROUS_RATES)}",
        ),
    )
    return [reason for failed, reason in checks if failed]


def _to_torchvision(state: dict[str, Tensor], origin: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """The trunk for RGB input. Rounding loses bits on the way, so the numbers it came from are used while they hold, and the
    exact BGR stem travels in the state_dict's ``_metadata``, which torchvision ignores, while it cannot be found again."""
    trunk = OrderedDict((key, value) for key, value in state.items() if not HEAD_KEY.match(key))
    ours = tuple(state[key] for key in STEM)
    theirs = tuple(origin[key] for key in STEM) if origin else ()
    if not theirs or not all(map(torch.equal, to_bgr_input(*theirs), ours)):
        theirs = to_rgb_input(*ours)
    trunk.update(zip(STEM, theirs))
    if not all(map(torch.equal, to_bgr_input(*theirs), ours)):
        trunk._metadata = OrderedDict(deeplab=dict(zip(STEM, ours)))
    return trunk
