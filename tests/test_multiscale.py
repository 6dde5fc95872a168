from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab import deeplabv2, fuse_max, multiscale_logits, predict
from deeplab.inference import canvas_size, enlarge, enlarge_rows, enlarge_to_classes, predict_classes, predict_grid
from deeplab.multiscale import scaled_size
from tests.helpers_nets import EveryEighth, enlarged_sizes, naive_bilinear


class NoFloat64(TorchDispatchMode):
    """Refuses every operator that makes a float64 tensor, as a device without them does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError(f"{func} makes float64")
        return result


def linear_picture(height: int, width: int) -> Tensor:
    """A picture that is linear in the position, which every bilinear resizing keeps exactly: (1, 3, H, W) float64."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, y + 2 * x]).double()[None]


def test_published_sizes():
    assert scaled_size((321, 321), 0.75) == (241, 241)
    assert scaled_size((321, 513), 0.5) == (161, 257)
    assert scaled_size((513, 1), 0.75) == (385, 1)
    assert canvas_size((1, 2)) == (1, 9)
    assert canvas_size((321, 375)) == (321, 377)
    assert canvas_size((505, 500)) == (505, 505)


def test_multiscale_logits_and_fusion_against_a_naive_loop():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 33, 49, dtype=torch.float64)
    logits = multiscale_logits(EveryEighth(), images, (1.0, 0.75, 0.5))
    assert [tuple(x.shape[-2:]) for x in logits] == [(5, 7), (4, 5), (3, 4)]
    fused = fuse_max(logits)
    for n in range(2):
        for c in range(3):
            planes = []
            for scale in (1.0, 0.75, 0.5):
                small = naive_bilinear(images[n, c].numpy(), scaled_size((33, 49), scale))[::8, ::8]
                planes.append(small if scale == 1.0 else naive_bilinear(small, (5, 7)))
            np.testing.assert_allclose(fused[n, c].numpy(), np.maximum.reduce(planes), atol=1e-12)


@pytest.mark.parametrize("size", [(33, 49), (40, 55), (1, 1), (2, 17), (50, 64)])
def test_scales_stay_aligned_for_any_size(size):
    """A linear picture, padded with 0 from its own size on, comes back as it is: inside, away from the padding."""
    image = linear_picture(*size)
    inner = ((size[0] - 1) // 8 * 8 + 1, (size[1] - 1) // 8 * 8 + 1)
    for scales in ((1.0,), (0.5,), (1.5, 1.0)):
        if scales != (1.0,) and inner != size:
            continue  # the resized picture blends with the padding, so only 8k + 1 sides can be worked out
        result = predict(EveryEighth(), image, scales)[0]
        assert result.shape == (3, *size)
        torch.testing.assert_close(result[:, : inner[0], : inner[1]], image[0, :, : inner[0], : inner[1]].float())


def test_mirrored_prediction_is_the_mean_of_both_views():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 9, stride=8, padding=4).double()
    image = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    views = (net(image) + net(image.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(predict_grid(net, image, mirror=True), views)
    flipped = predict(net, image.flip(-1), mirror=True)
    torch.testing.assert_close(flipped, predict(net, image, mirror=True).flip(-1))


@pytest.mark.parametrize("size", [(1, 1), (8, 9), (9, 9), (10, 30), (33, 47), (64, 64)])
def test_blocks_of_rows_are_the_enlarged_logits(size):
    torch.manual_seed(0)
    rows, columns = ((side - 1) // 8 + 1 for side in canvas_size(size))
    logits = torch.randn(1, 4, rows, columns)
    whole = enlarge(logits, size)
    assert len(list(enlarge_rows(logits, size, 1))) == max(rows - 1, 1)  # never less than a row of the grid, here no more
    for max_elements in (1, 4 * 8 * size[1] * 2, 2**25):
        blocks = list(enlarge_rows(logits, size, max_elements))
        covered = [row for block, _ in blocks for row in range(*block.indices(size[0]))]
        assert covered == list(range(size[0]))
        torch.testing.assert_close(torch.cat([block for _, block in blocks], dim=2), whole, rtol=0, atol=2e-6)
    expected = naive_bilinear(np.pad(logits[0, 0].double().numpy(), ((0, rows == 1), (0, columns == 1)), mode="edge"),
                              tuple((side - 1) * 8 + 1 + 8 * (side == 1) for side in (rows, columns)))  # fmt: skip
    np.testing.assert_allclose(whole[0, 0].numpy(), expected[: size[0], : size[1]], atol=1e-5)


def test_predict_takes_one_picture_or_a_batch():
    net = deeplabv2("resnet18", 3).eval()
    image = torch.randn(3, 35, 20)
    with torch.no_grad():
        one, batch = predict(net, image), predict(net, image[None])
    assert one.shape == (3, 35, 20)
    assert torch.equal(one, batch[0])


@pytest.mark.parametrize(
    ("size", "canvas"), [((20, 30), (65, 65)), ((1, 1), (33, 9)), ((33, 41), (505, 49)), ((8, 64), (65, 65))]
)
def test_a_grid_that_goes_on_past_the_picture(size, canvas):
    """A fixed canvas: the blocks end with the picture, whatever their height."""
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
    """Against fractions of whole numbers, one position after another; no float64 is made, which mps does not have."""
    scaled = scaled_size(size, scale)
    torch.manual_seed(0)
    small = torch.randn(1, 1, *((side - 1) // 8 + 1 for side in canvas_size(scaled)))
    with NoFloat64():
        grid = predict_grid(lambda x: small, torch.zeros(1, 3, *size), (scale,))
    result = grid[0, 0].double().numpy()

    def taps(side: int, scaled_side: int) -> list[tuple[int, float]]:
        steps = (side - 1) // 8
        return [divmod(Fraction(i * (scaled_side - 1), max(8 * steps, 1)), 1) for i in range(steps + 1)]

    plane = np.pad(small[0, 0].double().numpy(), ((0, 1), (0, 1)))  # what lies behind the last one has weight 0
    for i, (y, part_y) in enumerate(taps(size[0], scaled[0])):
        for j, (x, part_x) in enumerate(taps(size[1], scaled[1])):
            b, a = float(part_y), float(part_x)
            top, bottom = (plane[row, x] * (1 - a) + plane[row, x + 1] * a for row in (y, y + 1))
            assert result[i, j] == pytest.approx(top * (1 - b) + bottom * b, abs=2e-6)


def test_classes_of_a_picture_or_a_batch():
    """The class is that of the largest enlarged logit, and 255 all over a picture with a logit that is not finite."""
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
    """A picture of 24 megapixels: no tensor of all classes at full size is made."""
    sizes = enlarged_sizes(monkeypatch)
    logits = torch.randn(9, 501, 751)
    classes = enlarge_to_classes(logits, (4001, 6001))
    assert classes.shape == (4001, 6001)
    assert (classes[::8, ::8] == logits.argmax(0)).all()
    assert max(sizes) <= 1.3 * 2**25  # a block and the grid row that opens the next
