"""What a new user sees before, during and after a first run on their own data."""

import re
import shlex
import subprocess
import sys
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_script
from dataset import DatasetError, read_image, to_input
from deeplab import DeepLabV2, PSPNet, deeplabv2, load_net, predict_classes, single_scale_loss
from scripts import check_dataset, predict
from tests.helpers import ROOT, save_palette_png
from tests.helpers_runs import (
    evaluate,
    log_lines,
    stopping,
    train,
)
from utils.evaluation import run as evaluation
from utils.evaluation.options import evaluation_parser
from utils.training import loop as training
from utils.training.options import training_parser

BARE = ["--backbone", "resnet18", "--input-size", "33,41", "--batch-size", "2", "--device", "cpu", "--num-workers", "0",
        "--save-num-images", "0", "--num-steps", "1", "--learning-rate", "1e-3"]  # fmt: skip
SCRATCH = ["--restore-from", "none"]

pytestmark = pytest.mark.usefixtures("thin_nets")


def bare(toy_voc, folder, *options, loss=single_scale_loss):
    """A run without the number of classes and the batch norm on its command line, unless they are in ``options``."""
    words = ["--data-dir", str(toy_voc), "--snapshot-dir", str(folder), *BARE, *options]
    return training.run(training_parser("", batch_size=10, iter_size=1, snapshot_dir="").parse_args(words), loss)


def meta(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)["meta"]


def test_missing_files_are_reported_before_the_first_step(toy_voc, tmp_path, snapshot):
    (toy_voc / "JPEGImages/toy_3.jpg").unlink()
    (toy_voc / "SegmentationClassAug/toy_1.png").unlink()
    message = "no image for toy_3 in .*JPEGImages, .*; no label for toy_1 in .*SegmentationClassAug"
    with pytest.raises(DatasetError, match=message):
        bare(toy_voc, tmp_path / "s", *SCRATCH)
    assert not (tmp_path / "s").exists()
    with pytest.raises(DatasetError, match=message):
        evaluate(toy_voc, snapshot)


def test_where_the_classes_come_from(toy_voc, tmp_path, capsys):
    """The option, else classes.txt, else the snapshot in --restore-from, else VOC's 21."""
    bare(toy_voc, tmp_path / "voc", *SCRATCH)
    assert "21 classes, PASCAL VOC's; other data need --num-classes or a classes.txt" in capsys.readouterr().out
    assert (meta(tmp_path / "voc")["num_classes"], meta(tmp_path / "voc")["classes"]) == (21, None)
    names = ["ground", "red", "green", "blue", "never"]
    (toy_voc / "classes.txt").write_text("\n".join(names))
    bare(toy_voc, tmp_path / "file", "--restore-from", str(tmp_path / "voc/VOC12_scenes_1.pth"))
    text = capsys.readouterr().out
    assert f"5 classes, those of {toy_voc / 'classes.txt'}" in text
    assert "the file's head has 21 classes and the net 5: the head is left out" in text
    assert (meta(tmp_path / "file")["num_classes"], meta(tmp_path / "file")["classes"]) == (5, names)
    (toy_voc / "classes.txt").unlink()
    bare(toy_voc, tmp_path / "weights", "--restore-from", str(tmp_path / "file/toy_scenes_1.pth"))
    assert f"5 classes, those of {tmp_path / 'file/toy_scenes_1.pth'}" in capsys.readouterr().out
    assert (meta(tmp_path / "weights")["num_classes"], meta(tmp_path / "weights")["classes"]) == (5, names)
    bare(toy_voc, tmp_path / "weights", "--resume", "--num-steps", "2")  # goes on with them, names included
    assert (meta(tmp_path / "weights")["num_classes"], meta(tmp_path / "weights")["classes"]) == (5, names)
    bare(toy_voc, tmp_path / "option", *SCRATCH, "--num-classes", "4")
    assert meta(tmp_path / "option")["num_classes"] == 4


