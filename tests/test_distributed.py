"""Two processes with gloo against one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import evaluate
from tests.helpers import ROOT, make_toy_voc
from tests.helpers_runs import (
    SCRATCH,
    SMALL,
    STEPS,
    log_lines,
    model,
    scores,
    train,
    train_msc,
)
from tests.helpers_two_ranks import FROZEN, HEADS, STOPPED, TWO_HEADS, counting
from utils import distributed
from utils.command import UserError
from utils.device import select_device

pytestmark = pytest.mark.usefixtures("thin_nets")


def torchrun(script: str, *options, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*launcher, str(ROOT / script), *map(str, options)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=500, env=environment)


@pytest.fixture(scope="module")
def two_ranks(thin_nets, tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """Run tests/helpers_two_ranks.py once in two processes: the data, the folder, and the results of each process."""
    folder = tmp_path_factory.mktemp("two_ranks")
    toy = make_toy_voc(folder / "toy")
    # Running statistics that match the data, so that the net works with frozen batch norm, too.
    train(toy, folder / "start", *SCRATCH, "--batch-norm", "stats", "--learning-rate", "0", "--num-steps", "25")
    before = {path: path.read_bytes() for name in ("JPEGImages", "SegmentationClassAug") for path in (toy / name).iterdir()}
    result = torchrun("tests/helpers_two_ranks.py", toy, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    for path, content in before.items():
        path.write_bytes(content)
    return toy, folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def moves_alike(start: dict, one: dict, two: dict, tolerance: float) -> None:
    """The updates of each convolution agree to ``tolerance`` of their norm.

    1 % is far above rounding and far below the effect of a missing scale, half batch or process.
    """
    for key in (key for key in one if "conv" in key):
        moved, apart = (one[key] - start[key]).norm(), (two[key] - one[key]).norm()
        assert moved > 20 * 1.2e-7 * start[key].norm(), key  # above float32 rounding
        assert apart <= tolerance * moved, f"{key}: {apart / moved:.2%} apart"


@pytest.mark.parametrize("name", [*STEPS, "single"])
def test_two_processes_train_like_one(name, two_ranks, tmp_path):
    """Three steps of two images with every option: batch norm is frozen, so the steps are the same."""
    toy, folder, results = two_ranks
    key = "single" if name == "single" else f"frozen {name}"
    assert [result[key] for result in results] == [[0, ""], [0, ""]]
    start = model(folder / "start/VOC12_scenes_25.pth")
    if "fp16" in name:
        two = model(folder / f"two {key}/VOC12_scenes_8.pth")
        assert all(bool(value.isfinite().all()) for value in two.values())
        assert 0 < float((two["conv1.weight"] - start["conv1.weight"]).abs().max()) < 0.1
        return
    options = ["--restore-from", str(folder / "start/VOC12_scenes_25.pth"), *FROZEN]
    if name == "single":
        train(toy, tmp_path, *options)
    else:
        train_msc(toy, tmp_path, *options, *STEPS[name])
    one, two = model(tmp_path / "VOC12_scenes_3.pth"), model(folder / f"two {key}/VOC12_scenes_3.pth")
    moves_alike(start, one, two, 0.3 if "16" in name else 0.01)
    lines = [log_lines(tmp_path), log_lines(folder / f"two {key}")]
    for mine, theirs in zip(*lines):  # the logged losses are those of both processes
        for part in (part for part in mine if part.startswith("loss")):
            assert theirs[part] == pytest.approx(mine[part], rel=0.02 if "16" in name else 1e-4), part
    assert [line["step"] for line in lines[1]] == [1, 2, 3]


@pytest.mark.parametrize("name", TWO_HEADS)
def test_two_processes_drop_the_same_channels_as_one(name, two_ranks, tmp_path):
    toy, folder, results = two_ranks
    assert [result[name] for result in results] == [[0, ""], [0, ""]]
    train_msc(toy, tmp_path, *HEADS, *TWO_HEADS[name])
    (start, one), (_, two) = (
        [model(path / f"VOC12_scenes_{step}.pth") for step in (1, 2)] for path in (tmp_path, folder / f"two {name}")
    )
    heads = [key for key in one if key.startswith("head" if name == "pspnet" else ("head", "dsn"))]
    for key in (key for key in heads if not torch.equal(one[key], start[key])):  # frozen batch norm has none
        moved, apart = (one[key] - start[key]).norm(), (two[key] - one[key]).norm()
        assert apart <= 0.01 * moved, f"{key}: {apart / moved:.2%} apart"
    assert not torch.equal(one["head.1.weight"], start["head.1.weight"])
    losses = [[line["loss"] for line in log_lines(path)] for path in (tmp_path, folder / f"two {name}")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("mode", ["stats", "full"])
def test_batch_statistics_of_each_process(mode, two_ranks):
    """The run differs from that of one process; statistics and counters move once per scale and batch."""
    _, folder, results = two_ranks
    for name, batches in (("plain", 3), ("iter-size", 6)):
        assert [result[f"{mode} {name}"] for result in results] == [[0, ""], [0, ""]]
        state = model(folder / f"two {mode} {name}/VOC12_scenes_3.pth")
        assert all(bool(value.isfinite().all()) for value in state.values())
        assert int(state["bn1.num_batches_tracked"]) == 25 + 3 * batches


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two_ranks):
    """Before anything is saved, though only process 1 has it, in step 3; the sentence names step and images."""
    _, folder, results = two_ranks
    for kind, sentence in (result["nan"] for result in results):
        assert kind == "Diverged"
        assert re.search(r"step 3, images toy_\d, toy_\d \(--learning-rate .*\): the snapshots are unchanged", sentence)
    assert {path.name for path in (folder / "nan").glob("*.pth")} == {"VOC12_scenes_2.pth"}
    state = torch.load(folder / "nan/last.ckpt", weights_only=True)
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_full_disk_and_a_folder_in_use_are_errors_of_both_processes(two_ranks):
    """Process 0 writes and locks; both processes train to the last step."""
    _, folder, results = two_ranks
    for (kind, full), (_, held) in ((result["full"], result["held"]) for result in results):
        assert kind == "DiskError"
        assert re.search(r"ended at step 5, which is not saved: .*last\.ckpt cannot be written .*; then add --resume", full)
        assert re.search(r"held is in use by process \d+ on ", held)
    assert [line["step"] for line in log_lines(folder / "full")] == [1, 2, 3, 4, 5]
    assert not list((folder / "full").glob("*.pth"))


def test_a_signal_to_one_process_stops_both_and_the_run_resumes(two_ranks, tmp_path):
    """Both stop at the same step. They resume from one checkpoint, though process 1 has none, as if never stopped."""
    toy, folder, results = two_ranks
    assert [result["stop"] for result in results] == [[128 + signal.SIGUSR1, ""]] * 2
    assert [result["handed over"] for result in results] == [[0, ""]] * 2
    assert [line["step"] for line in log_lines(folder / "stop")] == [1, 2, 3, 4, 5]
    torch.manual_seed(0)
    train(toy, tmp_path, *STOPPED)
    torch.manual_seed(1234)
    assert not (folder / "elsewhere").exists()
    losses = [[line["loss"] for line in log_lines(path)] for path in (tmp_path, folder / "stop")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    one, two = model(tmp_path / "VOC12_scenes_5.pth"), model(folder / "stop/VOC12_scenes_5.pth")
    start = model(tmp_path / "VOC12_scenes_2.pth")
    moves_alike(start, one, two, 0.02)


def test_processes_with_different_checkpoints_or_lists_are_refused(two_ranks):
    _, folder, results = two_ranks
    for result in results:
        assert result["moved"][0] == "UserError"
        assert "process 1 sees" in result["moved"][1] or "at step 5, but process 0 sees none" in result["moved"][1]
        kind, sentence = result["lists"]
        assert kind == "UserError"
        assert sentence.startswith("the processes have different images: number 3 is JPEGImages/toy_2.jpg")
    assert not (folder / "lists").exists()


def test_an_image_that_one_process_cannot_read_loses_nothing(two_ranks):
    _, folder, results = two_ranks
    kinds = sorted(result["broken"][0] for result in results)
    assert kinds in (["DatasetError", "DatasetError"], ["DatasetError", "OtherProcessFailed"])
    assert torch.load(folder / "broken/last.ckpt", weights_only=True)["step"] >= 1


def test_two_processes_validate_like_evaluate(two_ranks, tmp_path):
    """With the statistics of process 0; the trained weights do not change. If one process cannot read a file, both end."""
    toy, folder, results = two_ranks
    assert [result[name] for result in results for name in ("validated", "not validated")] == [[0, ""]] * 4
    states = [torch.load(folder / name / "last.ckpt", weights_only=True)["model"] for name in ("validated", "not validated")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    lines = [line for line in log_lines(folder / "validated") if "val_mean_iou" in line]
    for line in lines:
        if (path := folder / f"validated/VOC12_scenes_{line['step']}.pth").exists():
            result = scores(toy, path, tmp_path)["scores"]
            assert result["mean_iou"] == pytest.approx(line["val_mean_iou"], abs=2e-6)
    assert [line["step"] for line in lines] == [1, 2]
    assert [result["half"][0] for result in results] == ["OtherProcessFailed", "DatasetError"]
    assert all("toy_5.jpg is not an image" in result["half"][1] for result in results)
    assert torch.load(folder / "half/last.ckpt", weights_only=True)["step"] == 1


def test_two_processes_count_the_same_matrix(two_ranks):
    toy, folder, results = two_ranks
    assert evaluate.main(counting(toy, folder, "one")) == 0
    assert [result["counted"] for result in results] == [[0, ""], [0, ""]]
    assert len(json.loads((folder / "report/report.json").read_text())["pictures"]) == 6
    assert len(list((folder / "report/pictures").glob("*_crf.png"))) == 6
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["before_crf"]["confusion_matrix"] == two["before_crf"]["confusion_matrix"]
    assert one["after_crf"]["confusion_matrix"] == two["after_crf"]["confusion_matrix"]
    # Before and after the CRF, printed by one process only.
    assert [result["counted said"].count("mean IoU") for result in results] == [2, 0]
    for i in range(6):
        assert (folder / f"masks one/toy_{i}.png").read_bytes() == (folder / f"masks two/toy_{i}.png").read_bytes()


def test_an_indivisible_batch_is_refused(two_ranks):
    _, _, results = two_ranks
    for kind, sentence in (result["indivisible"] for result in results):
        assert kind == "UserError"
        assert "--batch-size 3 cannot be divided among 2 processes" in sentence


def test_a_label_that_one_process_cannot_read_ends_both_evaluations(two_ranks):
    """With the sentence, and no process waits for counts that never come."""
    _, _, results = two_ranks
    assert [result["evaluated"][0] for result in results] == ["OtherProcessFailed", "DatasetError"]
    assert all("toy_5.png holds the value 77" in result["evaluated"][1] for result in results)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("evaluate, lists", r"different images: number 2 is .*toy_1\.png in process 0 and .*toy_2\.png in process 1"),
        ("evaluate, weights", r"different weights, by their checksum: it is \w{16} in process 0 and \w{16} in process 1"),
        ("evaluate, options", "different --mirror: it is False in process 0 and True in process 1"),
        ("submission, lists", r"different images: number 2 is toy_1 toy_1\.jpg in process 0 and toy_2 toy_2\.jpg in"),
        ("predict, images", r"different images: number 3 is toy_2\.jpg in process 0 and missing in process 1"),
        ("predict, weights", "different weights, by their checksum"),
        ("train, validation lists", "different validation images: number 2 is"),
        ("train, options", "different --num-steps: it is 2 in process 0 and 3 in process 1"),
    ],
)
def test_processes_with_different_inputs_are_refused(name, sentence, two_ranks):
    """Scores over different images or nets would mean nothing: both processes fail, and nothing is written."""
    _, folder, results = two_ranks
    for result in results:
        assert result[name][0] == "UserError"
        assert re.search(sentence, result[name][1])
    assert not (folder / "different").exists()
    assert not (folder / "a.tgz").exists()


@pytest.mark.parametrize(
    ("name", "kinds", "sentence"),
    [
        ("evaluate, a folder", ("OtherProcessFailed", "DatasetError"), "nowhere does not exist; get PASCAL VOC"),
        ("evaluate, a file", ("OtherProcessFailed", "WeightsError"), r"nowhere\.pth: there is no such file"),
        ("evaluate, memory", ("OtherProcessFailed", "MemoryError"), "memory ran out: use smaller"),
        ("evaluate, a bug", ("OtherProcessFailed", "KeyError"), "process 1: KeyError: 'key'"),
        ("evaluate, a disk", ("DiskError", "OtherProcessFailed"), "full"),
        ("submission, a disk", ("DiskError", "OtherProcessFailed"), "full"),
        ("predict, an image", ("OtherProcessFailed", "UserError"), r"nowhere\.jpg does not exist"),
    ],
)
def test_an_error_of_one_process_is_reported_by_the_other(name, kinds, sentence, two_ranks):
    _, _, results = two_ranks
    outcomes = [result[name] for result in results]
    assert tuple(kind for kind, _ in outcomes) == kinds
    for kind, said in outcomes:
        assert re.search(sentence, said) or kind in ("MemoryError", "KeyError")  # run_command makes their sentence


def test_two_processes_predict_every_image_once(two_ranks):
    """Both exit with status 1 if one of them skips an image."""
    _, folder, results = two_ranks
    assert [result["predict"] for result in results] == [[1, ""], [1, ""]]
    assert {path.name for path in (folder / "masks").iterdir()} == {f"toy_{number}.png" for number in range(3)}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"a": 1, "b": ["x", "y"]}, None),
        ({"a": 2, "b": ["x", "y"]}, "different a: it is 1 in process 0 and 2 in process 2"),
        ({"a": 1.0, "b": ["x", "y"]}, "different a: it is 1 in process 0 and 1.0 in process 2"),
        ({"a": 1, "b": ["y", "x"]}, "different b: number 1 is x in process 0 and y in process 2"),
        ({"a": 1, "b": ["x", "y", "y"]}, "different b: number 3 is missing in process 0 and y in process 2"),
        ({"a": 1, "b": []}, "different b: number 1 is x in process 0 and missing in process 2"),
        ({"a": 1}, r"different b: it is \['x', 'y'\] in process 0 and None in process 2"),
        ({"a": 1, "b": ["x", "y"], "c": 3}, "different c: it is None in process 0 and 3 in process 2"),
    ],
)
def test_the_first_difference_is_named(other, sentence, monkeypatch):
    """Processes 0 and 1 agree; ``other`` is that of process 2."""
    mine, sent = {"a": 1, "b": ["x", "y"]}, []
    monkeypatch.setattr(distributed, "gather", lambda value: [sent.append(value), value][1:])
    distributed.check_same(other)
    theirs = iter([*sent, other])  # checksums, and the values if they differ
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value, next(theirs)])
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        distributed.check_same(mine)


@pytest.fixture
def four_gpus(monkeypatch):
    """A fake machine with four CUDA devices, without environment variables of launchers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)

    def launched(**environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({}, 2),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 1),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "3"}, 3),
        ({"RANK": "5", "WORLD_SIZE": "8"}, 1),  # the local rank is unknown: rank modulo devices
    ],
)
def test_each_process_uses_its_own_gpu(environment, index, four_gpus):
    """The local rank of torchrun or Slurm overrides --gpu, which is for a single process."""
    four_gpus(**environment)
    assert select_device("auto", 2) == torch.device("cuda", index)
    assert select_device("cuda", 2) == torch.device("cuda", index)


