"""Large pictures in tiles, against the published procedure written out; scales that are averaged."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deeplab import predict, predict_windows
from deeplab.inference import FUSIONS, canvas_size, enlarge_rows, enlarge_to_classes, predict_grid, tile_starts
from deeplab.multiscale import scaled_size
from tests.helpers_nets import enlarged_sizes, naive_bilinear
from utils import options


class SmallNet(nn.Module):
    """Logits of what lies around every 8th pixel, so that the border of a tile shows; notes the sizes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 9, stride=8, padding=4).double()
        self.sizes: set[tuple[int, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.add(tuple(x.shape[-2:]))
        return torch.tanh(self.conv(x))


def published(net: nn.Module, image: np.ndarray, window: tuple[int, int], overlap: Fraction, mirror: bool) -> np.ndarray:
    """predict_sliding of pytorch-segmentation-toolbox, (3, H, W) -> (C, H, W), but with a stride that is not rounded twice."""
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


def test_where_tiles_begin():
    assert tile_starts(2048, 769) == [0, 513, 1026, 1279]  # published: stride ceil(769 * 2/3) = 513
    assert tile_starts(1024, 769) == [0, 255]
    assert tile_starts(769, 769) == tile_starts(20, 769) == [0]
    assert tile_starts(770, 769) == [0, 1]
    assert tile_starts(100, 50, Fraction(0)) == [0, 50]
    assert tile_starts(2048, 768)[1] == 512  # two thirds of 768 exactly, where floating point gives 513


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


def test_a_window_of_the_pictures_size_is_the_whole_picture():
    net, image = SmallNet(), torch.randn(1, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(predict_windows(net, image, (33, 41)), predict(net, image))
        # one that is no 8k + 1 is padded to it, as whole pictures are
        torch.testing.assert_close(predict_windows(net, image[..., :30, :40], (30, 40)), predict(net, image[..., :30, :40]))
    assert net.sizes == {(33, 41)}


@pytest.mark.parametrize("window", [(32, 33), (26, 40), (33, 34)])
def test_a_window_off_the_grid_is_rounded_up_and_sees_the_pixels_that_are_there(window):
    """No tile is padded inside the picture, at any scale."""
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
def test_logits_at_full_size_become_classes_as_they_are(size):
    logits = torch.randn(1, 4, *size)
    assert canvas_size(size, 1) == size
    for max_elements in (1, 4 * size[1] * 3, 2**25):
        blocks = list(enlarge_rows(logits, size, max_elements, stride=1))
        assert torch.equal(torch.cat([block for _, block in blocks], dim=2), logits)
        assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(size[0]))
    assert torch.equal(enlarge_to_classes(logits[0], size, stride=1), logits[0].argmax(dim=0).byte())
    logits[0, 1, -1, -1] = float("nan")
    assert (enlarge_to_classes(logits[0], size, stride=1) == 255).all()


def test_no_more_is_enlarged_than_a_tile(monkeypatch):
    """Beside the sums, which are the only tensor of all classes at the picture's size."""
    sizes = enlarged_sizes(monkeypatch)
    with torch.no_grad():
        predict_windows(SmallNet().float(), torch.zeros(1, 3, 150, 300), (65, 65))
    assert max(sizes) == 4 * 65 * 65
