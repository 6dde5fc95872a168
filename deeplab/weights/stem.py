"""The first layer between the two kinds of pictures: torchvision's RGB of 0..1 and our mean-subtracted BGR of 0..255."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deeplab.weights.weights import Weights

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)  # what our nets subtract; the same numbers as dataset.MEAN_BGR
TORCHVISION_MEAN = (0.485, 0.456, 0.406)  # RGB, 0..1: torchvision/transforms/_presets.py
TORCHVISION_STD = (0.229, 0.224, 0.225)
STEM = ("conv1.weight", "bn1.running_mean")  # what differs between RGB and BGR input

PICTURE_VARIANCE_LIMIT = 300.0
"""Between the kinds of :func:`picture_variance`: nets over normalised RGB made here gave 0.3 to 100, the same over BGR 0..255
900 to 300,000."""
_USUAL_GAIN = 0.25  # the size of bn1.weight in trained ResNets, for files whose statistics are folded into it


def picture_variance(state: Mapping[str, Tensor]) -> float:
    """How much a trunk's training pictures varied, told by its first layer: the median over the channels of ``bn1.running_var``
    / |``conv1`` kernel|^2.

    The running variance is that of the kernel's answers, so the quotient is the variance of the pictures along the kernel,
    whatever the kernel's length: about 1 to 10 for normalised pictures, thousands for 0..255. Channels that died (no kernel
    to speak of) do not count. Files that fold the statistics into weight and bias (a variance of 1 everywhere, as Detectron's
    have) are judged as if each answer had the usual gain. NaN where the first layer is not whole.
    """
    shape = state["conv1.weight"].shape if "conv1.weight" in state else (0,)
    whole = 1 <= shape[0] <= 64 and shape[1:] in ((3, 7, 7), (3, 3, 3))
    norm = (state.get(f"bn1.{leaf}") for leaf in ("weight", "running_mean", "running_var"))
    if not whole or any(values is None or values.shape != shape[:1] for values in norm):
        return math.nan
    energy = state["conv1.weight"].double().pow(2).sum((1, 2, 3))
    variance = state["bn1.running_var"].double()
    if bool(((variance - 1).abs() < 1e-3).all()) and not state["bn1.running_mean"].any():
        variance = (_USUAL_GAIN / state["bn1.weight"].double()).pow(2)
    alive = energy > 1e-6 * energy.max()
    return float((variance[alive] / energy[alive]).median()) if alive.any() else math.nan


def turn_stem(weights: Weights) -> None:
    """:func:`to_bgr_input` of weights for normalised RGB, with a note; a first layer that is not whole is refused later."""
    state = weights.state
    if not math.isnan(picture_variance(state)) and all(state[key].float().isfinite().all() for key in STEM):
        weights.notes.append(
            "its first layer is turned from RGB 0..1 to mean-subtracted BGR 0..255 input; the colour of the padding around the "
            "image is the one thing that differs"
        )
        state.update(zip(STEM, to_bgr_input(*(state[key] for key in STEM))))


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
