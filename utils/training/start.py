"""Where a training run starts: at a checkpoint (``--resume``), from weights (``--restore-from``) or from random values.

Process 0 decides and reads, and hands what it found to the others: they need not see its files, and none starts elsewhere.
"""

import hashlib
import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import DATASETS, count_classes, read_class_names
from deeplab import NETS, Net, make_net, multi_scale_loss, single_scale_loss
from deeplab.loss import LossFunction
from deeplab.weights import CONFIG, build_net, load_weights
from utils import distributed
from utils.checkpoint import ANEW, Misfit, compare_content, compare_meta, dataset_of, load_checkpoint, shown
from utils.command import UserError, put
from utils.options import INITIAL_WEIGHTS
from utils.training.optimizer import poly_lr
from utils.training.options import training_parser

NET_OPTIONS = ("net", "backbone", "num_classes", "atrous_rates")
SETTLED = (*NET_OPTIONS, "batch_norm", "learning_rate", "loss_size", "aux_weight")  # by the net, where nobody gave them
# What a resumed run may do differently without becoming another run. Everything else would change what is computed.
MAY_CHANGE = {
    "num_workers", "device", "gpu", "no_tf32", "deterministic", "compile", "grad_checkpoint",
    "one_scale_at_a_time", "data_dir", "data_list", "image_dir", "label_dir",  # other paths of the same pictures
    "snapshot_dir", "save_pred_every", "keep", "save_num_images", "log_every", "tensorboard", "num_steps", "resume",
    "val_every", "val_list",
}  # fmt: skip


@dataclass
class Start:
    """Everything that a run begins with.

    Attributes:
        options: the run's options, those of the checkpoint where one is resumed and they were not given.
        config: what :func:`deeplab.make_net` takes, with ``batch_norm``.
        model: its state_dict.
        step: steps done.
        seen_voc_val: why the net's scores on the data set's val mean nothing, "" if they mean something.
        lines: what to tell the user.
        classes: the names of the classes, None where nobody gave them.
        run: what tells this run's files from another's, None where it was begun before that was written.
        checkpoint: optimizer, scaler, ids (their check sum) and numbers (the steps of the snapshots that the run has
            written) of the checkpoint; {} for a new run.
    """

    options: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Tensor]
    step: int = 0
    seen_voc_val: str = ""
    lines: list[str] = field(default_factory=list)
    classes: list[str] | None = None
    run: str | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)

    def build_net(self) -> Net:
        """The net with its weights, on the CPU and in training mode."""
        config = dict(self.config)
        with torch.device("meta"):
            net = make_net(config, config.pop("batch_norm"))
        net.to_empty(device="cpu")
        net.load_state_dict(self.model)  # copied: tensors in a file may share their memory
        return net

    def identify(self, ids: Sequence[str]) -> None:
        """Settle ``run`` of a new run, from its options, its pictures and its initial weights: one command, one run."""
        options = {name: value for name, value in self.options.items() if name not in ("snapshot_dir", "resume")}
        digest = hashlib.sha256(json.dumps([options, list(ids)]).encode())
        for tensor in self.model.values():
            digest.update(tensor.numpy().tobytes())
        self.run = digest.hexdigest()[:16]


def loss_name(loss: LossFunction) -> str:
    """The name of a loss function with its module, by which a resumed run is compared with the one that was begun.

    Raises:
        UserError: it has none of its own.
    """
    module, name = getattr(loss, "__module__", None), getattr(loss, "__qualname__", None)
    if not module or not name or "<lambda>" in name:
        raise UserError(
            f"the loss function {loss!r} has no name, by which --resume could tell it from another; define it with def, at the "
            "top of a module"
        )
    if module == "__main__":  # the script, which may be imported as well
        module = Path(getattr(sys.modules[module], "__file__", None) or module).stem
    return f"{module}.{name}"


SCRIPTS = {loss_name(single_scale_loss): "train.py", loss_name(multi_scale_loss): "train_msc.py"}


def compare_losses(begun: str, now: str) -> None:
    """Raise :class:`UserError` if a run was begun with another loss function.

    Args:
        begun: its name; files of format 1 hold it without the module, and ours' bare names mean ours.
    """
    bare = {name.rpartition(".")[2]: name for name in SCRIPTS}
    if "." not in begun:
        begun = bare.get(begun) or (now if now.rpartition(".")[2] == begun and now not in SCRIPTS else begun)
    if begun == now:
        return
    if begun in SCRIPTS and now in SCRIPTS:
        raise UserError(f"--resume: the run was begun with {SCRIPTS[begun]}, not with {SCRIPTS[now]}; go on with that script")
    raise UserError(f"--resume: the run was begun with the loss {begun}, not with {now}; go on with that one")


