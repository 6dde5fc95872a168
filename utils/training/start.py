"""The start of a training run: a checkpoint (``--resume``), pretrained weights (``--restore-from``) or random values.

Process 0 decides, reads the files and sends the result to the others, so they need no access to its files and all start alike.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dataset import DATASETS
from dataset.classes import ClassFile
from deeplab import NETS, Net
from deeplab.weights import build_net, load_weights
from utils import distributed
from utils.checkpoint import ANEW, dataset_of, load_checkpoint
from utils.command import UserError, put
from utils.options import INITIAL_WEIGHTS, Options
from utils.training.identity import NET_OPTIONS, Misfit, compare_meta, kept_options, net_of_checkpoint, resumed_options
from utils.training.options import FINE_TUNING_RATE


@dataclass(frozen=True)
class Start:
    """The state that a run begins with, the same on all processes.

    Attributes:
        options: settled; in a resumed run those that were not given are the checkpoint's.
        net: with its weights, on the CPU.
        lines: for the user.
        classes: the names of the classes; None if nobody gave them.
        seen_voc_val: why the net's mean IoU on the data set's val list means nothing; "" if it means something.
        step: the number of steps done.
        given: the names of the options on the command line that began the run; None if the checkpoint does not say.
        run: the identifier of a resumed run; None for a new run, or if the checkpoint has none (earlier versions).
        checkpoint: of the checkpoint: optimizer, scaler, ids (their checksum), numbers (the steps of the snapshots that the run
            has written), prefix (of their names) and class_weights; {} for a new run.
    """

    options: Options
    net: Net
    lines: Sequence[str]
    classes: list[str] | None
    seen_voc_val: str
    step: int = 0
    run: str | None = None
    given: list[str] | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)


def find_checkpoint(options: Options) -> Path | None:
    """The checkpoint to resume, the same on all processes; None for a new run.

    Raises:
        UserError: the processes see different checkpoints.
    """
    if not options.resume:
        return None
    path = _checkpoint_path(options)
    steps = distributed.gather(_step_of(path))
    if max(steps) > steps[0]:
        main = {-1: "sees none", 0: "cannot read its own"}.get(steps[0], f"sees it at step {steps[0]}")
        raise UserError(
            f"--resume: process {steps.index(max(steps))} sees {path} at step {max(steps)}, but process 0 {main}; "
            "give a --snapshot-dir that all machines share, or copy the newest last.ckpt to all"
        )
    if options.resume == "last" and steps[0] < 0:
        if distributed.is_main():
            put(sys.stdout, f"no {path} to resume from: starting at step 0")
        return None
    return path


def run_folder(options: Options) -> Path:
    """The folder that the run writes to: ``--snapshot-dir`` if given, else that of the checkpoint."""
    return Path(options.snapshot_dir) if "snapshot_dir" in options.given else _checkpoint_path(options).parent


def _checkpoint_path(options: Options) -> Path:
    path = Path(options.snapshot_dir if options.resume in (None, "last") else options.resume)
    return path / "last.ckpt" if options.resume in (None, "last") or path.is_dir() else path


def _step_of(path: Path) -> int:
    """The step of the checkpoint that this process sees; -1 if there is none, 0 if it cannot be read."""
    if not path.exists():
        return -1
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # process 0 reports what is wrong when it loads the file
        return 0


def resume(asked: Options, loss: str, path: Path) -> Start:
    """The start from a checkpoint. The whole checkpoint is compared with the run before any of it is used.

    Args:
        asked: the options of the command line.
        loss: see :func:`utils.training.identity.loss_name`; runs of train.py and train_msc.py differ in it.

    Raises:
        UserError: a missing or broken checkpoint, an option that cannot change, or a folder that holds another run.
    """
    checkpoint = load_checkpoint(path)
    meta, step, folder = checkpoint["meta"], checkpoint["step"], run_folder(asked)
    try:
        compare_meta(checkpoint)
        options, lines = resumed_options(asked, meta, step, loss)
        options = options.replace(snapshot_dir=str(folder))
        if step > options.num_steps:
            raise Misfit(f"its step {step} is after the last step, {options.num_steps}")
        net = net_of_checkpoint(checkpoint, options)
    except Misfit as misfit:
        raise UserError(f"--resume: {path} does not fit its run: {misfit}; put an intact copy in its place, {ANEW}") from None
    if path.parent.resolve() != folder.resolve():
        refuse_other_run(folder)
    kept = {name: checkpoint.get(name) for name in ("optimizer", "scaler", "ids", "numbers", "prefix", "class_weights")}
    lines.insert(0, f"resumed from {path} at step {step}")
    seen = meta.get("seen_voc_val") or ""
    return Start(options, net, lines, meta.get("classes"), seen, step, meta.get("run"), meta.get("given"), kept)


def begin(options: Options, loss: str, class_file: ClassFile) -> Start:
    """The start of a new run: from ``--restore-from``, or from random values.

    Raises:
        UserError, WeightsError: missing weights, weights that do not fit, or a folder that holds another run.
    """
    refuse_other_run(Path(options.snapshot_dir))
    torch.manual_seed(options.random_seed)
    weights = None
    if options.restore_from:
        if options.restore_from == INITIAL_WEIGHTS and not Path(INITIAL_WEIGHTS).exists():
            advice = "`python scripts/download.py list` shows how to get it"
            raise UserError(f"{INITIAL_WEIGHTS} does not exist: {advice}; --restore-from none trains from scratch")
        weights = load_weights(options.restore_from, options.trunk, options.abn)
    num_classes, classes, line = _classes(options, class_file, weights.meta if weights else {})
    name = options.net or (weights.config if weights else {}).get("net", "deeplabv2")
    options = options.replace(**{key: value for key, value in NETS[name].defaults.items() if key not in options.given})
    net, report = build_net(
        weights,
        net=name,
        backbone=options.backbone,
        num_classes=num_classes,
        atrous_rates=options.atrous_rates,
        batch_norm=options.batch_norm,
        restore_last=not options.not_restore_last,
    )
    lines = [line, f"{options.restore_from}: {weights.scheme}", *report.lines()] if weights else [line, *report.notes]
    if not weights and options.batch_norm == "frozen":
        lines.append("warning: a net from scratch learns little with --batch-norm frozen; leave it out, the default is full")
    if not weights and "learning_rate" not in options.given and options.learning_rate == FINE_TUNING_RATE:
        default = f"the default --learning-rate {FINE_TUNING_RATE:g}"
        lines.append(f"note: {default} is for fine-tuning pretrained weights; from scratch 5e-3 is better")
    settled = kept_options(options) | {key: net.config.get(key) for key in NET_OPTIONS} | {"loss": loss}
    seen = weights.seen_voc_val if weights and dataset_of(weights.meta) == options.dataset else ""
    return Start(Options(settled), net, lines, classes, seen, given=sorted(options.given))


def _classes(options: Options, class_file: ClassFile, meta: dict[str, Any]) -> tuple[int, list[str] | None, str]:
    """The number of classes of a new run, their names if somebody gave them, and a line that says where both come from.

    Args:
        meta: of the snapshot that the run starts from; {} if there is none.
    """
    data = DATASETS[options.dataset]
    if data.NAMES:
        return len(data.NAMES), list(data.NAMES), f"{len(data.NAMES)} classes, those of {data.TITLE}"
    count = options.num_classes
    if "num_classes" in options.given:
        return count, class_file.names(count), f"{count} classes"
    if found := class_file.count(options.ignore_label):
        return found, class_file.names(found), f"{found} classes, those of {class_file.path}"
    if found := meta.get("num_classes"):
        return found, meta.get("classes"), f"{found} classes, those of {options.restore_from}"
    return count, None, f"{count} classes, PASCAL VOC's; other data need --num-classes or a classes.txt"


def refuse_other_run(folder: Path) -> None:
    """Raise :class:`UserError` if a new run would overwrite files of another run in ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--snapshot-dir {folder} is a file; expected a folder, or the name of a new one")
    if (folder / "last.ckpt").exists():
        advice = "add --resume to go on with that run, choose another --snapshot-dir, or delete it"
        raise UserError(f"--snapshot-dir {folder} holds a run already (last.ckpt); {advice}")
    if numbered := sorted([*folder.glob("*_scenes_*.pth"), *folder.glob("best.pth")]):
        raise UserError(
            f"--snapshot-dir {folder} holds snapshots already ({numbered[0].name}), which this run would overwrite; "
            "choose another --snapshot-dir, or move them"
        )