def test_one_gpu_for_several_processes_is_refused(four_gpus):
    assert select_device("cuda:3", 0) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="CUDA device 4 was requested, but this machine has 4"):
        select_device("cuda", 4)
    four_gpus(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    with pytest.raises(UserError, match="--device cuda:0 would put 2 processes on one GPU"):
        select_device("cuda:0", 0)
    four_gpus(LOCAL_RANK="7")
    with pytest.raises(UserError, match="CUDA device 7"):
        select_device("cuda", 0)


def test_buffers_are_not_synchronised(monkeypatch):
    """Frozen ones never change, and only the running statistics of process 0 are saved."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # a group of one that claims to be two: wrapping uses no collective
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = distributed.wrap(nn.BatchNorm2d(3), torch.device("cpu"))
        assert not wrapped.will_sync_module_buffers()
    finally:
        dist.destroy_process_group()


ENDS = """
import atexit, json, os, signal, socket, sys
import torch
import torch.distributed as dist
from utils import distributed
from utils.command import UserError, run_command

def main():
    distributed.start()
    used, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *words, group: [used.append(group), all_reduce(*words, group=group)]
    assert distributed.sum_(torch.ones(2)).tolist() == [2, 2]
    assert distributed.min_(torch.tensor([distributed.rank()])).tolist() == [0]
    assert distributed.agree(distributed.rank()) == [1]
    assert used == [distributed._hosts] * 3 and distributed._hosts is not dist.group.WORLD
    if end == "error":
        raise UserError("what the user did")
    if end == "bug":
        raise KeyError("what we did")
    if end == "killed":
        if distributed.rank():
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.gather(0)
    if end == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    distributed.stop()

class Witness:
    def __del__(self, write=os.write):  # os may be gone by then
        write(1, b"Python was shut down")

folder, *ends = sys.argv[1:]
del sys.argv[1:]
started = {}
for end in ends:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    for rank in (0, 1):
        if child := os.fork():
            started[f"{end} {rank}"] = child
            continue
        for number, name in ((1, "said"), (2, "errors")):
            os.dup2(os.open(f"{folder}/{end} {rank} {name}", os.O_WRONLY | os.O_CREAT), number)
        os.environ["RANK"] = str(rank)
        witness = Witness()
        atexit.register(lambda: print("exit functions were called", end=""))
        run_command(main)
        raise AssertionError("run_command came back")
ended = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in started.items()}
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, list[tuple[int, str, str]]]:
    """Each end of two processes that run ENDS -> (exit status, output, errors) of both. All are forked from one process with
    torch loaded."""
    folder, ends = tmp_path_factory.mktemp("ends"), ("well", "error", "bug", "signal", "killed")
    words = [sys.executable, "-c", ENDS, folder, *ends]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    texts = lambda name: [(folder / f"{name} {stream}").read_text() for stream in ("said", "errors")]  # noqa: E731
    return {end: [(status[f"{end} {rank}"], *texts(f"{end} {rank}")) for rank in (0, 1)] for end in ends}


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("well", 0, "^$"),
        ("error", 2, "^-c: error: what the user did\n$"),
        ("bug", 1, "KeyError: 'what we did'\n$"),
        ("signal", 128 + signal.SIGTERM, "^$"),
    ],
)
def test_one_of_several_processes_ends_with_its_status(end, status, said, ended):
    """Python is not shut down, since gloo's threads may need it: about one in six such programs died of SIGABRT."""
    for returncode, output, errors in ended[end]:
        assert returncode == status, errors
        assert output == "exit functions were called"
        assert re.search(said, errors)


