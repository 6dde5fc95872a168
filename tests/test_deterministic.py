"""--deterministic: the same command writes the same bytes and runs only operators that are deterministic on CUDA."""

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
from deeplab import NETS, multi_scale_loss, predict_classes, predict_windows, single_scale_loss
from deeplab.loss import Ohem
from tests.helpers_devices import STEP, VARIANTS, data_of
from tests.helpers_runs import SCRATCH, log_lines, train, train_msc
from utils.command import run_command
from utils.device import select_device
from utils.evaluation import score

pytestmark = pytest.mark.usefixtures("thin_nets")
TIMES = {"images_per_s", "data_wait", "seconds", "memory_mb"}
# Operators that raise on CUDA under torch.use_deterministic_algorithms(True), by its documentation; kthvalue by its kernel,
# scatter_reduce only for products. nll_loss2d raises for sums and means.
NOT_DETERMINISTIC = {
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *(
        "adaptive_max_pool2d_backward",
        "fractional_max_pool2d_backward",
        "fractional_max_pool3d_backward",
        "avg_pool3d_backward",
    ),
    *("max_unpool2d", "max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "nll_loss_forward", "nll_loss_backward", "_ctc_loss_backward"),
    *("_embedding_bag_dense_backward", "scatter_reduce"),
    *("put_", "put", "histc", "bincount", "median", "nanmedian", "kthvalue"),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    yield
    torch.use_deterministic_algorithms(False)


class Deterministic(TorchDispatchMode):
    """Refuses operators without a deterministic implementation on CUDA, and records the others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names.add(name)
        assert name not in NOT_DETERMINISTIC, name
        assert not name.startswith("nll_loss2d_forward") or args[3] == 0, "a loss that sums"
        return func(*args, **(kwargs or {}))


def bytes_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_writes_the_same_bytes(toy_voc, tmp_path):
    """Snapshots, checkpoint, options, panels, predictions, scores, and the log except for times; not TensorBoard's files."""
    options = [*SCRATCH, "--num-steps", "3", "--save-pred-every", "2", "--val-every", "2", "--save-num-images", "1",
               "--num-workers", "1", "--loss-size", "input", "--deterministic"]  # fmt: skip
    found, logs = [], []
    for _ in range(2):
        torch.manual_seed(len(found))  # random state from earlier work
        assert train(toy_voc, tmp_path / "run", *options, loss=multi_scale_loss) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        words = ["--data-dir", toy_voc, "--restore-from", tmp_path / "run/VOC12_scenes_3.pth", "--num-workers", "0",
                 "--device", "cpu", "--scales", "1,0.75", "--mirror", "--save-dir", tmp_path / "run/masks",
                 "--save-json", tmp_path / "run/scores.json", "--deterministic"]  # fmt: skip
        assert evaluate.main([str(word) for word in words]) == 0
        logs.append([{k: v for k, v in line.items() if k not in TIMES} for line in log_lines(tmp_path / "run")])
        (tmp_path / "run/log.jsonl").unlink()
        found.append(bytes_of(tmp_path / "run"))
        (tmp_path / "run").rename(tmp_path / f"moved {len(found)}")
    names = {"VOC12_scenes_2.pth", "VOC12_scenes_3.pth", "last.ckpt", "best.pth", "args.json", "scores.json"}
    assert found[0].keys() > names
    assert len(found[0]) == len(names) + 2 + 6  # panels, masks
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    assert logs[0] == logs[1]
    assert json.loads(found[0]["args.json"])["deterministic"] is True


@pytest.mark.parametrize(
    ("name", "mode"),
    [("loss-size", "frozen"), ("grad-checkpoint", "frozen"), ("one-scale-at-a-time", "full")],
)
def test_a_training_step_is_deterministic_on_cuda(name, mode, toy_voc, tmp_path, on_meta):
    """On meta tensors torch runs the same operators as on CUDA."""
    torch.use_deterministic_algorithms(True)
    with Deterministic():
        on_meta(train_msc, toy_voc, tmp_path, *STEP, "--batch-norm", mode, *VARIANTS[name])


def test_an_evaluation_is_deterministic_on_cuda(toy_voc, fake_cuda):
    torch.use_deterministic_algorithms(True)
    with Deterministic():
        score.score(fake_cuda[0], data_of(toy_voc), torch.device("cuda"), scales=(1.0, 0.5), mirror=True)


@pytest.mark.parametrize("name", NETS)
def test_every_net_and_loss_is_deterministic_on_cuda(name):
    """Forward and backward: one scale and three, both sizes of the loss, hard pixels, the auxiliary head, prediction."""
    torch.use_deterministic_algorithms(True)
    with torch.device("meta"):
        images, labels = torch.zeros(2, 3, 65, 57), torch.zeros(2, 65, 57, dtype=torch.int64)
        frozen, learning = (NETS[name]("resnet18", 3, batch_norm).train() for batch_norm in ("frozen", "full"))
    with Deterministic() as deterministic:
        single_scale_loss(frozen, images, labels, "output")["loss"].backward()
        multi_scale_loss(learning, images, labels, "input", Ohem(keep=9), 0.4, one_scale_at_a_time=True)["loss"].backward()
        with torch.no_grad():
            predict_classes(frozen.eval(), images, (1.0, 0.75), mirror=True)
            predict_windows(frozen, images, (33, 33), scales=(1.0, 0.75), fuse="mean")
    assert {"convolution_backward", "max_pool2d_with_indices_backward", "topk"} <= deterministic.names


def test_the_list_matches_torchs_documentation():
    """The list has an operator for each module and function that raises by torch's documentation."""
    _, raising = torch.use_deterministic_algorithms.__doc__.split("RuntimeError` when ``mode=True``:")
    entries = re.findall(r"\* :(?:class|func):`~?torch[.\w]*\.(\w+)`", raising.split("In addition")[0])
    assert len(entries) > 20
    others = {"interpolate": "upsample", "nllloss": "nll_loss", "ctcloss": "ctc_loss", "maxunpool1d": "max_unpool2d"}
    listed = [name.replace("_", "") for name in NOT_DETERMINISTIC]
    for entry in (entry.lower().replace("_", "") for entry in entries if entry != "resize_"):  # raises for quantised tensors
        wanted = others.get(entry, entry).replace("_", "")
        assert any(wanted in name for name in listed), entry


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.avg_pool3d(x, 2),
        lambda x: x.flatten().kthvalue(2).values,
        lambda x: F.cross_entropy(x, torch.zeros(2, 9, 9, dtype=torch.int64, device="meta")),
    ],
)
def test_operators_that_are_not_deterministic_are_found(operation):
    with pytest.raises(AssertionError), Deterministic():
        operation(torch.zeros(2, 3, 9, 9, device="meta", requires_grad=True)).sum().backward()


def test_training_without_the_option_is_not_deterministic(toy_voc, tmp_path, on_meta):
    with pytest.raises(AssertionError, match="upsample_bilinear2d_backward"), Deterministic():
        on_meta(train, toy_voc, tmp_path, *STEP, "--loss-size", "input")


def test_the_option_switches_it_on_and_off(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    select_device("cpu", 0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    select_device("cpu", 0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_that_is_not_deterministic_is_one_sentence(capsys):
    torch.use_deterministic_algorithms(True)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)) and 0)
    assert end.value.code == 2
    assert "error: --deterministic: put_ does not have a deterministic implementation; leave" in capsys.readouterr().err
