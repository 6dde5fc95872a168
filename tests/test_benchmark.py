"""The benchmark: its smoke test, its counting and its reference. Nothing here depends on how fast anything is."""

import json
import math
import multiprocessing
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dataset import VOCSegmentation, read_ids
from deeplab import deeplabv2, single_scale_loss
from scripts import benchmark
from scripts.bench import PARTS, measure, reference
from scripts.bench.inputs import make_pictures
from scripts.bench.measure import Part, Runner, Variant, count_flops, measure_peak, run_part
from utils.command import UserError
from utils.files import is_output
from utils.metrics import ConfusionMatrix

CPU = torch.device("cpu")
TINY = ["--backbone", "resnet18", "--num-classes", "4", "--input-size", "65,65", "--canvas", "65,65", "--device", "cpu"]
TINY += [
    "--repeats",
    "1",
    "--pictures",
    "2",
    "--num-workers",
    "0",
    "--no-compile",
    "--crf-pictures",
    "2",
    "--crf-workers",
    "1,2",
]


def random_statistics(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, buffer in net.named_buffers():
        values = torch.rand(buffer.shape, generator=generator)
        buffer.copy_(values + 0.5 if name.endswith(("weight", "running_var")) else values - 0.5)
    return net


def check_rows(rows: dict[str, dict], arithmetic: bool) -> None:
    assert len(rows) >= 2
    for row in rows.values():
        numbers = [row[key] for key in ("median_s", "min_s", "max_s", "items_per_s", "speedup", "first_s", "items")]
        if arithmetic:
            numbers += [row[key] for key in ("flops", "flops_per_s", "gemm_ratio")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert len(row["seconds"]) == 1
    assert next(iter(rows.values()))["speedup"] == 1


# ---- each part


@pytest.mark.parametrize("name", ["train", "msc", "predict", "evaluate", "data", "crf"])
def test_part(name, toy_voc, tmp_path, monkeypatch, capsys):
    """Memory is measured for one of them alone: it takes a process a row, through the command line."""
    monkeypatch.setattr(measure, "GEMM_SIDE", {"cpu": 64})
    file = tmp_path / "speed.json"
    options = [name, *TINY, "--data-dir", str(toy_voc), "--json", str(file), *(["--no-memory"] if name != "predict" else [])]
    assert benchmark.main(options) == 0
    result = json.loads(file.read_text())
    assert is_output(file)  # so that the next benchmark may replace it
    assert list(result["parts"]) == [name]
    check_rows(result["parts"][name]["rows"], arithmetic=name not in ("data", "crf"))
    assert result["gemm"]["float32"]["flops_per_s"] > 0
    assert result["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert all(row in printed for row in result["parts"][name]["rows"])
    if name == "train":
        rows = result["parts"][name]["rows"]
        assert list(rows)[:3] == ["reference, as published", "unfolded, frozen batch norm", "ours"]
        assert rows["ours"]["flops"] == rows["reference, as published"]["flops"]  # folding leaves the convolutions as they are
        assert rows["ours --grad-checkpoint"]["flops"] > 1.2 * rows["ours"]["flops"]  # it runs the trunk forward twice
    if name == "predict":
        weights = sum(tensor.nbytes for tensor in deeplabv2("resnet18", 4).state_dict().values())
        for row in result["parts"][name]["rows"].values():
            assert row["peak_bytes"] > weights
            assert row["beyond_bytes"] < row["peak_bytes"] - weights
        assert "peak MB" in printed
    if name == "crf":
        rows = result["parts"][name]["rows"]
        agreement = [row["agreement"] for row in rows.values()]
        assert list(rows)[:2] == ["reference, 1 process", "ours, 1 process"]
        assert rows["reference, 2 processes"]["speedup"] == 1
        assert agreement[0] == 1
        assert min(agreement) > 0.99


def test_processes_of_the_reference_start_in_any_way(toy_voc, monkeypatch):
    """Spawned processes, as on macOS and Windows, find what they are handed by its name alone."""
    monkeypatch.setattr(multiprocessing, "get_context", partial(multiprocessing.get_context, "spawn"))
    args = benchmark.parse_args(["crf", *TINY, "--data-dir", str(toy_voc), "--crf-workers", "1", "--crf-pictures", "1"])
    variant = PARTS["crf"](args, CPU).variants[0]
    runner = variant.build()
    try:
        runner.run()
    finally:
        runner.close()


@pytest.mark.parametrize("wrong", [["--data-dir", "nowhere"], ["--restore-from", "nowhere.pth"], ["--device", "cuda:77"]])
def test_mistakes_are_told_at_once(wrong, toy_voc, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        benchmark.main(["predict", *TINY, "--data-dir", str(toy_voc), *wrong])
    assert caught.value.exit_status == 2
    assert wrong[1] in str(caught.value) or "77" in str(caught.value)


def test_unknown_part(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["training"])
    assert caught.value.code == 2
    assert "'training' is no part" in capsys.readouterr().err


def test_names_of_the_parts():
    assert (*PARTS, "memory") == benchmark.PART_NAMES


def test_made_up_pictures(tmp_path):
    make_pictures(tmp_path / "voc", 3, 21)
    data = VOCSegmentation(tmp_path / "voc", read_ids(tmp_path / "voc/ImageSets/Segmentation/val.txt"))
    labels = [data.load(index)[1] for index in range(len(data))]  # loading checks sizes and values
    assert [label.shape for label in labels] == [(375, 500), (500, 375), (333, 500)]
    assert all({0, 255} < set(np.unique(label)) or 255 in label for label in labels)


# ---- the ruler


class FakeGemm:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def measure(self) -> None:
        self.log.append("gemm")

    def rate(self, amp: str) -> float:
        return 1000.0


def test_variants_take_turns():
    log: list[str] = []

    def variant(name: str, seconds: float, items: int) -> Variant:
        def run() -> float:
            log.append(name)
            return seconds

        return Variant(name, lambda: Runner(run, close=lambda: log.append(f"end {name}")), items, flops_of=None)

    rows = run_part(Part("title", [variant("a", 4.0, 2), variant("b", 1.0, 3)]), 2, FakeGemm(log), CPU, lambda text: None)
    assert log == ["a", "b", "gemm", "a", "b", "gemm", "a", "b", "end a", "end b"]
    assert rows["b"]["seconds"] == [1.0, 1.0]
    assert rows["b"]["items_per_s"] == 3
    assert rows["b"]["speedup"] == 6  # 3 a second against 2 in 4 seconds
    assert rows["b"]["flops"] == 0


def test_seconds_are_those_of_the_call():
    variant = Variant("sleep", lambda: Runner(lambda: time.sleep(0.05)), 1, flops_of=None)
    rows = run_part(Part("title", [variant]), 3, FakeGemm([]), CPU, lambda text: None)
    assert rows["sleep"]["min_s"] >= 0.05


def test_operations_of_one_convolution():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    images = torch.rand(2, 3, 7, 9)
    forward = 2 * (2 * 5 * 7 * 9) * (3 * 3 * 3)  # two a multiply-add, 27 multiply-adds a value
    assert count_flops(lambda: conv(images)) == forward
    with torch.inference_mode():
        assert count_flops(lambda: conv(images)) == forward
    assert count_flops(lambda: conv(images).sum().backward()) == 2 * forward  # the pictures need no gradient
    assert count_flops(lambda: conv(images.requires_grad_()).sum().backward()) == 3 * forward


def test_rates_follow_from_counts_and_seconds():
    conv = nn.Conv2d(1, 1, 1, bias=False)

    def run() -> float:
        conv(torch.rand(1, 1, 10, 10))
        return 0.5

    build = lambda: Runner(run)  # noqa: E731
    part = Part("title", [Variant("eager", build, 1), Variant("compiled", build, 1, flops_of="eager")])
    for row in run_part(part, 1, FakeGemm([]), CPU, lambda text: None).values():
        assert (row["flops"], row["flops_per_s"], row["gemm_ratio"]) == (200, 400, 0.4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_holds_what_a_call_allocates():
    net = nn.Linear(1000, 1000, bias=False)  # 4 MB

    def allocate(count: int) -> Variant:
        def run() -> None:
            torch.ones(count)

        return Variant("allocate", lambda: Runner(run, net), 1)

    small, large = (measure_peak(allocate(count), CPU) for count in (1, 50_000_000))
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
    labels[:, :4] = 255  # as many in both pictures, so both ways of averaging agree
    expected = single_scale_loss(lambda images: logits, torch.empty(2, 3, 33, 41), labels, size="input")["loss"]
    torch.testing.assert_close(reference.single_scale_loss(lambda images: logits, torch.empty(2, 3, 33, 41), labels), expected)


def test_reference_counts_as_we_do():
    rng = np.random.default_rng(0)
    labels, predictions = rng.choice([0, 1, 2, 255], 500), rng.integers(0, 3, 500)
    matrix = ConfusionMatrix(3)
    matrix.update(torch.from_numpy(labels), torch.from_numpy(predictions))
    np.testing.assert_array_equal(reference.count(labels, predictions, 3), matrix.matrix.numpy())


def test_reference_prediction_has_the_size_of_the_picture():
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)

    def net(inputs: torch.Tensor) -> torch.Tensor:  # class 1 where the canvas lies in the right half
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


def test_figures_replace_nothing_of_the_users(tmp_path):
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="no earlier output"):
        benchmark.main(["memory", *TINY, "--json", str(tmp_path / "notes.json")])
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
