import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dataset import DatasetError, VOCSegmentation, read_ids
from dataset.arrays import ArraySegmentation, classes_of
from deeplab import single_scale_loss
from tests.helpers import TOY_CLASSES
from tests.helpers_runs import SCRATCH, SMALL, equal, model, stopping
from utils import training
from utils.command import UserError
from utils.loader import running
from utils.training.options import training_parser

NO_NAMES = classes_of(None)


class Pairs(Dataset):
    """Arrays in memory."""

    def __init__(self, pairs, **attributes):
        self.pairs = pairs
        vars(self).update(attributes)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


@pytest.fixture
def pairs(toy_voc):
    files = VOCSegmentation(toy_voc, read_ids(toy_voc / "ImageSets/Segmentation/train.txt"), num_classes=TOY_CLASSES)
    return [files.load(index) for index in range(len(files))]


def train(folder, data, *options, loss=single_scale_loss):
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    return training.run(parser.parse_args(["--snapshot-dir", str(folder), *SMALL, *SCRATCH, *options]), loss, data)


@pytest.mark.usefixtures("thin_nets")
def test_arrays_train_as_their_files_do_and_resume(toy_voc, pairs, tmp_path, capsys):
    """Bit-identical weights: from files, from arrays, and from arrays in a stopped and resumed run."""
    steps = ["--num-steps", "4", "--save-num-images", "1"]
    train(tmp_path / "files", None, "--data-dir", str(toy_voc), *steps)
    capsys.readouterr()
    data = Pairs(pairs, names=["ground", "red", "green", "blue"])
    train(tmp_path / "arrays", data, *steps)
    assert "4 images of Pairs" in (said := capsys.readouterr().out)
    assert "next: python evaluate.py --data-dir DATA_DIR --restore-from" in said
    whole = model(tmp_path / "arrays/own_scenes_4.pth")
    assert equal(whole, model(tmp_path / "files/VOC12_scenes_4.pth"))
    assert (tmp_path / "arrays/images/000004_0.png").exists()
    meta = torch.load(tmp_path / "arrays/last.ckpt", weights_only=True)["meta"]
    assert (meta["classes"], meta["num_classes"]) == (["ground", "red", "green", "blue"], TOY_CLASSES)

    train(tmp_path / "stopped", data, *steps, loss=stopping(single_scale_loss, 2))
    with pytest.raises(UserError, match="the list of 3 images is not the one that the run was begun with"):
        train(tmp_path / "stopped", Pairs(pairs[:3], names=data.names), "--resume")
    assert train(tmp_path / "stopped", data, "--resume") == 0
    assert equal(whole, model(tmp_path / "stopped/own_scenes_4.pth"))


@pytest.mark.usefixtures("thin_nets")
def test_validation_needs_a_folder(toy_voc, pairs, tmp_path):
    data = Pairs(pairs)
    with pytest.raises(UserError, match="--val-every evaluates on images in --data-dir, which is not given"):
        train(tmp_path / "a", data, "--num-steps", "1", "--val-every", "1")
    (toy_voc / "classes.txt").write_text("a\nb\nc\nd\n")
    assert train(tmp_path / "b", data, "--num-steps", "1", "--val-every", "1", "--data-dir", str(toy_voc)) == 0
    meta = torch.load(tmp_path / "b/best.pth", weights_only=True)["meta"]
    assert meta["classes"] == ["a", "b", "c", "d"]  # the only ones that there are


def test_the_data_set_names_its_classes(pairs):
    data = Pairs(pairs, names=("ground", "red", "green", "blue"), colors={0: (9, 8, 7), 2: (1, 2, 3)})
    opened = ArraySegmentation(data, classes_of(data), TOY_CLASSES)
    assert opened.names == ["ground", "red", "green", "blue"]
    assert (opened.colors[0], opened.colors[2]) == ((9, 8, 7), (1, 2, 3))
    assert ArraySegmentation(Pairs(pairs), NO_NAMES, TOY_CLASSES).names is None
    with pytest.raises(DatasetError, match="Pairs names 4 classes; expected 3"):
        ArraySegmentation(data, classes_of(data), 3)


def test_items_are_not_changed():
    """Views and read-only arrays work; the user's ignore label becomes 255 in a copy."""
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    label = np.full((5, 7), 3, np.uint8)
    rgb.flags.writeable = label.flags.writeable = False
    data = ArraySegmentation(Pairs([(rgb[:, :, ::-1], label)]), NO_NAMES, 2, ignore_label=3)
    image, read = data.load(0)
    assert (image == rgb[:, :, ::-1]).all()
    assert image.flags.c_contiguous
    assert (read == 255).all()
    assert (label == 3).all()
    assert len(pickle.loads(pickle.dumps(data))) == 1


IMAGE, LABEL = np.zeros((5, 7, 3), np.uint8), np.zeros((5, 7), np.uint8)
WRONG = {
    "no pair": (IMAGE, "item 1 of Pairs is an array (5, 7, 3) of uint8"),
    "three parts": ((IMAGE, LABEL, "x"), "item 1 of Pairs is a tuple of 3"),
    "Pillow": ((Image.fromarray(IMAGE), LABEL), "the image of item 1 of Pairs is a Image"),
    "a tensor": ((IMAGE, torch.zeros(5, 7)), "the label of item 1 of Pairs is a Tensor"),
    "floats": ((IMAGE / 255, LABEL), "the image of item 1 of Pairs is an array (5, 7, 3) of float64"),
    "int64 labels": ((IMAGE, LABEL.astype(int)), "the label of item 1 of Pairs is an array (5, 7) of int64"),
    "grey": ((LABEL, LABEL), "the image of item 1 of Pairs is an array (5, 7) of uint8"),
    "channels first": ((np.zeros((3, 5, 7), np.uint8), LABEL), "an image of (3, 5, 7) and a label of (5, 7)"),
    "two sizes": ((IMAGE, LABEL.T), "item 1 of Pairs has an image of (5, 7, 3) and a label of (7, 5)"),
    "no pixels": ((IMAGE[:0], LABEL[:0]), "the image of item 1 of Pairs is an array (0, 7, 3)"),
    "values": ((IMAGE, LABEL + 9), "the label of item 1 of Pairs holds the value 9; expected class indices 0..3; 255"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_item_is_one_sentence(kind):
    item, message = WRONG[kind]
    with pytest.raises(DatasetError, match=re.escape(message)):
        ArraySegmentation(Pairs([(IMAGE, LABEL), item]), NO_NAMES, TOY_CLASSES).load(1)


@pytest.mark.parametrize("items", [[], iter([(IMAGE, LABEL)]), 5])
def test_other_objects_than_map_style_data_sets_are_refused(items):
    with pytest.raises(DatasetError, match=r"is empty or not map-style; expected __len__\(\) > 0"):
        ArraySegmentation(items, NO_NAMES, TOY_CLASSES)


@pytest.mark.filterwarnings("ignore:Got pickle error")  # from torch
def test_items_that_cannot_be_pickled_are_refused():
    class Local(Pairs):
        pass

    data = ArraySegmentation(Local([(IMAGE, LABEL)]), NO_NAMES, TOY_CLASSES)
    loader = DataLoader(data, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(UserError, match=r"cannot be sent to workers .*: define its class at the top of a module"):
        running(loader).__enter__()
