"""The dense CRF that sharpens a prediction along the edges of the image (Kraehenbuehl & Koltun, arXiv:1210.5644)."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

MIN_PROBABILITY = 1e-5  # a probability of 0 would be an infinite energy that no neighbour could ever outvote
TOLERANCE = 1e-3  # how far a probability may be outside 0..1


class CRFUnavailable(ImportError):
    """The package that computes the CRF is not installed."""

    exit_status = 2


@dataclass(frozen=True)
class CRFParams:
    """The settings of :func:`dense_crf`; the defaults are those published for DeepLab-v2 ResNet-101 on VOC.

    Attributes:
        iterations: mean-field iterations; 0 leaves the probabilities as they are.
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


def dense_crf(image: np.ndarray, probabilities: np.ndarray, params: CRFParams = PUBLISHED, prune: float = 0.0) -> np.ndarray:
    """Refine class probabilities with a fully connected CRF, by mean field with a Potts model.

    The energy is -log p (p no lower than 1e-5) plus, for each pair of pixels with different classes, the two kernels of
    :class:`CRFParams`, each normalised symmetrically (k_ij / sqrt(n_i n_j), n_i = sum_j k_ij). The sums over all pairs are
    approximated on a permutohedral lattice, as in the authors' program; like it, and unlike the paper, they contain the
    pixel itself. All channels of ``image`` weigh the same: RGB and BGR give the same, but for that approximation.

    Args:
        image: (H, W, 3) uint8, the raw image, 0..255, never the mean-subtracted input of the net.
        probabilities: (C, H, W) floating point, softmax over the classes: 0..1, summing to 1 at each pixel.
        params: the settings, by default the published ones.
        prune: classes whose probability is nowhere above this are left out, which saves time in proportion, and get
            probability 0. 0 leaves nothing out.

    Returns:
        (C, H, W) float32 probabilities. The inputs are not changed.

    Raises:
        ValueError: a shape or dtype other than the above, sizes that differ, or values outside 0..1 (logits, NaN).
        CRFUnavailable: pydensecrf is not installed.
    """
    image, probabilities = np.asarray(image), np.asarray(probabilities)
    _check(image, probabilities)
    densecrf = find_densecrf()
    if prune > 0:
        kept = probabilities.max(axis=(1, 2)) > prune
        kept[probabilities.max(axis=(1, 2)).argmax()] = True
        refined = np.zeros(probabilities.shape, dtype=np.float32)
        # A pixel's probabilities need not add up to 1 again: a common factor changes nothing in the mean field.
        refined[kept] = _mean_field(image, probabilities[kept], params, densecrf)
        return refined
    return _mean_field(image, probabilities, params, densecrf)


def _mean_field(image: np.ndarray, probabilities: np.ndarray, params: CRFParams, densecrf: ModuleType) -> np.ndarray:
    """:func:`dense_crf` on inputs that were checked."""
    classes, height, width = probabilities.shape
    likely = np.maximum(probabilities.reshape(classes, -1).astype(np.float32), MIN_PROBABILITY)
    crf = densecrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(likely)))
    crf.addPairwiseGaussian(
        sxy=params.gaussian_sxy,
        compat=params.gaussian_weight,
        kernel=densecrf.DIAG_KERNEL,
        normalization=densecrf.NORMALIZE_SYMMETRIC,
    )
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=np.ascontiguousarray(image),
        compat=params.bilateral_weight,
        kernel=densecrf.DIAG_KERNEL,
        normalization=densecrf.NORMALIZE_SYMMETRIC,
    )
    refined = crf.inference(params.iterations)  # C x H*W float32
    return np.array(refined, dtype=np.float32).reshape(classes, height, width)


def find_densecrf() -> ModuleType:
    """pydensecrf's module, imported only when it is needed.

    Raises:
        CRFUnavailable: it is not installed.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise CRFUnavailable(f"the dense CRF needs pydensecrf ({error}); pip install pydensecrf2") from None
    return densecrf


def _check(image: np.ndarray, probabilities: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype != np.uint8:
        raise ValueError(
            f"the image of the CRF is {image.dtype} of shape {image.shape}; expected the raw uint8 picture of shape (H, W, 3)"
        )
    floating = np.issubdtype(probabilities.dtype, np.floating)
    if not floating or probabilities.shape[1:] != image.shape[:2] or len(probabilities) == 0:
        raise ValueError(
            f"the probabilities of the CRF are {probabilities.dtype} of shape {probabilities.shape}; expected floating point "
            f"of shape (C, {image.shape[0]}, {image.shape[1]})"
        )
    low, high = float(probabilities.min()), float(probabilities.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN fails both
        raise ValueError(
            f"the probabilities of the CRF lie in {low:.4g}..{high:.4g}; expected 0..1: give the softmax of the logits"
        )