def test_from_scratch_batch_norm_is_trained(toy_voc, tmp_path, capsys):
    bare(toy_voc, tmp_path / "none", *SCRATCH)
    text = capsys.readouterr().out
    assert "batch norm full (from scratch)" in text
    assert "warning: a net from scratch" not in text
    assert meta(tmp_path / "none")["args"]["batch_norm"] == "full"
    bare(toy_voc, tmp_path / "frozen", *SCRATCH, "--batch-norm", "frozen")
    assert "warning: a net from scratch learns little with --batch-norm frozen" in capsys.readouterr().out
    assert meta(tmp_path / "frozen")["args"]["batch_norm"] == "frozen"
    bare(toy_voc, tmp_path / "tuned", "--restore-from", str(tmp_path / "none/VOC12_scenes_1.pth"))
    assert meta(tmp_path / "tuned")["args"]["batch_norm"] == "frozen"
    bare(toy_voc, tmp_path / "frozen", "--resume", "--num-steps", "2")
    assert meta(tmp_path / "frozen")["args"]["batch_norm"] == "frozen"


def size_of(net) -> str:
    """The number of parameters, without batch norm's buffers, as a run prints it."""
    return f"{sum(value.numel() for value in net.parameters()) / 1e6:.2f} M"


def test_the_first_lines_of_a_run_name_the_net_and_the_optimiser(toy_voc, tmp_path, capsys):
    """Net, trainable parameters, mode of batch norm with the reason; each group's learning rate and weight decay."""
    of_four = ["--num-classes", "4", "--learning-rate", "1e-3"]
    bare(toy_voc, tmp_path / "a", *SCRATCH, *of_four)
    net = deeplabv2("resnet18", 4, batch_norm="full")
    said, size = capsys.readouterr().out, size_of(net)
    assert f"net: deeplabv2 on resnet18, {size} parameters, all trainable; batch norm full (from scratch)\n" in said
    head = sum(conv.weight.numel() for conv in net.layer5.conv2d_list)
    backbone = sum(value.numel() for name, value in net.named_parameters() if not name.startswith("layer5"))
    counts = [f"{count / 1e6:.2f} M" if count >= 10_000 else str(count) for count in (backbone, head)]
    assert (
        f"optimiser: SGD, momentum 0.9; {counts[0]} parameters at learning rate 0.001, weight decay 0.0005; {counts[1]} "
        "parameters at learning rate 0.01, weight decay 0.0005; 16 parameters at learning rate 0.02, weight decay 0\n" in said
    )
    bare(toy_voc, tmp_path / "a", "--resume", "--num-steps", "2")
    assert "batch norm full (from scratch)" in capsys.readouterr().out
    weights = ["--restore-from", str(tmp_path / "a/VOC12_scenes_1.pth")]
    bare(toy_voc, tmp_path / "b", *of_four, *weights)
    assert "all trainable; batch norm frozen (default of deeplabv2)" in capsys.readouterr().out
    bare(toy_voc, tmp_path / "c", *of_four, *weights, "--is-training")
    frozen = size_of(deeplabv2("resnet18", 4))
    assert f"{size} parameters, {frozen} trainable; batch norm stats (as asked for)" in capsys.readouterr().out
    bare(toy_voc, tmp_path / "d", *SCRATCH, *of_four, "--net", "pspnet", "--aux-weight", "0")
    whole = PSPNet("resnet18", 4)
    whole.dsn.requires_grad_(False)
    trainable = sum(value.numel() for value in whole.parameters() if value.requires_grad) / 1e6
    said = capsys.readouterr().out
    assert f"net: pspnet on resnet18, {size_of(whole)} parameters, {trainable:.2f} M trainable;" in said
    assert f"momentum 0.9; {trainable:.2f} M parameters at learning rate 0.001, weight decay 0.0005\n" in said


def test_from_scratch_a_note_suggests_a_higher_learning_rate(toy_voc, tmp_path, capsys):
    note = "the default --learning-rate 0.00025 is for fine-tuning pretrained weights; from scratch 5e-3 is better"
    words = [word for word in BARE if word not in ("--learning-rate", "1e-3")]
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="")

    def run(folder, *options):
        args = parser.parse_args(["--data-dir", str(toy_voc), "--snapshot-dir", str(folder), *words, *options])
        training.run(args, single_scale_loss)
        return note in capsys.readouterr().out

    assert run(tmp_path / "a", *SCRATCH)
    assert not run(tmp_path / "b", "--restore-from", str(tmp_path / "a/VOC12_scenes_1.pth"))
    assert not run(tmp_path / "c", *SCRATCH, "--learning-rate", "2.5e-4")
    assert not run(tmp_path / "d", *SCRATCH, "--net", "deeplabv3")  # its own default is higher


