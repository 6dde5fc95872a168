"""--deterministic: the same command leaves the same bytes, and nothing is launched that torch knows no exact way of on CUDA."""

import json
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
from deeplab import multi_scale_loss
from tests.test_device import STEP, VARIANTS, data_of, fake_cuda, on_meta  # noqa: F401
from tests.test_training import SCRATCH, log_lines, train, train_msc
from utils import distributed, evaluation
from utils.command import run_command

TIMES = {"images_per_s", "data_wait", "seconds", "memory_mb"}
# What raises on CUDA under torch.use_deterministic_algorithms(True), by its documentation; of nll_loss2d the sums and means.
NO_EXACT_WAY = {
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "grid_sampler_2d_backward"),
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "max_unpool2d"),
    *("reflection_pad2d_backward", "avg_pool3d_backward", "nll_loss", "put_", "histc", "bincount", "median", "kthvalue"),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    yield
    torch.use_deterministic_algorithms(False)


class Exact(TorchDispatchMode):
    """Refuses operators that have no deterministic implementation on CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in NO_EXACT_WAY, name
        assert not name.startswith("nll_loss2d_forward") or args[3] == 0, "a loss that sums"
        return func(*args, **(kwargs or {}))


def bytes_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_leaves_the_same_bytes(toy_voc, tmp_path):
    """Snapshots, checkpoint, options, panels, predictions and scores; the log but for times and speeds. TensorBoard's no."""
    options = [*SCRATCH, "--num-steps", "3", "--save-pred-every", "2", "--val-every", "2", "--save-num-images", "1",
               "--num-workers", "1", "--loss-size", "input", "--deterministic"]  # fmt: skip
    found, logs = [], []
    for _ in range(2):
        torch.manual_seed(len(found))  # what the process did before
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
    ("name", "mode"), [("loss-size", "frozen"), ("grad-checkpoint", "frozen"), ("one-scale-at-a-time", "full")]
)
def test_a_training_step_has_an_exact_way_on_cuda(name, mode, toy_voc, tmp_path, on_meta):  # noqa: F811
    """On meta tensors torch takes the operators that it takes on CUDA."""
    torch.use_deterministic_algorithms(True)
    with Exact():
        on_meta(train_msc, toy_voc, tmp_path, *STEP, "--batch-norm", mode, *VARIANTS[name])


def test_an_evaluation_has_an_exact_way_on_cuda(toy_voc, fake_cuda):  # noqa: F811
    torch.use_deterministic_algorithms(True)
    with Exact():
        evaluation.score(fake_cuda[0], data_of(toy_voc), torch.device("cuda"), scales=(1.0, 0.5), mirror=True)


def test_without_the_option_there_is_none(toy_voc, tmp_path, on_meta):  # noqa: F811
    with pytest.raises(AssertionError, match="upsample_bilinear2d_backward"), Exact():
        on_meta(train, toy_voc, tmp_path, *STEP, "--loss-size", "input")


def test_it_is_switched_on_and_off(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    distributed.select_device("cpu", 0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    distributed.select_device("cpu", 0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_exact_way_is_a_sentence(capsys):
    torch.use_deterministic_algorithms(True)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)) and 0)
    assert end.value.code == 2
    assert "error: --deterministic: put_ does not have a deterministic implementation; leave" in capsys.readouterr().err
