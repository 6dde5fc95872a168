"""--resume: the resumed run is the run that was begun, whatever options are given and however it ended."""

import json
import lzma
import signal
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab import make_net, multi_scale_loss, single_scale_loss
from deeplab.weights import WeightsError, load_weights
from tests.helpers import ROOT, save_palette_png
from tests.helpers_runs import SCRATCH, SMALL, equal, log_lines, model, scores, stopping, train, train_msc
from utils import distributed, training
from utils.checkpoint import load_checkpoint, make_meta, prefix_of
from utils.command import UserError
from utils.evaluation.options import evaluation_parser
from utils.options import Options
from utils.training import log, start, validation
from utils.training.identity import compare_losses, loss_name
from utils.training.lock import FolderLock
from utils.training.optimizer import GuardedSGD
from utils.training.options import settle, training_parser

pytestmark = pytest.mark.usefixtures("thin_nets")
RUN = [*SCRATCH, "--num-steps", "6", "--iter-size", "2", "--weight-decay", "0.01", "--momentum", "0.8", "--power", "0.5",
       "--input-size", "25,33", "--save-pred-every", "100"]  # fmt: skip


def checkpoint(folder) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("loss", [single_scale_loss, multi_scale_loss])
def test_a_resumed_run_is_the_run_that_was_begun(loss, toy_voc, tmp_path):
    """Bit for bit, with only --resume: every option, generator and running statistic comes from the checkpoint."""
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
    "class_weights": ("balanced", "--class-weights None -> balanced"),
    "warmup_steps": ("5", "--warmup-steps 0 -> 5"),
    "clip_grad_norm": ("5", "--clip-grad-norm None -> 5.0"),
    "color_jitter": ("0,0,0,0", r"--color-jitter None -> \(0.0, 0.0, 0.0, 0.0\)"),
    "ignore_label": ("3", "--ignore-label 255 -> 3"),
    "restore_from": ("other.pth", "--restore-from"),
}


def test_options_that_would_change_the_run_are_refused(toy_voc, tmp_path):
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
    assert bare_resume(tmp_path, single_scale_loss, "--batch-size", "2") == 0  # the value that it had


def begun_by_train(toy_voc, folder):
    train(toy_voc, folder, *SCRATCH, "--num-steps", "1")
    return folder


def test_options_that_may_change_are_applied(toy_voc, tmp_path):
    """Other workers, other memory use and other paths give the same run."""
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
    assert "with --num-steps 8 the base learning rate goes on at 0.0005 instead of 0" in capsys.readouterr().out
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
    # --resume CKPT alone goes on in the checkpoint's folder; with --snapshot-dir the run writes there instead.
    assert train(toy_voc, tmp_path / "c", "--resume", str(tmp_path / "a/last.ckpt"), "--num-steps", "2") == 0
    assert checkpoint(tmp_path / "a")["step"] == 1
    assert [line["step"] for line in log_lines(tmp_path / "c")] == [2]
    assert train_msc(toy_voc, tmp_path / "d", *one) == 0


