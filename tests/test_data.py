"""From options to a data set: the list that is read, and what is compared between processes."""

import pytest

from dataset import DatasetError
from tests.helpers import TOY_CLASSES
from utils.data import layout_words, list_of, open_dataset, what_is_compared
from utils.options import Options


@pytest.fixture
def args(toy_voc) -> Options:
    places = {"data_dir": str(toy_voc), "data_list": None, "image_dir": "JPEGImages", "label_dir": None}
    return Options({"dataset": "voc", "ignore_label": None, **places})


def write(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def test_the_list_of_a_split(args, toy_voc):
    assert list_of(args, "train") == toy_voc / "ImageSets/Segmentation/train.txt"
    assert list_of(args, "val") == toy_voc / "ImageSets/Segmentation/val.txt"
    more = write(toy_voc / "ImageSets/SegmentationAug/train_aug.txt", "toy_0")
    assert list_of(args, "train") == more
    mine = write(toy_voc / "mine.txt", "toy_1")
    assert list_of(args.replace(data_list="mine.txt"), "train") == list_of(args.replace(data_list=str(mine)), "val") == mine
    with pytest.raises(DatasetError, match=r"test\.txt does not exist; for the 19 classes of Cityscapes pass --dataset city"):
        list_of(args, "test", 19)


def test_missing_files_are_reported_before_reading(args, toy_voc):
    (toy_voc / "SegmentationClassAug/toy_2.png").unlink()
    with pytest.raises(DatasetError, match="no label for toy_2"):
        open_dataset(args, "train", TOY_CLASSES)
    data, path = open_dataset(args.replace(data_list=str(write(toy_voc / "some.txt", "toy_0"))), "train", TOY_CLASSES)
    assert (data.ids, path, data.ignore_label) == (["toy_0"], toy_voc / "some.txt", 255)


def test_files_are_compared_not_their_spelling(args, toy_voc):
    def compared(*lines):
        words = args.replace(data_list=str(write(toy_voc / "list.txt", *lines)))
        return what_is_compared(open_dataset(words, "train", TOY_CLASSES)[0])

    pair = "/JPEGImages/toy_0.jpg /SegmentationClassAug/toy_0.png"
    assert compared("toy_0", "toy_1") == compared(pair, "toy_1") != compared("toy_1", pair)
    (toy_voc / "SegmentationClassAug/toy_2.png").rename(toy_voc / "SegmentationClassAug/other.png")
    assert compared("toy_0") != compared(pair.replace("toy_0.png", "other.png"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"image_dir": "a b", "label_dir": "masks"}, ["--image-dir", "a b", "--label-dir", "masks"]),
        ({"dataset": "cityscapes", "image_dir": "leftImg8bit"}, ["--dataset", "cityscapes"]),
    ],
)
def test_the_options_for_another_command(args, changes, words):
    assert layout_words(args.replace(**changes)) == words
