"""The benchmark: its parts, the measurements, and the reference. No test depends on the speed of the machine."""

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import train as train_script
from deeplab import deeplabv2, single_scale_loss
from scripts import benchmark
from scripts.bench import gpu_check, inputs, measure, prediction, reference
from scripts.bench.inputs import make_images, open_images
from scripts.bench.measure import Row, Runner, Table, measure_peak, run_table
from utils.command import UserError
from utils.metrics import ConfusionMatrix
from utils.outputs import is_output

CPU = torch.device("cpu")
TINY = ["--backbone", "resnet18", "--num-classes", "4", "--input-size", "65,65", "--device", "cpu"]
TINY += ["--repeats", "1", "--pictures", "1", "--no-compile"]


@pytest.fixture
def small(monkeypatch):
    """Small images and matrices, and two cores."""
    monkeypatch.setattr(inputs, "SIZES", ((40, 55), (33, 47)))
    monkeypatch.setattr(reference, "CANVAS", (65, 65))
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(prediction, "usable_cores", lambda: 2)
    monkeypatch.setattr(prediction, "default_processes", lambda most: 2)


def random_statistics(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, buffer in net.named_buffers():
        values = torch.rand(buffer.shape, generator=generator)
        buffer.copy_(values + 0.5 if name.endswith(("weight", "running_var")) else values - 0.5)
    return net


# ---- each part


def test_without_pydensecrf_the_other_parts_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pydensecrf" else find(name, *rest))
    with pytest.raises(UserError, match="not installed; install it, or name other parts: train") as error:
        benchmark.main(TINY)
    assert "crf" not in str(error.value).split(": ")[1].split()


@pytest.mark.parametrize("name", [name for name in benchmark.PART_NAMES if name != "memory"])
def test_part(name, small, tmp_path, capsys):
    """Memory is measured in only one of them, as it needs a process per row."""
    if name == "crf":
        pytest.importorskip("pydensecrf")
    file = tmp_path / "speed.json"
    options = [name, *TINY, "--json", str(file), *(["--no-memory"] if name != "evaluate" else [])]
    assert benchmark.main(options) == 0
    result = json.loads(file.read_text())
    assert is_output(file)  # so that the next benchmark may replace it
    assert list(result["parts"]) == [name]
    assert torch.__version__ in result["device"]
    rows, printed = result["parts"][name]["rows"], capsys.readouterr().out
    assert all(row in printed for row in rows)
    nets = name in ("train", "msc", "evaluate")
    for row in rows.values():
        numbers = [row["median_s"]] + [row[key] for key in ("flops", "gemm_ratio") if nets]
        numbers += [row[key] for key in ("items_per_s", "speedup") if row["items"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert len(row["seconds"]) == 1
    assert next(iter(rows.values()))["speedup"] == 1
    if nets:
        assert list(rows)[-1] == "matrix product, float32"
        assert rows["matrix product, float32"]["flops"] == 3 * 2 * 64**3
        assert rows["matrix product, float32"]["gemm_ratio"] == 1
    if name == "train":
        assert list(rows)[:3] == ["reference, as published", "unfolded, frozen batch norm", "ours"]
        assert rows["ours"]["flops"] == rows["reference, as published"]["flops"]  # folding does not change the convolutions
        assert rows["ours --grad-checkpoint"]["flops"] > 1.2 * rows["ours"]["flops"]  # the backbone runs forward twice
    if name == "evaluate":
        assert list(rows)[:2] == ["reference, as published", "ours"]
        weights = sum(tensor.nbytes for tensor in deeplabv2("resnet18", 4).state_dict().values())
        for row in list(rows.values())[:2]:
            assert row["peak_bytes"] > weights
            assert row["beyond_bytes"] < row["peak_bytes"] - weights
        assert "beyond MB" in printed
    if name == "crf":
        agreement = [row["agreement"] for row in rows.values()]
        assert list(rows)[:2] == ["reference, 1 process", "ours, 1 process"]
        assert rows["reference, 2 processes"]["speedup"] == 1
        assert agreement[0] == 1
        assert min(agreement) > 0.99
        on_device = rows["ours --crf-backend torch, one core"]
        assert 0 < on_device["iteration_s"] < on_device["lattices_s"] + 10 * on_device["iteration_s"] < 60
        assert on_device["difference"] < 1e-3


def test_processes_of_the_reference_start_with_spawn(small, tmp_path, monkeypatch):
    """Spawned processes (macOS, Windows) import the functions that they run by name."""
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr(multiprocessing, "get_context", partial(multiprocessing.get_context, "spawn"))
    args = benchmark.parse_args(["crf", *TINY])
    args.data_dir = tmp_path / "images"
    make_images(args.data_dir, 1, 4)
    runner = prediction.crf(args, CPU).rows[0].build()
    try:
        runner.run()
    finally:
        runner.close()


def test_a_device_that_is_not_there():
    with pytest.raises(Exception, match="77") as caught:
        benchmark.main(["evaluate", *TINY, "--device", "cuda:77"])
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("wrong", "message"), [(["training"], "'training' is not a part"), (["train", "--net", "pspnet"], "--net pspnet")]
)
def test_mistakes(wrong, message, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(wrong)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_synthetic_images(tmp_path):
    make_images(tmp_path / "voc", 3, 21)
    data = open_images(argparse.Namespace(data_dir=tmp_path / "voc", num_classes=21))
    labels = [data.load(index)[1] for index in range(len(data))]  # loading checks sizes and values
    assert [label.shape for label in labels] == [(375, 500), (500, 375), (333, 500)]
    assert all(255 in label and len(np.unique(label)) > 2 for label in labels)


# ---- measurements


def test_rows_alternate(monkeypatch):
    log: list[str] = []
    now = [0.0]
    monkeypatch.setattr(measure, "timer", lambda: now[0])

    def spend(name: str, seconds: float) -> None:
        log.append(name)
        now[0] += seconds

    def row(name: str, seconds: float, images: int) -> Row:
        work, setup = partial(spend, name, seconds), partial(spend, f"set up {name}", 100)  # only the work is timed
        return Row(name, lambda: Runner(work, setup, close=partial(spend, f"end {name}", 0)), images)

    table = Table("title", [row("a", 4.0, 2), row("b", 1.0, 3)], nets=False)
    rows = run_table(table, 2, CPU)
    once = ["set up a", "a", "set up b", "b"]
    assert log[:12] == once * 3  # the first is the warm-up
    assert sorted(log[12:]) == ["end a", "end b"]
    assert rows["b"]["seconds"] == [1.0, 1.0]
    assert rows["b"]["median_s"] == 1.0
    assert rows["b"]["items_per_s"] == 3
    assert rows["b"]["speedup"] == 6  # 3 per second against 2 in 4 seconds


def test_rows_are_closed_if_one_fails():
    log = []

    def fail() -> None:
        raise ZeroDivisionError

    rows = [Row("a", lambda: Runner(int, close=lambda: log.append("end a")), 1), Row("b", lambda: Runner(fail), 1)]
    with pytest.raises(ZeroDivisionError):
        run_table(Table("title", rows, nets=False), 1, CPU)
    assert log == ["end a"]


def test_seconds_of_a_run():
    row = Row("sleep", lambda: Runner(lambda: time.sleep(0.05)), 1)
    rows = run_table(Table("title", [row], nets=False), 3, CPU)
    assert min(rows["sleep"]["seconds"]) >= 0.05


def test_flops_and_their_speed(monkeypatch):
    """Two operations per multiply-add, forward and backward; the speed is the count divided by the seconds."""
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 4})
    monkeypatch.setattr(measure, "timer", partial(next, itertools.count()))  # each run takes one second
    conv = nn.Conv2d(3, 5, 3, padding=1)
    images = torch.rand(2, 3, 7, 9)
    forward = 2 * (2 * 5 * 7 * 9) * (3 * 3 * 3)  # 27 multiply-adds per value
    runs = {
        "forward": lambda: conv(images),
        "backward": lambda: conv(images).sum().backward(),  # the images need no gradient
        "to the images": lambda: conv(images.clone().requires_grad_()).sum().backward(),
    }
    rows = [Row(name, partial(Runner, run), 1) for name, run in runs.items()]
    rows.append(Row("compiled", partial(Runner, runs["forward"]), 1, compiled=True))  # with the FLOPs of the row before
    entries = run_table(Table("title", rows), 1, CPU)
    product = 3 * 2 * 4**3
    for name, times in {"forward": 1, "backward": 2, "to the images": 3, "compiled": 3}.items():
        assert entries[name]["flops"] == times * forward
        assert entries[name]["gemm_ratio"] == pytest.approx(times * forward / product)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_includes_what_a_run_allocates():
    net = nn.Linear(1000, 1000, bias=False)  # 4 MB
    args = argparse.Namespace(device="cpu", gpu=0, no_tf32=False, deterministic=False)

    def table(args: argparse.Namespace, device: torch.device) -> Table:
        allocate = lambda count: Runner(lambda: torch.ones(count), net=net)  # noqa: E731
        return Table("title", [Row(str(count), partial(allocate, count), 1) for count in (1, 50_000_000)])

    small, large = (measure_peak(table, name, args) for name in ("1", "50000000"))
    assert 190e6 < large["peak_bytes"] - small["peak_bytes"] < 260e6
    assert small["beyond_bytes"] < 4e6 < 190e6 < large["beyond_bytes"] + 4e6


# ---- the reference


@pytest.mark.parametrize(("backbone", "stride_in_3x3"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_reference_is_the_same_net(backbone, stride_in_3x3):
    torch.manual_seed(0)
    net = random_statistics(deeplabv2(backbone, 3, stride_in_3x3=stride_in_3x3)).eval()
    images = torch.randn(1, 3, 49, 60)
    for norm in (FrozenBatchNorm2d, reference.batch_norm):
        unfolded = reference.ReferenceNet(net.config, norm).eval()
        assert not unfolded.load_state_dict(net.state_dict(), strict=False).unexpected_keys
        with torch.no_grad():
            expected = net(images)
            torch.testing.assert_close(unfolded(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_reference_trains_on_batch_statistics_with_fixed_weights():
    net = reference.ReferenceNet(deeplabv2("resnet18", 3).config).train()
    optimizer = reference.make_optimizer(net, 0.01)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images, labels = torch.randn(2, 3, 33, 33), torch.randint(0, 3, (2, 33, 33))
    assert math.isfinite(reference.train_step(net, optimizer, images, labels, reference.single_scale_loss))
    after = net.state_dict()
    assert torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])


def test_reference_loss_is_ours_on_enlarged_logits():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 33, 41))
    labels[:, :4] = 255  # equally many in both images, so that both ways of averaging agree
    expected = single_scale_loss(lambda images: logits, torch.empty(2, 3, 33, 41), labels, size="input")["loss"]
    torch.testing.assert_close(reference.single_scale_loss(lambda images: logits, torch.empty(2, 3, 33, 41), labels), expected)


def test_reference_counts_like_ours():
    rng = np.random.default_rng(0)
    labels, predictions = rng.choice([0, 1, 2, 255], 500), rng.integers(0, 3, 500)
    matrix = ConfusionMatrix(3)
    matrix.update(torch.from_numpy(labels), torch.from_numpy(predictions))
    np.testing.assert_array_equal(reference.count(labels, predictions, 3), matrix.matrix.numpy())


def test_reference_prediction_has_the_size_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)

    def net(inputs: torch.Tensor) -> torch.Tensor:  # class 1 in the right half of the canvas
        assert inputs.shape == (1, 3, 41, 65)
        assert not inputs[:, :, 20:].any()
        logits = torch.zeros(1, 2, 6, 9)
        logits[:, 1] = torch.linspace(-1, 1, 9)
        return logits

    prediction = reference.predict(net, image, (41, 65), CPU)
    assert prediction.shape == (20, 33)
    assert not prediction[:, :32].any()


