import json
import os
import sys
from functools import partialmethod, wraps
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import train as train_script
from dataset import DatasetError, VOCSegmentation
from deeplab import multi_scale_loss, single_scale_loss
from tests.helpers import TOY_CLASSES, save_palette_png
from tests.helpers_runs import SCRATCH, SMALL, STEPS, TORCH, command, equal, log_lines, model, train, train_msc
from utils import visualize
from utils.command import UserError, run_command
from utils.training import messages, setup, validation
from utils.training.monitor import Diverged
from utils.training.options import COUNTS_ONCE, training_parser

pytestmark = pytest.mark.usefixtures("thin_nets")


def test_accumulated_batches_equal_one_batch(toy_voc, tmp_path):
    """The learning rate changes only between optimiser steps, and the first step accumulates as many batches as the others."""
    common = ["--restore-from", "none", "--batch-norm", "frozen", "--learning-rate", "1e-4", "--num-steps", "3"]
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
    width, height = Image.open(tmp_path / "images/000003_toy_0.png").size
    assert width == 4 * 2 * 55 + 3 * visualize.GAP
    assert height > 2 * 40
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


def test_the_number_of_workers_fits_the_bytes_of_a_batch(toy_voc, tmp_path, monkeypatch):
    """Per pixel three bytes of colour and one of label."""
    asked = []
    monkeypatch.setattr(setup, "fitting_workers", lambda *words: asked.append(words) or (0, ""))
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1", "--num-workers", "5", "--batch-size", "3", "--input-size", "25,33")
    assert asked == [(5, 3 * 25 * 33 * 4)]
    assert torch.backends.cudnn.benchmark  # all crops have the same size
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["scaler"] == {}  # only float16 needs loss scaling


def test_a_note_says_that_each_process_has_its_own_batch_statistics(toy_voc, monkeypatch):
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    for processes, options, noted in ((1, [], False), (2, [], True), (2, ["--batch-norm", "frozen"], False)):
        args = parser.parse_args(["--data-dir", str(toy_voc), *SMALL, "--batch-norm", "full", "--batch-size", "6", *options])
        data, data_list = setup.open_training_data(args)
        monkeypatch.setattr(setup.distributed, "world_size", lambda processes=processes: processes)
        (note,) = [
            line for line in messages.head_lines(args, data, data_list, "", torch.device("cpu")) if "batch statistics" in line
        ] or [""]
        assert ("each process takes batch statistics of its own 3 images" in note) == bool(note) == noted


