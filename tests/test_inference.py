"""Images of any size to logits and classes: whole, at several scales, in tiles; against naive and published procedures."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab import deeplabv2, predict, predict_windows
from deeplab.inference import (
    FUSIONS,
    canvas_size,
    enlarge,
    enlarge_rows,
    enlarge_to_classes,
    predict_classes,
    predict_grid,
    tile_starts,
)
from deeplab.multiscale import scaled_size
from tests.helpers_nets import EveryEighth, enlarged_sizes, naive_bilinear
from utils import options


class SmallNet(nn.Module):
    """Logits that depend on the surroundings of every 8th pixel, so that tile borders matter; records the input sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 9, stride=8, padding=4).double()
        self.sizes: set[tuple[int, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.add(tuple(x.shape[-2:]))
        return torch.tanh(self.conv(x))


class NoFloat64(TorchDispatchMode):
    """Refuses every operator that makes a float64 tensor, like a device without float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError(f"{func} makes float64")
        return result


def linear_image(height: int, width: int) -> Tensor:
    """An image that is linear in the position, so that bilinear resizing is exact: (1, 3, H, W) float64."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, y + 2 * x]).double()[None]


def published(net: nn.Module, image: np.ndarray, window: tuple[int, int], overlap: Fraction, mirror: bool) -> np.ndarray:
    """predict_sliding of pytorch-segmentation-toolbox, (3, H, W) -> (C, H, W), except that the stride is rounded only once."""
    height, width = image.shape[1:]
    total, count = np.zeros((4, height, width)), np.zeros((height, width))
    strides = [ceil(side * (1 - overlap)) for side in window]
    for row in range(ceil(max(height - window[0], 0) / strides[0]) + 1):
        for column in range(ceil(max(width - window[1], 0) / strides[1]) + 1):
            y2, x2 = min(row * strides[0] + window[0], height), min(column * strides[1] + window[1], width)
            y1, x1 = max(y2 - window[0], 0), max(x2 - window[1], 0)
            tile = np.zeros((3, *window))
            tile[:, : y2 - y1, : x2 - x1] = image[:, y1:y2, x1:x2]
            logits = net(torch.from_numpy(tile)[None])[0].numpy()
            if mirror:
                logits = (logits + net(torch.from_numpy(tile[..., ::-1].copy())[None])[0].numpy()[..., ::-1]) / 2
            enlarged = np.stack([naive_bilinear(plane, window) for plane in logits])
            total[:, y1:y2, x1:x2] += enlarged[:, : y2 - y1, : x2 - x1]
            count[y1:y2, x1:x2] += 1
    return total / count


def resized(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([naive_bilinear(plane, size) for plane in planes])


def test_canvas_size():
    assert canvas_size((1, 2)) == (1, 9)
    assert canvas_size((321, 375)) == (321, 377)
    assert canvas_size((505, 500)) == (505, 505)


@pytest.mark.parametrize("size", [(33, 49), (40, 55), (1, 1), (2, 17), (50, 64)])
def test_scales_stay_aligned_for_any_size(size):
    """A linear image, padded with 0, is returned unchanged away from the padding."""
    image = linear_image(*size)
    inner = ((size[0] - 1) // 8 * 8 + 1, (size[1] - 1) // 8 * 8 + 1)
    for scales in ((1.0,), (0.5,), (1.5, 1.0)):
        if scales != (1.0,) and inner != size:
            continue  # resizing blends the image with the padding, so only sides of 8k + 1 can be computed by hand
        result = predict(EveryEighth(), image, scales)[0]
        assert result.shape == (3, *size)
        torch.testing.assert_close(result[:, : inner[0], : inner[1]], image[0, :, : inner[0], : inner[1]].float())


def test_flipped_prediction_is_the_mean_of_both_views():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 9, stride=8, padding=4).double()
    image = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    views = (net(image) + net(image.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(predict_grid(net, image, mirror=True), views)
    flipped = predict(net, image.flip(-1), mirror=True)
    torch.testing.assert_close(flipped, predict(net, image, mirror=True).flip(-1))


@pytest.mark.parametrize("size", [(1, 1), (8, 9), (9, 9), (10, 30), (33, 47), (64, 64)])
def test_blocks_of_rows_equal_the_enlarged_logits(size):
    torch.manual_seed(0)
    rows, columns = ((side - 1) // 8 + 1 for side in canvas_size(size))
    logits = torch.randn(1, 4, rows, columns)
    whole = enlarge(logits, size)
    assert len(list(enlarge_rows(logits, size, 1))) == max(rows - 1, 1)  # at least one row of the grid, here exactly one
    for max_elements in (1, 4 * 8 * size[1] * 2, 2**25):
        blocks = list(enlarge_rows(logits, size, max_elements))
        covered = [row for block, _ in blocks for row in range(*block.indices(size[0]))]
        assert covered == list(range(size[0]))
        torch.testing.assert_close(torch.cat([block for _, block in blocks], dim=2), whole, rtol=0, atol=2e-6)
    expected = naive_bilinear(np.pad(logits[0, 0].double().numpy(), ((0, rows == 1), (0, columns == 1)), mode="edge"),
                              tuple((side - 1) * 8 + 1 + 8 * (side == 1) for side in (rows, columns)))  # fmt: skip
    np.testing.assert_allclose(whole[0, 0].numpy(), expected[: size[0], : size[1]], atol=1e-5)


def test_predict_accepts_one_image_or_a_batch():
    net = deeplabv2("resnet18", 3).eval()
    image = torch.randn(3, 35, 20)
    with torch.no_grad():
        one, batch = predict(net, image), predict(net, image[None])
    assert one.shape == (3, 35, 20)
    assert torch.equal(one, batch[0])


@pytest.mark.parametrize(
    ("size", "canvas"), [((20, 30), (65, 65)), ((1, 1), (33, 9)), ((33, 41), (505, 49)), ((8, 64), (65, 65))]
)
def test_a_grid_larger_than_the_image(size, canvas):
    """A fixed canvas: the blocks end with the image, for any block height."""
    torch.manual_seed(0)
    logits = torch.randn(1, 3, *((side - 1) // 8 + 1 for side in canvas))
    whole = np.stack([naive_bilinear(plane, canvas) for plane in logits[0].double().numpy()])[:, : size[0], : size[1]]
    np.testing.assert_allclose(enlarge(logits, size)[0].numpy(), whole, atol=1e-5)
    for max_elements in (1, 3 * 8 * size[1] * 3, 2**25):
        blocks = list(enlarge_rows(logits, size, max_elements))
        assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(size[0]))
        np.testing.assert_allclose(torch.cat([block for _, block in blocks], dim=2)[0].numpy(), whole, atol=1e-5)
    assert (enlarge_to_classes(logits[0], size).numpy() == whole.argmax(0)).all()


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.75, 1.25, 1.9])
@pytest.mark.parametrize("size", [(1, 9), (33, 49), (505, 17), (97, 2049)])
def test_logits_of_a_scale_are_sampled_in_exact_arithmetic(scale, size):
    """Against exact fractions, one position at a time; no float64 is used, since mps has none."""
    scaled = scaled_size(size, scale)
    torch.manual_seed(0)
    small = torch.randn(1, 1, *((side - 1) // 8 + 1 for side in canvas_size(scaled)))
    with NoFloat64():
        grid = predict_grid(lambda x: small, torch.zeros(1, 3, *size), (scale,))
    result = grid[0, 0].double().numpy()

    def taps(side: int, scaled_side: int) -> list[tuple[int, float]]:
        steps = (side - 1) // 8
        return [divmod(Fraction(i * (scaled_side - 1), max(8 * steps, 1)), 1) for i in range(steps + 1)]

    plane = np.pad(small[0, 0].double().numpy(), ((0, 1), (0, 1)))  # the padding has weight 0
    for i, (y, part_y) in enumerate(taps(size[0], scaled[0])):
        for j, (x, part_x) in enumerate(taps(size[1], scaled[1])):
            b, a = float(part_y), float(part_x)
            top, bottom = (plane[row, x] * (1 - a) + plane[row, x + 1] * a for row in (y, y + 1))
            assert result[i, j] == pytest.approx(top * (1 - b) + bottom * b, abs=2e-6)


def test_classes_of_one_image_or_a_batch():
    """The class of the largest enlarged logit, or 255 everywhere in an image with a logit that is not finite."""
    torch.manual_seed(2)
    logits = torch.randn(3, 4, 3, 5)
    logits[1, 2, 0, 1] = float("nan")
    logits[2, 0, 2, 4] = float("-inf")
    images = torch.zeros(3, 3, 17, 33)
    classes = predict_classes(lambda x: logits, images)
    assert classes.dtype == torch.uint8
    expected = np.stack([naive_bilinear(plane, (17, 33)) for plane in logits[0].double().numpy()]).argmax(0)
    assert (classes[0].numpy() == expected).all()
    assert (classes[1:] == 255).all()
    assert torch.equal(predict_classes(lambda x: logits[:1], images[0]), classes[0])
    infinite = torch.full((2, 2, 2), float("inf"))
    assert (enlarge_to_classes(infinite, (9, 3)) == 255).all()


def test_classes_are_taken_in_blocks_of_rows(monkeypatch):
    """An image of 24 megapixels: no tensor of all classes at full size is made."""
    sizes = enlarged_sizes(monkeypatch)
    logits = torch.randn(9, 501, 751)
    classes = enlarge_to_classes(logits, (4001, 6001))
    assert classes.shape == (4001, 6001)
    assert (classes[::8, ::8] == logits.argmax(0)).all()
    assert max(sizes) <= 1.3 * 2**25  # a block and the first grid row of the next


def test_tile_starts():
    assert tile_starts(2048, 769) == [0, 513, 1026, 1279]  # published: stride ceil(769 * 2/3) = 513
    assert tile_starts(1024, 769) == [0, 255]
    assert tile_starts(769, 769) == tile_starts(20, 769) == [0]
    assert tile_starts(770, 769) == [0, 1]
    assert tile_starts(100, 50, Fraction(0)) == [0, 50]
    assert tile_starts(2048, 768)[1] == 512  # exactly two thirds of 768; floating point gives 513


@pytest.mark.parametrize(
    ("size", "window", "overlap", "mirror"),
    [
        ((50, 100), (33, 33), "1/3", False),
        ((50, 100), (33, 41), "0.25", True),
        ((90, 70), (41, 33), "1/3", False),
        ((20, 90), (33, 33), "1/3", True),
        ((90, 20), (33, 33), "0", False),
        ((20, 15), (33, 33), "1/3", False),
        ((34, 33), (33, 33), "1/2", False),
    ],
)
def test_tiles_against_the_published_procedure(size, window, overlap, mirror):
    net = SmallNet()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits = predict_windows(net, images, window, Fraction(overlap), mirror=mirror)
        expected = [published(net, image.numpy(), window, Fraction(overlap), mirror) for image in images]
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-6)
    assert net.sizes == {window}


@pytest.mark.parametrize(("fuse", "combine"), [("max", np.maximum.reduce), ("mean", lambda parts: np.mean(parts, axis=0))])
def test_each_scale_is_cut_into_tiles_of_one_size(fuse, combine):
    net, image, scales = SmallNet(), torch.randn(3, 50, 70, dtype=torch.float64), (0.5, 1.0, 1.5)
    with torch.no_grad():
        logits = predict_windows(net, image[None], (33, 33), Fraction(1, 3), scales, True, fuse)[0]
        parts = []
        for scale in scales:
            small = resized(image.numpy(), scaled_size((50, 70), scale))
            parts.append(resized(published(net, small, (33, 33), Fraction(1, 3), True), (50, 70)))
    np.testing.assert_allclose(logits.numpy(), combine(parts), atol=2e-6)
    assert net.sizes == {(33, 33)}


def test_one_tile_of_the_image_size_is_the_whole_image():
    net, image = SmallNet(), torch.randn(1, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(predict_windows(net, image, (33, 41)), predict(net, image))
        # a size other than 8k + 1 is padded, like whole images
        torch.testing.assert_close(predict_windows(net, image[..., :30, :40], (30, 40)), predict(net, image[..., :30, :40]))
    assert net.sizes == {(33, 41)}


@pytest.mark.parametrize("window", [(32, 33), (26, 40), (33, 34)])
def test_a_tile_off_the_grid_is_rounded_up_and_not_padded_inside_the_image(window):
    """At every scale tiles inside the image contain only its pixels."""
    net, image = SmallNet(), torch.randn(1, 3, 100, 90, dtype=torch.float64) + 9
    rounded = (33, 41) if window[1] > 33 else (33, 33)
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append(bool((args[0] == 0).any())))
    with torch.no_grad():
        found = predict_windows(net, image, window, scales=(1.0, 0.75))
        assert torch.equal(found, predict_windows(net, image, rounded, scales=(1.0, 0.75)))
        np.testing.assert_allclose(
            predict_windows(net, image, window)[0], published(net, image[0].numpy(), rounded, Fraction(1, 3), False), atol=2e-6
        )
    assert net.sizes == {rounded}
    assert not any(seen)


def test_the_mean_of_scales_on_the_grid():
    net, image = SmallNet(), torch.randn(1, 3, 40, 50, dtype=torch.float64)
    with torch.no_grad():
        parts = [predict_grid(net, image, (scale,)) for scale in (1.0, 0.5, 0.75)]
        torch.testing.assert_close(predict_grid(net, image, (1.0, 0.5, 0.75), fuse="mean"), torch.stack(parts).mean(dim=0))
        torch.testing.assert_close(predict_grid(net, image, (1.0, 0.5, 0.75)), torch.stack(parts).amax(dim=0))
    assert tuple(FUSIONS) == options.FUSIONS


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 9), (40, 55)])
def test_logits_at_full_size_are_not_resized(size):
    logits = torch.randn(1, 4, *size)
    assert canvas_size(size, 1) == size
    for max_elements in (1, 4 * size[1] * 3, 2**25):
        blocks = list(enlarge_rows(logits, size, max_elements, stride=1))
        assert torch.equal(torch.cat([block for _, block in blocks], dim=2), logits)
        assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(size[0]))
    assert torch.equal(enlarge_to_classes(logits[0], size, stride=1), logits[0].argmax(dim=0).byte())
    logits[0, 1, -1, -1] = float("nan")
    assert (enlarge_to_classes(logits[0], size, stride=1) == 255).all()


def test_only_tiles_are_enlarged(monkeypatch):
    """The sums are the only tensor of all classes at the size of the image."""
    sizes = enlarged_sizes(monkeypatch)
    with torch.no_grad():
        predict_windows(SmallNet().float(), torch.zeros(1, 3, 150, 300), (65, 65))
    assert max(sizes) == 4 * 65 * 65