def test_reference_sample(toy_voc):
    image, label = toy_voc / "JPEGImages/toy_0.jpg", toy_voc / "SegmentationClassAug/toy_0.png"
    for _ in range(5):
        pixels, mask = reference.training_sample(image, label, (33, 65))
        assert pixels.shape == (3, 33, 65)
        assert mask.shape == (33, 65)
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 255}


def test_figures_never_replace_a_file_of_the_user(tmp_path):
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="no earlier output"):
        benchmark.main(["memory", *TINY, "--json", str(tmp_path / "notes.json")])
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'


# scripts/gpu_check.sh


def test_the_gpu_check_names_tests_that_exist():
    paths = [word for options in gpu_check.TESTS.values() for word in options if word.startswith("tests")]
    assert len(paths) == len(gpu_check.TESTS)
    assert all((gpu_check.ROOT / path).exists() for path in paths)


def test_the_real_steps_of_the_gpu_check_are_taken(tmp_path):
    """The command of the check with small crops: with purely random weights and frozen batch norm it would diverge."""
    command = gpu_check.real_steps_command(tmp_path, "resnet101", 1, 65, 3)
    assert command[0] == "train.py"
    assert train_script.main([*command[1:], "--num-workers", "0", "--device", "cpu", "--log-every", "1"]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "snapshots/log.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert all(2 < loss < 5 for loss in losses), losses  # log(21) = 3.04 is the loss of a uniform prediction


def test_the_table_of_the_gpu_check_is_complete_if_a_part_fails(tmp_path, monkeypatch, capsys):
    def real_steps(check):
        raise ZeroDivisionError("no steps")

    for name, text in {"tests": "done", "limits": "done", "benchmark": "failed, status 2"}.items():
        monkeypatch.setattr(gpu_check.Check, name, lambda check, name=name, text=text: check.table.update({name: text}))
    monkeypatch.setattr(gpu_check.Check, "real_steps", real_steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    out = capsys.readouterr().out.splitlines()
    table = dict(line.split("  ", 1) for line in out[-7:])
    assert table["tests"].strip() == table["limits"].strip() == "done"
    assert "failed: ZeroDivisionError: no steps" in table["real steps"]
    assert "real steps, benchmark failed: please" in out[-1]


def test_the_utilisation_comes_from_nvidia_smi(tmp_path, monkeypatch):
    reporter = tmp_path / "nvidia-smi"
    reporter.write_text(f"#!/bin/sh\necho 87\necho [N/A]\necho 91\ntouch {tmp_path}/printed\nexec sleep 60\n")
    reporter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with gpu_check.utilisation() as found:
        pass
    assert found == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with gpu_check.utilisation() as found:
        while not (tmp_path / "printed").exists():
            time.sleep(0.01)
    assert found == [87, 91]
