"""Convert the first layer between two kinds of input: torchvision's RGB of 0..1 and our mean-subtracted BGR of 0..255."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deeplab.weights.weights import Weights

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)  # subtracted from our input; the same numbers as dataset.MEAN_BGR
TORCHVISION_MEAN = (0.485, 0.456, 0.406)  # RGB, 0..1: torchvision/transforms/_presets.py
TORCHVISION_STD = (0.229, 0.224, 0.225)
STEM = ("conv1.weight", "bn1.running_mean")  # the tensors that differ between RGB and BGR input

IMAGE_VARIANCE_LIMIT = 300.0
"""The threshold of :func:`image_variance`: in experiments, nets over normalised RGB gave 0.3 to 100, and the same nets over BGR
0..255 gave 900 to 300,000."""
_USUAL_GAIN = 0.25  # the typical bn1.weight of trained ResNets, for files that fold the statistics into it


def image_variance(state: Mapping[str, Tensor]) -> float:
    """Estimate the variance of a backbone's training images from its first layer: the median over the channels of
    ``bn1.running_var`` / |``conv1`` kernel|^2.

    The running variance is that of the kernel's outputs, so the quotient is the variance of the images along the kernel,
    independent of the kernel's norm: about 1 to 10 for normalised images, thousands for 0..255. Dead channels (a kernel near
    0) do not count. For files that fold the statistics into weight and bias (a variance of 1 everywhere, as in Detectron's),
    each output is assumed to have the usual gain. NaN if the first layer is incomplete.
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
    """Apply :func:`to_bgr_input` to weights for normalised RGB, with a note; an incomplete first layer is refused later."""
    state = weights.state
    if not math.isnan(image_variance(state)) and all(state[key].float().isfinite().all() for key in STEM):
        weights.notes.append(
            "its first layer is converted from RGB 0..1 to mean-subtracted BGR 0..255 input; only the colour of the padding "
            "around the image differs"
        )
        state.update(zip(STEM, to_bgr_input(*(state[key] for key in STEM))))


def to_bgr_input(weight: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a torchvision stem to mean-subtracted BGR images of 0..255.

    The input is x[r] = (p / 255 - mean[r]) / std[r] in torchvision and p - MEAN_BGR[b] here. So the kernel of channel b is that
    of r divided by 255 std[r], and the constant between 255 mean[r] and MEAN_BGR[b] moves into the running mean of ``bn1``.
    ``bn1(conv1(image))`` stays the same except at the border, where zero padding stands for another colour.

    Args:
        weight: (64, 3, 7, 7) ``conv1.weight`` over RGB.
        running_mean: (64,) of ``bn1``.

    Returns:
        Both as float32, computed in double precision and rounded once, so they are the same bits on every machine.
    """
    std = torch.tensor(TORCHVISION_STD, dtype=torch.float64)[:, None, None]
    turned = (weight.double() / (255 * std)).flip(1).float()
    return turned, (running_mean.double() - _mean_response(turned)).float()


def to_rgb_input(weight: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_bgr_input`, exact up to the rounding to float32."""
    std = torch.tensor(TORCHVISION_STD, dtype=torch.float64)[:, None, None]
    return (weight.double().flip(1) * (255 * std)).float(), (running_mean.double() + _mean_response(weight)).float()


def _mean_response(weight: Tensor) -> Tensor:
    """The output of each kernel over BGR for the constant image MEAN_BGR - 255 TORCHVISION_MEAN; (64,) float64."""
    constant = [ours - 255 * theirs for ours, theirs in zip(MEAN_BGR, reversed(TORCHVISION_MEAN))]
    products = weight.double() * torch.tensor(constant, dtype=torch.float64)[:, None, None]
    return torch.tensor([math.fsum(kernel.flatten().tolist()) for kernel in products], dtype=torch.float64)
