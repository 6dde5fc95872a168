"""The dense CRF, which sharpens a prediction along the edges of the image (Kraehenbuehl & Koltun, arXiv:1210.5644).

Two backends compute the same function: pydensecrf on the host, and torch operations on any device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deeplab.permutohedral import Lattice

MIN_PROBABILITY = 1e-5  # a probability of 0 would be an infinite energy, which no neighbour could outvote
TOLERANCE = 1e-3  # a probability may be this far outside 0..1


class CRFUnavailable(ImportError):
    """pydensecrf is not installed."""

    exit_status = 2


@dataclass(frozen=True)
class CRFParams:
    """The parameters of :func:`dense_crf`; the defaults are the published ones of DeepLab-v2 ResNet-101 on VOC.

    Attributes:
        iterations: mean-field iterations; 0 does not change the probabilities.
        gaussian_weight: weight of the smoothness kernel exp(-|p_i - p_j|^2 / 2 gaussian_sxy^2) between pixels at p_i and p_j.
        gaussian_sxy: its width in pixels.
        bilateral_weight: weight of the appearance kernel
            exp(-|p_i - p_j|^2 / 2 bilateral_sxy^2 - |I_i - I_j|^2 / 2 bilateral_srgb^2) with the colours I, 0..255.
        bilateral_sxy: its width in pixels.
        bilateral_srgb: its width in grey levels, the same for the three channels.

    Raises:
        ValueError: a value below 0, a width of 0, NaN.
    """

    iterations: int = 10
    gaussian_weight: float = 3.0
    gaussian_sxy: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_sxy: float = 67.0
    bilateral_srgb: float = 3.0

    def __post_init__(self) -> None:
        amounts = (self.iterations, self.gaussian_weight, self.bilateral_weight)
        widths = (self.gaussian_sxy, self.bilateral_sxy, self.bilateral_srgb)
        if not (all(value >= 0 for value in amounts) and all(value > 0 for value in widths)):
            raise ValueError(f"{self}: expected iterations and weights of at least 0, widths above 0")


PUBLISHED = CRFParams()
Backend = Literal["pydensecrf", "torch"]
ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)


def dense_crf(
    image: ArrayOrTensor,
    probabilities: ArrayOrTensor,
    params: CRFParams = PUBLISHED,
    prune: float = 0.0,
    backend: Backend = "pydensecrf",
) -> ArrayOrTensor:
    """Refine class probabilities with a fully connected CRF: mean-field inference with a Potts model.

    The unary energy is -log p, with p clamped to at least 1e-5. Each pair of pixels with different classes adds the two kernels
    of :class:`CRFParams`, normalised symmetrically (k_ij / sqrt(n_i n_j), n_i = sum_j k_ij). The sums over all pairs are
    approximated on a permutohedral lattice. As in the authors' program, and unlike the paper, they include the pixel itself.
    All channels of ``image`` have the same weight, so RGB and BGR give the same result up to that approximation.

    Args:
        image: (H, W, 3) or (N, H, W, 3) uint8, the raw image, 0..255, never the mean-subtracted input of the net.
        probabilities: (C, H, W) or (N, C, H, W) floating point, softmax over the classes: 0..1, summing to 1 at each pixel.
            A NumPy array if the image is one, else a tensor on the same device.
        params: the parameters, by default the published ones.
        prune: classes whose probability in an image never exceeds this are left out of that image and get probability 0. The
            time is proportional to the number of classes. 0 leaves nothing out.
        backend: ``"pydensecrf"`` computes on the host, one image at a time. ``"torch"`` computes all images at once on the
            device of the tensors. It equals pydensecrf to rounding (1e-4: pydensecrf's own results move as much when its inputs
            move by 1e-7) and is deterministic. An image of VOC's size, 500x375, with 21 classes needs 0.4 GB.

    Returns:
        float32 probabilities of the shape, kind and device of ``probabilities``. The inputs are not changed.

    Raises:
        ValueError: a wrong shape or dtype, sizes that differ, values outside 0..1 (logits, NaN), or widths too small for the
            lattice. The values of tensors on a GPU are not checked, since that would be a host sync.
        CRFUnavailable: pydensecrf is not installed.
    """
    if backend not in ("pydensecrf", "torch"):
        raise ValueError(f"the backend of the CRF is {backend!r}; expected 'pydensecrf' or 'torch'")
    images, classes = _tensor(image), _tensor(probabilities)
    _check(images, classes)
    single = classes.ndim == 3
    if single:
        images, classes = images[None], classes[None]
    kept = None
    if prune > 0:
        highest = classes.amax(dim=(2, 3))
        kept = (highest > prune) | one_hot(highest.argmax(dim=1), classes.shape[1]).bool()  # (N, C)
    if backend == "torch":
        refined = _mean_field(images, classes, params, kept)
    else:
        refined = _by_pydensecrf(images.cpu().numpy(), classes.cpu().numpy(), params, kept)
    refined = refined[0] if single else refined
    return refined.numpy() if isinstance(probabilities, np.ndarray) else refined.to(classes.device)


def _mean_field(images: Tensor, probabilities: Tensor, params: CRFParams, kept: Tensor | None) -> Tensor:
    """:func:`dense_crf` in torch, on checked inputs: (N, H, W, 3), (N, C, H, W) -> (N, C, H, W) float32."""
    count, classes, height, width = probabilities.shape
    energy = probabilities.float().clamp_min(MIN_PROBABILITY).log()  # minus the energy
    if kept is not None:
        energy = energy.masked_fill(~kept[:, :, None, None], -torch.inf)
        used = kept.any(dim=0).nonzero().flatten()  # drop the classes that no image keeps; a host sync
        energy = energy[:, used]
    energy = energy.permute(0, 2, 3, 1).reshape(count * height * width, -1).contiguous()
    # One row per pixel, one column per class. A class that is left out is -inf, which exp turns into 0.
    lattices = list(_lattices(images, params)) if params.iterations else []
    refined = _softmax(energy)
    for _ in range(params.iterations):
        message = energy.clone()
        for lattice in lattices:
            message += lattice(refined)
        refined = _softmax(message)
    refined = refined.view(count, height, width, -1).permute(0, 3, 1, 2)
    if kept is None:
        return refined.contiguous()
    return refined.new_zeros(count, classes, height, width).index_copy_(1, used, refined)


def _lattices(images: Tensor, params: CRFParams) -> Iterator[Lattice]:
    """The two kernels, normalised and weighted; a kernel of weight 0 is left out."""
    count, height, width, _ = images.shape
    position = torch.arange(max(height, width), dtype=torch.float32, device=images.device)
    x = position[:width].expand(count, height, width)
    y = position[:height, None].expand(count, height, width)
    colors = images.permute(3, 0, 1, 2).float()
    for weight, sxy, channels in (
        (params.gaussian_weight, params.gaussian_sxy, ()),
        (params.bilateral_weight, params.bilateral_sxy, tuple(colors)),
    ):
        if weight > 0:
            # Divide by a tensor: with a number CUDA multiplies by its reciprocal, and rounding decides which vertices exist.
            widths = [position.new_full((), value) for value in (sxy, params.bilateral_srgb)]
            features = [x / widths[0], y / widths[0], *(channel / widths[1] for channel in channels)]
            bounds = [(width - 1) / sxy, (height - 1) / sxy, *([255 / params.bilateral_srgb] * len(channels))]
            yield Lattice(torch.stack(features, dim=1).flatten(2), bounds).normalise(weight)


def _softmax(values: Tensor) -> Tensor:
    """The softmax of each row. On a CPU, torch's own takes ten times as long for rows shorter than 16."""
    if values.shape[1] >= 16 or values.device.type != "cpu":
        return values.softmax(dim=1)
    powers = (values - values.amax(dim=1, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=1, keepdim=True))


