"""Properties for any sizes, batches, labels and names, against a naive derivation; every run has the same examples."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset import MEAN_BGR, Pad, RandomCrop, RandomMirror, RandomScale, StepSampler, TrainTransform
from deeplab.inference import canvas_size
from deeplab.loss import resize_labels
from deeplab.multiscale import scaled_size
from deeplab.weights import WeightsError
from deeplab.weights.names import (
    FROM_KAZUTO,
    canonical_from_caffe,
    find_backbone,
    head_shape,
    kazuto_from_canonical,
    renamed,
    strip_wrappers,
)
from tests.helpers_published import caffe_blocks, canonical_modules
from utils.metrics import ConfusionMatrix
from utils.training.optimizer import poly_lr

few = settings(deadline=None, max_examples=40, derandomize=True, database=None)
side = st.integers(1, 60)
seed = st.integers(0, 2**32)


def pair(height, width, seed):
    """An image in which all pixels have different colours, and a mask that is one of its channels."""
    rng = np.random.default_rng(seed)
    image = np.stack([*np.indices((height, width)), rng.integers(0, 250, (height, width))], axis=-1).astype(np.uint8)
    return image, image[..., 2].copy()


# Transforms


@few
@given(side, side, side, side, seed)
@example(7, 7, 7, 7, 0)
@example(1, 1, 1, 1, 0)
def test_a_crop_is_part_of_the_padded_image(height, width, crop_height, crop_width, seed):
    image, label = pair(height, width, seed)
    size, rng = (crop_height, crop_width), np.random.default_rng(seed)
    cut, cut_label = Pad(size)(*RandomCrop(size)(image, label, rng), rng)
    assert cut.shape == (crop_height, crop_width, 3)
    assert cut_label.shape == (crop_height, crop_width)
    top, left = cut[0, 0, :2].tolist()
    for row in range(crop_height):
        for column in range(crop_width):
            if (y := top + row) < height and (x := left + column) < width:
                assert cut[row, column].tolist() == image[y, x].tolist()
                assert cut_label[row, column] == label[y, x]
            else:  # only if the image is too small, and never at the left or the top
                assert crop_height > height or crop_width > width
                assert cut[row, column].tolist() == [round(mean) for mean in MEAN_BGR]
                assert cut_label[row, column] == 255
    # nothing is padded that the image could have filled
    assert (cut_label != 255).sum() == min(height, crop_height) * min(width, crop_width)


@few
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0.05, 2), seed)
def test_image_and_mask_keep_one_size_and_the_mask_gets_no_new_label(height, width, factor, seed):
    image, label = pair(height, width, seed)
    scaled, scaled_label = RandomScale(factor, factor)(image, label, np.random.default_rng(seed))
    expected = tuple(max(1, round(n * factor)) for n in (height, width))
    assert scaled.shape == (*expected, 3)
    assert scaled_label.shape == expected
    for row in range(expected[0]):
        for column in range(expected[1]):  # nearest to the pixel's centre; a tie may go either way
            near = [
                {math.floor((Fraction(2 * i + 1, 2) * n / m) - Fraction(k, 10**6)) for k in (-1, 0, 1)}
                for i, n, m in ((row, height, expected[0]), (column, width, expected[1]))
            ]
            assert scaled_label[row, column] in {label[y, x] for y in near[0] if y < height for x in near[1] if x < width}


@few
@given(side, side, side, side, seed, st.integers(0, 10**9))
def test_a_sample_is_a_function_of_seed_and_draw(height, width, crop_height, crop_width, seed, draw):
    image, label = pair(height, width, seed)
    transforms = [RandomScale(), RandomMirror(), RandomCrop((crop_height, crop_width)), Pad((crop_height, crop_width))]
    first, second = (TrainTransform(seed, transforms)(image, label, draw) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert first.present.shape == (256,)
    assert first.present.nonzero().flatten().tolist() == sorted(set(label.flatten().tolist()))
    assert set(first.label.unique().tolist()) <= {*label.flatten().tolist(), 255}


# Sampler


@few
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), seed, st.integers(0, 30))
def test_any_batch_shards_and_start_give_one_stream(length, share, shards, seed, start):
    batch = share * shards
    samplers = [StepSampler(length, batch, seed, start, shard, shards) for shard in range(shards)]
    streams = [iter(sampler) for sampler in samplers]
    got = [[next(stream) for stream in streams] for _ in range(4)]
    draws = list(range((start + 4) * batch))
    order = []  # the whole stream by definition: one permutation per epoch
    while len(order) < len(draws):
        order += np.random.default_rng((seed, len(order) // length, 1)).permutation(length).tolist()
    expected = list(zip(order, draws))
    for number, parts in enumerate(got, start):
        assert [entry for part in parts for entry in part] == expected[number * batch : (number + 1) * batch]
        assert {len(part) for part in parts} == {share}
    for begin in range(0, len(draws) - length + 1, length):  # each epoch has each image once
        assert sorted(order[begin : begin + length]) == list(range(length))


# Metrics


@few
@given(st.integers(1, 6), st.integers(0, 80), seed, st.one_of(st.none(), st.integers(0, 7)))
@example(1, 0, 0, None)
def test_scores_equal_a_naive_count(classes, pixels, seed, ignore):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes), 255, *([ignore] if ignore is not None else [])], pixels)
    predictions = rng.integers(0, classes, pixels)
    matrix = ConfusionMatrix(classes, ignore_label=255 if ignore is None else ignore)
    for part in np.array_split(np.arange(pixels), 3):
        matrix.update(torch.from_numpy(labels[part]), torch.from_numpy(predictions[part]))
    pairs = Counter((t, p) for t, p in zip(labels.tolist(), predictions.tolist()) if t not in (255, ignore))
    scores = matrix.scores()
    ious, accuracies, weighted = [], [], Fraction(0)
    for c in range(classes):
        hit = pairs[c, c]
        labelled = sum(n for (t, _), n in pairs.items() if t == c)
        either = sum(n for (t, p), n in pairs.items() if c in (t, p))
        iou = Fraction(hit, either) if either and c != ignore else None
        assert scores.class_iou[c] == float(iou) if iou is not None else np.isnan(scores.class_iou[c])
        assert scores.class_accuracy[c] == hit / labelled if labelled else np.isnan(scores.class_accuracy[c])
        ious += [iou] if iou is not None else []
        accuracies += [Fraction(hit, labelled)] if labelled else []
        weighted += labelled * (iou or 0)
    total = pairs.total()
    for found, expected in (
        (scores.mean_iou, sum(ious) / len(ious) if ious else math.nan),
        (scores.mean_accuracy, sum(accuracies) / len(accuracies) if accuracies else math.nan),
        (scores.pixel_accuracy, sum(n for (t, p), n in pairs.items() if t == p) / total if total else math.nan),
        (scores.frequency_weighted_iou, weighted / total if total else math.nan),
    ):
        np.testing.assert_allclose(found, float(expected), rtol=1e-12)


# Sizes


@few
@given(st.integers(1, 700), st.integers(1, 90), seed)
@example(321, 41, 0)
@example(5, 1, 0)
def test_labels_are_the_nearest_of_the_aligned_grid(source, target, seed):
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, source, 2), dtype=np.uint8))
    small = resize_labels(labels, (target, 2))
    for row in range(target):
        exact = Fraction(row * (source - 1), target - 1) if target > 1 else Fraction(0)
        nearest = min(range(source), key=lambda y: (abs(y - exact), -y))  # halves are rounded up
        assert small[0, row].tolist() == labels[0, nearest].tolist()


@few
@given(st.integers(1, 4000), st.sampled_from([Fraction(1, 2), Fraction(3, 4), Fraction(1), Fraction(5, 4), Fraction(3, 2)]))
def test_scaled_sizes_keep_the_grid(side, scale):
    scaled, other = scaled_size((side, 1), float(scale))
    assert other == 1
    assert abs((scaled - 1) - (side - 1) * scale) <= Fraction(1, 2)
    assert (side - 1) * scale % 1 == 0 or scaled != side or scale == 1 or side < 3
    (canvas, _) = canvas_size((side, 1))
    assert side <= canvas < side + 8
    assert canvas % 8 == 1
    if (side - 1) % 8 == 0 and scale in (Fraction(1, 2), Fraction(3, 4)):  # the published case: the scaled grid is exact
        assert scaled - 1 == (side - 1) * scale


@few
@given(st.floats(1e-6, 1), st.integers(1, 1000), st.floats(0.1, 3), st.data())
def test_the_learning_rate_falls_from_its_base_to_zero(base, total, power, data):
    step = data.draw(st.integers(0, total - 1))
    rate = poly_lr(base, step, total, power)
    assert math.isclose(rate, base * math.exp(power * math.log((total - step) / total)), rel_tol=1e-9)
    assert poly_lr(base, 0, total, power) == base
    assert poly_lr(base, total, total, power) == 0


# Names

OURS = [f"{module}.{leaf}" for module, _ in canonical_modules("resnet101") for leaf in ("weight", "running_var")]
OURS += [f"layer5.conv2d_list.{k}.{leaf}" for k in range(4) for leaf in ("weight", "bias")]


@few
@given(st.sampled_from(OURS))
def test_kazuto1011s_names_and_ours_are_one_to_one(key):
    theirs = kazuto_from_canonical(key)
    assert theirs.startswith("base.")
    assert renamed(theirs.removeprefix("base."), FROM_KAZUTO) == key
    assert [other for other in OURS if kazuto_from_canonical(other) == theirs] == [key]


@few
@given(st.sampled_from(["resnet50", "resnet101", "resnet152"]), st.data())
def test_caffes_names_are_found_by_position(backbone, data):
    stage = data.draw(st.integers(0, 3))
    block = data.draw(st.integers(0, len(caffe_blocks(backbone)[stage]) - 1))
    branch = data.draw(st.sampled_from(["2a", "2b", "2c", "1"]))
    name = f"{caffe_blocks(backbone)[stage][block]}_branch{branch}"
    unit = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3"), "1": ("downsample.0", "downsample.1")}[
        branch
    ]
    where = f"layer{stage + 1}.{block}"
    assert canonical_from_caffe(f"res{name}") == f"{where}.{unit[0]}"
    assert canonical_from_caffe(f"bn{name}") == canonical_from_caffe(f"scale{name}") == f"{where}.{unit[1]}"


@few
@given(st.text("abcdefgh_.0123", max_size=20))
def test_a_name_of_another_net_is_unknown(text):
    assert renamed(f"x{text}", FROM_KAZUTO) is None
    assert canonical_from_caffe(f"x{text}") is None


@few
@given(
    st.lists(st.sampled_from(["module.", "_orig_mod.", "Scale.", "base."]), max_size=4), st.sampled_from(["", "net.", "a.b.c."])
)
def test_any_prefix_is_removed(wrappers, outside):
    names = [f"{module}.weight" for module, _ in canonical_modules("resnet18")]
    prefix = outside + "".join(wrappers)
    assert strip_wrappers(prefix + name for name in names) == {prefix + name: name for name in names}


def test_a_prefix_of_some_names_is_kept():
    for names in (["a.layer1.0.conv1.weight", "b.layer1.0.conv1.weight"], ["a.layer1.0.conv1.weight", "conv1.weight"]):
        assert strip_wrappers(names) == {name: name for name in names}


def test_a_missing_stage_has_no_blocks():
    state = {f"{module}.weight": torch.zeros(()) for module, _ in canonical_modules("resnet18")}
    assert find_backbone(state) == "resnet18"
    assert head_shape({}) == (0, 0)
    with pytest.raises(WeightsError, match="it has 2, 2, 0, 2 basic blocks"):
        find_backbone({name: value for name, value in state.items() if not name.startswith("layer3.")})
