"""The scores against a pixel-by-pixel count in fractions, and against hand-worked numbers."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from utils.metrics import ConfusionMatrix, mean_iou

pytestmark = pytest.mark.filterwarnings("error")


def naive_scores(labels, predictions, num_classes, ignore_label=255):
    """The six scores as exact fractions (None if absent), counted pixel by pixel and without a matrix."""
    pairs = [(int(a), int(b)) for a, b in zip(labels.reshape(-1), predictions.reshape(-1)) if int(a) != ignore_label]
    class_iou, class_accuracy, weighted = [], [], Fraction(0)
    for c in range(num_classes):
        both = sum(1 for a, b in pairs if a == c and b == c)
        either = sum(1 for a, b in pairs if a == c or b == c)
        labelled = sum(1 for a, _ in pairs if a == c)
        class_iou.append(Fraction(both, either) if either else None)
        class_accuracy.append(Fraction(both, labelled) if labelled else None)
        if labelled:
            weighted += Fraction(labelled, len(pairs)) * class_iou[-1]

    def mean(values):
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    pixel_accuracy = Fraction(sum(1 for a, b in pairs if a == b), len(pairs)) if pairs else None
    frequency_weighted = weighted if pairs else None
    return pixel_accuracy, mean(class_accuracy), mean(class_iou), frequency_weighted, class_iou, class_accuracy


def assert_same(scores, expected):
    def check(value, fraction):
        if fraction is None:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(float(fraction), abs=1e-12)

    check(scores.pixel_accuracy, expected[0])
    check(scores.mean_accuracy, expected[1])
    check(scores.mean_iou, expected[2])
    check(scores.frequency_weighted_iou, expected[3])
    for values, fractions in ((scores.class_iou, expected[4]), (scores.class_accuracy, expected[5])):
        assert values.dtype == np.float64
        assert len(values) == len(fractions)
        for value, fraction in zip(values, fractions):
            check(value, fraction)


def test_hand_worked_example():
    # rows = label, columns = prediction:  [2 1 0]   IoU 0: 2/(3+3-2) = 1/2   accuracy 0: 2/3
    #                                      [1 3 1]   IoU 1: 3/(5+5-3) = 3/7   accuracy 1: 3/5
    #                                      [0 1 1]   IoU 2: 1/(2+2-1) = 1/3   accuracy 2: 1/2
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 255, 255])
    predictions = torch.tensor([0, 0, 1, 0, 1, 1, 1, 2, 1, 2, 0, 2])
    confusion = ConfusionMatrix(3)
    confusion.update(labels, predictions)
    assert confusion.matrix.dtype == torch.int64
    assert confusion.matrix.tolist() == [[2, 1, 0], [1, 3, 1], [0, 1, 1]]
    scores = confusion.scores()
    assert scores.class_iou == pytest.approx([1 / 2, 3 / 7, 1 / 3])
    assert scores.class_accuracy == pytest.approx([2 / 3, 3 / 5, 1 / 2])
    assert scores.pixel_accuracy == pytest.approx(6 / 10)
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 3 / 5 + 1 / 2) / 3)
    assert scores.mean_iou == pytest.approx((1 / 2 + 3 / 7 + 1 / 3) / 3)
    assert scores.frequency_weighted_iou == pytest.approx((3 * 1 / 2 + 5 * 3 / 7 + 2 * 1 / 3) / 10)


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("prediction_type", [torch.uint8, torch.int32, torch.int64])
def test_random_batches_match_the_naive_count(label_type, prediction_type):
    generator = torch.Generator().manual_seed(3)
    confusion, all_labels, all_predictions = ConfusionMatrix(21), [], []
    for shape in ((1, 1), (3, 5, 7), (2, 3, 4, 5), (0, 9), ()):
        labels = torch.randint(0, 21, shape, generator=generator)
        labels[torch.rand(shape, generator=generator) < 0.2] = 255
        predictions = torch.randint(0, 21, shape, generator=generator)
        labels, predictions = labels.to(label_type), predictions.to(prediction_type)
        confusion.update(labels, predictions)
        all_labels.append(labels.reshape(-1))
        all_predictions.append(predictions.reshape(-1))
    assert_same(confusion.scores(), naive_scores(torch.cat(all_labels), torch.cat(all_predictions), 21))


def test_non_contiguous_inputs_are_not_changed():
    labels = torch.tensor([[0, 1, 2], [2, 255, 0]]).t()
    predictions = torch.tensor([[0, 2], [1, 1], [2, 2]])
    before = labels.clone(), predictions.clone()
    confusion = ConfusionMatrix(3)
    confusion.update(labels, predictions)
    assert torch.equal(labels, before[0])
    assert torch.equal(predictions, before[1])
    assert_same(confusion.scores(), naive_scores(labels, predictions, 3))


def test_absent_classes_are_left_out():
    # class 2 is only predicted: IoU 0, accuracy NaN; class 3 is absent: both NaN; class 1 is never predicted: both 0
    labels, predictions = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 2, 0])
    confusion = ConfusionMatrix(4)
    confusion.update(labels, predictions)
    scores = confusion.scores()
    np.testing.assert_array_equal(scores.class_iou, [0.5, 0.0, 0.0, np.nan])
    np.testing.assert_allclose(scores.class_accuracy, [2 / 3, 0.0, np.nan, np.nan])
    assert scores.mean_iou == pytest.approx(0.5 / 3)
    assert scores.mean_accuracy == pytest.approx(1 / 3)
    assert_same(scores, naive_scores(labels, predictions, 4))


@pytest.mark.parametrize("labels", [None, torch.full((2, 3), 255), torch.zeros((0,), dtype=torch.int64)])
def test_nothing_counted_gives_nan(labels):
    confusion = ConfusionMatrix(3)
    if labels is not None:
        confusion.update(labels, torch.zeros_like(labels))
    scores = confusion.scores()
    assert confusion.matrix.sum() == 0
    assert_same(scores, (None, None, None, None, [None] * 3, [None] * 3))
    assert json.loads(json.dumps(scores.as_dict("abc"), allow_nan=False))["mean_iou"] is None
    assert "-" in scores.table("abc")


def test_a_perfect_single_class():
    confusion = ConfusionMatrix(1)
    confusion.update(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert_same(confusion.scores(), (1, 1, 1, 1, [1], [1]))


def test_values_that_occurred():
    confusion = ConfusionMatrix(3)
    assert confusion.present() == []
    confusion.update(torch.tensor([0, 2, 2]), torch.tensor([1, 1, 2]))
    assert confusion.present() == [0, 2]
    confusion.update(torch.tensor([255]), torch.tensor([1]))
    assert confusion.present() == [0, 2, 255]


def test_another_ignore_label_and_predictions_under_it():
    labels, predictions = torch.tensor([11, 11, 255, 0, 1]), torch.tensor([99, -1, 1, 0, 0])
    confusion = ConfusionMatrix(2, ignore_label=11)
    confusion.update(labels, predictions)
    assert confusion.matrix.tolist() == [[1, 0], [1, 0]]
    assert confusion.scores().class_iou.tolist() == [0.5, 0.0]
    assert confusion.present() == [0, 1, 255]


@pytest.mark.parametrize("ignored", [0, 2])
def test_an_ignored_class_is_not_counted(ignored):
    """Its pixels are not counted, predictions of it are errors of the other classes, and no mean includes it."""
    generator = torch.Generator().manual_seed(ignored)
    labels, predictions = torch.randint(0, 3, (2, 40, 30), generator=generator)
    confusion = ConfusionMatrix(3, ignore_label=ignored)
    confusion.update(labels, predictions)
    classes = [i for i in range(3) if i != ignored]
    counted = (labels != ignored).numpy()
    true, predicted = labels.numpy()[counted], predictions.numpy()[counted]
    ious = [((true == i) & (predicted == i)).sum() / ((true == i) | (predicted == i)).sum() for i in classes]
    accuracies = [(predicted[true == i] == i).mean() for i in classes]
    scores = confusion.scores()
    np.testing.assert_allclose(scores.class_iou[classes], ious)
    assert math.isnan(scores.class_iou[ignored])
    assert math.isnan(scores.class_accuracy[ignored])
    assert scores.mean_iou == pytest.approx(np.mean(ious))
    assert scores.mean_accuracy == pytest.approx(np.mean(accuracies))
    assert scores.pixel_accuracy == pytest.approx((true == predicted).mean())
    assert scores.as_dict("abc")["classes"][ignored] == {"id": ignored, "name": "abc"[ignored], "iou": None, "accuracy": None}
    assert scores.table("abc").splitlines()[2 + ignored].split() == [str(ignored), "abc"[ignored], "-", "-"]
    assert confusion.present() == [*classes, 255]


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 3, 1], [0, 0, 1], "1 pixels have a label and 0 a prediction outside 0..2"),
        ([-1, 254, 1], [0, 0, 1], "2 pixels have a label and 0"),
        ([0, 2, 1], [0, 255, -1], "0 pixels have a label and 2 a prediction"),
        ([0, 1, 3], [3, 1, 0], "1 pixels have a label and 1 a prediction"),  # 3 is the first invalid index
        # for these two, label * C + prediction alone would be inside the matrix
        ([1, 1], [-1, -2], "0 pixels have a label and 2"),
        ([-1, 3], [5, -4], "2 pixels have a label and 0"),
    ],
)
def test_values_out_of_range_are_reported_and_not_counted(labels, predictions, message):
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor(labels), torch.tensor(predictions))
    good = sum(1 for a, b in zip(labels, predictions) if 0 <= a < 3 and 0 <= b < 3)
    assert int(confusion.matrix.sum()) == good
    with pytest.raises(ValueError, match=message):
        confusion.scores()


def test_refused_inputs():
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion.update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"predictions are torch\.float32"):
        confusion.update(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels are torch\.bool"):
        confusion.update(torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_classes is 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        confusion.scores().table(["a", "b"])
    with pytest.raises(ValueError, match="4 class names for 3 classes"):
        confusion.scores().as_dict("abcd")


def test_counts_of_two_processes_are_summed_in_place():
    first, second, whole = ConfusionMatrix(3), ConfusionMatrix(3), ConfusionMatrix(3)
    batches = torch.tensor([[0, 1, 2, 255]]), torch.tensor([[2, 2, 1, 0]])
    predictions = torch.tensor([[0, 1, 1, 1]])
    for part, labels in zip((first, second), batches):
        part.update(labels, predictions)
        whole.update(labels, predictions)
    first.counts += second.counts
    assert torch.equal(first.matrix, whole.matrix)
    assert first.scores().mean_iou == whole.scores().mean_iou


def test_table_and_dict():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))
    scores = confusion.scores()
    lines = scores.table(["background", "cat", "a sofa"]).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[2].split() == ["0", "background", "66.67", "66.67"]
    assert lines[3].split() == ["1", "cat", "50.00", "100.00"]
    assert lines[4].split() == ["2", "a", "sofa", "-", "-"]
    assert lines[6].split() == ["pixel", "accuracy", "75.00"]
    assert [line.split()[-1] for line in lines[7:]] == ["83.33", "58.33", "62.50"]
    palette = np.arange(768, dtype=np.uint8).reshape(256, 3)
    colored = scores.table(["background", "cat", "a sofa"], palette).splitlines()
    assert colored[3] == "\033[48;2;3;4;5m  \033[0m " + lines[3]
    plain = [re.sub("\033\\[[0-9;]*m", "", line) for line in colored]
    assert plain == ["   " + line for line in lines]
    values = json.loads(json.dumps(scores.as_dict(["background", "cat", "a sofa"]), allow_nan=False))
    assert values["pixel_accuracy"] == 0.75
    assert values["classes"][1] == {"id": 1, "name": "cat", "iou": 0.5, "accuracy": 1.0}
    assert values["classes"][2] == {"id": 2, "name": "a sofa", "iou": None, "accuracy": None}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_update_has_no_host_sync():
    labels, predictions = torch.randint(0, 21, (2, 65, 97), device="cuda"), torch.randint(0, 21, (2, 65, 97), device="cuda")
    confusion = ConfusionMatrix(21, "cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion.update(labels, predictions)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert_same(confusion.scores(), naive_scores(labels.cpu(), predictions.cpu(), 21))


# ---- mean_iou(labels, predictions, num_classes)


def test_mean_iou_of_arrays_and_tensors():
    """Label 0 (3 pixels): IoU 2/4; label 1: 1/2; class 2 is only predicted: 0; 255 is not counted."""
    labels = np.array([[0, 0, 0], [1, 1, 255]], dtype=np.uint8)
    predictions = np.array([[0, 0, 2], [0, 1, 1]], dtype=np.uint8)
    expected = pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert mean_iou(labels, predictions, 3) == expected
    assert mean_iou(labels[:, ::-1], predictions[:, ::-1], 21) == expected
    assert mean_iou(torch.from_numpy(labels), predictions.astype(np.int64), 3) == expected
    assert math.isnan(mean_iou(np.full((2, 2), 255), np.zeros((2, 2), int), 3))


def test_wrong_arrays_are_refused():
    labels = np.zeros((2, 3), np.uint8)
    for wrong, words in ((labels[:1], "differ in shape"), (labels / 2, "expected integer"), (labels + 9, "outside 0..2")):
        with pytest.raises(ValueError, match=words):
            mean_iou(labels, wrong, 3)
    with pytest.raises(TypeError, match=r"labels are a ndarray; expected a tensor .mean_iou accepts arrays"):
        ConfusionMatrix(3).update(labels, torch.zeros(2, 3, dtype=torch.uint8))