def resume(args: Namespace, loss: str) -> Start | None:
    """The start of ``--resume``, the same on all processes; None where a new run is to begin.

    Args:
        args: of :func:`utils.training.options.training_parser`.
        loss: see :func:`loss_name`; it tells train.py's runs from train_msc.py's.

    Raises:
        UserError: no or a broken checkpoint, an option that cannot change, a folder that holds another run, or processes that
            see different checkpoints.
    """
    if not args.resume:
        return None
    path = _checkpoint_path(args)
    steps = distributed.gather(_step_of(path))
    if max(steps) > steps[0]:
        main = {-1: "sees none", 0: "cannot read its own"}.get(steps[0], f"sees it at step {steps[0]}")
        raise UserError(
            f"--resume: process {steps.index(max(steps))} sees {path} at step {max(steps)}, but process 0 {main}; "
            "give a --snapshot-dir that all machines share, or copy the newest last.ckpt to all"
        )
    if args.resume == "last" and steps[0] < 0:
        if distributed.is_main():
            put(sys.stdout, f"no {path} to resume from: starting at step 0")
        return None
    return distributed.from_main(lambda: _resume(args, loss, path))


def begin(args: Namespace, loss: str) -> Start:
    """The start of a new run, the same on all processes.

    Raises:
        UserError, WeightsError: nothing to restore from, weights that do not fit, or a folder that holds another run.
    """
    return distributed.from_main(lambda: _begin(args, loss))


def run_folder(args: Namespace) -> Path:
    """The folder that the run writes into: a checkpoint's own, unless another is given."""
    return Path(args.snapshot_dir) if "snapshot_dir" in args.given else _checkpoint_path(args).parent


def _checkpoint_path(args: Namespace) -> Path:
    if args.resume in (None, "last"):
        return Path(args.snapshot_dir) / "last.ckpt"
    path = Path(args.resume)
    return path / "last.ckpt" if path.is_dir() else path


def _step_of(path: Path) -> int:
    """The step of this process's own checkpoint; -1 where there is none, 0 where it cannot be read."""
    if not path.exists():
        return -1
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # what is wrong with it is told by the process that needs it
        return 0


def _begin(args: Namespace, loss: str) -> Start:
    refuse_other_run(Path(args.snapshot_dir))
    weights = None
    if args.restore_from:
        if args.restore_from == INITIAL_WEIGHTS and not Path(INITIAL_WEIGHTS).exists():
            advice = "`python scripts/download.py list` shows how to get it"
            raise UserError(f"{INITIAL_WEIGHTS} does not exist: {advice}; --restore-from none trains from scratch")
        weights = load_weights(args.restore_from, args.trunk, args.abn)
    num_classes, classes, line = _classes(args, weights.meta if weights else {})
    args.net = args.net or (weights.config if weights else {}).get("net", "deeplabv2")
    for name, value in NETS[args.net].defaults.items():
        if name not in args.given:
            setattr(args, name, value)
    net_options = {name: getattr(args, name) for name in ("net", "backbone", "atrous_rates", "batch_norm")}
    net, report = build_net(weights, num_classes=num_classes, **net_options, restore_last=not args.not_restore_last)
    lines = [line, f"{args.restore_from}: {weights.scheme}", *report.lines()] if weights else [line, *report.notes]
    if not weights and "batch_norm" not in args.given:
        lines.append("--batch-norm full, as the net starts from scratch")
    elif not weights and args.batch_norm == "frozen":
        lines.append("warning: a net from scratch learns little with --batch-norm frozen; leave it out, which is full")
    options = options_of(args) | {name: net.config.get(name) for name in NET_OPTIONS} | {"loss": loss}
    config = {**net.config, "batch_norm": args.batch_norm}
    seen = weights.seen_voc_val if weights and dataset_of(weights.meta) == args.dataset else ""
    return Start(options, config, net.state_dict(), 0, seen, lines, classes)


def _classes(args: Namespace, meta: dict[str, Any]) -> tuple[int, list[str] | None, str]:
    """How many classes a new run has, their names where somebody gave them, and a line that says who.

    Args:
        meta: of the snapshot that is started from, {} where it is none.
    """
    if names := DATASETS[args.dataset].NAMES:
        return len(names), list(names), f"{len(names)} classes, those of {DATASETS[args.dataset].TITLE}"
    if "num_classes" in args.given:
        return args.num_classes, read_class_names(args.data_dir, args.num_classes), f"{args.num_classes} classes"
    if count := count_classes(args.data_dir, args.ignore_label):
        return count, read_class_names(args.data_dir, count), f"{count} classes, those of {Path(args.data_dir) / 'classes.txt'}"
    if count := meta.get("num_classes"):
        return count, meta.get("classes"), f"{count} classes, those of {args.restore_from}"
    return args.num_classes, None, f"{args.num_classes} classes, PASCAL VOC's; other data need --num-classes or a classes.txt"


