import colorsys
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    MEAN_BGR,
    ColorJitter,
    Pad,
    RandomCrop,
    RandomMirror,
    RandomScale,
    StepSampler,
    TrainTransform,
    VOCSegmentation,
    read_ids,
    to_input,
)
from dataset.transforms import training_transforms
from tests.helpers import TOY_CLASSES
from utils.loader import make_loader


class Draws:
    """A stand-in for a generator that returns given numbers."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high):
        return self.values.pop(0)

    def random(self):
        return self.values.pop(0)

    def integers(self, stop):
        value = self.values.pop(0)
        assert 0 <= value < stop
        return value


def pad_crop(size):
    return lambda image, label, rng: Pad(size)(*RandomCrop(size)(image, label, rng), rng)


def coordinates(height, width):
    """An image and a mask whose values are their positions, so the result shows the geometry."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, rows], axis=2), rows


def test_horizontal_flip():
    image, label = coordinates(5, 7)
    image[..., 2] = label[:] = image[..., 1]
    for draw, expected in ((0.49, np.arange(6, -1, -1)), (0.5, np.arange(7))):
        flipped, flipped_label = RandomMirror()(image, label, Draws(draw))
        assert (flipped_label == expected).all()
        assert (flipped[..., 1] == expected).all()


@pytest.mark.parametrize("factor", [0.5, 0.73, 1.0, 1.31, 1.5, 0.01])
def test_scale_keeps_image_and_mask_aligned(factor):
    """The mask is sampled at the same half-pixel centres as the bilinear image; computed pixel by pixel."""
    height, width = 37, 52
    image, label = coordinates(height, width)
    scaled, scaled_label = RandomScale()(image, label, Draws(factor))
    expected = (max(1, round(height * factor)), max(1, round(width * factor)))
    assert scaled.shape[:2] == scaled_label.shape == expected
    for i in range(expected[0]):
        centre = (i + 0.5) * height / expected[0] - 0.5
        assert abs(int(scaled_label[i, 0]) - centre) <= 0.5 + 1e-6
        assert abs(int(scaled[i, 0, 0]) - min(max(centre, 0), height - 1)) <= 1  # OpenCV rounds to 8 bits


def test_scale_keeps_label_values():
    label = np.array([[0, 255], [20, 3]], dtype=np.uint8).repeat(9, 0).repeat(9, 1)
    _, scaled = RandomScale()(np.zeros((18, 18, 3), np.uint8), label, Draws(1.37))
    assert set(np.unique(scaled)) == {0, 3, 20, 255}


def test_scale_range_is_uniform():
    rng = np.random.default_rng(0)
    sides = [RandomScale(0.5, 1.5)(*coordinates(200, 10), rng)[1].shape[0] for _ in range(400)]
    assert min(sides) >= 100
    assert max(sides) <= 300
    assert abs(np.mean(sides) - 200) < 10
    with pytest.raises(ValueError, match=r"1\.5\.\.0\.5"):
        RandomScale(1.5, 0.5)


def test_published_scales_and_invalid_ranges():
    assert (RandomScale().low, RandomScale().high) == (0.5, 1.5)
    for low, high in ((0, 1), (-1, 1), (1.1, 1)):
        with pytest.raises(ValueError, match=f"the scale range is {low}..{high}; expected 0 < low <= high"):
            RandomScale(low, high)


def test_crop_inside_and_padding_at_the_bottom_right():
    image, label = coordinates(10, 12)
    crop, crop_label = pad_crop((4, 5))(image, label, Draws(6, 7))
    assert crop_label[0, 0] == 6
    assert crop_label.shape == (4, 5)
    assert (crop[..., 0] == crop_label).all()
    assert crop[0, 0, 1] == 7
    crop, crop_label = pad_crop((13, 12))(image, label, Draws(0, 0))
    assert (crop_label[:10] == label).all()
    assert (crop_label[10:] == 255).all()
    assert (crop[10:] == [104, 117, 123]).all()  # the mean colour in whole levels
    crop, crop_label = pad_crop((4, 20))(image, label, Draws(3, 0))
    assert (crop_label[:, :12] == label[3:7]).all()
    assert (crop_label[:, 12:] == 255).all()


def test_every_crop_position_occurs():
    rng = np.random.default_rng(0)
    tops = {int(pad_crop((3, 3))(*coordinates(6, 3), rng)[1][0, 0]) for _ in range(100)}
    assert tops == {0, 1, 2, 3}


