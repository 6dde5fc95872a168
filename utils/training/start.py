"""Where a training run starts: at a checkpoint (``--resume``), from weights (``--restore-from``) or from random values.

Process 0 decides and reads, and hands what it found to the others: they need not see its files, and none starts elsewhere.
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
from deeplab.weights import CONFIG, build_net, load_weights
from utils import distributed
from utils.checkpoint import ANEW, Misfit, compare_meta, dataset_of, load_checkpoint, net_of_checkpoint
from utils.command import UserError, put
from utils.options import INITIAL_WEIGHTS, Options
from utils.training.identity import NET_OPTIONS, kept_options, resumed_options
from utils.training.options import refuse_other_values


@dataclass(frozen=True)
class Start:
    """What a run begins with, the same on all processes.

    Attributes:
        options: settled; those of the checkpoint where one is resumed and they were not given.
        net: with its weights, on the CPU.
        step: steps done.
        seen_voc_val: why the net's mean IoU on the data set's val means nothing, "" if it means something.
        lines: for the user.
        classes: the names of the classes, None where nobody gave them.
        run: what tells a resumed run's files from another's; None of a new run, and where it was not written yet.
        checkpoint: optimizer, scaler, ids (their check sum) and numbers (the steps of the snapshots that the run has
            written) of the checkpoint; {} for a new run.
    """

    options: Options
    net: Net
    step: int = 0
    seen_voc_val: str = ""
    lines: Sequence[str] = ()
    classes: list[str] | None = None
    run: str | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)


def resume(options: Options, loss: str) -> Start | None:
    """The start of ``--resume``, the same on all processes; None where a new run is to begin.

    Args:
        options: as the command line gives them.
        loss: see :func:`loss_name`; it tells train.py's runs from train_msc.py's.

    Raises:
        UserError: no or a broken checkpoint, an option that cannot change, a folder that holds another run, or processes that
            see different checkpoints.
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
    return distributed.from_main(lambda: _resume(options, loss, path))


def run_folder(options: Options) -> Path:
    """The folder that the run writes into: a checkpoint's own, unless another is given."""
    return Path(options.snapshot_dir) if "snapshot_dir" in options.given else _checkpoint_path(options).parent


def _checkpoint_path(options: Options) -> Path:
    if options.resume in (None, "last"):
        return Path(options.snapshot_dir) / "last.ckpt"
    path = Path(options.resume)
    return path / "last.ckpt" if path.is_dir() else path


def _step_of(path: Path) -> int:
    """The step of this process's own checkpoint; -1 where there is none, 0 where it cannot be read."""
    if not path.exists():
        return -1
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # what is wrong with it is told by the process that needs it
        return 0


def begin(options: Options, loss: str, class_file: ClassFile) -> Start:
    """The start of a new run, made by process 0 for all: from ``--restore-from``, or from random values.

    Raises:
        UserError, WeightsError: nothing to restore from, weights that do not fit, or a folder that holds another run.
    """
    return distributed.from_main(lambda: _begin(options, loss, class_file))


def _begin(options: Options, loss: str, class_file: ClassFile) -> Start:
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
    if not weights and "batch_norm" not in options.given:
        lines.append("--batch-norm full, as the net starts from scratch")
    elif not weights and options.batch_norm == "frozen":
        lines.append("warning: a net from scratch learns little with --batch-norm frozen; leave it out, which is full")
    settled = kept_options(options) | {key: net.config.get(key) for key in NET_OPTIONS} | {"loss": loss}
    seen = weights.seen_voc_val if weights and dataset_of(weights.meta) == options.dataset else ""
    return Start(Options(settled), net, 0, seen, lines, classes)


def _classes(options: Options, class_file: ClassFile, meta: dict[str, Any]) -> tuple[int, list[str] | None, str]:
    """How many classes a new run has, their names where somebody gave them, and a line that says who.

    Args:
        meta: of the snapshot that is started from, {} where it is none.
    """
    if names := DATASETS[options.dataset].NAMES:
        return len(names), list(names), f"{len(names)} classes, those of {DATASETS[options.dataset].TITLE}"
    if "num_classes" in options.given:
        return options.num_classes, class_file.names(options.num_classes), f"{options.num_classes} classes"
    if count := class_file.count(options.ignore_label):
        return (
            count,
            class_file.names(count),
            f"{count} classes, those of {class_file.path}",
        )
    if count := meta.get("num_classes"):
        return count, meta.get("classes"), f"{count} classes, those of {options.restore_from}"
    return (
        options.num_classes,
        None,
        f"{options.num_classes} classes, PASCAL VOC's; other data need --num-classes or a classes.txt",
    )


def _resume(asked: Options, loss: str, path: Path) -> Start:
    checkpoint = load_checkpoint(path)
    meta, step = checkpoint["meta"], checkpoint["step"]
    try:
        compare_meta(checkpoint)
        refuse_other_values(meta["args"])
        options, lines = resumed_options(asked, meta, step, loss)
        options = options.replace(snapshot_dir=str(run_folder(asked)))
        if step > options.num_steps:
            raise Misfit(f"its step {step} is behind its last one, {options.num_steps}")
        config = {name: meta[name] for name in CONFIG if name in meta}
        net = net_of_checkpoint(checkpoint, config, options.batch_norm, options.momentum, options.amp)
    except Misfit as misfit:
        raise UserError(f"--resume: {path} does not fit its run: {misfit}; put a whole copy in its place, {ANEW}") from None
    if path.parent.resolve() != Path(options.snapshot_dir).resolve():
        refuse_other_run(Path(options.snapshot_dir))
    kept = {name: checkpoint.get(name) for name in ("optimizer", "scaler", "ids", "numbers")}
    lines.insert(0, f"resumed from {path} at step {step}")
    return Start(options, net, step, meta.get("seen_voc_val") or "", lines, meta.get("classes"), meta.get("run"), kept)


def refuse_other_run(folder: Path) -> None:
    """Raise :class:`UserError` if a new run would overwrite what another one left in ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--snapshot-dir {folder} is a file; expected a folder, or a name where nothing is yet")
    if (folder / "last.ckpt").exists():
        advice = "add --resume to go on with it, choose another --snapshot-dir, or delete it"
        raise UserError(f"--snapshot-dir {folder} holds a run already (last.ckpt); {advice}")
    if numbered := sorted([*folder.glob("*_scenes_*.pth"), *folder.glob("best.pth")]):
        raise UserError(
            f"--snapshot-dir {folder} holds snapshots already ({numbered[0].name}), which this run would overwrite; "
            "choose another --snapshot-dir, or move them"
        )