def test_bf16_is_suggested_if_the_gpu_supports_it(toy_voc, monkeypatch):
    parser = training_parser("", batch_size=10, iter_size=1, snapshot_dir="snapshots")
    args = parser.parse_args(["--data-dir", str(toy_voc), *SMALL])
    data, data_list = setup.open_training_data(args)
    for device, capability, amp, suggested in (
        ("cuda", (9, 0), "off", True),
        ("cuda", (7, 5), "off", False),
        ("cuda", (9, 0), "fp16", False),
        ("cpu", None, "off", False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        args.amp = amp
        said = "\n".join(messages.head_lines(args, data, data_list, "", torch.device(device)))
        assert ("bf16 is about twice as fast on this card: --amp bf16" in said) == suggested


def test_a_loss_that_is_not_finite_stops_the_run(toy_voc, tmp_path):
    """The message names the step and the images of the batch; the snapshots are unchanged."""

    def loss(net, images, labels, **options):
        loss.calls += 1
        losses = single_scale_loss(net, images, labels, **options)
        return {"loss": losses["loss"] * (float("nan") if loss.calls == 6 else 1)}

    loss.calls = 0
    options = [*SCRATCH, "--num-steps", "5", "--iter-size", "2", "--save-pred-every", "2"]
    with pytest.raises(
        Diverged, match=r"step 3, images toy_\d, toy_\d \(--learning-rate 0.001, --batch-norm full, w.* none\)"
    ) as error:
        train(toy_voc, tmp_path, *options, loss=loss)
    assert error.value.exit_status == 1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_step_that_makes_weights_infinite_is_not_saved(toy_voc, tmp_path):
    """Its loss was still finite, and no later loss has been checked yet: in the middle of a run or at its end."""
    options = [*SCRATCH, "--learning-rate", "1e38", "--save-pred-every", "1"]
    with pytest.raises(Diverged, match=r"weights of the net are not finite after step 1: the snapshots are unchanged"):
        train(toy_voc, tmp_path / "a", *options, "--num-steps", "3")
    with pytest.raises(Diverged, match=r"after step 1"):
        train(toy_voc, tmp_path / "b", *options, "--num-steps", "1")
    assert not list(tmp_path.rglob("*.pth"))
    assert not list(tmp_path.rglob("last.ckpt"))


def test_a_new_run_renames_an_earlier_log(toy_voc, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "args.1.json").write_text("older")
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "1")
    assert (tmp_path / "log.2.jsonl").read_text() == '{"mine": 1}\n'
    assert (tmp_path / "args.2.json").read_text() == "{}"
    assert (tmp_path / "args.1.json").read_text() == "older"
    assert [line["step"] for line in log_lines(tmp_path)] == [1]


def test_fine_tuning_starts_from_a_snapshot(toy_voc, tmp_path):
    """Batch norm is frozen by default. The head is kept, or dropped for other classes or with --not-restore-last."""
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


def test_two_of_four_aspp_branches_are_used_and_recorded(toy_voc, tmp_path):
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


def test_is_training_updates_only_the_running_statistics(toy_voc, tmp_path):
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
    assert "4 images of" in result.stdout + result.stderr


MISTAKES = {
    "no data": (["--data-dir", "nowhere"], r"nowhere does not exist; get PASCAL VOC with `python scripts/download.py"),
    "no list": (["--data-list", "nothing.txt"], "nothing.txt do not exist; pass a file with one id per line"),
    "no weights": (
        ["--restore-from", "weights/MS_DeepLab_resnet_pretrained_COCO_init.pth"],
        "`python scripts/download.py list`",
    ),
    "other weights": (["--restore-from", "lost.pth"], "lost.pth"),
    "too few classes": (["--num-classes", "2"], "class indices 0..1; 255"),
    "no GPU 99": (["--device", "cuda:99"], "CUDA device 99"),
    "no device": (["--device", "gpu"], "is not a torch device"),
    "sync-bn on the CPU": (["--sync-bn"], "between CUDA devices only"),
    "crop": (["--input-size", "321"], "write HEIGHT,WIDTH"),
    "scale range": (["--scale-range", "2,1"], "write LOW,HIGH"),
    "steps": (["--num-steps", "0"], "expected at least 1"),
    "negative learning rate": (["--learning-rate", "-1"], "-1 is out of range; expected a finite number of at least 0"),
    "learning rate of nan": (["--learning-rate", "nan"], "nan is out of range"),
    "momentum": (["--momentum", "-1"], "-1 is out of range"),
    "momentum of 1": (["--momentum", "1"], "1 is out of range; expected at least 0 and below 1"),
    "weight decay": (["--weight-decay", "-1"], "-1 is out of range"),
    "infinite power": (["--power", "inf"], "inf is out of range"),
    "scale": (["--scale-range", "nan,nan"], "not above 0 and finite"),
    "too many classes": (["--num-classes", "300"], "300 is too large; expected at most 255"),
    "one class": (["--num-classes", "1"], "with a single class the loss is always 0"),
    "ignore label": (["--ignore-label", "256"], "256 is too large"),
    "no mps": (["--device", "mps"], "has no mps device"),
    "no xpu": (["--device", "xpu"], "has no xpu device"),
    "other device": (["--device", "meta"], "--device meta is not supported"),
    "jitter": (["--color-jitter", "0.4,0.4"], "write B,C,S,H"),
    "hue": (["--color-jitter", "0.4,0.4,0.4,0.6"], "is not a colour jitter"),
    "clip": (["--clip-grad-norm", "0"], "0 is out of range; expected a finite number above 0"),
    "class weights": (["--class-weights", "lost.txt"], "lost.txt"),
    "one position": (["--input-size", "6,6", "--batch-size", "1"], "gives one position per image"),
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


SAME_STEP = {  # name -> (name of the reference, tolerance as a share of the largest change in a tensor)
    "grad-checkpoint": ("plain", 1e-3),
    "one-scale": ("plain", 1e-3),
    "bf16": ("plain", 0.2),
    "bf16 grad-checkpoint": ("bf16", 0.02),
    "fp16 one-scale": ("fp16", 0.02),
    "one-scale grad-checkpoint iter-size": ("iter-size", 1e-3),
    "one-scale loss-size": ("loss-size", 1e-3),
}


@pytest.mark.parametrize("batch_norm", ["frozen", "stats", "full"])
def test_every_option_goes_through_the_loop(batch_norm, toy_voc, tmp_path):
    """At least two steps each, from the same net. Options that only save memory or time give the same steps and counters."""
    train(toy_voc, tmp_path / "start", *SCRATCH, "--num-steps", "1")
    start = model(tmp_path / "start/VOC12_scenes_1.pth")
    common = ["--restore-from", str(tmp_path / "start/VOC12_scenes_1.pth"), "--batch-norm", batch_norm,
              "--learning-rate", "1e-5"]  # fmt: skip
    ends = {}
    for name, options in STEPS.items():
        folder = tmp_path / name
        steps = 5 if "fp16" in name else 2  # loss scaling skips the first ones
        small = ["--input-size", "17,17"] if "fp16" in name else []  # CPUs are slow with float16
        assert train_msc(toy_voc, folder, *common, *options, *small, "--num-steps", str(steps)) == 0
        ends[name] = model(folder / f"VOC12_scenes_{steps}.pth")
        assert all(bool(value.isfinite().all()) for value in ends[name].values()), name
        assert not torch.equal(ends[name]["conv1.weight"], start["conv1.weight"]), name
        moved = not torch.equal(ends[name]["bn1.running_mean"], start["bn1.running_mean"])
        assert moved == (batch_norm != "frozen"), name
        if batch_norm != "frozen":  # three scales per batch, after the one batch of the start
            counted = {int(value) for key, value in ends[name].items() if key.endswith("num_batches_tracked")}
            assert counted == {1 + 3 * steps * (2 if "iter-size" in name else 1)}, name
    for name, (other, tolerance) in SAME_STEP.items():
        for key in (key for key in start if key.startswith(("layer5", "layer4.1.conv2"))):
            atol = tolerance * float((ends[other][key] - start[key]).abs().max())
            torch.testing.assert_close(ends[name][key], ends[other][key], rtol=0, atol=atol, msg=f"{name} {key}")


def test_fp16_from_its_first_scale(toy_voc, tmp_path):
    """The scale of 65536 is too large for the first steps. These are skipped, and leave the momentum unchanged."""
    options = [*SCRATCH, "--amp", "fp16", "--iter-size", "1", "--num-steps", "6", "--learning-rate", "1e-3"]
    assert train_msc(toy_voc, tmp_path, *options) == 0
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    buffers = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    assert max(float(buffer.abs().max()) for buffer in buffers) < 1e3
    assert all(line["loss"] < 100 for line in log_lines(tmp_path))


NEUTRAL = ["--warmup-steps", "1", "--clip-grad-norm", "1e30", "--color-jitter", "0,0,0,0", "--class-weights"]


@pytest.mark.parametrize("script", [train, train_msc])
def test_options_off_by_default_change_nothing(script, toy_voc, tmp_path):
    """A step without the options equals, bit for bit, a step in which each of them multiplies by one."""
    (tmp_path / "ones.txt").write_text("1 1 1 1")
    script(toy_voc, tmp_path / "default", *SCRATCH, "--num-steps", "2")
    script(toy_voc, tmp_path / "neutral", *SCRATCH, "--num-steps", "2", *NEUTRAL, str(tmp_path / "ones.txt"))
    assert equal(*(model(tmp_path / name / "VOC12_scenes_2.pth") for name in ("default", "neutral")))


def test_the_learning_rate_rises_in_the_first_steps(toy_voc, tmp_path, capsys):
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "4", "--warmup-steps", "3", "--learning-rate", "1e-3", "--power", "1")
    factors = (1 / 3, 2 / 3 * 3 / 4, 2 / 4, 1 / 4)
    assert [line["lr"] for line in log_lines(tmp_path)] == pytest.approx([1e-3 * factor for factor in factors])
    assert "rises over the first 3 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="--warmup-steps 5 is more than --num-steps 4"):
        train(toy_voc, tmp_path / "b", *SCRATCH, "--num-steps", "4", "--warmup-steps", "5")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_is_as_long_as_the_clipped_gradient(amp, toy_voc, tmp_path):
    """Without momentum and weight decay, a parameter's change over its learning rate is its gradient; the total norm is X."""
    options = ["--restore-from", "none", "--batch-norm", "frozen", "--momentum", "0", "--weight-decay", "0", "--power", "0",
               "--input-size", "17,17", "--save-pred-every", "1", "--learning-rate", "0.01", "--amp", amp]  # fmt: skip
    train(toy_voc, tmp_path, *options, "--num-steps", "4", "--clip-grad-norm", "0.5")
    steps = [model(tmp_path / f"VOC12_scenes_{step}.pth") for step in (1, 2, 3, 4)]
    for before, after in pairwise(steps):
        squares = 0.0
        for name, value in after.items():
            scale = {"layer5": 20 if name.endswith("bias") else 10}.get(name.split(".")[0], 1)
            squares += float(((value - before[name]).double() / (0.01 * scale)).square().sum())
        if amp == "fp16" and squares == 0:  # loss scaling skipped the step
            continue
        assert squares**0.5 == pytest.approx(0.5, rel=0.02)
    assert squares > 0


def test_compiled_steps(toy_voc, tmp_path, monkeypatch):
    """The same steps as without, with recomputation and trained batch norm, which are most likely to disturb the counters.

    The graph is captured, split into forward and backward and run without code generation, as C++ would take minutes.
    """
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    train(toy_voc, tmp_path / "start", *SCRATCH, "--num-steps", "1")
    common = ["--restore-from", str(tmp_path / "start/VOC12_scenes_1.pth"), "--batch-norm", "full", "--num-steps", "2",
              "--learning-rate", "1e-5"]  # fmt: skip
    recompute = ["--grad-checkpoint"] if TORCH >= COUNTS_ONCE else []
    for name, options in (("plain", []), ("compiled", ["--compile", *recompute])):
        train(toy_voc, tmp_path / name, *common, *options)
    plain, compiled = (model(tmp_path / name / "VOC12_scenes_2.pth") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("options", [[], ["--batch-norm", "full"], ["--batch-norm", "full", "--one-scale-at-a-time"]])
def test_compiled_steps_on_three_scales(options, toy_voc, tmp_path, monkeypatch):
    """The same steps as without, also if blocks or all the smaller scales are recomputed."""
    if "full" in options and TORCH < COUNTS_ONCE:
        pytest.skip(f"refused on torch {TORCH}")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    train(toy_voc, tmp_path / "start", *SCRATCH, "--num-steps", "1")
    common = ["--restore-from", str(tmp_path / "start/VOC12_scenes_1.pth"), "--num-steps", "3", "--learning-rate", "1e-5"]
    for name, more in (("plain", []), ("compiled", ["--compile", "--grad-checkpoint"])):
        torch._dynamo.reset()
        counters.clear()
        train_msc(toy_voc, tmp_path / name, *common, *options, *more)
    assert not counters["graph_break"]
    # One graph of net and loss. One scale at a time: graphs of the net, per size one for the first pass and one for the
    # recomputation. One more comes from the trial before the run.
    assert 1 < counters["stats"]["unique_graphs"] <= (6 if "--one-scale-at-a-time" in options else 2)
    plain, compiled = (model(tmp_path / name / "VOC12_scenes_3.pth") for name in ("plain", "compiled"))
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("version", "script", "options", "needs"),
    [
        (
            "2.7.1",
            train,
            ["--grad-checkpoint"],
            r"--batch-norm full need torch 2\.9: torch 2\.7\.1 would update .* twice per step",
        ),
        ("2.8.0+cu128", train_msc, ["--grad-checkpoint", "--one-scale-at-a-time"], r"need torch 2\.9"),
        ("2.4.0", train_msc, ["--one-scale-at-a-time"], r"--one-scale-at-a-time needs torch 2\.5, and this is 2\.4\.0"),
    ],
)
def test_options_that_an_old_torch_compiles_wrongly_are_refused(
    version, script, options, needs, toy_voc, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.__version__", version)
    monkeypatch.setattr(setup, "check_compiler", lambda device: None)
    with pytest.raises(UserError, match=needs):
        script(toy_voc, tmp_path, *SCRATCH, "--compile", *options)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_missing_compiler_is_one_sentence(toy_voc, tmp_path):
    environment = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = [*SMALL, *SCRATCH, "--compile"]
    result = command("train.py", "--data-dir", toy_voc, "--snapshot-dir", tmp_path / "s", *options, env=environment)
    assert result.returncode == 2, result.stderr
    assert "torch.compile does not work on this machine" in result.stderr
    assert "Traceback" not in result.stderr


def test_losses_of_a_log_line_are_means_that_add_up(toy_voc, tmp_path):
    """Means over all steps since the previous line, compared with the losses logged at each step."""
    common = [*SCRATCH, "--num-steps", "5", "--iter-size", "2"]
    train_msc(toy_voc, tmp_path / "each", *common, "--log-every", "1")
    train_msc(toy_voc, tmp_path / "all", *common, "--log-every", "4")
    each, lines = log_lines(tmp_path / "each"), log_lines(tmp_path / "all")
    assert [line["step"] for line in lines] == [1, 4, 5]
    for name in ("loss", "loss_max", "loss_1x", "loss_0.75x", "loss_0.5x"):
        assert lines[1][name] == pytest.approx(np.mean([line[name] for line in each[1:4]]), abs=2e-6)
        assert lines[2][name] == pytest.approx(each[4][name], abs=2e-6)
    for line in lines:
        assert line["loss"] == pytest.approx(sum(v for k, v in line.items() if k.startswith("loss_")), abs=1e-5)


def test_binary_masks_are_refused_before_the_first_step(toy_voc, tmp_path):
    """All labels hold only 0 and 255; a single label with another class is enough to start."""
    labels = sorted((toy_voc / "SegmentationClassAug").glob("*.png"))
    for path in labels:
        label = np.array(Image.open(path))
        save_palette_png(path, np.where((label > 0) & (label < 255), 255, 0).astype(np.uint8))
    with pytest.raises(UserError, match=r"binary masks 0/255, .* --binary MASKS NEW"):
        train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "4")
    assert not list(tmp_path.glob("*.pth"))
    save_palette_png(labels[0], np.full_like(np.array(Image.open(labels[0])), 1))
    assert train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "4") == 0


