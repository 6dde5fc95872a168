"""Validation during training: the results of evaluate.py, the best snapshot, and no effect on the training."""

import json
import shutil
import signal

import pytest
import torch

from dataset import DatasetError
from tests.helpers_runs import SCRATCH, log_lines, model, scores, train
from utils.command import UserError
from utils.training import validation

OPTIONS = [*SCRATCH, "--num-steps", "4", "--save-pred-every", "4"]


@pytest.mark.parametrize("mode", ["full", "stats", "frozen"])
def test_weights_are_the_same_with_and_without_validation(mode, toy_voc, tmp_path):
    options = [*OPTIONS, "--batch-norm", mode, "--learning-rate", "1e-4"]
    train(toy_voc, tmp_path / "without", *options)
    train(toy_voc, tmp_path / "with", *options, "--val-every", "1", "--num-workers", "1")
    files = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("without", "with")]
    for key, value in files[0]["model"].items():
        assert torch.equal(value, files[1]["model"][key]), key
    assert [line.get("loss") for line in log_lines(tmp_path / "without")] == [
        line["loss"] for line in log_lines(tmp_path / "with") if "loss" in line
    ]


def test_scores_are_those_of_evaluate_and_the_best_is_kept(toy_voc, tmp_path):
    train(toy_voc, tmp_path / "run", *OPTIONS, "--num-steps", "5", "--val-every", "2", "--tensorboard")
    lines = [line for line in log_lines(tmp_path / "run") if "val_mean_iou" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    best = max(lines, key=lambda line: line["val_mean_iou"])
    result = scores(toy_voc, tmp_path / "run/best.pth", tmp_path)
    assert result["step"] == best["step"]
    assert result["scores"]["mean_iou"] == pytest.approx(best["val_mean_iou"], abs=2e-6)
    assert [entry["iou"] for entry in result["scores"]["classes"]] == pytest.approx(list(best["val_iou"].values()), abs=2e-6)
    last = scores(toy_voc, tmp_path / "run/VOC12_scenes_5.pth", tmp_path)["scores"]["mean_iou"]
    assert last == pytest.approx(lines[-1]["val_mean_iou"], abs=2e-6)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_a_worse_net_never_replaces_the_best(toy_voc, tmp_path):
    """Not after a resume either, and a new run in its folder is refused."""
    options = [*OPTIONS, "--val-every", "4"]
    train(toy_voc, tmp_path, *options)
    content = torch.load(tmp_path / "best.pth", weights_only=True)
    content["meta"].update(val_mean_iou=0.99)
    torch.save(content, tmp_path / "best.pth")
    before = (tmp_path / "best.pth").read_bytes()
    train(toy_voc, tmp_path, "--resume", "--num-steps", "6")
    assert (tmp_path / "best.pth").read_bytes() == before
    assert [line["step"] for line in log_lines(tmp_path) if "val_mean_iou" in line] == [4, 6]
    for path in [*tmp_path.glob("VOC12*"), tmp_path / "last.ckpt"]:
        path.unlink()
    with pytest.raises(UserError, match=r"holds snapshots already \(best\.pth\)"):
        train(toy_voc, tmp_path, *options)


def test_a_missing_validation_of_a_killed_run_is_done_on_resuming(toy_voc, tmp_path):
    """The run was killed between the snapshot of step 2 and its validation, or between its best.pth and its log line."""
    whole = tmp_path / "whole"
    train(toy_voc, whole, *OPTIONS, "--num-steps", "2", "--val-every", "2")
    for name, best in (("a", False), ("b", True)):
        shutil.copytree(whole, tmp_path / name)
        lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / name / "log.jsonl").write_text("".join(lines[:2]))
        if not best:
            (tmp_path / name / "best.pth").unlink()
        train(toy_voc, tmp_path / name, "--resume")
        assert log_lines(tmp_path / name) == log_lines(whole)
        assert torch.equal(*(model(folder / "best.pth")["conv1.weight"] for folder in (whole, tmp_path / name)))


def test_a_stop_signal_interrupts_a_validation(toy_voc, tmp_path, monkeypatch, capsys):
    score, seen = validation.score, []

    def score_and_stop(*args, finish, **options):
        def stopping(sample, prediction):
            seen.append(sample.id)
            signal.raise_signal(signal.SIGTERM)
            finish(sample, prediction)

        return score(*args, finish=stopping, **options)

    monkeypatch.setattr(validation, "score", score_and_stop)
    assert train(toy_voc, tmp_path, *OPTIONS, "--val-every", "3") == 128 + signal.SIGTERM
    assert seen == ["toy_0"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 3
    assert not (tmp_path / "best.pth").exists()
    assert "saved" in capsys.readouterr().out.splitlines()[-1]
    for _ in range(2):  # after the last step, too, and in a run that has no more steps
        assert train(toy_voc, tmp_path, "--resume", "--val-every", "4") == 128 + signal.SIGTERM
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 4
        assert not (tmp_path / "best.pth").exists()
        assert "add --resume to evaluate it" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.undo()
    assert train(toy_voc, tmp_path, "--resume") == 0
    assert model(tmp_path / "best.pth").keys() == model(tmp_path / "VOC12_scenes_4.pth").keys()


def test_a_failed_validation_is_one_sentence_and_loses_nothing(toy_voc, tmp_path):
    with pytest.raises(DatasetError, match="nowhere"):
        train(toy_voc, tmp_path / "a", *OPTIONS, "--val-every", "2", "--val-list", str(tmp_path / "nowhere.txt"))
    assert not (tmp_path / "a/last.ckpt").exists()
    (toy_voc / "JPEGImages/toy_5.jpg").write_bytes(b"broken")  # only on the validation list
    with pytest.raises(DatasetError, match="toy_5"):
        train(toy_voc, tmp_path / "b", *OPTIONS, "--val-every", "2")
    with pytest.raises(DatasetError, match="toy_5"):
        train(toy_voc, tmp_path / "b", "--resume")  # its validation is still to come
    assert torch.load(tmp_path / "b/last.ckpt", weights_only=True)["step"] == 2
    assert json.loads((tmp_path / "b/args.json").read_text())["val_every"] == 2