def test_validation_without_a_list_names_its_option(toy_voc, tmp_path):
    (toy_voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DatasetError, match=r"^--val-every needs .*, named by --val-list: .*no list of image ids") as error:
        bare(toy_voc, tmp_path / "a", *SCRATCH, "--val-every", "1")
    assert "--data-list" not in str(error.value)
    with pytest.raises(DatasetError, match=r"named by --val-list: no list of image ids: lost.txt and .*lost.txt do not exist"):
        bare(toy_voc, tmp_path / "b", *SCRATCH, "--val-every", "1", "--val-list", "lost.txt")


def test_classes_that_no_label_has_are_named_once(toy_voc, tmp_path, capsys, snapshot):
    for path in (toy_voc / "SegmentationClassAug").iterdir():
        label = np.array(Image.open(path))
        save_palette_png(path, np.where(label == 2, 1, label).astype(np.uint8))
    train(toy_voc, tmp_path / "a", *SCRATCH, "--num-steps", "5", "--num-classes", "6", "--batch-size", "2")
    text = capsys.readouterr().out
    assert text.count("warning: none of the") == 1
    assert "none of the 4 labels read so far has the classes 2 class 2, 4 class 4, 5 class 5; if there are no more" in text
    assert "train with --num-classes 4" in text
    evaluate(toy_voc, snapshot)
    assert "no label has the classes 2 green" in capsys.readouterr().out


def test_the_ignore_label_is_remembered(toy_voc, tmp_path, capsys):
    bare(toy_voc, tmp_path, *SCRATCH, "--num-classes", "4", "--ignore-label", "3")
    words = ["--data-dir", str(toy_voc), "--restore-from", str(tmp_path / "VOC12_scenes_1.pth"), "--num-workers", "0"]
    capsys.readouterr()
    for options, ignored in (([], "3"), (["--ignore-label", "2"], "2")):
        assert evaluation.run(evaluation_parser("").parse_args([*words, *options])) == 0
        text = capsys.readouterr().out
        assert re.findall(r"(\d) class \d \(void\)", text) == [ignored]
        assert ("--ignore-label 3, as in training" in text) == (not options)


def test_a_label_error_names_the_command_that_finds_them_all(toy_voc, tmp_path, capsys):
    (toy_voc / "classes.txt").write_text("a\nb\nc\nd\n")
    save_palette_png(toy_voc / "SegmentationClassAug/toy_2.png", np.full((57, 41), 9, dtype=np.uint8))
    (toy_voc / "SegmentationClassAug").rename(toy_voc / "my masks")
    options = [*SCRATCH, "--num-steps", "4", "--ignore-label", "3", "--label-dir", "my masks"]
    with pytest.raises(DatasetError, match=r"holds the value 9; .*; to find all such files, run python scripts/") as error:
        bare(toy_voc, tmp_path, *options)
    words = shlex.split(str(error.value).rpartition(", run ")[2])
    assert words[:2] == ["python", "scripts/check_dataset.py"]
    capsys.readouterr()
    assert check_dataset.main([*words[2:], "--workers", "0"]) == 1
    text = capsys.readouterr().out
    assert "4 ids, 4 classes" in text
    assert "toy_2.png holds the value 9" in text


