"""--resume: the run that goes on is the run that was begun, whatever is given with it and however it ended."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab import multi_scale_loss, single_scale_loss
from tests.conftest import save_palette_png
from tests.test_training import SCRATCH, log_lines, model, train, train_msc
from utils import distributed, log
from utils.command import UserError

RUN = [*SCRATCH, "--num-steps", "6", "--iter-size", "2", "--weight-decay", "0.01", "--momentum", "0.8", "--power", "0.5",
       "--input-size", "25,33", "--save-pred-every", "100"]  # fmt: skip


def stopping(loss, batches: int):
    """``loss`` that asks for a stop in its ``batches``-th call."""

    def wrapped(*args, **kwargs):
        wrapped.left -= 1
        if wrapped.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **kwargs)

    wrapped.left = batches
    return wrapped


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def checkpoint(folder) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("loss", [single_scale_loss, multi_scale_loss])
def test_a_resumed_run_is_the_run_that_was_begun(loss, toy_voc, tmp_path):
    """Bit for bit, with --resume alone: every option, generator and running statistic comes from the checkpoint."""
    train(toy_voc, tmp_path / "whole", *RUN, loss=loss)
    assert train(toy_voc, tmp_path / "parts", *RUN, loss=stopping(loss, 6)) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "parts")["step"] == 3
    torch.manual_seed(99)
    assert bare_resume(tmp_path / "parts", loss) == 0
    assert [line["step"] for line in log_lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    assert equal(*(model(tmp_path / name / "VOC12_scenes_6.pth") for name in ("whole", "parts")))
    for name in ("loss", "lr"):
        assert [line[name] for line in log_lines(tmp_path / "whole")] == [line[name] for line in log_lines(tmp_path / "parts")]
    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    whole, parts = whole["meta"]["args"], parts["meta"]["args"]
    assert {key: value for key, value in whole.items() if key not in ("snapshot_dir", "resume", "loss")} == {
        key: value for key, value in parts.items() if key not in ("snapshot_dir", "resume", "loss")
    }
    seconds = [line["seconds"] for line in log_lines(tmp_path / "parts")]
    assert seconds == sorted(seconds)


def bare_resume(folder, loss=single_scale_loss, *options: str) -> int:
    from utils import training
    from utils.options import training_parser

    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    return training.run(parser.parse_args(["--snapshot-dir", str(folder), "--resume", *options]), loss)


CHANGES = {
    "weight_decay": ("0.1", "--weight-decay 0.01 -> 0.1"),
    "momentum": ("0.7", "--momentum 0.8 -> 0.7"),
    "learning_rate": ("1", "--learning-rate 0.001 -> 1.0"),
    "power": ("1", "--power 0.5 -> 1.0"),
    "batch_size": ("4", "--batch-size 2 -> 4"),
    "iter_size": ("1", "--iter-size 2 -> 1"),
    "input_size": ("33,33", r"--input-size \(25, 33\) -> \(33, 33\)"),
    "scale_range": ("1,2", r"--scale-range .* -> \(1.0, 2.0\)"),
    "random_seed": ("5", "--random-seed 1234 -> 5"),
    "num_classes": ("5", "--num-classes 4 -> 5"),
    "backbone": ("resnet34", "--backbone resnet18 -> resnet34"),
    "atrous_rates": ("6,12", "--atrous-rates .* -> "),
    "batch_norm": ("stats", "--batch-norm full -> stats"),
    "net": ("pspnet", "--net deeplabv2 -> pspnet"),
    "ohem_keep": ("9", "--ohem-keep 100000 -> 9"),
    "loss_size": ("input", "--loss-size output -> input"),
    "amp": ("fp16", "--amp off -> fp16"),
    "ignore_label": ("3", "--ignore-label 255 -> 3"),
    "restore_from": ("other.pth", "--restore-from"),
}


def test_what_would_make_it_another_run_is_refused(toy_voc, tmp_path):
    train(toy_voc, tmp_path, *RUN, loss=stopping(single_scale_loss, 2))
    before = (tmp_path / "last.ckpt").read_bytes()
    for name, (value, message) in CHANGES.items():
        with pytest.raises(UserError, match=message):
            bare_resume(tmp_path, single_scale_loss, "--" + name.replace("_", "-"), value)
    with pytest.raises(UserError, match=r"--momentum 0\.8 -> 0\.7, --weight-decay 0\.01 -> 0\.1 .*leave them out"):
        bare_resume(tmp_path, single_scale_loss, "--momentum", "0.7", "--weight-decay", "0.1", "--batch-size", "2")
    with pytest.raises(UserError, match=r"begun with train\.py, not with train_msc\.py"):
        bare_resume(tmp_path / "other", multi_scale_loss, "--resume", str(begun_by_train(toy_voc, tmp_path / "begun")))
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert bare_resume(tmp_path, single_scale_loss, "--batch-size", "2") == 0  # what it was


def begun_by_train(toy_voc, folder):
    train(toy_voc, folder, *SCRATCH, "--num-steps", "1")
    return folder


def test_what_may_change_is_applied(toy_voc, tmp_path):
    """And is the same run: other workers, other memory, other places."""
    train(toy_voc, tmp_path / "whole", *RUN)
    train(toy_voc, tmp_path / "parts", *RUN, loss=stopping(single_scale_loss, 4))
    moved = tmp_path / "moved"
    toy_voc.rename(moved)
    (tmp_path / "list.txt").write_text((moved / "ImageSets/Segmentation/train.txt").read_text())
    options = ["--num-workers", "1", "--data-dir", str(moved), "--data-list", str(tmp_path / "list.txt"), "--log-every", "2",
               "--save-pred-every", "4", "--tensorboard", "--grad-checkpoint", "--save-num-images", "1"]  # fmt: skip
    assert bare_resume(tmp_path / "parts", single_scale_loss, *options) == 0
    assert {path.name for path in (tmp_path / "parts").glob("*.pth")} == {"VOC12_scenes_4.pth", "VOC12_scenes_6.pth"}
    assert len(list((tmp_path / "parts/images").iterdir())) == 2
    assert list((tmp_path / "parts").glob("events.out.tfevents.*"))
    assert [line["step"] for line in log_lines(tmp_path / "parts")] == [1, 2, 3, 4, 6]
    assert equal(*(model(tmp_path / name / "VOC12_scenes_6.pth") for name in ("whole", "parts")))
    (tmp_path / "list.txt").write_text("toy_1\ntoy_0\ntoy_2\ntoy_3\n")
    with pytest.raises(UserError, match="not the one that the run was begun with"):
        bare_resume(tmp_path / "parts", single_scale_loss, "--data-list", str(tmp_path / "list.txt"), "--num-steps", "8")


def test_more_steps(toy_voc, tmp_path, capsys):
    train(toy_voc, tmp_path, *RUN)
    with pytest.raises(UserError, match=r"step 6 is reached already and --num-steps is 5"):
        bare_resume(tmp_path, single_scale_loss, "--num-steps", "5")
    assert bare_resume(tmp_path) == 0  # nothing left to do
    assert bare_resume(tmp_path, single_scale_loss, "--num-steps", "8") == 0
    assert "with --num-steps 8 the base rate goes on at 0.0005 instead of 0" in capsys.readouterr().out
    assert log_lines(tmp_path)[-1]["lr"] == pytest.approx(1e-3 * (1 - 7 / 8) ** 0.5)
    assert checkpoint(tmp_path)["meta"]["args"]["num_steps"] == 8


def test_another_run_is_never_overwritten(toy_voc, tmp_path):
    one = [*SCRATCH, "--num-steps", "1"]
    for name in ("a", "b"):
        train(toy_voc, tmp_path / name, *one)
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"holds a run already.*--resume"):
        train(toy_voc, tmp_path / "b", *one)
    with pytest.raises(UserError, match=r"holds a run already"):
        bare_resume(tmp_path / "b", single_scale_loss, "--resume", str(tmp_path / "a/last.ckpt"), "--num-steps", "2")
    (tmp_path / "b/last.ckpt").rename(tmp_path / "kept.ckpt")
    with pytest.raises(UserError, match=r"holds snapshots already \(VOC12_scenes_1\.pth\)"):
        train(toy_voc, tmp_path / "b", *one)
    (tmp_path / "kept.ckpt").rename(tmp_path / "b/last.ckpt")
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir() if path.is_file()} == before
    # A path alone goes on in the checkpoint's own folder, another folder of its own begins there.
    assert train(toy_voc, tmp_path / "c", "--resume", str(tmp_path / "a/last.ckpt"), "--num-steps", "2") == 0
    assert checkpoint(tmp_path / "a")["step"] == 1
    assert [line["step"] for line in log_lines(tmp_path / "c")] == [2]
    assert train_msc(toy_voc, tmp_path / "d", *one) == 0


def test_without_a_checkpoint_it_begins(toy_voc, tmp_path, capsys):
    assert train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1", "--resume") == 0
    assert "to resume from: starting at step 0" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_goes_on(toy_voc, tmp_path):
    """It did not tell the check sum of the ids, nor which snapshots the run had written."""
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content.keys() - {"ids", "numbers"} == {"model", "meta", "optimizer", "scaler", "step"}
    torch.save({key: value for key, value in content.items() if key not in ("ids", "numbers")}, tmp_path / "last.ckpt")
    assert train(toy_voc, tmp_path, "--resume", "--num-steps", "2") == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 2


@pytest.mark.parametrize(("step", "words"), [(-1, "sees none"), (0, "cannot read its own"), (4, "sees it at step 4")])
def test_a_newer_checkpoint_in_another_process_is_told(toy_voc, tmp_path, monkeypatch, step, words):
    monkeypatch.setattr(distributed, "gather", lambda own: [step, 9])
    with pytest.raises(UserError, match=rf"process 1 sees .*last\.ckpt at step 9, but process 0 {words}; give"):
        train(toy_voc, tmp_path, *RUN, "--resume")


def test_broken_checkpoints_are_refused(toy_voc, tmp_path):
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    with pytest.raises(UserError, match=r"no optimiser state"):
        train(toy_voc, tmp_path, "--resume", str(tmp_path / "VOC12_scenes_1.pth"))
    with pytest.raises(UserError, match=r"there is no .*nothing\.ckpt"):
        train(toy_voc, tmp_path, "--resume", str(tmp_path / "nothing.ckpt"))
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one number
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt.*damaged.* or begin another run .*--restore-from and the newest"):
        train(toy_voc, tmp_path, "--resume")
    (tmp_path / "last.ckpt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        train(toy_voc, tmp_path, "--resume")


def test_the_log_and_the_folder_of_a_killed_run(toy_voc, tmp_path):
    """Lines behind the checkpoint, a torn line and torn temporary files go; what is not the run's stays."""
    train(toy_voc, tmp_path, *RUN, loss=stopping(single_scale_loss, 6))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    later = [json.dumps({**json.loads(lines[-1]), "step": step}) for step in (4, 5)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, *later, later[0][: len(later[0]) // 2]]))
    for name in (".last.ckpt.123.tmp", ".VOC12_scenes_4.pth.1a2b3c4d.5e6f7a8b.tmp", ".mine.tmp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert bare_resume(tmp_path) == 0
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith((".", "n"))} == {".mine.tmp", "notes.txt"}


def test_the_first_and_the_last_step_are_logged(toy_voc, tmp_path):
    """Of each start, so that a wrong rate is seen at once."""
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "3", "--log-every", "100")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 3]
    train(toy_voc, tmp_path, "--resume", "--num-steps", "6", "--log-every", "100")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 3, 4, 6]


