"""The dense CRF against an exact mean field in float64 on tiny images, and on images that it must clean up."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab.crf import CRFParams, CRFUnavailable, dense_crf
from tests.helpers_devices import NoConstants

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ["pydensecrf", "torch"]


def exact_mean_field(image, probabilities, params):
    """Mean field with every pair of pixels summed one by one in float64, without a lattice."""
    classes, height, width = probabilities.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    kernels = []
    for weight, sxy, srgb in (
        (params.gaussian_weight, params.gaussian_sxy, None),
        (params.bilateral_weight, params.bilateral_sxy, params.bilateral_srgb),
    ):
        kernel = np.zeros((len(pixels), len(pixels)))
        for i, (yi, xi) in enumerate(pixels):
            for j, (yj, xj) in enumerate(pixels):
                exponent = ((yi - yj) ** 2 + (xi - xj) ** 2) / (2 * sxy**2)
                if srgb is not None:
                    difference = image[yi, xi].astype(float) - image[yj, xj].astype(float)
                    exponent += (difference**2).sum() / (2 * srgb**2)
                kernel[i, j] = np.exp(-exponent)
        norm = kernel.sum(axis=1)
        kernels.append(weight * kernel / np.sqrt(np.outer(norm, norm)))
    unary = -np.log(np.maximum(probabilities.reshape(classes, -1).astype(float), 1e-5))
    q = np.exp(-unary) / np.exp(-unary).sum(axis=0)
    for _ in range(params.iterations):
        energy = unary.copy()
        for kernel in kernels:
            for label in range(classes):  # Potts: a different class at the other pixel costs the kernel's value
                energy[label] += (1 - q[label]) @ kernel
        q = np.exp(-(energy - energy.min(axis=0)))
        q /= q.sum(axis=0)
    return q.reshape(probabilities.shape)


def random_probabilities(rng, classes, height, width, sharpness=1.0):
    p = np.exp(sharpness * rng.standard_normal((classes, height, width)))
    return (p / p.sum(axis=0)).astype(np.float32)


def two_colours(height, width, edge):
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:, :edge], image[:, edge:] = (90, 120, 60), (200, 30, 40)
    return image


def from_labels(labels, classes, confidence):
    """(C, H, W) probabilities: ``confidence`` for the label, the rest in equal shares for the other classes."""
    one_hot = (np.arange(classes)[:, None, None] == labels).astype(np.float64)
    return (one_hot * confidence + (1 - one_hot) * (1 - confidence) / max(classes - 1, 1)).astype(np.float32)


# The lattice is an approximation. The largest difference after one iteration, over 24 such cases, was 0.037 for the Gaussian
# kernel and 0.002 for the bilateral one. The argmax differs only where two classes are within 0.1 of each other.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "image", [np.full((5, 7, 3), 90, np.uint8), two_colours(5, 7, 3), two_colours(9, 6, 5)], ids=["flat", "5x7", "9x6"]
)
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 0.05), ({"bilateral_weight": 0.0}, 0.05), ({"gaussian_weight": 0.0}, 0.005)],
    ids=["both", "gaussian", "bilateral"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_iteration_agrees_with_the_exact_sums(image, settings, tolerance, seed, backend):
    params = CRFParams(iterations=1, **settings)
    p = random_probabilities(np.random.default_rng(seed), 3, *image.shape[:2])
    refined, exact = dense_crf(image, p, params, backend=backend), exact_mean_field(image, p, params)
    assert refined.dtype == np.float32
    assert refined.shape == p.shape
    np.testing.assert_allclose(refined.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(refined, exact, atol=tolerance)
    second, first = np.sort(exact, axis=0)[-2:]
    clear = first - second > 0.1
    assert (refined.argmax(axis=0) == exact.argmax(axis=0))[clear].all()


# Ten iterations amplify the differences between near-equal classes; on labels with some noise they converge: 0.0042 measured.
@pytest.mark.parametrize(("classes", "confidence"), [(2, 0.6), (3, 0.5), (3, 0.7)])
def test_published_settings_agree_with_the_exact_sums(classes, confidence):
    rng = np.random.default_rng(classes)
    labels = np.repeat([[0, 0, 0, 1, 1, 1, 1]], 9, axis=0)
    noisy = np.where(rng.random(labels.shape) < 0.12, (labels + 1) % classes, labels)
    image, p = two_colours(9, 7, 3), from_labels(noisy, classes, confidence)
    refined = dense_crf(image, p)
    np.testing.assert_allclose(refined, exact_mean_field(image, p, CRFParams()), atol=0.01)
    assert (refined.argmax(axis=0) == labels).all()


def test_defaults_are_the_published_settings():
    assert dataclasses.asdict(CRFParams()) == {
        "iterations": 10,
        "gaussian_weight": 3.0,
        "gaussian_sxy": 1.0,
        "bilateral_weight": 4.0,
        "bilateral_sxy": 67.0,
        "bilateral_srgb": 3.0,
    }


@pytest.mark.parametrize("params", [CRFParams(iterations=0), CRFParams(gaussian_weight=0, bilateral_weight=0)])
def test_no_iterations_or_no_weights_leave_the_probabilities(params):
    rng = np.random.default_rng(1)
    p = random_probabilities(rng, 4, 6, 5)
    image = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    np.testing.assert_allclose(dense_crf(image, p, params), p, atol=1e-6)
    hard = from_labels(rng.integers(0, 4, (6, 5)), 4, 1.0)  # zeros and ones: raised to 1e-5 and scaled to sum 1
    np.testing.assert_allclose(dense_crf(image, hard, params), hard, atol=4e-5)


def test_noise_is_cleaned_to_the_colour_edge():
    rng = np.random.default_rng(5)
    image = (two_colours(19, 23, 11) + rng.integers(0, 8, (19, 23, 3))).astype(np.uint8)
    truth = np.repeat((np.arange(23) >= 11)[None].astype(int), 19, axis=0)
    noisy = np.where(rng.random(truth.shape) < 0.15, rng.integers(0, 3, truth.shape), truth)
    p = from_labels(noisy, 3, 0.7)
    assert (p.argmax(axis=0) != truth).sum() > 20
    refined = dense_crf(image, p)
    assert (refined.argmax(axis=0) == truth).all()
    # the kernels give all channels the same weight, but the lattice depends on their order (0.006 measured)
    for order in ([2, 1, 0], [1, 2, 0]):
        np.testing.assert_allclose(dense_crf(image[:, :, order], p), refined, atol=0.02)


def test_a_shifted_edge_moves_to_the_colour_edge():
    truth = np.repeat((np.arange(31) >= 15)[None].astype(int), 25, axis=0)
    shifted = np.repeat((np.arange(31) >= 18)[None].astype(int), 25, axis=0)
    refined = dense_crf(two_colours(25, 31, 15), from_labels(shifted, 2, 0.8))
    assert (refined.argmax(axis=0) == truth).all()


def test_a_lone_wrong_pixel_is_repaired():
    labels = np.zeros((9, 11), dtype=int)
    labels[4, 6] = 1
    refined = dense_crf(np.full((9, 11, 3), 128, np.uint8), from_labels(labels, 3, 0.9))
    assert (refined.argmax(axis=0) == 0).all()


@pytest.mark.parametrize(("classes", "height", "width"), [(1, 1, 1), (2, 1, 1), (1, 4, 3), (5, 1, 9), (21, 7, 1)])
def test_smallest_inputs(classes, height, width):
    rng = np.random.default_rng(0)
    p = random_probabilities(rng, classes, height, width)
    refined = dense_crf(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), p)
    assert refined.shape == p.shape
    np.testing.assert_allclose(refined.sum(axis=0), 1, atol=1e-5)
    if height * width == 1:  # the only pair of the pixel is itself: exact in closed form
        alone = exact_mean_field(np.zeros((1, 1, 3), np.uint8), p, CRFParams())
        np.testing.assert_allclose(refined, alone, atol=1e-4)


def test_inputs_are_not_changed_and_may_be_strided():
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    p = random_probabilities(rng, 3, 7, 9)
    expected = dense_crf(image, p)
    strided_image = np.repeat(image, 2, axis=1)[:, ::2]
    strided_p = np.ascontiguousarray(p.transpose(1, 2, 0)).transpose(2, 0, 1)
    for array in (strided_image, strided_p):
        assert not array.flags.c_contiguous
        array.setflags(write=False)
    before = strided_image.copy(), strided_p.copy()
    np.testing.assert_array_equal(dense_crf(strided_image, strided_p), expected)
    np.testing.assert_array_equal(strided_image, before[0])
    np.testing.assert_array_equal(strided_p, before[1])
    np.testing.assert_array_equal(dense_crf(image, p.astype(np.float64)), expected)
    half = p.astype(np.float16)
    np.testing.assert_array_equal(dense_crf(image, half), dense_crf(image, half.astype(np.float32)))


IMAGE = np.zeros((4, 6, 3), np.uint8)
UNIFORM = np.full((3, 4, 6), 1 / 3, np.float32)


def changed(value):
    p = UNIFORM.copy()
    p[0, 1, 2] = value
    return p


@pytest.mark.parametrize(
    ("image", "probabilities", "message"),
    [
        (IMAGE.transpose(2, 0, 1), UNIFORM, r"uint8 of shape \(3, 4, 6\); expected the raw image.* of shape \(H, W, 3\)"),
        (IMAGE[:, :, 0], UNIFORM, r"of shape \(4, 6\)"),
        (np.zeros((4, 6, 4), np.uint8), UNIFORM, r"shape \(4, 6, 4\)"),
        (np.zeros((0, 6, 3), np.uint8), UNIFORM[:, :0], r"shape \(0, 6, 3\)"),
        (IMAGE.astype(np.float32) - 104, UNIFORM, "image of the CRF is torch.float32 of shape"),
        (IMAGE, UNIFORM.transpose(1, 2, 0), r"float32 of shape \(4, 6, 3\); expected floating point of shape \(C, 4, 6\)"),
        (IMAGE, UNIFORM[:, :3], r"shape \(3, 3, 6\)"),
        (IMAGE, UNIFORM[0], r"shape \(4, 6\)"),
        (IMAGE, UNIFORM[:0], r"shape \(0, 4, 6\)"),
        (IMAGE, (UNIFORM * 255).astype(np.uint8), "probabilities of the CRF are torch.uint8"),
        (IMAGE, changed(np.nan), r"are in nan\.\.nan"),
        (IMAGE, changed(np.inf), r"are in 0\.3333\.\.inf"),
        (IMAGE, changed(-0.2), r"are in -0\.2\.\.0\.3333; expected 0\.\.1"),
        (IMAGE, changed(-0.002), r"are in -0\.002\.\.0\.3333; expected 0\.\.1"),
        (IMAGE, changed(1.002), r"are in 0\.3333\.\.1\.002; expected 0\.\.1"),
        (IMAGE, UNIFORM * 9, r"are in 3\.\.3; expected 0\.\.1: pass the softmax"),
    ],
)
def test_wrong_inputs_are_refused(image, probabilities, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(image, probabilities)


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": -1},
        {"gaussian_weight": -3.0},
        {"bilateral_weight": float("nan")},
        {"gaussian_sxy": 0.0},
        {"bilateral_sxy": float("nan")},
        {"bilateral_srgb": -1.0},
    ],
)
def test_wrong_settings_are_refused(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*: expected iterations and weights of at least 0"):
        CRFParams(**settings)


def test_the_published_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CRFParams().iterations = 5


def test_pydensecrf_is_imported_only_when_needed(monkeypatch):
    code = "import sys, deeplab.crf; sys.exit('pydensecrf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(CRFUnavailable, match=r"pydensecrf is not installed .*pip install pydensecrf2.*--crf-backend torch"):
        dense_crf(IMAGE, UNIFORM)
    assert CRFUnavailable.exit_status == 2


def test_pruning_leaves_out_classes_that_are_unlikely_everywhere():
    """A class below the threshold everywhere: the others are refined as if it did not exist."""
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    probabilities = rng.dirichlet([4, 4, 4], (12, 9)).transpose(2, 0, 1).astype(np.float32)
    unlikely = np.full((1, 12, 9), 0.004, np.float32)
    with_unlikely = np.concatenate([probabilities[:1], unlikely, probabilities[1:]]) / 1.004
    expected = dense_crf(image, probabilities)
    pruned = dense_crf(image, with_unlikely, prune=0.01)
    assert not pruned[1].any()
    np.testing.assert_allclose(pruned[[0, 2, 3]], expected, atol=1e-5)
    np.testing.assert_array_equal(dense_crf(image, with_unlikely, prune=0.001), dense_crf(image, with_unlikely))
    nothing = np.concatenate([np.zeros((1, 12, 9), np.float32), probabilities])
    assert dense_crf(image, nothing)[0].any()  # by default no class is left out
    border = np.concatenate(
        [np.full((1, 12, 9), 0.25, np.float32), probabilities * 0.75]
    )  # nowhere above 0.25, exact in binary
    assert not dense_crf(image, border, prune=0.25)[0].any()
    assert dense_crf(image, border, prune=0.2499)[0].any()
    flat = np.full((4, 3, 3), 0.25, np.float32)
    assert dense_crf(image[:3, :3], flat, prune=0.5).argmax(0).max() == 0  # the likeliest class is always kept


def photograph(rng, height, width):
    """Smooth regions, edges and grain, like a camera image."""
    coarse = torch.from_numpy(rng.random((1, 3, 5, 7)) * 255)
    regions = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    shading = torch.nn.functional.interpolate(coarse.flip(2), (height, width), mode="bilinear")
    image = (0.7 * regions + 0.3 * shading)[0].permute(1, 2, 0).numpy() + rng.normal(0, 3, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def blobs(rng, classes, height, width):
    """Probabilities like those of a net: the softmax of smooth logits."""
    coarse = torch.from_numpy(rng.normal(0, 2.5, (1, classes, 5, 6)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True).softmax(1)[0].numpy()


def assert_equal_to_rounding(found, expected):
    """Within 1e-4: pydensecrf's own results move as much when its inputs move by 1e-7."""
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-4)
    second, first = np.sort(np.concatenate([np.zeros_like(expected[:1]), expected]), axis=0)[-2:]
    assert ((found.argmax(0) == expected.argmax(0)) | (first - second < 1e-4)).all()


