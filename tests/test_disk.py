"""A full, read-only or missing disk: a run goes on, warns, and loses nothing that it could save.

A full disk is simulated by a limit on the size of files (RLIMIT_FSIZE): the system refuses to write more.
"""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from deeplab import deeplabv2
from tests.helpers_runs import SCRATCH, at, equal, limit, log_lines, model, train
from utils import checkpoint, files
from utils.checkpoint import Snapshots
from utils.evaluation.video import VideoFile
from utils.files import DiskError
from utils.training import validation
from utils.training.lock import FolderLock
from utils.training.log import RunLog
from utils.training.optimizer import GuardedSGD

pytestmark = pytest.mark.usefixtures("thin_nets")
resource = pytest.importorskip("resource")  # POSIX
RUN = [*SCRATCH, "--num-steps", "4", "--save-pred-every", "1"]


@pytest.fixture(autouse=True)
def _unlimited():
    yield
    limit(None)


def snapshots(folder) -> set[str]:
    return {path.name for path in folder.glob("*.pth")}


def test_a_run_goes_on_while_the_disk_is_full(toy_voc, tmp_path, capsys):
    acts = {2: lambda: limit(2**20), 4: lambda: limit(None)}
    assert train(toy_voc, tmp_path, *RUN, loss=at(acts)) == 0
    said = capsys.readouterr().out
    assert all(
        f"WARNING: step {step} is not saved: {tmp_path / 'last.ckpt'} cannot be written (File" in said for step in (2, 3)
    )
    assert said.count("; training goes on and tries again at the next snapshot") == 2
    assert snapshots(tmp_path) == {"VOC12_scenes_1.pth", "VOC12_scenes_4.pth"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 4
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_the_run_can_be_resumed(toy_voc, tmp_path):
    train(toy_voc, tmp_path / "whole", *RUN)
    with pytest.raises(
        DiskError, match=r"ended at step 4, which is not saved: .*last\.ckpt cannot be.*_4\.pth.*add --resume"
    ) as e:
        train(toy_voc, tmp_path / "full", *RUN, loss=at({3: lambda: limit(2**20)}))
    assert e.value.exit_status == 2
    limit(None)
    assert torch.load(tmp_path / "full/last.ckpt", weights_only=True)["step"] == 2
    assert train(toy_voc, tmp_path / "full", "--resume") == 0
    assert equal(*(model(tmp_path / name / "VOC12_scenes_4.pth") for name in ("whole", "full")))
    (tmp_path / "full/VOC12_scenes_4.pth").unlink()  # the snapshot for which there was no space
    assert train(toy_voc, tmp_path / "full", "--resume") == 0
    assert equal(*(model(tmp_path / name / "VOC12_scenes_4.pth") for name in ("whole", "full")))


def test_a_failed_save_is_reported_before_another_error(toy_voc, tmp_path, capsys):
    """Once, whether its thread ends before or after the error."""

    def fail():
        raise ValueError("of another kind")

    with pytest.raises(ValueError, match="of another kind"):
        train(toy_voc, tmp_path, *RUN, loss=at({3: lambda: limit(2**20), 4: fail}))
    said = "".join(capsys.readouterr())
    assert said.count("WARNING: step 3 is not saved: ") == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 2


def test_a_deleted_folder_is_created_again(toy_voc, tmp_path):
    assert train(toy_voc, tmp_path / "s", *RUN, "--tensorboard", loss=at({3: lambda: shutil.rmtree(tmp_path / "s")})) == 0
    assert snapshots(tmp_path / "s") == {"VOC12_scenes_3.pth", "VOC12_scenes_4.pth"}
    assert [line["step"] for line in log_lines(tmp_path / "s")] == [3, 4]


def test_the_best_net_that_cannot_be_saved_is_not_the_best(toy_voc, tmp_path, monkeypatch, capsys):
    refused = []

    def save_snapshot(*args, **more):
        if not refused:
            refused.append(True)
            raise DiskError("no space for it")
        checkpoint.save_snapshot(*args, **more)

    monkeypatch.setattr(validation, "save_snapshot", save_snapshot)
    assert train(toy_voc, tmp_path, *RUN, "--num-steps", "2", "--learning-rate", "0", "--val-every", "1") == 0
    assert "WARNING: the best net so far, of step 1, is not saved: no space for it" in capsys.readouterr().out
    assert torch.load(tmp_path / "best.pth", weights_only=True)["meta"]["step"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_lines_of_the_log_wait_for_space(tmp_path, capsys):
    """An incomplete line is removed again; TensorBoard ends."""
    options = {"num_steps": 9, "batch_size": 1, "iter_size": 1, "tensorboard": True}
    with RunLog(FolderLock(tmp_path), options) as run:
        for step in range(1, 6):
            limit(
                {2: (tmp_path / "log.jsonl").stat().st_size + 20, 4: None}.get(
                    step, resource.getrlimit(resource.RLIMIT_FSIZE)[0]
                )
            )
            run.line(step, {"loss": 1.0}, 0.1, 1, 0.0, [])
            if step == 3:
                assert [line["step"] for line in log_lines(tmp_path)] == [1]
        limit((tmp_path / "log.jsonl").stat().st_size)
        run.line(6, {"loss": 1.0}, 0.1, 1, 0.0, [])
        limit(None)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert said.count("log.jsonl cannot be written (") == said.count("; its lines wait until it can") == 2
    assert said.count("TensorBoard's file cannot be written (File too large) and ends here") == 1


def test_free_space_is_checked_before_the_first_step(toy_voc, tmp_path, monkeypatch, whole_nets):
    """The expected sizes are those of the files that a run leaves."""
    train(toy_voc, tmp_path / "a", *RUN, "--num-steps", "1")
    last, numbered = ((tmp_path / "a" / name).stat().st_size for name in ("last.ckpt", "VOC12_scenes_1.pth"))
    usage = type(shutil.disk_usage(tmp_path))

    def free(size: float) -> None:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage(10**12, 10**12, int(size)))

    needs = rf"has {0.99 * (last + numbered) / 1e6:.0f} MB free, and the first snapshots need {(last + numbered) / 1e6:.0f} MB"
    free(0.99 * (last + numbered))
    with pytest.raises(DiskError, match=needs) as error:
        train(toy_voc, tmp_path / "b", *RUN)
    assert error.value.exit_status == 2
    assert not (tmp_path / "b").exists()
    net = deeplabv2("resnet18", 4, "full")
    room = {keep: partial(Snapshots(tmp_path, keep, []).check_space, net, GuardedSGD(net, 1.0), 4) for keep in (0, 2)}
    four, three = (2 * last + n * numbered for n in (3, 2))  # the new last.ckpt beside the old one, before the last .pth
    free(0.99 * four)
    assert f"this run's 4 snapshots need {four / 1e6:.0f} MB; free space" in room[0]()
    assert room[2]() == ""
    free(0.99 * three)  # the third is written before the first is deleted
    assert f"this run's 3 snapshots need {three / 1e6:.0f} MB; free space" in room[2]()
    free(1.01 * four)
    assert room[0]() == ""
    small = nn.Linear(10, 9)  # 99 numbers of 4 bytes, and as many of momentum; exact to the byte
    optimizer = torch.optim.SGD(small.parameters(), momentum=0.9)
    small(torch.ones(10)).sum().backward()
    optimizer.step()
    check = partial(Snapshots(tmp_path, 0, []).check_space, small, optimizer)
    free(3 * 396 - 1)
    with pytest.raises(DiskError):
        check(1)
    free(3 * 396)
    assert check(1) == ""
    free(5 * 396 - 1)
    assert "this run's 2 snapshots need" in check(2)
    free(5 * 396)
    assert check(2) == ""


def test_no_run_begins_on_a_read_only_disk(toy_voc, tmp_path, monkeypatch):
    """Simulated, so that the test works for root, too."""

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(DiskError, match=r"nothing can be written to .*s \(Read-only file system\); choose another folder"):
        train(toy_voc, tmp_path / "s", *RUN)


def test_the_newest_snapshots_stay(toy_voc, tmp_path, capsys):
    """Also after a restart. Files that the run did not write are never deleted, whatever their names; a missing one is fine."""

    def put() -> None:
        (tmp_path / "VOC12_scenes_1000.pth").write_bytes(b"somebody's")
        (tmp_path / "VOC12_scenes_1.pth").unlink()

    options = [*RUN, "--keep", "2", "--num-steps", "3", "--val-every", "3"]
    assert train(toy_voc, tmp_path, *options, loss=at({2: put})) == 0
    others = {"best.pth", "VOC12_scenes_1000.pth"}
    assert snapshots(tmp_path) == {"VOC12_scenes_2.pth", "VOC12_scenes_3.pth"} | others
    assert "not saved" not in capsys.readouterr().out
    (tmp_path / "VOC12_scenes_1.pth").write_bytes(b"put back")
    assert train(toy_voc, tmp_path, "--resume", "--num-steps", "5") == 0
    assert snapshots(tmp_path) == {"VOC12_scenes_1.pth", "VOC12_scenes_4.pth", "VOC12_scenes_5.pth"} | others
    assert train(toy_voc, tmp_path, "--resume", "--num-steps", "6", "--keep", "1") == 0
    assert snapshots(tmp_path) == {"VOC12_scenes_1.pth", "VOC12_scenes_6.pth"} | others


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_video_that_does_not_fit_is_one_sentence_and_leaves_nothing(tmp_path, size):
    """OpenCV does not report failed writes. An earlier video of the same name stays."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    (tmp_path / "film.mp4").write_bytes(b"of yesterday")
    film = VideoFile(tmp_path / "film.mp4", 5.0)
    film.write(noise)
    limit(size)
    for turn in range(1, 9):
        film.write(np.roll(noise, turn))
    with pytest.raises(DiskError, match=r"film\.mp4 cannot be written: .* of 9 frames; free space"):
        film.__exit__(None, None, None)
    limit(None)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert (tmp_path / "film.mp4").read_bytes() == b"of yesterday"