def test_a_process_whose_partner_is_killed_ends_with_one_sentence(ended):
    (status, _, errors), (killed, _, _) = ended["killed"]
    assert (status, killed) == (1, -signal.SIGKILL)
    assert re.fullmatch("-c: error: another process has ended before its work was done; .*\n", errors)


def launch(in_a_group, toy_voc, folder, *options: str) -> subprocess.Popen:
    """Start torchrun with two processes in its own process group, and return once the run has saved step 2."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    arguments = [
        "--data-dir",
        str(toy_voc),
        "--snapshot-dir",
        str(folder),
        *SMALL,
        *STOPPED,
        "--learning-rate",
        "1e-5",
        "--save-pred-every",
        "1",
        *options,
    ]
    process = in_a_group([*launcher, "train.py", *arguments, "--resume"])
    for _ in range(1200):
        if (folder / "VOC12_scenes_2.pth").exists():
            return process
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run did not begin within a minute")


def test_a_killed_process_is_restarted_and_resumes(in_a_group, toy_voc, tmp_path):
    process = launch(in_a_group, toy_voc, tmp_path, "--num-steps", "8")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, 9))


def test_a_signal_to_the_launcher_and_its_processes_saves_the_run(in_a_group, toy_voc, tmp_path):
    process = launch(in_a_group, toy_voc, tmp_path, "--num-steps", "100000", "--save-pred-every", "2", "--log-every", "1")
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGTERM: stopping after this step" in errors
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == log_lines(tmp_path)[-1]["step"]