def test_the_last_line_of_a_run(toy_voc, tmp_path, capsys):
    """It names the saved file and the next command, which its own parser accepts, or says that nothing is left to do."""
    options = [*SCRATCH, "--num-classes", "4", "--num-steps", "4", "--log-every", "2"]
    bare(toy_voc, tmp_path, *options, loss=stopping(single_scale_loss, 2))
    text = capsys.readouterr().out
    assert text.endswith(f"saved {tmp_path / 'last.ckpt'} at step 2 of 4; add --resume to go on\n")
    bare(toy_voc, tmp_path, *options, "--resume")
    text = capsys.readouterr().out
    assert f"step 4 of 4: loss {log_lines(tmp_path)[-1]['loss']:.4f}, lr " in text  # one line per entry without a terminal
    last = text.splitlines()[-1]
    assert last.startswith(f"saved {tmp_path / 'VOC12_scenes_4.pth'}; next: python evaluate.py ")
    args = evaluation_parser("").parse_args(shlex.split(last)[shlex.split(last).index("evaluate.py") + 1 :])
    args.device = "cpu"
    assert evaluation.run(args) == 0
    capsys.readouterr()
    bare(toy_voc, tmp_path, "--resume", "--num-steps", "4")
    assert capsys.readouterr().out.endswith(
        "nothing is left to do: all 4 steps are done; to train on, add a larger --num-steps\n"
    )


def test_broken_images_do_not_end_a_prediction(toy_voc, snapshot, tmp_path, capsys):
    folder = toy_voc / "JPEGImages"
    (folder / "toy_1.jpg").write_bytes(b"no image")
    (folder / "toy_3.jpg").write_bytes((folder / "toy_3.jpg").read_bytes()[:-40])
    (folder / "notes.txt").touch()
    words = [str(folder), "--restore-from", str(snapshot), "--save-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main(words) == 1
    out, err = capsys.readouterr()
    assert "left out: 1 .txt" in out
    assert "masks of 4 files in" in out
    assert "2 of 6 files were left out:" in err
    assert "toy_1.jpg is not an image" in err
    assert "toy_3.jpg is truncated" in err
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"toy_0", "toy_2", "toy_4", "toy_5"}


def test_an_image_to_a_mask_in_python(toy_voc, snapshot, tmp_path):
    net = load_net(snapshot)
    mask = predict_classes(net, to_input(read_image(toy_voc / "JPEGImages/toy_1.jpg")))
    words = [
        str(toy_voc / "JPEGImages/toy_1.jpg"),
        "--restore-from",
        str(snapshot),
        "--save-dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert predict.main(words) == 0
    assert (mask.numpy() == np.array(Image.open(tmp_path / "toy_1.png"))).mean() > 0.99  # folded weights round differently


def test_common_mistakes_get_a_helpful_answer():
    net = DeepLabV2("resnet18", 3)
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    for given in (image, torch.from_numpy(image), torch.zeros(1, 3, 9, 9, dtype=torch.uint8)):
        for call in (net, lambda x: predict_classes(net, x)):
            with pytest.raises(TypeError, match=r"of (torch\.)?uint8; expected a float tensor .* dataset\.to_input\("):
                call(given)
    with pytest.raises(ValueError, match=r"backbone 'weights/x\.pth' is unknown; .*deeplab\.load_net\(path\)"):
        DeepLabV2("weights/x.pth")


def test_help_names_the_defaults_that_depend_on_other_options(capsys):
    with pytest.raises(SystemExit):
        train_script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ".jpg, .png, .bmp, .tif or .webp" in text
    assert "full from scratch" in text
    assert "lines of classes.txt in --data-dir" in text


@pytest.mark.parametrize("name", ["train", "train_msc", "evaluate"])
def test_help_has_120_lines_at_most_and_its_examples_are_commands(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    make = {
        "train": partial(training_parser, batch_size=10, iter_size=1, snapshot_dir="snapshots"),
        "evaluate": evaluation_parser,
    }
    parser = make.get(name, partial(training_parser, batch_size=1, iter_size=10, snapshot_dir="snapshots_msc"))("")
    with pytest.raises(SystemExit):
        import_module(name).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    examples = [line.split() for line in lines if line.startswith(f"  python {name}.py ")]
    assert len(examples) == 3
    for words in examples:
        parser.parse_args(words[2:])


def test_help_of_a_script_comes_without_torch():
    """Also from another folder than the repository, in which Python does not look for modules by itself."""
    for name in ("evaluate", "train", "scripts/benchmark", "scripts/convert_weights", "scripts/predict"):
        words = [sys.executable, "-X", "importtime", ROOT / f"{name}.py", "--help"]
        result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT.parent, timeout=60)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("usage: ")
        assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE), name