def _resume(args: Namespace, loss: str, path: Path) -> Start:
    checkpoint = load_checkpoint(path)
    meta, step = checkpoint["meta"], checkpoint["step"]
    try:
        compare_meta(checkpoint)
        refuse_other_values(meta["args"])
        options, lines = resumed_options(args, meta, step, loss)
        if step > options["num_steps"]:
            raise Misfit(f"its step {step} is behind its last one, {options['num_steps']}")
        config = {name: meta[name] for name in CONFIG if name in meta}
        config["batch_norm"] = options["batch_norm"]
        compare_content(checkpoint, config, options["momentum"], options["amp"])
    except Misfit as misfit:
        raise UserError(f"--resume: {path} does not fit its run: {misfit}; put a whole copy in its place, {ANEW}") from None
    options["snapshot_dir"] = str(folder := run_folder(args))
    if path.parent.resolve() != folder.resolve():
        refuse_other_run(folder)
    kept = {name: checkpoint.get(name) for name in ("optimizer", "scaler", "ids", "numbers")}
    lines.insert(0, f"resumed from {path} at step {step}")
    seen, classes = meta.get("seen_voc_val") or "", meta.get("classes")
    return Start(options, config, checkpoint["model"], step, seen, lines, classes, meta.get("run"), kept)


def refuse_other_values(options: dict[str, Any]) -> None:
    """Raise :class:`Misfit` if options from a file are none that the command line could have given."""
    for action in training_parser("", batch_size=1, iter_size=1, snapshot_dir="")._actions:
        value = options.get(action.dest, action.default)
        if type(value) is type(action.default) and value == action.default:
            continue
        if action.nargs == 0:  # a switch
            found = type(value) is bool
        elif not isinstance(value, int | float | str | list | tuple):
            found = False
        else:
            try:
                text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                taken = action.type(text) if callable(action.type) else text
            except (ArgumentTypeError, ValueError):
                taken = None
            found = taken is not None and _plain(taken) == _plain(value) and value in (action.choices or [value])
        if not found:
            raise Misfit(f"its option {_flag(action.dest)} is {shown(value)}")
    if any(not isinstance(name, str) for name in options):
        raise Misfit("its options have no names")


def resumed_options(args: Namespace, meta: dict[str, Any], step: int, loss: str) -> tuple[dict[str, Any], list[str]]:
    """The options of a resumed run: those given now, else those of its checkpoint.

    Args:
        args: ``args.given`` holds the names of the options on the command line.
        meta: of the checkpoint.
        step: steps done.
        loss: see :func:`loss_name`.

    Returns:
        The options, and a line for each that has changed.

    Raises:
        UserError: a given option would make it another run.
    """
    before = {"dataset": "voc", **meta["args"], **{name: meta.get(name) for name in NET_OPTIONS}}
    before["net"] = before["net"] or "deeplabv2"  # of older checkpoints
    if before.get("loss"):
        compare_losses(str(before["loss"]), loss)
    now = options_of(args)
    changed = {
        name: (before[name], now[name])
        for name in sorted(args.given & before.keys())
        if _plain(before[name]) != _plain(now[name]) and name not in ("resume", "snapshot_dir")
    }
    if refused := [name for name in changed if name not in MAY_CHANGE]:
        texts = ", ".join(f"{_flag(name)} {changed[name][0]} -> {changed[name][1]}" for name in refused)
        raise UserError(
            f"--resume goes on with the same run, in which these cannot change: {texts} (the run's value -> the one given); "
            "leave them out, or start another run with --restore-from"
        )
    lines = [f"changed: {_flag(name)} {old} -> {new}" for name, (old, new) in changed.items()]
    options = {name: now[name] if name in args.given else before.get(name, now[name]) for name in now}
    options.update(loss=loss, resume=args.resume)
    if "num_steps" in changed:
        total, power, base = now["num_steps"], options["power"], options["learning_rate"]
        if total <= step:
            raise UserError(f"--resume: step {step} is reached already and --num-steps is {total}; give more, or leave it out")
        rates = [poly_lr(base, min(step, steps), steps, power) for steps in (before["num_steps"], total)]
        lines.append(f"with --num-steps {total} the base rate goes on at {rates[1]:.3g} instead of {rates[0]:.3g}")
    return options, lines


def options_of(args: Namespace) -> dict[str, Any]:
    """The options as a snapshot keeps them: without which of them were given, and with ``--is-training`` settled."""
    return {name: value for name, value in vars(args).items() if name != "given"}


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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