def test_without_a_checkpoint_a_new_run_begins(toy_voc, tmp_path, capsys):
    assert train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1", "--resume") == 0
    assert "to resume from: starting at step 0" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_goes_on(toy_voc, tmp_path):
    """It lacks the checksum of the ids, the steps of the snapshots that the run has written, and their prefix."""
    (toy_voc / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    added = {"ids", "numbers", "prefix"}
    assert content.keys() - added == {"model", "meta", "optimizer", "scaler", "step"}
    torch.save({key: value for key, value in content.items() if key not in added}, tmp_path / "last.ckpt")
    assert train(toy_voc, tmp_path, "--resume", "--num-steps", "2") == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 2
    assert (tmp_path / "VOC12_scenes_2.pth").exists()


def test_snapshots_of_the_users_own_data_are_named_after_its_folder(toy_voc, tmp_path, monkeypatch):
    """A resumed run keeps its prefix even if the data has moved. --keep, the log and the default of evaluate.py know it."""
    data, moved = tmp_path / "-my data.v2é", tmp_path / "moved"
    toy_voc.rename(data)
    (data / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    run = tmp_path / "snapshots"
    every = ["--save-pred-every", "1", "--keep", "2"]
    train(data, run, *SCRATCH, "--num-steps", "3", *every)
    assert {path.name for path in run.glob("*.pth")} == {"_my_data_v2é_scenes_2.pth", "_my_data_v2é_scenes_3.pth"}
    (torn := run / "._my_data_v2é_scenes_4.pth.1a2b3c4d.5e6f7a8b.tmp").write_bytes(b"x")
    data.rename(moved)
    train(moved, run, "--resume", "--num-steps", "4", *every)
    assert {path.name for path in run.glob("*.pth")} == {"_my_data_v2é_scenes_3.pth", "_my_data_v2é_scenes_4.pth"}
    assert not torn.exists()
    monkeypatch.chdir(tmp_path)
    (run / "notes_scenes_x.pth").touch()
    assert evaluation_parser("").parse_args([]).restore_from == "snapshots/_my_data_v2é_scenes_4.pth"
    (run / "VOC12_scenes_20000.pth").touch()
    assert evaluation_parser("").parse_args([]).restore_from == "snapshots/VOC12_scenes_20000.pth"


def test_prefixes_of_snapshots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {".": tmp_path.name, "/": "data", "a/../my-set_2/": "my-set_2", "a.b c": "a_b_c", "数据": "数据", "...": "___"}
    assert {folder: prefix_of(folder) for folder in names} == names
    assert all(log.is_ours(f"{prefix_of(folder)}_scenes_20000.pth") for folder in names)
    (tmp_path / f"{prefix_of('数' * 84)}_scenes_20000.pth.1a2b3c4d.5e6f7a8b.tmp").touch()  # not too long for a file system


@pytest.mark.parametrize(("step", "words"), [(-1, "sees none"), (0, "cannot read its own"), (4, "sees it at step 4")])
def test_a_newer_checkpoint_in_another_process_is_refused(toy_voc, tmp_path, monkeypatch, step, words):
    # Everything else that is gathered is an error, and no process has one here.
    monkeypatch.setattr(distributed, "gather", lambda own: [step, 9] if type(own) is int else [own, own])
    with pytest.raises(UserError, match=rf"process 1 sees .*last\.ckpt at step 9, but process 0 {words}; give"):
        train(toy_voc, tmp_path, *RUN, "--resume")


def test_broken_checkpoints_are_refused(toy_voc, tmp_path):
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    with pytest.raises(UserError, match=r"no optimiser state"):
        train(toy_voc, tmp_path, "--resume", str(tmp_path / "VOC12_scenes_1.pth"))
    with pytest.raises(UserError, match=r"there is no .*nothing\.ckpt"):
        train(toy_voc, tmp_path, "--resume", str(tmp_path / "nothing.ckpt"))
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a number
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt.*damaged.* or begin another run .*--restore-from and the newest"):
        train(toy_voc, tmp_path, "--resume")
    (tmp_path / "last.ckpt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        train(toy_voc, tmp_path, "--resume")


def test_the_log_and_the_folder_of_a_killed_run(toy_voc, tmp_path):
    """Lines after the checkpoint's step, an incomplete line and temporary files are removed; files of others stay."""
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
    """The first step after each start, so that a wrong learning rate is seen at once."""
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "3", "--log-every", "100")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 3]
    train(toy_voc, tmp_path, "--resume", "--num-steps", "6", "--log-every", "100")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 3, 4, 6]


