import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_script
from deeplab import multi_scale_loss, single_scale_loss
from tests.conftest import ROOT, TOY_CLASSES
from utils import training
from utils.command import UserError, run_command
from utils.options import training_parser

SMALL = ["--backbone", "resnet18", "--num-classes", str(TOY_CLASSES), "--input-size", "33,41", "--batch-size", "2",
         "--device", "cpu", "--num-workers", "0", "--log-every", "1", "--save-num-images", "0"]  # fmt: skip
SCRATCH = ["--restore-from", "none", "--batch-norm", "full", "--random-scale", "--random-mirror", "--learning-rate", "1e-3"]


def train(toy_voc: Path, folder: Path, *options: str, loss=single_scale_loss) -> int:
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    return training.run(parser.parse_args(["--data-dir", str(toy_voc), "--snapshot-dir", str(folder), *SMALL, *options]), loss)


def command(script: str, *options: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / script, *options], capture_output=True, text=True, cwd=ROOT, timeout=120, **kwargs
    )


def model(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", [single_scale_loss, multi_scale_loss])
def test_three_and_three_steps_equal_six(toy_voc, tmp_path, loss):
    """Bit for bit, parameters and running statistics, with a restart in the middle."""
    options = [*SCRATCH, "--iter-size", "2"]
    train(toy_voc, tmp_path / "whole", *options, "--num-steps", "6", loss=loss)

    def stop_after_three(*args, **kwargs):
        if calls := stop_after_three.calls:
            calls.pop()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **kwargs)

    stop_after_three.calls = [None] * 5  # the sixth batch is the second of step 3
    assert train(toy_voc, tmp_path / "parts", *options, "--num-steps", "6", loss=stop_after_three) == 130
    torch.manual_seed(99)
    assert train(toy_voc, tmp_path / "parts", *options, "--num-steps", "6", "--resume", loss=loss) == 0
    assert [line["step"] for line in log_lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    whole, parts = model(tmp_path / "whole/VOC12_scenes_6.pth"), model(tmp_path / "parts/VOC12_scenes_6.pth")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_accumulated_batches_equal_one_batch(toy_voc, tmp_path):
    """The rate changes at step boundaries only, and the first step is as long as the others."""
    common = ["--restore-from", "none", "--learning-rate", "1e-4", "--num-steps", "3"]
    train(toy_voc, tmp_path / "one", *common, "--batch-size", "4")
    train(toy_voc, tmp_path / "accumulated", *common, "--batch-size", "1", "--iter-size", "4")
    one, accumulated = (log_lines(tmp_path / name) for name in ("one", "accumulated"))
    assert [line["lr"] for line in one] == [line["lr"] for line in accumulated] == [1e-4 * (1 - k / 3) ** 0.9 for k in range(3)]
    one, accumulated = model(tmp_path / "one/VOC12_scenes_3.pth"), model(tmp_path / "accumulated/VOC12_scenes_3.pth")
    for key in one:
        torch.testing.assert_close(one[key], accumulated[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_what_a_run_leaves_behind(toy_voc, tmp_path):
    options = [*SCRATCH, "--num-steps", "3", "--save-pred-every", "2", "--save-num-images", "2", "--tensorboard"]
    assert train(toy_voc, tmp_path, *options, loss=multi_scale_loss) == 0
    assert {path.name for path in tmp_path.glob("*.pth")} == {"VOC12_scenes_2.pth", "VOC12_scenes_3.pth"}
    names = {"000002_toy_0.png", "000002_toy_1.png", "000003_toy_0.png", "000003_toy_1.png"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == names
    assert Image.open(tmp_path / "images/000003_toy_0.png").size == (3 * 55 + 2 * 4, 40)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert not list(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "args.json").read_text())["num_steps"] == 3
    lines = log_lines(tmp_path)
    assert lines[0].keys() >= {
        "step",
        "loss",
        "lr",
        "images_per_s",
        "seconds",
        "loss_max",
        "loss_1x",
        "loss_0.75x",
        "loss_0.5x",
    }
    parts = sum(lines[0][name] for name in ("loss_max", "loss_1x", "loss_0.75x", "loss_0.5x"))
    assert lines[0]["loss"] == pytest.approx(parts, abs=1e-5)
    meta = torch.load(tmp_path / "VOC12_scenes_3.pth", weights_only=True)["meta"]
    assert (meta["backbone"], meta["num_classes"], meta["step"], meta["stride_in_3x3"]) == ("resnet18", 4, 3, False)
    assert meta["atrous_rates"] == [6, 12, 18, 24]


def test_last_checkpoint_is_not_overwritten_by_a_new_run(toy_voc, tmp_path):
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    with pytest.raises(UserError, match=r"holds a run already.*--resume"):
        train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    assert train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1", "--resume") == 0  # nothing left to do


def test_resume_refuses_what_does_not_fit(toy_voc, tmp_path):
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    with pytest.raises(UserError, match=r"num_classes 4, but 5"):
        train(toy_voc, tmp_path, *SCRATCH, "--num-classes", "5", "--resume")
    with pytest.raises(UserError, match=r"--batch-norm full; it cannot change to stats"):
        train(toy_voc, tmp_path, *SCRATCH, "--batch-norm", "stats", "--resume")
    with pytest.raises(UserError, match=r"no optimiser state"):
        train(toy_voc, tmp_path, *SCRATCH, "--resume", str(tmp_path / "VOC12_scenes_1.pth"))
    with pytest.raises(UserError, match=r"there is no .*nothing\.ckpt"):
        train(toy_voc, tmp_path, *SCRATCH, "--resume", str(tmp_path / "nothing.ckpt"))
    (tmp_path / "last.ckpt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"not a checkpoint that torch can read"):
        train(toy_voc, tmp_path, *SCRATCH, "--resume")


def test_a_loss_that_is_not_finite_stops_the_run(toy_voc, tmp_path):
    """The message names the step and the pictures of the batch; the snapshots stay as they were."""

    def loss(net, images, labels, **options):
        loss.calls += 1
        losses = single_scale_loss(net, images, labels, **options)
        return {"loss": losses["loss"] * (float("nan") if loss.calls == 6 else 1)}

    loss.calls = 0
    options = [*SCRATCH, "--num-steps", "5", "--iter-size", "2", "--save-pred-every", "2"]
    with pytest.raises(training.Diverged, match=r"step 3, pictures toy_\d, toy_\d") as error:
        train(toy_voc, tmp_path, *options, loss=loss)
    assert error.value.exit_status == 1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_fine_tuning_starts_from_a_snapshot(toy_voc, tmp_path):
    """Batch norm frozen by default, the head kept, or dropped for other classes or with --not-restore-last."""
    train(toy_voc, tmp_path / "a", *SCRATCH, "--num-steps", "1")
    snapshot = tmp_path / "a/VOC12_scenes_1.pth"
    quiet = ["--restore-from", str(snapshot), "--num-steps", "1", "--learning-rate", "0"]
    train(toy_voc, tmp_path / "kept", *quiet)
    train(toy_voc, tmp_path / "dropped", *quiet, "--not-restore-last")
    before = model(snapshot)
    for name, head_kept in (("kept", True), ("dropped", False)):
        after = model(tmp_path / name / "VOC12_scenes_1.pth")
        assert all(torch.equal(after[key], before[key]) for key in after if not key.startswith("layer5"))
        assert torch.equal(after["layer5.conv2d_list.0.weight"], before["layer5.conv2d_list.0.weight"]) == head_kept
    train(toy_voc, tmp_path / "more", *quiet, "--num-classes", "7")
    assert model(tmp_path / "more/VOC12_scenes_1.pth")["layer5.conv2d_list.0.bias"].shape == (7,)


def test_two_branches_of_four_are_used_and_recorded(toy_voc, tmp_path):
    train(toy_voc, tmp_path / "a", *SCRATCH, "--num-steps", "1")
    snapshot = str(tmp_path / "a/VOC12_scenes_1.pth")
    train(
        toy_voc,
        tmp_path / "b",
        "--restore-from",
        snapshot,
        "--atrous-rates",
        "6,12",
        "--num-steps",
        "1",
        "--learning-rate",
        "0",
    )
    content = torch.load(tmp_path / "b/VOC12_scenes_1.pth", weights_only=True)
    assert content["meta"]["atrous_rates"] == [6, 12]
    head = {key for key in content["model"] if key.startswith("layer5.")}
    assert head == {f"layer5.conv2d_list.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")}
    assert all(torch.equal(content["model"][key], model(Path(snapshot))[key]) for key in head)


def test_is_training_moves_the_statistics_only(toy_voc, tmp_path):
    train(toy_voc, tmp_path / "a", *SCRATCH, "--num-steps", "1")
    before = model(tmp_path / "a/VOC12_scenes_1.pth")
    train(
        toy_voc, tmp_path / "b", "--restore-from", str(tmp_path / "a/VOC12_scenes_1.pth"), "--is-training", "--num-steps", "1"
    )
    after = model(tmp_path / "b/VOC12_scenes_1.pth")
    assert torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])


def test_it_learns(toy_voc, tmp_path):
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "40", "--learning-rate", "2e-3")
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize("script", ["train.py", "train_msc.py"])
def test_the_command_line(script, toy_voc, tmp_path):
    result = command(
        script,
        "--data-dir",
        toy_voc,
        "--snapshot-dir",
        tmp_path / "s",
        *SMALL,
        *SCRATCH,
        "--num-steps",
        "2",
        "--iter-size",
        "1",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "s/VOC12_scenes_2.pth").exists()
    assert "4 pictures of" in result.stdout + result.stderr