IMAGES = {
    "photograph": lambda rng: photograph(rng, 97, 121),
    "noise": lambda rng: rng.integers(0, 256, (38, 29, 3), dtype=np.uint8),
    "dark": lambda rng: np.zeros((17, 22, 3), np.uint8),
    "constant": lambda rng: np.full((24, 33, 3), 200, np.uint8),
    "1x1": lambda rng: photograph(rng, 1, 1),
    "31x1": lambda rng: photograph(rng, 31, 1),
    "1x26": lambda rng: photograph(rng, 1, 26),
}


@pytest.mark.parametrize("classes", [1, 2, 11, 21, 150])
@pytest.mark.parametrize("name", IMAGES)
def test_torch_equals_pydensecrf(name, classes):
    rng = np.random.default_rng(classes)
    image = IMAGES[name](rng)
    p = blobs(rng, classes, *image.shape[:2])
    assert_equal_to_rounding(dense_crf(image, p, backend="torch"), dense_crf(image, p))


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"iterations": 1},
        {"iterations": 13},
        {"gaussian_weight": 7.5},
        {"gaussian_weight": 0.0},
        {"gaussian_sxy": 3.7},
        {"gaussian_sxy": 0.4},
        {"bilateral_weight": 11.0},
        {"bilateral_weight": 0.0},
        {"bilateral_sxy": 3.0},
        {"bilateral_sxy": 1000.0},
        {"bilateral_srgb": 20.0},
        {"bilateral_srgb": 0.9},
    ],
    ids=str,
)
def test_torch_equals_pydensecrf_at_other_settings(settings):
    rng = np.random.default_rng(7)
    image, p = photograph(rng, 45, 62), blobs(rng, 5, 45, 62)
    params = CRFParams(**settings)
    assert_equal_to_rounding(dense_crf(image, p, params, backend="torch"), dense_crf(image, p, params))