def test_tensorboard_drops_the_steps_that_are_done_again(toy_voc, tmp_path):
    """The event of the checkpoint's own step stays; later ones are purged (TensorBoard drops steps >= purge_step)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"num_steps": 9, "batch_size": 1, "iter_size": 1, "tensorboard": True}
    for first, last in ((0, 4), (2, 5)):
        with log.RunLog(FolderLock(tmp_path), options, first) as run:
            for step in range(first + 1, last + 1):
                run.line(step, {"loss": float(10 * first + step)}, 0.1, 1, 0.0, [])
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_labels_are_judged_from_the_start_after_a_restart(toy_voc, tmp_path, capsys):
    """A restart does not warn because the labels before it are not counted: three of four labels hold only class 0."""
    for name in ("toy_0", "toy_1", "toy_2"):
        path = toy_voc / "SegmentationClassAug" / f"{name}.png"
        label = np.array(Image.open(path))
        save_palette_png(path, np.zeros_like(label))
    options = [*SCRATCH, "--num-steps", "9", "--batch-size", "1"]
    for stop_at in (1, 2, 3):
        folder = tmp_path / str(stop_at)
        train(toy_voc, folder, *options, loss=stopping(single_scale_loss, stop_at))
        assert bare_resume(folder) == 0
    assert "only class" not in capsys.readouterr().out


def test_is_training_is_another_name_for_stats(toy_voc, tmp_path):
    common = ["--restore-from", "none", "--learning-rate", "1e-5", "--num-steps", "2"]
    for number, (begun, resumed) in enumerate(
        [(["--batch-norm", "stats"], "--is-training"), (["--is-training"], "--is-training")]
    ):
        train(toy_voc, tmp_path / str(number), *common, *begun, loss=stopping(single_scale_loss, 1))
        assert bare_resume(tmp_path / str(number), single_scale_loss, resumed) == 0
    assert bare_resume(tmp_path / "0", single_scale_loss, "--batch-norm", "stats") == 0


@pytest.fixture
def version1(tmp_path, whole_nets) -> Path:
    """A folder with the ``last.ckpt`` and the snapshot that the program of format 1 wrote at step 2 of 4, on the toy data.

    The net is a ResNet-18 (torch 2.14; ``--val-every 2`` and the options of ``RUN``, crops of 33,41); the run was stopped by
    SIGTERM. Each tensor's first 13 numbers were then repeated over the whole tensor, in memory order (channels last), and
    saved again with torch.save, so the files compress from 135 MB to 49 kB. The numbers expected below are those of that
    program, resumed from these files.
    """
    for path in (ROOT / "tests/version1").glob("*.xz"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return tmp_path / "s"


def test_a_run_of_format_1_goes_on(version1, toy_voc):
    """Its momentum, its weights and its options are those of the file."""
    assert bare_resume(version1, single_scale_loss, "--data-dir", str(toy_voc)) == 0
    lines = log_lines(version1)
    assert [line["step"] for line in lines] == [2, 3, 4, 4]
    assert [line["loss"] for line in lines[1:3]] == pytest.approx([2.081963, 0.928204], rel=1e-4)
    assert [line["lr"] for line in lines[1:3]] == pytest.approx([1e-3 * 0.5**0.5, 1e-3 * 0.25**0.5])
    assert [line["val_mean_iou"] for line in (lines[0], lines[3])] == pytest.approx([0.059091, 0.21475], abs=2e-3)
    state = model(version1 / "VOC12_scenes_4.pth")
    norms = [state[name].norm().item() for name in ("conv1.weight", "layer4.1.bn2.running_var", "layer5.conv2d_list.3.bias")]
    assert norms == pytest.approx([2.240394, 53.281524, 0.0595726], rel=1e-4)


def test_a_snapshot_of_format_1_is_evaluated(version1, toy_voc, tmp_path):
    result = scores(toy_voc, version1 / "VOC12_scenes_2.pth", tmp_path)
    assert result["step"] == 2
    expected = [[443, 4551, 2864, 2307], [247, 113, 280, 60], [138, 46, 662, 114], [310, 113, 626, 127]]
    counted = np.array(result["scores"]["confusion_matrix"])
    assert np.abs(counted - expected).sum() <= 26  # of 13,001 pixels: rounding differs between machines


def checkpoint_of(options: Options) -> dict:
    """A checkpoint as a run with these options saves it at step 3, but with other numbers in its tensors."""
    net = make_net({"backbone": "resnet18", "num_classes": 4}, options.batch_norm)
    optimizer = GuardedSGD(net, 0.1, options.momentum)
    args = {name: value for name, value in vars(options).items() if name != "given"}
    args |= {"backbone": "resnet18", "num_classes": 4, "loss": loss_name(single_scale_loss)}
    return {
        "model": net.state_dict(),
        "meta": make_meta(net, ["a", "b", "c", "d"], 3, args, run="1f", seen_voc_val=""),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "step": 3,
        "ids": "5a",
        "numbers": [2],
    }


def parsed(*options: str) -> Options:
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    return settle(parser.parse_args(["--resume", "--batch-norm", "full", *options]))


def resumed(content, monkeypatch, *options: str):
    """The start of a run that is resumed from ``content``."""
    monkeypatch.setattr(start, "load_checkpoint", lambda path: content)
    return start.resume(parsed(*options), loss_name(single_scale_loss), Path("snapshots/last.ckpt"))


def edited(content: dict, place: str, value) -> dict:
    """A copy of ``content`` with ``value`` in one place, such as ``"meta/step"``; ``GONE`` removes the entry."""
    first, _, rest = place.partition("/")
    key = int(first) if first.isdigit() else first
    copy = list(content) if isinstance(content, list) else dict(content)
    if rest:
        copy[key] = edited(copy[key], rest, value)
    elif value is GONE:
        del copy[key]
    else:
        copy[key] = value
    return copy


GONE = object()
SLOT, WEIGHT = "optimizer/state/0/momentum_buffer", "model/conv1.weight"  # of one parameter, (64, 3, 7, 7)
BOTH = (SLOT, WEIGHT)
SHAPE = (64, 3, 7, 7)
PLACES: dict[str, list] = {
    "optimizer": [None, {}, []],
    "optimizer/state": [{}, None],
    "optimizer/state/0": [None, {}, GONE],
    "optimizer/state/99": [{"momentum_buffer": torch.zeros(1)}],
    "optimizer/state/x": [{"momentum_buffer": torch.zeros(1)}],
    "optimizer/param_groups": [None, [], [{}, {}, {}]],
    "optimizer/param_groups/0/lr_scale": [2.0, "1", GONE],
    "optimizer/param_groups/2/decay_scale": [1.0],
    "optimizer/param_groups/0/params": [[], None],
    "optimizer/param_groups/1/params": [[0, 1, 2, 3]],
    "model": [None, {}, [1]],
    "model/conv9.weight": [torch.zeros(1)],
    "model/7": [torch.zeros(1)],
    "step": [10**5000, "3", 2, 3.0, True, -1, None, torch.tensor(3)],
    "meta": [None, {}, []],
    "meta/step": [4, GONE],
    "meta/args": [None, [], GONE],
    "meta/net": ["unet"],
    "meta/backbone": ["resnet99", "resnet34", None, GONE],
    "meta/num_classes": ["4", 5, -1, 10**30],
    "meta/atrous_rates": [6, ["a"]],
    "meta/batch_norm_eps": ["x"],
    "meta/stem": ["round"],
    "meta/classes": [["a"], "abcd", [1, 2, 3, 4]],
    "meta/seen_voc_val": [5],
    "meta/run": [5],
    "meta/given": [5, "a", [1]],
    "ids": [5],
    "numbers": [5, ["../../x"], [9], [True]],
    "class_weights": [5, [1.0], [1, 1, 1, 1], [1.0, 1.0, 1.0, float("nan")]],
    "prefix": [5, "", "../x", "a b", None],
    "scaler": [None, {"scale": 4.0, "_growth_tracker": 0}],
}
OPTIONS: dict[str, list] = {
    "momentum": ["0.9", 1.5, None],
    "class_weights": ["balanced", ""],
    "warmup_steps": [-1, "x"],
    "clip_grad_norm": [0.0, "x"],
    "color_jitter": [[1, 2], 0.4, [0.4, 0.4, 0.4, 0.6]],
    "weight_decay": [float("nan")],
    "learning_rate": [[1]],
    "batch_size": [0, 2.5, True],
    "num_steps": [-5, 2, None],
    "input_size": [33, (33,), ("a", "b")],
    "scale_range": [(2.0, 1.0)],
    "amp": ["fp8"],
    "batch_norm": ["none"],
    "random_mirror": ["yes"],
    "random_scale": [1],
    "random_seed": [-1],
    "dataset": ["coco"],
    "data_list": [5],
    "data_dir": [None],
    "power": [torch.zeros(1), torch.zeros(2)],
    "loss_size": ["both"],
    "iter_size": ["x", 10**5000],
    "ohem_keep": ["x"],
}
ANOTHER_RUNS = [
    *[(place, value) for place in BOTH for value in (GONE, None, 1.0, "x", [0.0])],
    *[(place, torch.zeros(shape)) for place in BOTH for shape in ((1,), (), (0,), SHAPE[::-1], (*SHAPE, 1))],
    *[(place, torch.zeros(SHAPE, dtype=kind)) for place in BOTH for kind in (torch.half, torch.double, torch.int8)],
    *[(place, torch.zeros(SHAPE, device="meta")) for place in BOTH],
    *[(place, torch.zeros(SHAPE).to_sparse()) for place in BOTH],
    *[(place, value) for place, values in PLACES.items() for value in values],
    *[(f"meta/args/{name}", value) for name, values in OPTIONS.items() for value in values],
]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_checkpoint_is_compared_with_its_run_before_it_is_loaded(monkeypatch):
    """Every tensor, group and option: a value that would load as another run, or crash, gives one sentence."""
    content = checkpoint_of(parsed("--momentum", "0.8"))
    begun = resumed(content, monkeypatch)
    assert (begun.step, begun.run, begun.classes, begun.options.momentum) == (3, "1f", ["a", "b", "c", "d"], 0.8)
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)])
    for place, value in [*ANOTHER_RUNS, (SLOT, nested), (WEIGHT, nested)]:
        with pytest.raises(UserError, match=r"last\.ckpt does not fit its run: its .*an intact copy in its place, or begin"):
            pytest.fail(f"{place}: {resumed(edited(content, place, value), monkeypatch)}"[:200])
    with pytest.raises(UserError, match=r"its 'conv1.weight' is torch.float32 of shape \(1,\); the run has .*\(64, 3, 7, 7\)"):
        resumed(edited(content, WEIGHT, torch.zeros(1)), monkeypatch)


def test_entries_that_differ_between_versions_of_torch_are_ignored(monkeypatch):
    """The hyperparameters come from the run; those in the groups of the file have no effect."""
    content = checkpoint_of(parsed("--momentum", "0.8"))
    hostile = {"momentum": 0.0, "weight_decay": 9.0, "nesterov": True, "maximize": True, "lr": 5.0, "dampening": 0.9, "new": 1}
    groups = [{**group, **hostile} for group in content["optimizer"]["param_groups"]]
    for state in content["optimizer"]["state"].values():
        state["momentum_buffer"] = torch.full(state["momentum_buffer"].shape, 0.25)
    content = edited(content, "optimizer/param_groups", groups)
    begun = resumed(content, monkeypatch)
    net = begun.net.to(memory_format=torch.channels_last)
    optimizer = GuardedSGD(net, 0.5, 0.8, 0.01)
    before = [{**group, "params": None} for group in optimizer.param_groups]
    optimizer.load_momentum(begun.checkpoint["optimizer"])
    assert [{**group, "params": None} for group in optimizer.param_groups] == before
    assert all((state["momentum_buffer"] == 0.25).all() for state in optimizer.state.values())
    assert all(state["momentum_buffer"].stride() == parameter.stride() for parameter, state in optimizer.state.items())
    without = checkpoint_of(parsed("--momentum", "0"))
    assert without["optimizer"]["state"] == {}
    assert resumed(without, monkeypatch).options.momentum == 0


def test_tensors_of_a_file_that_share_memory_are_copied(monkeypatch):
    content = checkpoint_of(parsed())
    shared = torch.zeros(1).expand(64)
    for name in ("bn1.weight", "bn1.bias", "layer1.0.bn1.weight"):
        content["model"][name] = shared
    net = resumed(content, monkeypatch).net
    with torch.no_grad():
        net.bn1.weight[0] = 5.0
    assert [tensor.sum() for tensor in (net.bn1.weight, net.bn1.bias, net.layer1[0].bn1.weight)] == [5.0, 0.0, 0.0]


def test_loss_scaling_of_a_checkpoint(monkeypatch):
    """Its scale comes from the file, its growth from the run."""
    content = edited(
        checkpoint_of(parsed("--amp", "fp16")), "scaler", {"scale": 8.0, "_growth_tracker": 5, "growth_interval": 1}
    )
    assert resumed(content, monkeypatch).checkpoint["scaler"]["scale"] == 8.0
    for scale in (0.0, -1.0, float("inf"), float("nan"), "8", None, torch.ones(1)):
        with pytest.raises(UserError, match="its loss scaling has the scale"):
            resumed(edited(content, "scaler/scale", scale), monkeypatch)
    with pytest.raises(UserError, match="its loss scaling is not that of --amp fp16"):
        resumed(edited(content, "scaler", {}), monkeypatch)


@pytest.mark.parametrize("version", [99, 3, 0, "2", None, 2.0, True])
def test_a_file_of_another_format_is_refused(version, tmp_path):
    """A newer program may mean something else by the same names. Snapshots and checkpoints are both refused."""
    content = {"model": {}, "meta": {"backbone": "resnet18", "version": version}, "optimizer": {}, "scaler": {}, "step": 1}
    torch.save(content, tmp_path / "last.ckpt")
    sentence = rf"last\.ckpt: it is of format {version!r}, and this program knows 1 to 2; use the program that wrote it"
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match=sentence):
        load_weights(tmp_path / "last.ckpt")


def test_losses_are_compared_by_their_qualified_names(toy_voc, tmp_path):
    ours, ours_msc = loss_name(single_scale_loss), loss_name(multi_scale_loss)
    assert (ours, ours_msc) == ("deeplab.loss.single_scale_loss", "deeplab.loss.multi_scale_loss")
    assert loss_name(stopping) == "tests.helpers_runs.stopping"
    for begun, now in [(ours, ours), ("single_scale_loss", ours), ("multi_scale_loss", ours_msc), ("mine", "lab.mine")]:
        compare_losses(begun, now)
    for begun, now in [("single_scale_loss", ours_msc), (ours_msc, ours)]:
        with pytest.raises(UserError, match=r"was begun with train(_msc)?\.py, not with train"):
            compare_losses(begun, now)
    for begun, now in [
        ("single_scale_loss", "lab.single_scale_loss"), ("lab.single_scale_loss", ours), ("lab.mine", "lab.other"),
        ("lab.mine", "lab2.mine"), ("mine", "lab.other"), ("mine", ours), (ours, "lab.mine"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"was begun with the loss .*{begun}, not with {now}; go on with .*{begun}"):
            compare_losses(begun, now)
    for loss in (lambda *args: {}, partial(single_scale_loss, size="input"), Namespace()):
        with pytest.raises(UserError, match=r"the loss function .* has no name, but --resume compares losses by name"):
            train(toy_voc, tmp_path / "s", *RUN, loss=loss)
    assert not (tmp_path / "s").exists()


def smooth_loss(net, images, labels, size, aux_weight, smooth):
    """A loss with an option of its own."""
    smooth_loss.seen.append(smooth)
    return {"loss": smooth * single_scale_loss(net, images, labels, size, aux_weight=aux_weight)["loss"]}


def any_loss(net, images, labels, **options):
    return smooth_loss(net, images, labels, options["size"], options["aux_weight"], options["smooth"])


@pytest.mark.parametrize("loss", [smooth_loss, any_loss])
def test_an_option_of_the_users_own_loss(loss, toy_voc, tmp_path):
    """Added to the parser, it is passed to the parameter of its name, and a resumed run goes on with its value."""

    def run(*options):
        parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
        parser.add_argument("--smooth", type=float, default=1.0)
        parser.add_argument("--note", default="")  # not passed to a loss without such a parameter
        smooth_loss.seen = []
        words = ["--data-dir", str(toy_voc), "--snapshot-dir", str(tmp_path / "s"), *SMALL, *SCRATCH, *options]
        training.run(parser.parse_args(words), loss)
        return smooth_loss.seen

    assert run("--num-steps", "1", "--smooth", "0.5") == [0.5]
    assert run("--num-steps", "2", "--resume") == [0.5]
    with pytest.raises(UserError, match=r"these cannot change: --smooth 0\.5 -> 3\.0"):
        run("--num-steps", "3", "--resume", "--smooth", "3")


def test_the_users_own_script_is_the_module_of_its_loss(monkeypatch):
    """The name is the same whether the script is run or imported; another script's loss of that name is another loss."""

    def loss():
        pass

    loss.__module__, loss.__qualname__ = "__main__", "loss"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/somewhere/mine.py", raising=False)
    assert loss_name(loss) == "mine.loss"


