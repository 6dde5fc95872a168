"""What makes a run this run: options, loss, net, images and classes, compared on resuming and between processes."""

import hashlib
import json
import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import VOCSegmentation
from deeplab import Net, make_net, multi_scale_loss, single_scale_loss
from deeplab.loss import LossFunction
from deeplab.weights import CONFIG
from utils import distributed
from utils.checkpoint import PREFIX
from utils.command import UserError
from utils.data import what_is_compared
from utils.options import Options, flag
from utils.training.optimizer import poly_lr
from utils.training.options import training_parser

NET_OPTIONS = ("net", "backbone", "num_classes", "atrous_rates")
# What a resumed run may do differently without becoming another run. Everything else would change what is computed.
MAY_CHANGE = {
    "num_workers", "device", "gpu", "no_tf32", "deterministic", "compile", "grad_checkpoint",
    "one_scale_at_a_time", "data_dir", "data_list", "image_dir", "label_dir",  # other paths of the same images
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
    """The options of a resumed run, those given now, else those of its checkpoint, and a line for each that has changed.

    Args:
        meta: of the checkpoint.
        step: steps done.

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
        for name in sorted(asked.given & before.keys() - {"resume", "snapshot_dir"})
        if plain(before[name]) != plain(now[name])
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
        total, *schedule = now["num_steps"], options["power"], options["warmup_steps"]
        if total <= step:
            raise UserError(f"--resume: step {step} is reached already and --num-steps is {total}; give more, or leave it out")
        rates = [
            poly_lr(options["learning_rate"], min(step, steps), steps, *schedule) for steps in (before["num_steps"], total)
        ]
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


class Misfit(Exception):
    """What a checkpoint holds, and what was expected."""


def compare_meta(checkpoint: dict[str, Any]) -> None:
    """Raise :class:`Misfit` if what a checkpoint says of its run is not what a run writes, its options included."""
    meta, step = checkpoint["meta"], checkpoint["step"]
    if not isinstance(meta, dict) or not isinstance(meta.get("args"), dict) or not {"backbone", "num_classes"} <= meta.keys():
        raise Misfit("its meta is not that of a run")
    if type(step) is not int or step < 0 or step != meta.get("step"):
        raise Misfit(
            f"its step is {brief(step)}, and {brief(meta.get('step'))} in its meta; expected the number of steps that are done"
        )
    classes, numbers, ids = meta.get("classes"), checkpoint.get("numbers"), checkpoint.get("ids")
    if classes is not None and not (_is_list(classes, str) and len(classes) == meta["num_classes"]):
        raise Misfit(f"its classes are not the names of {brief(meta['num_classes'])} classes")
    if not _is_list(meta.get("given") or [], str):
        raise Misfit("its given options are not names")
    if not all(isinstance(value, str | None) for value in (ids, meta.get("run"), meta.get("seen_voc_val", ""))):
        raise Misfit("its ids, run or seen_voc_val is no text")
    if numbers is not None and not (_is_list(numbers, int) and all(0 < number <= step for number in numbers)):
        raise Misfit("its numbers are not steps of snapshots")
    if not (isinstance(prefix := checkpoint.get("prefix", "VOC12"), str) and re.fullmatch(PREFIX, prefix)):
        raise Misfit(f"its prefix of snapshots is {brief(prefix)}")
    weights: Any = checkpoint.get("class_weights")
    right = _is_list(weights, float) and len(weights) == meta["num_classes"] and all(0 <= x < math.inf for x in weights)
    if not right and (meta["args"].get("class_weights") or weights is not None):
        raise Misfit(f"its class weights are {brief(weights)}; expected {brief(meta['num_classes'])} numbers of at least 0")
    for action in training_parser("", batch_size=1, iter_size=1, snapshot_dir="")._actions:
        if not _could_give(action, value := meta["args"].get(action.dest, action.default)):
            raise Misfit(f"its option {flag(action.dest)} is {brief(value)}")
    if not all(isinstance(name, str) for name in meta["args"]):
        raise Misfit("its options have no names")


def _could_give(action: Any, value: Any) -> bool:
    """Whether an option of the command line, one of argparse's actions, can have that value."""
    if type(value) is type(action.default) and value == action.default:
        return True
    if action.nargs == 0:  # a switch
        return type(value) is bool
    if not isinstance(value, int | float | str | list | tuple):
        return False
    try:
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        read = action.type(text) if action.type else text
    except (ArgumentTypeError, ValueError):
        return False
    return plain(read) == plain(value) and value in (action.choices or [value])


def net_of_checkpoint(checkpoint: dict[str, Any], options: Options) -> Net:
    """The net of a checkpoint, on the CPU. All of the file is compared with what the run would build before any is loaded.

    The hyperparameters in the optimiser's groups are not looked at: they are the run's, and their names differ between versions
    of torch.

    Raises:
        Misfit: a name, a shape, a type, or a parameter's group differs.
    """
    try:
        with torch.device("meta"):
            net = make_net({name: value for name, value in checkpoint["meta"].items() if name in CONFIG}, options.batch_norm)
    except Exception as error:  # of many kinds, by what is wrong in it
        raise Misfit(f"its meta describes no net ({type(error).__name__}: {brief(error)})") from None
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = net.parameter_groups()
    learning = dict(enumerate(names[id(parameter)] for group in groups for parameter in group["params"]))
    expected = {name: _kind(tensor, "meta") for name, tensor in net.state_dict().items()}
    expected |= {f"momentum of {name}": expected[name] for name in learning.values() if options.momentum}
    expected |= _group_of_each(groups, lambda parameter: names[id(parameter)])
    try:
        optimizer = checkpoint["optimizer"]
        found = {name: _kind(tensor) for name, tensor in checkpoint["model"].items()}
        for number, state in optimizer["state"].items():
            if (buffer := state.get("momentum_buffer")) is not None:
                found[f"momentum of {learning[number]}"] = _kind(buffer)
        found |= _group_of_each(optimizer["param_groups"], lambda number: learning[number])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Misfit("its model, or its optimizer, is not what torch saves") from None
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if wrong:
        more = f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        what = f"{found.get(wrong[0], 'missing')}{more}; the run has {expected.get(wrong[0], 'nothing of that name')}"
        raise Misfit(f"its {brief(wrong[0])} is {what}")
    scaler = checkpoint["scaler"]
    if not isinstance(scaler, dict) or (options.amp == "fp16") != bool(scaler):
        raise Misfit(f"its loss scaling is not that of --amp {options.amp}")
    scale, tracker = (scaler.get("scale"), scaler.get("_growth_tracker")) if scaler else (1.0, 0)
    if type(scale) is not float or not 0 < scale < math.inf or type(tracker) is not int or tracker < 0:
        raise Misfit(
            f"its loss scaling has the scale {brief(scale)} after {brief(tracker)} steps; expected a finite number above 0"
        )
    net.to_empty(device="cpu")
    net.load_state_dict(checkpoint["model"])  # copied: tensors in a file may share their memory
    return net


def _group_of_each(groups: Iterable[dict[str, Any]], name_of: Callable[[Any], str]) -> dict[str, str]:
    """What the optimiser's groups do with each of their parameters, in words."""
    return {
        f"group of {name_of(parameter)}": f"rate x{group['lr_scale']:g}, decay x{group['decay_scale']:g}"
        for group in groups
        for parameter in group["params"]
    }


def _kind(value: object, device: str = "cpu") -> str:
    """The type and the shape of a tensor on ``device``, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested or value.layout != torch.strided or value.device.type != device:
        return "a tensor that does not hold a number for each place"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def plain(value: Any) -> Any:
    """A value as JSON keeps it."""
    return list(value) if isinstance(value, tuple) else value


def brief(value: object) -> str:
    """A value from a file, in one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of too many digits, or what is nested too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)
