"""What makes a run this run: options, loss, images and classes. They are compared here, on resuming and between processes."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from dataset import VOCSegmentation
from deeplab import Net, multi_scale_loss, single_scale_loss
from deeplab.loss import LossFunction
from utils import distributed
from utils.command import UserError
from utils.loader import what_is_compared
from utils.options import Options
from utils.training.optimizer import poly_lr
from utils.training.options import flag, plain

NET_OPTIONS = ("net", "backbone", "num_classes", "atrous_rates")
# What a resumed run may do differently without becoming another run. Everything else would change what is computed.
MAY_CHANGE = {
    "num_workers", "device", "gpu", "no_tf32", "deterministic", "compile", "grad_checkpoint",
    "one_scale_at_a_time", "data_dir", "data_list", "image_dir", "label_dir",  # other paths of the same pictures
    "snapshot_dir", "save_pred_every", "keep", "save_num_images", "log_every", "tensorboard", "num_steps", "resume",
    "val_every", "val_list",
}  # fmt: skip


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


def resumed_options(asked: Options, meta: dict[str, Any], step: int, loss: str) -> tuple[Options, list[str]]:
    """The options of a resumed run: those given now, else those of its checkpoint.

    Args:
        asked: ``asked.given`` holds the names of the options on the command line.
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
    now = kept_options(asked)
    changed = {
        name: (before[name], now[name])
        for name in sorted(asked.given & before.keys())
        if plain(before[name]) != plain(now[name]) and name not in ("resume", "snapshot_dir")
    }
    if refused := [name for name in changed if name not in MAY_CHANGE]:
        texts = ", ".join(f"{flag(name)} {changed[name][0]} -> {changed[name][1]}" for name in refused)
        raise UserError(
            f"--resume goes on with the same run, in which these cannot change: {texts} (the run's value -> the one given); "
            "leave them out, or start another run with --restore-from"
        )
    lines = [f"changed: {flag(name)} {old} -> {new}" for name, (old, new) in changed.items()]
    options = {name: now[name] if name in asked.given else before.get(name, now[name]) for name in now}
    options.update(loss=loss, resume=asked.resume)
    if "num_steps" in changed:
        total, power, base = now["num_steps"], options["power"], options["learning_rate"]
        if total <= step:
            raise UserError(f"--resume: step {step} is reached already and --num-steps is {total}; give more, or leave it out")
        rates = [poly_lr(base, min(step, steps), steps, power) for steps in (before["num_steps"], total)]
        lines.append(f"with --num-steps {total} the base rate goes on at {rates[1]:.3g} instead of {rates[0]:.3g}")
    return Options(options), lines


def kept_options(options: Options) -> dict[str, Any]:
    """The options as a snapshot keeps them: without which of them were given."""
    return {name: value for name, value in vars(options).items() if name != "given"}


def compare_data(data: VOCSegmentation, device: str, ids: str | None, classes: list[str] | None) -> str:
    """Compare what is trained on with the other processes and with the run that is resumed.

    Args:
        device: the kind of device.
        ids: what this function returned when the run was begun; None for a new run.
        classes: names of the classes of the run that is resumed; None for a new run, or where nobody gave them.

    Returns:
        A check sum of the ids in their order, which the draws depend on.

    Raises:
        UserError: on all processes, where something differs.
    """
    distributed.check_same({"kinds of device": device, **what_is_compared(data)})
    found = hashlib.sha256("\n".join(data.ids).encode()).hexdigest()
    if ids not in (None, found):
        raise UserError(f"--resume: the list of {len(data)} images is not the one that the run was begun with; pass that one")
    if classes and data.names and list(data.names) != classes:
        name, begun = next((a, b) for a, b in zip(data.names, classes) if a != b)
        raise UserError(
            f"--resume: the run was begun with the class {begun!r} where {data.root} now names {name!r}; resume with the same "
            "classes, or start another run with --restore-from"
        )
    return found


def new_run(options: Options, ids: list[str], net: Net) -> str:
    """What tells a new run's files from another's: a check sum of options, ids and initial weights. One command is one run."""
    kept = {name: value for name, value in vars(options).items() if name not in ("snapshot_dir", "resume")}
    digest = hashlib.sha256(json.dumps([kept, ids]).encode())
    for tensor in net.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