def test_other_class_names_and_another_runs_best_net_are_refused(toy_voc, tmp_path):
    (toy_voc / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    options = [*SCRATCH, "--num-steps", "2", "--val-every", "1"]
    train(toy_voc, tmp_path / "a", *options, "--num-steps", "1")
    train(toy_voc, tmp_path / "b", *options, "--num-steps", "1", "--random-seed", "5")
    runs = [torch.load(path, weights_only=True)["meta"]["run"] for path in sorted(tmp_path.glob("*/*.[cp]*t*"))]
    assert runs[0] == runs[1] == runs[2] != runs[3] == runs[4] == runs[5]
    (toy_voc / "classes.txt").write_text("sky\ncar\nroad\ntree\n")
    with pytest.raises(UserError, match=r"begun with the class 'road', but .*toy now names it 'car'; resume with the same"):
        train(toy_voc, tmp_path / "a", "--resume", "--num-steps", "2")
    (toy_voc / "classes.txt").unlink()
    best = (tmp_path / "b/best.pth").read_bytes()
    (tmp_path / "a/best.pth").write_bytes(best)
    with pytest.raises(UserError, match=r"a/best\.pth is another run's, and this run would replace it; move it away"):
        train(toy_voc, tmp_path / "a", "--resume", "--num-steps", "2")
    assert (tmp_path / "a/best.pth").read_bytes() == best
    (tmp_path / "a/best.pth").unlink()
    assert train(toy_voc, tmp_path / "a", "--resume", "--num-steps", "2") == 0
    meta = torch.load(tmp_path / "a/best.pth", weights_only=True)["meta"]
    assert (meta["run"], meta["classes"]) == (runs[0], ["sky", "road", "car", "tree"])


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1, 1.5, "x", None, [1]])
def test_a_best_net_without_a_score_is_damaged(score, tmp_path):
    torch.save({"meta": {"val_mean_iou": score}}, tmp_path / "best.pth")
    with pytest.raises(UserError, match="the best snapshot so far, is damaged"):
        validation.mean_iou_of(tmp_path / "best.pth")


def test_a_damaged_log_keeps_its_readable_lines(tmp_path):
    path, good = tmp_path / "log.jsonl", ['{"step": 1, "loss": 1.0, "seconds": 2.5}', '{"step": 2, "val_mean_iou": 0.5}']
    steps = ["true", "-1", "1.0", '"1"', "[1]", "null", "NaN", "1" + "0" * 5000, '1, "seconds": "x"', '1, "seconds": Infinity']
    bad = ["[" * 100000, "1", "[]", "null", "\xff", "", *(f'{{"step": {step}}}' for step in steps), '{"step": 3}']
    path.write_bytes("\n".join([good[0], *bad, good[1], good[1][:9]]).encode("latin-1"))
    with log.RunLog(FolderLock(tmp_path), {"num_steps": 9, "batch_size": 1, "iter_size": 1, "tensorboard": False}, 2) as run:
        assert run.scored
        assert 2.5 <= run.seconds < 60
    assert path.read_text().splitlines() == good
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read"):
        log.cut_log(path, 2)
