from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

import utils.processes
from dataset import MEAN_BGR, VOCSegmentation, read_label
from deeplab import CRFParams, deeplabv2, dense_crf
from deeplab.weights import WeightsError
from tests.helpers import TOY_CLASSES, TOY_SIZES, save_palette_png
from tests.helpers_nets import naive_logits, naive_scores
from tests.helpers_runs import command, evaluate, scores
from utils.checkpoint import make_meta, save_snapshot
from utils.command import UserError
from utils.evaluation import images as samples
from utils.evaluation.crf_pool import CRFPool
from utils.evaluation.options import evaluation_parser
from utils.evaluation.predict import NotFinite, predict_batch
from utils.evaluation.score import score
from utils.visualize import GAP


def test_scores_and_masks_against_a_naive_evaluation(toy_voc, snapshot, tmp_path):
    result = scores(
        toy_voc, snapshot, tmp_path, "--save-dir", str(tmp_path / "masks"), "--save-panels", str(tmp_path / "panels")
    )
    pairs = []
    for i, size in enumerate(TOY_SIZES):
        logits = naive_logits(snapshot, toy_voc, i)
        label = np.array(Image.open(toy_voc / "SegmentationClassAug" / f"toy_{i}.png"))
        mask = Image.open(tmp_path / "masks" / f"toy_{i}.png")
        assert mask.mode == "P"
        prediction = read_label(tmp_path / "masks" / f"toy_{i}.png", TOY_CLASSES)  # masks can be read back as labels
        assert prediction.shape == size
        ordered = np.sort(logits, axis=0)
        clear = ordered[-1] - ordered[-2] > 1e-3 * np.abs(logits).max()
        assert clear.mean() > 0.95
        assert (prediction == logits.argmax(0))[clear].all()
        pairs.append((label, prediction))
        factor = 160 // max(size)
        assert Image.open(tmp_path / "panels" / f"toy_{i}.png").width == 4 * factor * size[1] + 3 * GAP
    accuracy, mean_iou = naive_scores(pairs)
    assert result["scores"]["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert result["scores"]["mean_iou"] == pytest.approx(mean_iou, abs=1e-12)
    assert [entry["name"] for entry in result["scores"]["classes"]] == ["ground", "red", "green", "blue"]
    assert result["step"] == 7


@pytest.mark.parametrize(
    "options",
    [("--batch-size", "4"), ("--num-workers", "2"), ("--batch-size", "3", "--input-size", "65,65"), ("--input-size", "65,65")],
)
def test_batches_workers_and_canvas_predict_every_image_once(toy_voc, snapshot, tmp_path, options):
    """Images of mixed sizes have the same scores in batches as one by one."""
    canvas = options[-2:] if "--input-size" in options else ()
    one = scores(toy_voc, snapshot, tmp_path, *canvas)["scores"]
    other = scores(toy_voc, snapshot, tmp_path, *options)["scores"]
    assert other["mean_iou"] == pytest.approx(one["mean_iou"], abs=2e-3)
    assert other["pixel_accuracy"] == pytest.approx(one["pixel_accuracy"], abs=2e-3)


def test_the_number_of_waiting_images_is_bounded(monkeypatch):
    monkeypatch.setattr(samples, "MAX_WAITING", 5)
    taken = 0

    def stream():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield samples.Sample(str(i), np.zeros((8 * i + 1, 9, 3), np.uint8), np.zeros((8 * i + 1, 9), np.uint8))

    given = []
    for group, canvas in samples.group_by_canvas(stream(), None, 4):
        given += [sample.id for sample in group]
        assert all(sample.label.shape == canvas for sample in group)
        assert taken - len(given) <= 5
    assert sorted(given, key=int) == [str(i) for i in range(40)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_crf_scores_before_and_after_in_one_run(toy_voc, snapshot, tmp_path, workers):
    plain = scores(toy_voc, snapshot, tmp_path)
    options = ["--crf", "--crf-workers", workers, "--save-dir", str(tmp_path / "masks")]
    result = scores(toy_voc, snapshot, tmp_path, *options)
    assert result["before_crf"] == plain["scores"]
    logits = torch.from_numpy(naive_logits(snapshot, toy_voc, 1))
    image = cv2.imread(str(toy_voc / "JPEGImages/toy_1.jpg"))[:, :, ::-1]
    expected = dense_crf(image, torch.softmax(logits, 0).numpy(), CRFParams()).argmax(0)
    assert (np.array(Image.open(tmp_path / "masks/toy_1.png")) == expected).mean() > 0.99
    labels = [np.array(Image.open(toy_voc / "SegmentationClassAug" / f"toy_{i}.png")) for i in range(6)]
    refined = [np.array(Image.open(tmp_path / "masks" / f"toy_{i}.png")) for i in range(6)]
    assert result["after_crf"]["mean_iou"] == pytest.approx(naive_scores(list(zip(labels, refined)))[1], abs=1e-12)


def test_scales_and_flip_have_an_effect(toy_voc, snapshot, tmp_path):
    results = [
        scores(toy_voc, snapshot, tmp_path, *o)["scores"]["pixel_accuracy"] for o in ((), ("--mirror",), ("--scales", "1,0.5"))
    ]
    assert len(set(results)) == 3


def test_wrong_sizes_classes_and_heads_are_refused(toy_voc, snapshot, tmp_path):
    with pytest.raises(UserError, match=r"toy_0 of 40x55 does not fit --input-size 41x41"):
        evaluate(toy_voc, snapshot, "--input-size", "41,41")
    with pytest.raises(UserError, match="net for 4 classes, which --num-classes 21 cannot change"):
        evaluate(toy_voc, snapshot, "--num-classes", "21")
    (toy_voc / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"net for 4 classes, but .*classes\.txt names 2; evaluate it on data"):
        evaluate(toy_voc, snapshot)
    (toy_voc / "classes.txt").unlink()
    headless = {key: value for key, value in torch.load(snapshot, weights_only=True)["model"].items() if "layer5" not in key}
    torch.save(headless, tmp_path / "headless.pth")
    with pytest.raises(UserError, match="no usable head"):
        evaluate(toy_voc, tmp_path / "headless.pth")


class Picky(torch.nn.Module):
    """Returns the image itself as logits; they are infinite if its first pixel is white."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        white = (x[:, :1, :1, :1] > 120).float()  # the mean colour is subtracted
        return torch.cat([x, x[:, :1]], dim=1)[..., ::8, ::8] / (1 - white)


@pytest.mark.parametrize("crf", [False, True])
def test_logits_that_are_not_finite_are_an_error_that_names_the_image(toy_voc, crf):
    image = cv2.imread(str(toy_voc / "JPEGImages/toy_3.jpg"))
    image[:16, :16] = 255
    cv2.imwrite(str(toy_voc / "JPEGImages/toy_3.jpg"), image)
    data = VOCSegmentation(toy_voc, [f"toy_{i}" for i in range(6)], num_classes=TOY_CLASSES)
    finished = []
    with CRFPool(1) if crf else nullcontext() as pool, pytest.raises(NotFinite, match="not finite for image toy_3"):
        score(Picky(), data, torch.device("cpu"), pool=pool, finish=lambda sample, prediction: finished.append(sample.id))
    assert finished == ["toy_0", "toy_1", "toy_2"][: len(finished)]  # some may still be in the CRF
    assert len(finished) == 3 or crf
    assert NotFinite.exit_status == 1


def test_score_without_a_command_line(toy_voc):
    """As in validation during training: the matrices, and the classes of each image through ``finish``."""
    data = VOCSegmentation(toy_voc, ["toy_0", "toy_4"], num_classes=TOY_CLASSES, ignore_label=2)
    kept = {}
    matrices = score(Picky(), data, torch.device("cpu"), finish=lambda sample, classes: kept.update({sample.id: classes}))
    expected = np.zeros((TOY_CLASSES, TOY_CLASSES), int)
    for index, image_id in enumerate(data.ids):
        _, label = data.load(index)
        pairs = label[label != 255], kept[image_id][label != 255]
        np.add.at(expected, pairs, 1)
    assert list(matrices) == [""]
    assert (matrices[""].matrix.numpy() == expected).all()
    assert np.isnan(matrices[""].scores().class_iou[2])


def test_images_are_padded_with_the_mean_colour_to_the_canvas():
    seen = []

    def net(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x[..., ::8, ::8]

    image = np.full((30, 20, 3), 200, np.uint8)
    logits = predict_batch(net, [image, image[:9]], (505, 505), torch.device("cpu"))
    assert logits.shape == (2, 3, 64, 64)
    assert seen[0].shape == (2, 3, 505, 505)
    filled = torch.zeros(2, 505, 505, dtype=torch.bool)
    filled[0, :30, :20] = filled[1, :9, :20] = True
    for channel, mean in enumerate(MEAN_BGR):
        torch.testing.assert_close(seen[0][:, channel], filled * (200 - torch.tensor(mean, dtype=torch.float32)))


def test_nothing_is_evaluated_with_a_parameter_that_no_file_gave(toy_voc, snapshot, tmp_path):
    torch.manual_seed(0)
    net = deeplabv2("resnet18", TOY_CLASSES, atrous_rates=(6, 12))
    save_snapshot(tmp_path / "two.pth", net, make_meta(net, None, 7, {}, seen_voc_val=""))
    evaluate(toy_voc, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match=r"two\.pth: the rates of its head are \[6, 12\], and \[6, 12, 18, 24\] are not"):
        evaluate(toy_voc, tmp_path / "two.pth", "--atrous-rates", "6,12,18,24")
    evaluate(toy_voc, snapshot, "--atrous-rates", "6,12")  # a subset of the file's rates


def test_outputs_never_replace_the_users_files(toy_voc, snapshot, tmp_path):
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    weights = tmp_path / "net.pth"
    weights.write_bytes(snapshot.read_bytes())
    (tmp_path / "labels").symlink_to(toy_voc / "SegmentationClassAug")
    (toy_voc / "classes.txt").write_text("a\nb\nc\nd\n")
    data_list = toy_voc / "ImageSets/Segmentation/val.txt"
    before = contents()
    both = ["--save-dir", str(tmp_path / "out"), "--save-panels", str(tmp_path / "out")]
    for options, message in (
        (["--save-dir", str(toy_voc / "SegmentationClassAug")], "among the data"),
        (["--save-dir", str(toy_voc / "SegmentationClass")], "among the data"),  # later runs would read them as labels
        (["--save-dir", str(tmp_path / "labels")], "among the data"),
        (["--save-panels", str(toy_voc / "JPEGImages")], "among the data"),
        (both, r"the mask of .*toy_0\.jpg .* and the panel of .*toy_0\.jpg .* both"),
        (["--save-json", str(data_list)], r"the scores would be written to .*val\.txt, over"),
        (["--save-json", str(weights)], r"over .*net\.pth"),
        (["--save-json", str(toy_voc / "classes.txt")], r"over .*classes\.txt"),
        (["--save-json", str(toy_voc / "SegmentationClassAug/toy_1.png")], "among the data"),
        (["--save-json", str(tmp_path)], "which is a folder"),
        (["--save-json", str(data_list / "scores.json")], "nothing can be written to"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(toy_voc, weights, *options)
    assert contents() == before
    assert not (tmp_path / "out").exists()
    assert not (toy_voc / "SegmentationClass").exists()
    for _ in range(2):  # an earlier evaluation's files may be replaced
        evaluate(toy_voc, weights, "--save-dir", str(tmp_path / "out"), "--save-json", str(tmp_path / "new/scores.json"))
    assert len(contents()) == len(before) + 6 + 1


def test_ids_keep_their_folders(toy_voc, snapshot, tmp_path):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (toy_voc / folder / "city").mkdir()
        (toy_voc / folder / f"toy_0.{suffix}").rename(toy_voc / folder / f"city/toy_1.{suffix}")
    (tmp_path / "list.txt").write_text("city/toy_1\ntoy_1\n")
    options = ["--data-list", str(tmp_path / "list.txt"), "--save-panels", str(tmp_path / "panels")]
    evaluate(toy_voc, snapshot, "--save-dir", str(tmp_path / "out"), *options)
    for folder in ("out", "panels"):
        files = [str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*.png")]
        assert sorted(files) == ["city/toy_1.png", "toy_1.png"]


def test_an_ignored_class_is_marked_in_the_scores(toy_voc, snapshot, tmp_path, capsys):
    result = scores(toy_voc, snapshot, tmp_path, "--ignore-label", "0")["scores"]
    assert result["classes"][0] == {"id": 0, "name": "ground (void)", "iou": None, "accuracy": None}
    assert result["mean_iou"] == pytest.approx(np.mean([entry["iou"] for entry in result["classes"][1:]]))
    assert sum(result["confusion_matrix"][0]) == 0
    assert sum(row[0] for row in result["confusion_matrix"]) > 0  # predictions of it are errors
    assert "ground (void)" in capsys.readouterr().out


def palette_of(path: Path) -> list[list[int]]:
    return np.array(Image.open(path).getpalette()).reshape(-1, 3).tolist()


def test_colours_come_from_the_data_or_else_from_the_snapshot(toy_voc, snapshot, tmp_path):
    content = torch.load(snapshot, weights_only=True)
    content["meta"]["colors"] = [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]]
    torch.save(content, tmp_path / "net.pth")
    evaluate(toy_voc, tmp_path / "net.pth", "--save-dir", str(tmp_path / "snapshot"))
    assert palette_of(tmp_path / "snapshot/toy_0.png")[:5] == [*content["meta"]["colors"], [0, 0, 128]]
    (toy_voc / "classes.txt").write_text("a 9 8 7\nb 7 7 7\nc\nd 200 0 9\n")
    evaluate(toy_voc, tmp_path / "net.pth", "--save-dir", str(tmp_path / "data"))
    palette = palette_of(tmp_path / "data/toy_0.png")
    assert [palette[label] for label in (0, 1, 2, 3, 255)] == [[9, 8, 7], [7, 7, 7], [0, 128, 0], [200, 0, 9], [224, 224, 192]]


@pytest.mark.parametrize("tf32", [True, False])
def test_no_tf32_turns_tf32_off(toy_voc, snapshot, monkeypatch, tf32):
    """torch accepts the setting without a GPU, too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    evaluate(toy_voc, snapshot, *([] if tf32 else ["--no-tf32"]))
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_the_progress_bar_is_shown_only_in_a_terminal(toy_voc, snapshot, monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        evaluate(toy_voc, snapshot)
        assert ("6/6 [" in capsys.readouterr().err) == terminal


def test_the_table_shows_colours_only_in_a_terminal(toy_voc, snapshot, monkeypatch, capsys):
    patch = "\033[48;2;0;128;0m  \033[0m   2 blue"
    for terminal, no_color in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
        evaluate(toy_voc, snapshot)
        assert (patch.replace("blue", "green") in capsys.readouterr().out) == (terminal and not no_color)


def test_labels_with_a_single_class_give_a_warning(toy_voc, snapshot, capsys):
    """Binary masks of 0 and 255: all pixels are ignored or of class 0, so a net that always predicts class 0 gets 100 %."""
    evaluate(toy_voc, snapshot)
    assert "warning" not in capsys.readouterr().out
    for path in (toy_voc / "SegmentationClassAug").iterdir():
        save_palette_png(path, np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8))
    evaluate(toy_voc, snapshot)
    assert "warning: these scores mean little: the labels are binary masks 0/255" in capsys.readouterr().out


def test_workers_send_arrays_which_are_pinned_on_arrival(toy_voc, monkeypatch):
    """Arrays go through a pipe; tensors would need shared memory, of which containers have little."""
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    sample = samples.Samples(VOCSegmentation(toy_voc, ["toy_0"], num_classes=TOY_CLASSES))[0]
    assert isinstance(sample.image, np.ndarray)
    assert isinstance(sample.label, np.ndarray)
    arrived = pin_memory(sample)
    assert [tensor.data_ptr() for tensor in pinned] == [array.ctypes.data for array in (arrived.image, arrived.label)]
    assert (arrived.image == sample.image).all()
    assert (arrived.label == sample.label).all()
    assert arrived.id == "toy_0"


def test_crf_processes_share_the_cores(monkeypatch):
    for cores, processes, expected in ((1, "1", 1), (16, "4", 4), (128, "1", 32), (2, "8", 1)):
        monkeypatch.setattr(utils.processes, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert evaluation_parser("").parse_args([]).crf_workers == expected


def test_the_command(toy_voc, snapshot):
    result = command("evaluate.py", "--data-dir", toy_voc, "--restore-from", snapshot, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "mean IoU" in result.stdout
    assert "green" in result.stdout
    for options, message in (
        ((), "VOC12_scenes_20000.pth does not exist"),
        (("--restore-from", snapshot), "VOC2012 does not exist"),
    ):
        result = command("evaluate.py", *options)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_weights_trained_on_voc_val_give_a_warning(toy_voc, snapshot, tmp_path, capsys):
    content = torch.load(snapshot, weights_only=True)
    content["meta"]["seen_voc_val"] = "it was trained on train and val"
    torch.save(content, tmp_path / "seen.pth")
    evaluate(toy_voc, tmp_path / "seen.pth")
    assert "mean nothing here: it was trained on train and val" in capsys.readouterr().out
    evaluate(toy_voc, tmp_path / "seen.pth", "--data-list", str(toy_voc / "ImageSets/Segmentation/train.txt"))
    assert "mean nothing" not in capsys.readouterr().out