MISTAKES = {
    "no data": (["--data-dir", "nowhere"], r"nowhere does not exist; get PASCAL VOC with `python scripts/download.py"),
    "no list": (["--data-list", "nothing.txt"], "nothing.txt does not exist; pass a file with one id a line"),
    "no weights": (
        ["--restore-from", "weights/MS_DeepLab_resnet_pretrained_COCO_init.pth"],
        "`python scripts/download.py list`",
    ),
    "other weights": (["--restore-from", "lost.pth"], "lost.pth"),
    "too few classes": (["--num-classes", "2"], "class indices 0..1 and 255"),
    "no GPU 99": (["--device", "cuda:99"], "CUDA device 99"),
    "no device": (["--device", "gpu"], "is no torch device"),
    "sync-bn": (["--sync-bn", "--batch-norm", "frozen"], "add --batch-norm full"),
    "sync-bn on the CPU": (["--sync-bn"], "between CUDA devices only"),
    "crop": (["--input-size", "321"], "write HEIGHT,WIDTH"),
    "scale": (["--scale-range", "2,1"], "write LOW,HIGH"),
    "steps": (["--num-steps", "0"], "expected at least 1"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(kind, toy_voc, tmp_path, monkeypatch, capsys):
    options, message = MISTAKES[kind]
    folders = ["--data-dir", str(toy_voc), "--snapshot-dir", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", ["train.py", *folders, *SMALL, *SCRATCH, *options])
    with pytest.raises(SystemExit) as end:
        run_command(train_script.main)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists() or kind == "too few classes"


def test_a_mistake_leaves_no_traceback(tmp_path):
    result = command("train.py", "--data-dir", "nowhere", "--snapshot-dir", tmp_path / "s")
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: error: the data set folder nowhere does not exist; get PASCAL VOC with")
    assert "Traceback" not in result.stderr


def test_ctrl_c_saves_and_leaves(toy_voc, tmp_path):
    options = [
        "--data-dir",
        toy_voc,
        "--snapshot-dir",
        tmp_path,
        *SMALL,
        *SCRATCH,
        "--num-steps",
        "100000",
        "--num-workers",
        "1",
    ]
    process = subprocess.Popen([sys.executable, "train.py", *map(str, options)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "log.jsonl").exists() and len(log_lines(tmp_path)) > 1:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    steps = torch.load(tmp_path / "last.ckpt", weights_only=True)["step"]
    assert steps == log_lines(tmp_path)[-1]["step"]


@pytest.mark.cuda
def test_it_trains_on_cuda(toy_voc, tmp_path):
    for amp in ("off", "bf16", "fp16"):
        assert train(toy_voc, tmp_path / amp, *SCRATCH, "--num-steps", "3", "--device", "cuda", "--amp", amp) == 0
