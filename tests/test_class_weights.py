import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DatasetError, VOCSegmentation, read_ids
from deeplab import single_scale_loss
from tests.helpers import TOY_CLASSES
from tests.helpers_runs import SCRATCH, equal, model, stopping, train
from utils.command import UserError
from utils.training import class_weights
from utils.training.class_weights import balanced_weights, count_labels, read_weights

BALANCED = [*SCRATCH, "--num-steps", "3", "--class-weights", "balanced"]


def naive_weights(toy_voc) -> list[float]:
    """numpy.unique over the labels of the train list: all pixels / (number of classes * pixels of the class)."""
    ids = (toy_voc / "ImageSets/Segmentation/train.txt").read_text().split()
    labels = [np.array(Image.open(toy_voc / f"SegmentationClassAug/{name}.png")).ravel() for name in ids]
    values, counts = np.unique(np.concatenate(labels), return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist()))
    pixels.pop(255)
    assert len(pixels) == TOY_CLASSES
    return [sum(pixels.values()) / (TOY_CLASSES * pixels[c]) for c in range(TOY_CLASSES)]


def test_balanced_weights_by_hand():
    assert balanced_weights([2, 6, 0, 4]) == [2.0, 12 / 18, 1.0, 1.0]
    assert balanced_weights([0, 0]) == [1.0, 1.0]
    assert balanced_weights([1, 999_999])[0] == 500_000  # the same share of the loss as the other class


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_are_counted(workers, toy_voc):
    """Ignored pixels do not count. An image that is twice on the list counts twice, as it is drawn twice."""
    ids = read_ids(toy_voc / "ImageSets/Segmentation/train.txt")
    data = VOCSegmentation(toy_voc, [*ids, ids[0]], num_classes=TOY_CLASSES, ignore_label=2)
    labels = [np.array(Image.open(data.label_path(name))) for name in data.ids]
    expected = [sum(int((label == value).sum()) for label in labels) for value in (0, 1, 3)]
    found = count_labels(data, workers)
    assert found[[0, 1, 3]].tolist() == expected
    assert found[2] == 0
    assert found.sum() == sum(label.size for label in labels)


def test_a_file_of_weights(tmp_path):
    path = tmp_path / "weights.txt"
    path.write_text("0.5\n2\r\n\n0\n1e1")
    assert read_weights(path, 4) == [0.5, 2.0, 0.0, 10.0]
    for text, words in {
        "1 2 3": "holds 3 numbers; expected 4, one per class",
        "1 2 3 x": "could not convert string to float: 'x'; expected one number per class",
        "1 2 3 nan": "expected finite numbers of at least 0",
        "1 2 3 -1": "expected finite numbers of at least 0",
        "0 0 0 0": "not all of them 0",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_weights(path, 4)
    with pytest.raises(DatasetError, match="the class weights"):
        read_weights(tmp_path / "lost.txt", 4)


@pytest.mark.usefixtures("thin_nets")
def test_balanced_equals_a_file_of_its_weights_and_is_counted_once(toy_voc, tmp_path, monkeypatch, capsys):
    train(toy_voc, tmp_path / "plain", *SCRATCH, "--num-steps", "3")
    train(toy_voc, tmp_path / "balanced", *BALANCED)
    weights = naive_weights(toy_voc)
    assert f"class weights: balanced, {min(weights):.3g} to {max(weights):.3g}" in capsys.readouterr().out
    found = torch.load(tmp_path / "balanced/last.ckpt", weights_only=True)["class_weights"]
    assert found == pytest.approx(weights, rel=1e-12)
    whole = model(tmp_path / "balanced/VOC12_scenes_3.pth")
    assert not equal(whole, model(tmp_path / "plain/VOC12_scenes_3.pth"))
    (tmp_path / "weights.txt").write_text("\n".join(map(repr, found)))
    of_file = [*BALANCED[:-1], str(tmp_path / "weights.txt")]
    train(toy_voc, tmp_path / "file", *of_file, loss=stopping(single_scale_loss, 2))
    train(toy_voc, tmp_path / "stopped", *BALANCED, loss=stopping(single_scale_loss, 2))

    monkeypatch.setattr(class_weights, "count_labels", lambda *args: 1 / 0)
    train(toy_voc, tmp_path / "stopped", *BALANCED, "--resume")
    assert equal(model(tmp_path / "stopped/VOC12_scenes_3.pth"), whole)
    with pytest.raises(UserError, match=r"--class-weights balanced -> other.txt"):
        train(toy_voc, tmp_path / "stopped", "--resume", "--class-weights", "other.txt")
    (tmp_path / "weights.txt").write_text("1 2 3 4")
    with pytest.raises(UserError, match=r"weights.txt holds other class weights than when the run was begun"):
        train(toy_voc, tmp_path / "file", *of_file, "--resume")
    (tmp_path / "weights.txt").unlink()
    train(toy_voc, tmp_path / "file", "--resume")
    assert equal(model(tmp_path / "file/VOC12_scenes_3.pth"), whole)


@pytest.mark.usefixtures("thin_nets")
def test_class_weights_and_the_users_own_loss(toy_voc, tmp_path):
    """A loss with **options gets the weights; a loss without a parameter for them is refused."""
    train(toy_voc, tmp_path / "a", *BALANCED, loss=with_options)
    assert with_options.seen == pytest.approx(naive_weights(toy_voc), rel=1e-6)
    assert train(toy_voc, tmp_path / "b", *SCRATCH, "--num-steps", "1", loss=without_weights) == 0
    with pytest.raises(UserError, match=r"test_class_weights\.without_weights has no parameter class_weights; add \*\*options"):
        train(toy_voc, tmp_path / "c", *BALANCED, loss=without_weights)


def with_options(net, images, labels, **options):
    with_options.seen = options["class_weights"].tolist()
    return {"loss": net(images).mean()}


def without_weights(net, images, labels, size, aux_weight):
    return {"loss": net(images).mean()}