def test_a_batch_equals_its_images_one_by_one():
    """Also with pruning, which leaves different classes out of each image."""
    rng = np.random.default_rng(38)
    images = np.stack([photograph(rng, 21, 34) for _ in range(3)])
    p = np.stack([blobs(rng, 7, 21, 34) for _ in range(3)])
    p[0, 2] *= 1e-3
    p[1, 4] *= 1e-3
    p[:, 6] *= 1e-3
    assert (p[0, 2].max(), p[0, 4].max()) < (0.01, 1)
    for prune in (0.0, 0.01):
        expected = np.stack([dense_crf(image, one, prune=prune) for image, one in zip(images, p, strict=True)])
        for backend in BACKENDS:
            refined = dense_crf(images, p, prune=prune, backend=backend)
            for one, of_it in zip(refined, expected, strict=True):
                assert_equal_to_rounding(one, of_it)
            assert refined[0, 2].any() == (prune == 0)
    tensors = dense_crf(torch.from_numpy(images), torch.from_numpy(p), prune=0.01)
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_array_equal(tensors, dense_crf(images, p, prune=0.01))


def test_torch_gives_the_same_bits_on_one_thread_and_two():
    rng = np.random.default_rng(9)
    image, p = torch.from_numpy(photograph(rng, 90, 121)), torch.from_numpy(blobs(rng, 21, 90, 121))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(dense_crf(image, p, backend="torch"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


class HostSyncs(TorchDispatchMode):
    """Records the operators that are host syncs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::_unique2"):
            self.names.append(func._schema.name)
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            devices = {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}
            self.names += ["copy"] if len(devices) > 1 else []
        return result


@pytest.mark.parametrize("count", [1, 3])
def test_torch_has_one_host_sync_per_lattice(count):
    """On fake CUDA tensors, whose values the host cannot read."""
    with FakeTensorMode(shape_env=ShapeEnv()), HostSyncs() as syncs, NoConstants("cuda"):
        images = torch.zeros(count, 40, 55, 3, dtype=torch.uint8, device="cuda")
        p = torch.zeros(count, 21, 40, 55, device="cuda")
        refined = dense_crf(images, p, backend="torch")
    assert (refined.device.type, refined.shape, refined.dtype) == ("cuda", p.shape, torch.float32)
    assert syncs.names == ["aten::nonzero"] * 2


@pytest.mark.cuda
def test_torch_on_a_gpu_equals_pydensecrf():
    rng = np.random.default_rng(10)
    image, p = photograph(rng, 97, 121), blobs(rng, 21, 97, 121)
    on_gpu = [torch.from_numpy(array).cuda() for array in (image, p)]
    refined = dense_crf(*on_gpu, backend="torch")
    assert refined.is_cuda
    assert_equal_to_rounding(refined.cpu().numpy(), dense_crf(image, p))
    assert torch.equal(refined, dense_crf(*on_gpu, backend="torch"))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'; expected 'pydensecrf' or 'torch'"):
        dense_crf(IMAGE, UNIFORM, backend="cuda")
