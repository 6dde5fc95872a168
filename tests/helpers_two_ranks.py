"""The runs of test_distributed.py in two processes, one after another, so that the processes start only once.

    torchrun --nproc_per_node=2 tests/helpers_two_ranks.py TOY_VOC FOLDER

Each run writes its snapshots below FOLDER, and each process writes its results to FOLDER/<rank>.json.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial, update_wrapper
from io import StringIO
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

import evaluate
from deeplab import BACKBONES, deeplabv2, single_scale_loss
from scripts import predict
from tests.helpers import TOY_CLASSES, save_palette_png
from tests.helpers_nets import THIN
from tests.helpers_runs import SCRATCH, STEPS, limit, train, train_msc
from utils import distributed
from utils.checkpoint import make_meta, save_snapshot
from utils.command import run_command
from utils.evaluation import run as evaluation
from utils.evaluation import submission
from utils.files import DiskError
from utils.training.lock import FolderLock

STOPPED = [*SCRATCH, "--batch-norm", "frozen", "--num-steps", "5", "--save-pred-every", "2", "--learning-rate", "3e-4"]
FROZEN = ["--batch-norm", "frozen", "--learning-rate", "1e-4", "--num-steps", "3", "--batch-size", "2"]
# Loss scaling skips the first steps, and two processes may skip one more or less, since their shares of the loss are twice as
# large. float16 convolutions are slow on a CPU, so their crops are small.
LONGER = {name: ["--num-steps", "8", "--input-size", "17,17"] if "fp16" in name else [] for name in STEPS}
RUNS = {f"frozen {name}": ["--batch-norm", "frozen", *options, *LONGER[name]] for name, options in STEPS.items()}
RUNS |= {
    f"{mode} {name}": ["--batch-norm", mode, *STEPS[name]] for mode in ("stats", "full") for name in ("plain", "iter-size")
}
# Nets with dropout and an auxiliary head, one of them without weight in the loss; two steps from random weights.
TWO_HEADS = {
    "deeplabv3": ["--net", "deeplabv3", "--iter-size", "2"],
    "pspnet": ["--net", "pspnet", "--aux-weight", "0", "--one-scale-at-a-time"],
}
HEADS = [
    "--restore-from",
    "none",
    "--batch-norm",
    "frozen",
    "--num-steps",
    "2",
    "--save-pred-every",
    "1",
    "--learning-rate",
    "1e-4",
]


class Once:
    """A loss that also calls ``act`` in its ``call``-th call on one process."""

    def __init__(self, rank: int, call: int, act, loss=single_scale_loss) -> None:
        update_wrapper(self, loss)  # the run must see the name of the wrapped loss
        self.loss, self.act, self.left = loss, act, call if distributed.rank() == rank else -1

    def __call__(self, net, images, labels, **options):
        losses = self.loss(net, images, labels, **options)
        self.left -= 1
        return self.act(losses) if self.left == 0 else losses


def send(number: int):
    def act(losses):
        os.kill(os.getpid(), number)
        return losses

    return act


def full(losses):
    limit(2**20)
    return losses


def outcome(run) -> list:
    """The exit status of ``run()``, or the type and the sentence of its error."""
    try:
        return [run(), ""]
    except Exception as error:
        return [type(error).__name__, str(error)]


def counting(toy: Path, folder: Path, name: str, *options: str) -> list[str]:
    """The arguments of evaluate.py that evaluate the first net with the CRF."""
    words = ["--data-dir", toy, "--restore-from", folder / "start/VOC12_scenes_25.pth", "--device", "cpu", "--num-workers", "0"]
    words += ["--crf", "--crf-workers", "1", "--save-json", folder / f"{name}.json", "--save-dir", folder / f"masks {name}"]
    return [*map(str, words), *options]


def main(toy: Path, folder: Path) -> None:
    BACKBONES.update(THIN)
    distributed.start()
    distributed.stop = lambda: None  # the process group is kept from one run to the next
    rank, start, results = distributed.rank(), folder / "start/VOC12_scenes_25.pth", {}

    common = ["--restore-from", str(start), *FROZEN]
    for name, options in RUNS.items():
        results[name] = outcome(partial(train_msc, toy, folder / f"two {name}", *common, *options))
    for name, options in TWO_HEADS.items():
        results[name] = outcome(partial(train_msc, toy, folder / f"two {name}", *HEADS, *options))
    results["single"] = outcome(partial(train, toy, folder / "two single", *common))

    def nan(losses):
        return {name: loss * float("nan") for name, loss in losses.items()}

    results["nan"] = outcome(partial(train, toy, folder / "nan", *STOPPED, "--log-every", "9", loss=Once(1, 3, nan)))
    results["stop"] = outcome(partial(train, toy, folder / "stop", *STOPPED, loss=Once(1, 3, send(signal.SIGUSR1))))
    # The disk of process 0 is full from its second step on; then its folder is in use.
    results["full"] = outcome(partial(train, toy, folder / "full", *STOPPED, loss=Once(0, 2, full)))
    limit(None)
    with FolderLock(folder / "held") if rank == 0 else nullcontext():
        distributed.from_main(lambda: None)
        results["held"] = outcome(partial(train, toy, folder / "held", *STOPPED))
    # Like two machines: process 1 has no checkpoint, and process 0 sends it.
    own = folder / "stop" if rank == 0 else folder / "elsewhere"
    results["handed over"] = outcome(partial(train, toy, own, "--resume"))
    own = folder / "elsewhere" if rank == 0 else folder / "stop"
    results["moved"] = outcome(partial(train, toy, own, *STOPPED, "--resume"))
    (folder / "other.txt").write_text("toy_0\ntoy_1\n")
    other = ["--data-list", str(folder / "other.txt")] if rank else []
    results["lists"] = outcome(partial(train, toy, folder / "lists", *STOPPED, *other))
    results |= different(toy, folder, start)

    results["indivisible"] = outcome(partial(train, toy, folder / "indivisible", *STOPPED, "--batch-size", "3"))
    with redirect_stdout(StringIO()) as said:
        results["counted"] = outcome(partial(evaluate.main, counting(toy, folder, "two", "--report", str(folder / "report"))))
    results["counted said"] = said.getvalue()

    two = [*SCRATCH, "--num-steps", "2", "--save-pred-every", "2"]
    for name, options in {"not validated": [], "validated": ["--val-every", "1"]}.items():
        results[name] = outcome(partial(train, toy, folder / name, *two, *options))
    (folder / "half.txt").write_text("toy_4\ntoy_5\n")  # process 1 cannot read its image
    image = toy / "JPEGImages/toy_5.jpg"
    whole = image.read_bytes()
    distributed.from_main(lambda: image.write_bytes(b"broken"))
    options = ["--val-every", "1", "--val-list", str(folder / "half.txt")]
    results["half"] = outcome(partial(train, toy, folder / "half", *two, *options))
    distributed.from_main(lambda: image.write_bytes(whole))

    # An image that only process 1 reads breaks; process 0 saves the steps so far.
    def break_image(losses):
        (toy / "JPEGImages/toy_3.jpg").write_bytes(b"broken")
        (toy / "JPEGImages/toy_1.jpg").write_bytes(b"broken")
        return losses

    results["broken"] = outcome(partial(train, toy, folder / "broken", *STOPPED, loss=Once(1, 1, break_image)))
    # A label that only process 1 reads is wrong: process 0, which sums the counts, fails, too.
    label = toy / "SegmentationClassAug/toy_5.png"
    distributed.from_main(lambda: save_palette_png(label, np.full_like(np.array(Image.open(label)), 77)))
    (toy / "evaluated.txt").write_text("toy_4\ntoy_5\n")
    options = ["--data-dir", toy, "--data-list", toy / "evaluated.txt", "--restore-from", start, "--device", "cpu"]
    results["evaluated"] = outcome(partial(evaluate.main, [*map(str, options), "--num-workers", "0"]))
    (folder / f"{rank}.json").write_text(json.dumps(results))


def different(toy: Path, folder: Path, start: Path) -> dict[str, list]:
    """The outcomes of commands with processes that have different inputs, or one process that fails."""
    second, results = distributed.rank() == 1, {}
    if not second:
        for name, ids in {"a": "toy_0 toy_1 toy_2", "b": "toy_0 toy_2"}.items():
            (folder / f"{name}.txt").write_text(ids.replace(" ", "\n"))
        torch.manual_seed(0)
        for name, classes in {"other": TOY_CLASSES, "voc": 21}.items():
            net = deeplabv2("resnet18", classes)
            save_snapshot(folder / f"{name}.pth", net, make_meta(net, None, 1, {}, seen_voc_val=""))
    distributed.from_main(lambda: None)
    lists = [folder / ("b.txt" if second else "a.txt")]
    voc = folder / "voc.pth"
    common = ["--device", "cpu", "--num-workers", "0"]

    def evaluated(*options, weights=start, ids=folder / "a.txt", data=toy) -> list:
        words = ["--data-dir", data, "--data-list", ids, "--restore-from", weights, *common, *options]
        return outcome(partial(evaluate.main, [*map(str, words)]))

    def predicted(*options, weights=start) -> list:
        words = ["--restore-from", weights, "--save-dir", folder / "masks", *common, *options]
        return outcome(partial(predict.main, [*map(str, words)]))

    images = [toy / f"JPEGImages/toy_{number}.jpg" for number in (0, 1, 2)]
    results["evaluate, lists"] = evaluated(ids=lists[0])
    results["evaluate, weights"] = evaluated(weights=folder / "other.pth" if second else start)
    results["evaluate, options"] = evaluated(*["--mirror"] * second)
    results["evaluate, a folder"] = evaluated(data=folder / "nowhere" if second else toy)
    results["evaluate, a file"] = evaluated(weights=folder / "nowhere.pth" if second else start)
    for name, error in {"memory": MemoryError(), "a bug": KeyError("key")}.items():
        with patch.object(evaluation, "open_trained_net", side_effect=error) if second else nullcontext():
            results[f"evaluate, {name}"] = evaluated()
    with nullcontext() if second else patch.object(evaluation, "save_json", side_effect=DiskError("full")):
        results["evaluate, a disk"] = evaluated("--save-json", folder / "scores.json")
    results["submission, lists"] = evaluated("--submission", folder / "a.tgz", weights=voc, ids=lists[0])
    with nullcontext() if second else patch.object(submission, "write_atomically", side_effect=DiskError("full")):
        results["submission, a disk"] = evaluated("--submission", folder / "a.tgz", weights=voc)
    results["predict, images"] = predicted(*(images[:2] if second else images))
    results["predict, weights"] = predicted(*images, weights=folder / "other.pth" if second else start)
    results["predict, an image"] = predicted(*images[:2], folder / "nowhere.jpg" if second else images[2])
    (folder / f"broken{distributed.rank()}.jpg").write_bytes(b"broken")
    results["predict"] = predicted(*images, *(folder / f"broken{number}.jpg" for number in (0, 1)), images[0])
    two = [*SCRATCH, "--num-steps", "2"]
    for name, options in {
        "validation lists": ["--val-every", "1", "--val-list", str(lists[0])],
        "options": ["--num-steps", "3" if second else "2"],
    }.items():
        results[f"train, {name}"] = outcome(partial(train, toy, folder / "different", *two, *options))
    return results


if __name__ == "__main__":
    run_command(partial(main, Path(sys.argv[1]), Path(sys.argv[2])))