def test_to_input_subtracts_the_mean_once():
    image = np.array([[[0, 128, 255]], [[104, 117, 123]]], dtype=np.uint8)
    result = to_input(image)
    assert result.shape == (3, 2, 1)
    assert result.dtype == torch.float32
    expected = np.array([[0, 104], [128, 117], [255, 123]]) - np.array(MEAN_BGR)[:, None]
    np.testing.assert_allclose(result[..., 0].numpy(), expected, atol=1e-4)


def test_the_input_of_a_batch_is_that_of_its_images():
    """Bit-identical to subtraction in float32, in channels-last format; the bytes do not change."""
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    batch = to_input(torch.from_numpy(images.copy()))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = images.astype(np.float32) - np.asarray(MEAN_BGR, dtype=np.float32)
    assert (batch.numpy() == expected.transpose(0, 3, 1, 2)).all()
    assert all(torch.equal(one, to_input(image)) for one, image in zip(batch, images))


def test_a_view_with_reversed_channels_is_accepted():
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    assert torch.equal(to_input(image[..., ::-1]), to_input(image[..., ::-1].copy()))


def test_other_input_than_images_is_refused():
    good = np.zeros((3, 4, 3), np.uint8)
    for wrong, found in (
        (Image.fromarray(good), "Image of no numbers"),
        (good.astype(np.float32), "ndarray of float32[3, 4, 3]"),
        (torch.zeros(2, 3, 4, 3), "Tensor of torch.float32[2, 3, 4, 3]"),
        (np.zeros((3, 4, 4), np.uint8), "ndarray of uint8[3, 4, 4]"),
    ):
        with pytest.raises(
            TypeError, match=rf"the image is a {re.escape(found)}.*; expected uint8 .* read_image\(path\) reads"
        ):
            to_input(wrong)


def test_options_choose_the_transforms_in_order():
    off = {
        "random_scale": False,
        "random_mirror": False,
        "scale_range": (0.7, 1.3),
        "input_size": (9, 17),
        "color_jitter": None,
    }
    crop, pad = training_transforms(SimpleNamespace(**off))
    assert (type(crop), crop.size, type(pad), pad.size) == (RandomCrop, (9, 17), Pad, (9, 17))
    on = off | {"random_scale": True, "random_mirror": True, "color_jitter": (0.1, 0.2, 0.3, 0.4)}
    scale, *others = training_transforms(SimpleNamespace(**on))
    assert (scale.low, scale.high) == (0.7, 1.3)
    assert [type(each) for each in others] == [RandomMirror, RandomCrop, ColorJitter, Pad]


def blend(one, other, factor):
    """``one`` + factor * (``other`` - ``one``) rounded to whole levels, as in Pillow."""
    return np.clip(one + np.float32(factor) * (other.astype(np.float32) - one), 0, 255).astype(np.uint8)


def grey(rgb):
    return (rgb.astype(int) @ [19595, 38470, 7471] + 32768) >> 16  # ITU-R 601-2


def turned(rgb, share):
    """The hue of every pixel shifted, with Python's own colour conversion."""
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in (rgb.reshape(-1, 3) / 255).tolist()]
    return np.array([colorsys.hsv_to_rgb((h + share) % 1, s, v) for h, s, v in hsv]).reshape(rgb.shape) * 255


def naive_change(kind, rgb, factor):
    """Brightness, contrast, saturation or hue."""
    if kind == 3:
        return turned(rgb, factor)
    level = grey(rgb)
    return blend((0, int(level.mean() + 0.5), level[..., None])[kind], rgb, factor)


@pytest.mark.parametrize("strengths", [(0.4, 0, 0, 0), (0, 0.9, 0, 0), (0, 0, 2.0, 0), (0, 0, 0, 0.5), (0.4, 0.5, 0.6, 0)])
def test_colour_jitter_against_a_naive_one(strengths):
    """On a BGR image, for several draws; the order is drawn before the factors, and the label does not change."""
    noise = np.random.default_rng(5).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    label = np.arange(13 * 17, dtype=np.uint8).reshape(13, 17)
    orders = set()
    for seed in range(8):
        image, same = ColorJitter(*strengths)(noise.copy(), label, np.random.default_rng(seed))
        rng, rgb = np.random.default_rng(seed), noise[:, :, ::-1]
        order = rng.permutation(4).tolist()
        for k in order:
            if strengths[k]:
                low = -strengths[3] if k == 3 else max(0, 1 - strengths[k])
                rgb = naive_change(k, rgb, rng.uniform(low, strengths[3] if k == 3 else 1 + strengths[k]))
        apart = np.abs(image[:, :, ::-1].astype(float) - rgb)
        assert apart.mean() <= (3 if strengths[3] else 0)  # Pillow's hue has 256 values
        assert same is label
        orders.add(tuple(order))
    assert len(orders) > 4