def test_two_classes_are_not_mistaken_for_one(toy_voc, tmp_path, capsys):
    for path in (toy_voc / "SegmentationClassAug").glob("*.png"):
        label = np.array(Image.open(path))
        save_palette_png(path, ((label > 0) & (label < 255)).astype(np.uint8))
    train(toy_voc, tmp_path, *SCRATCH, "--num-steps", "4")
    output = capsys.readouterr()
    assert "class 0" not in output.out + output.err
    assert "2 lines such as `background` and `object`, or train with --num-classes 2" in output.out


def test_a_broken_image_loses_nothing(toy_voc, tmp_path):
    """The steps done are saved before the run fails. Resumed with the repaired image, it ends like an uninterrupted run."""
    options = [*SCRATCH, "--num-steps", "6", "--save-pred-every", "100"]
    train(toy_voc, tmp_path / "whole", *options)
    image = toy_voc / "JPEGImages/toy_1.jpg"
    content = image.read_bytes()

    @wraps(single_scale_loss)  # resuming compares losses by their names
    def loss(*args, **kwargs):
        loss.calls += 1
        if loss.calls == 3:
            image.write_bytes(b"broken")
        return single_scale_loss(*args, **kwargs)

    loss.calls = 0
    with pytest.raises(DatasetError, match=r"toy_1\.jpg"):
        train(toy_voc, tmp_path / "broken", *options, loss=loss)
    assert 3 <= torch.load(tmp_path / "broken/last.ckpt", weights_only=True)["step"] < 6
    image.write_bytes(content)
    train(toy_voc, tmp_path / "broken", *options, "--resume")
    whole, resumed = (model(tmp_path / name / "VOC12_scenes_6.pth") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_training_on_validation_images_gives_a_warning_and_a_mark(toy_voc, tmp_path, capsys):
    (toy_voc / "ImageSets/Segmentation/val.txt").write_text("toy_4\ntoy_5\n")
    (toy_voc / "trainval.txt").write_text("toy_0\ntoy_1\ntoy_4\n")
    train(toy_voc, tmp_path / "honest", *SCRATCH, "--num-steps", "1")
    assert "mean nothing" not in capsys.readouterr().out
    train(toy_voc, tmp_path / "seen", *SCRATCH, "--num-steps", "1", "--data-list", str(toy_voc / "trainval.txt"))
    warning = "warning: 1 of the images that it was trained on are on val.txt, so a mean IoU on that list will mean nothing"
    assert capsys.readouterr().out.count(warning) == 1
    metas = [torch.load(tmp_path / name / "VOC12_scenes_1.pth", weights_only=True)["meta"] for name in ("honest", "seen")]
    assert metas[0]["seen_voc_val"] == ""
    assert "1 of the images" in metas[1]["seen_voc_val"]


def test_images_are_compared_by_their_files(toy_voc):
    """Bare ids and pairs of the same files are the same image; the same id may be another image on the val list."""
    folder = toy_voc / "ImageSets/Segmentation"
    train = VOCSegmentation(toy_voc, ["toy_0", "toy_1"], num_classes=TOY_CLASSES)
    for lines, seen in (("toy_2", 0), ("/JPEGImages/toy_0.jpg /SegmentationClassAug/toy_0.png", 1),
                        ("val_images/toy_0.jpg val_masks/toy_0.png", 0)):  # fmt: skip
        (folder / "val.txt").write_text(lines)
        assert messages.seen_val(train)[:2] == ("1 " if seen else "")


def test_crops_larger_than_the_images_give_a_warning(toy_voc):
    data = VOCSegmentation(toy_voc, ["toy_0", "toy_1"], num_classes=TOY_CLASSES)  # 40 x 55 and 33 x 47
    (toy_voc / "JPEGImages/toy_1.jpg").write_bytes(b"broken")  # no sizes, no error
    assert (
        messages.crop_warning(data, (40, 55))
        == messages.crop_warning(data, (33, 41))
        == messages.crop_warning(data, (50, 80))
        == ""
    )
    assert "75% of the crops of 80x110 will be padding" in messages.crop_warning(data, (80, 110))
    assert "95% of the crops of 40x1100 will be padding" in messages.crop_warning(data, (40, 1100))


def test_panels_of_large_images_are_shrunk_and_never_end_a_run(toy_voc, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "TILE_SIDES", (10, 20))
    options = [*SCRATCH, "--num-steps", "1", "--save-num-images", "1"]
    train(toy_voc, tmp_path / "small", *options)
    width, height = Image.open(tmp_path / "small/images/000001_toy_0.png").size
    assert width == 4 * 20 + 3 * visualize.GAP
    assert height > round(40 * 20 / 55)  # with a legend

    def no_memory(*args):
        raise MemoryError("for the panel")

    monkeypatch.setattr(validation, "panel", no_memory)
    assert train(toy_voc, tmp_path / "none", *options) == 0
    assert (tmp_path / "none/VOC12_scenes_1.pth").exists()
    assert "warning: no panels at step 1 (MemoryError: for the panel)" in capsys.readouterr().out


@pytest.mark.cuda
def test_it_trains_on_cuda(toy_voc, tmp_path):
    for amp in ("off", "bf16", "fp16"):
        assert train(toy_voc, tmp_path / amp, *SCRATCH, "--num-steps", "3", "--device", "cuda", "--amp", amp) == 0