def _by_pydensecrf(images: np.ndarray, probabilities: np.ndarray, params: CRFParams, kept: Tensor | None) -> Tensor:
    """:func:`dense_crf` by pydensecrf, on checked inputs; the shapes are those of :func:`_mean_field`."""
    densecrf = find_densecrf()
    count, classes, height, width = probabilities.shape
    refined = torch.zeros(count, classes, height, width)
    for i, image in enumerate(images):
        # The kept probabilities of a pixel need not sum to 1: a common factor changes nothing in the mean field.
        used = slice(None) if kept is None else np.flatnonzero(kept[i].cpu().numpy())
        likely = probabilities[i, used].reshape(-1, height * width).astype(np.float32)
        likely = np.maximum(likely, MIN_PROBABILITY)
        crf = densecrf.DenseCRF2D(width, height, len(likely))
        crf.setUnaryEnergy(np.ascontiguousarray(-np.log(likely)))
        how = {"kernel": densecrf.DIAG_KERNEL, "normalization": densecrf.NORMALIZE_SYMMETRIC}
        crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_weight, **how)
        crf.addPairwiseBilateral(
            sxy=params.bilateral_sxy,
            srgb=params.bilateral_srgb,
            rgbim=np.ascontiguousarray(image),
            compat=params.bilateral_weight,
            **how,
        )
        result = np.array(crf.inference(params.iterations), dtype=np.float32)  # C x H*W
        refined[i, used] = torch.from_numpy(result).view(-1, height, width)
    return refined


def find_densecrf() -> ModuleType:
    """The module of pydensecrf, imported only when it is needed.

    Raises:
        CRFUnavailable: pydensecrf is not installed.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        advice = "pip install pydensecrf2, or choose the backend torch (--crf-backend torch)"
        raise CRFUnavailable(f"pydensecrf is not installed ({error}); {advice}") from None
    return densecrf


def _tensor(values: np.ndarray | Tensor) -> Tensor:
    """The values as a tensor; arrays with negative strides or in read-only memory are copied first."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _check(images: Tensor, probabilities: Tensor) -> None:
    shape = tuple(images.shape)
    if images.ndim not in (3, 4) or shape[-1] != 3 or images.numel() == 0 or images.dtype != torch.uint8:
        raise ValueError(
            f"the image of the CRF is {images.dtype} of shape {shape}; expected the raw image, torch.uint8 or numpy.uint8, of "
            "shape (H, W, 3)"
        )
    found = tuple(probabilities.shape)
    classes = found[-3] if len(found) == len(shape) else 0
    if not probabilities.is_floating_point() or not classes or found != (*shape[:-3], classes, *shape[-3:-1]):
        expected = ", ".join(map(str, (*shape[:-3], "C", *shape[-3:-1])))
        raise ValueError(
            f"the probabilities of the CRF are {probabilities.dtype} of shape {found}; expected floating point of shape "
            f"({expected})"
        )
    if probabilities.device.type == "cpu":
        low, high = float(probabilities.min()), float(probabilities.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN fails both
            raise ValueError(
                f"the probabilities of the CRF are in {low:.4g}..{high:.4g}; expected 0..1: pass the softmax of the logits"
            )