def test_tensorboard_forgets_the_steps_that_are_done_again(toy_voc, tmp_path):
    """An event of the checkpoint's own step stays, the later ones are purged (TensorBoard drops steps >= purge_step)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"num_steps": 9, "batch_size": 1, "iter_size": 1, "tensorboard": True}
    for first, last in ((0, 4), (2, 5)):
        with log.RunLog(tmp_path, options, first) as run:
            for step in range(first + 1, last + 1):
                run.line(step, {"loss": float(10 * first + step)}, 0.1, 1, 0.0)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_labels_are_judged_anew_after_a_restart(toy_voc, tmp_path, capsys):
    """Not as if those before it had held nothing: three of four pictures hold class 0 alone."""
    for name in ("toy_0", "toy_1", "toy_2"):
        path = toy_voc / "SegmentationClassAug" / f"{name}.png"
        label = np.array(Image.open(path))
        save_palette_png(path, np.zeros_like(label))
    options = [*SCRATCH, "--num-steps", "9", "--batch-size", "1"]
    for stop_at in (1, 2, 3):
        folder = tmp_path / str(stop_at)
        train(toy_voc, folder, *options, loss=stopping(single_scale_loss, stop_at))
        assert bare_resume(folder) == 0
    assert "nothing but class" not in capsys.readouterr().out


def test_is_training_is_another_word_for_stats(toy_voc, tmp_path):
    common = ["--restore-from", "none", "--learning-rate", "1e-5", "--num-steps", "2"]
    for number, (begun, resumed) in enumerate(
        [(["--batch-norm", "stats"], "--is-training"), (["--is-training"], "--is-training")]
    ):
        train(toy_voc, tmp_path / str(number), *common, *begun, loss=stopping(single_scale_loss, 1))
        assert bare_resume(tmp_path / str(number), single_scale_loss, resumed) == 0
    assert bare_resume(tmp_path / "0", single_scale_loss, "--batch-norm", "stats") == 0