def test_jitter_changes_no_padding_and_depends_on_the_draw_alone():
    image, label = np.full((5, 5, 3), 200, np.uint8), np.zeros((5, 5), np.uint8)
    options = {"random_scale": False, "random_mirror": False, "color_jitter": (0.4, 0.4, 0.4, 0.1), "input_size": (9, 7)}
    transform = TrainTransform(1, training_transforms(SimpleNamespace(**options)))
    first, again, other = (transform(image, label, draw) for draw in (3, 3, 4))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
    assert (first.image[5:] == torch.tensor([round(value) for value in MEAN_BGR])).all()
    assert (first.image[:5, :5] == first.image[0, 0]).all()


@pytest.fixture
def toy_training_set(toy_voc):
    transform = TrainTransform(7, [RandomScale(), RandomMirror(), RandomCrop((33, 41)), Pad((33, 41))])
    return VOCSegmentation(
        toy_voc, read_ids(toy_voc / "ImageSets/Segmentation/val.txt"), num_classes=TOY_CLASSES, transform=transform
    )


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_batches_do_not_depend_on_the_number_of_workers(toy_training_set):
    def batches(workers, start=0):
        sampler = StepSampler(len(toy_training_set), 4, seed=7, start=start)
        return take(make_loader(toy_training_set, sampler, workers, torch.device("cpu")), 5 - start)

    reference = batches(0)
    assert reference[0].image.shape == (4, 33, 41, 3)
    assert reference[0].label.shape == (4, 33, 41)
    assert reference[0].image.dtype == reference[0].label.dtype == torch.uint8
    for workers, start in ((1, 0), (3, 0), (0, 2), (1, 3)):
        for crop, other in zip(reference[start:], batches(workers, start)):
            assert all(map(torch.equal, crop, other))


def test_a_crop_knows_the_labels_of_the_whole_image(toy_voc):
    """Not only those in the crop, with the values after reading."""
    ids = read_ids(toy_voc / "ImageSets/Segmentation/val.txt")
    data = VOCSegmentation(
        toy_voc, ids, num_classes=TOY_CLASSES, ignore_label=2, transform=TrainTransform(7, [RandomCrop((1, 1)), Pad((1, 1))])
    )
    present = data[0, 0].present
    label = np.array(Image.open(toy_voc / "SegmentationClassAug" / f"{ids[0]}.png"))
    assert present.nonzero().flatten().tolist() == sorted(set(np.unique(label).tolist()) - {2} | {255})


def test_each_draw_of_an_image_differs(toy_training_set):
    first, second = toy_training_set[0, 0], toy_training_set[0, 1]
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], toy_training_set[0, 0][0])


def test_every_epoch_has_every_image_once():
    stream = iter(StepSampler(7, 2, seed=1))
    draws = [pair for _ in range(21) for pair in next(stream)]
    assert [draw for _, draw in draws] == list(range(42))
    passes = [[index for index, _ in draws[k : k + 7]] for k in range(0, 42, 7)]
    assert all(sorted(indices) == list(range(7)) for indices in passes)
    assert len({tuple(indices) for indices in passes}) > 1
    other = iter(StepSampler(7, 2, seed=2))
    assert [pair for _ in range(21) for pair in next(other)] != draws


def test_shards_are_parts_of_one_stream():
    whole = StepSampler(5, 4, seed=3)
    parts = [StepSampler(5, 4, seed=3, shard=shard, num_shards=2) for shard in range(2)]
    for number in (0, 1, 9):
        assert whole.batch(number) == parts[0].batch(number) + parts[1].batch(number)
    assert next(iter(StepSampler(5, 4, seed=3, start=9))) == whole.batch(9)


@pytest.mark.parametrize(("length", "batch_size", "shards"), [(0, 1, 1), (3, 0, 1), (3, 4, 3)])
def test_impossible_batches_are_refused(length, batch_size, shards):
    with pytest.raises(ValueError, match=r"empty|does not divide"):
        StepSampler(length, batch_size, seed=0, num_shards=shards)
