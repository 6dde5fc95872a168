"""What identifies a run: options, loss, net, images and classes, compared on resuming and between processes."""

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
# The options that may change when a run is resumed. Every other option would change what is computed.
MAY_CHANGE = {
    "num_workers", "device", "gpu", "no_tf32", "deterministic", "compile", "grad_checkpoint",
    "one_scale_at_a_time", "data_dir", "data_list", "image_dir", "label_dir",  # other paths of the same images
    "snapshot_dir", "save_pred_every", "keep", "save_num_images", "log_every", "tensorboard", "num_steps", "resume",
    "val_every", "val_list",
}  # fmt: skip


def loss_name(loss: LossFunction) -> str:
    """The name of a loss function with its module. On resuming it is compared with the name in the checkpoint.

    Raises:
        UserError: the function has no name of its own.
    """
    module, name = getattr(loss, "__module__", None), getattr(loss, "__qualname__", None)
    if not module or not name or "<lambda>" in name:
        raise UserError(
            f"the loss function {loss!r} has no name, but --resume compares losses by name; define it with def at the top of a "
            "module"
        )
    if module == "__main__":  # the script's own name, as if it were imported
        module = Path(getattr(sys.modules[module], "__file__", None) or module).stem
    return f"{module}.{name}"


SCRIPTS = {loss_name(single_scale_loss): "train.py", loss_name(multi_scale_loss): "train_msc.py"}


def compare_losses(begun: str, now: str) -> None:
    """Raise :class:`UserError` if a run was begun with another loss function.

    Args:
        begun: the name of that function. Files of format 1 hold it without the module; the names of our losses then mean ours.
    """
    bare = {name.rpartition(".")[2]: name for name in SCRIPTS}
    if "." not in begun:
        begun = bare.get(begun) or (now if now.rpartition(".")[2] == begun and now not in SCRIPTS else begun)
    if begun == now:
        return
    if begun in SCRIPTS and now in SCRIPTS:
        raise UserError(f"--resume: the run was begun with {SCRIPTS[begun]}, not with {SCRIPTS[now]}; go on with that script")
    raise UserError(f"--resume: the run was begun with the loss {begun}, not with {now}; go on with {begun}")


def resumed_options(asked: Options, meta: dict[str, Any], step: int, loss: str) -> tuple[Options, list[str]]:
    """The options of a resumed run (those given now, else the checkpoint's), and a line for each that has changed.

    Args:
        meta: the checkpoint's meta.
        step: the number of steps done.
        loss: the name of the loss function.

    Raises:
        UserError: a given option would change what the run computes.
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
            f"--resume goes on with the same run, so these cannot change: {texts} (the run's value -> the value given); "
            "leave them out, or start another run with --restore-from"
        )
    lines = [f"changed: {flag(name)} {old} -> {new}" for name, (old, new) in changed.items()]
    options = {name: now[name] if name in asked.given else before.get(name, now[name]) for name in now}
    options.update(loss=loss, resume=asked.resume)
    if "num_steps" in changed:
        total, *schedule = now["num_steps"], options["power"], options["warmup_steps"]
        if total <= step:
            raise UserError(f"--resume: step {step} is reached already and --num-steps is {total}; give more, or leave it out")
        old, new = (
            poly_lr(options["learning_rate"], min(step, steps), steps, *schedule) for steps in (before["num_steps"], total)
        )
        lines.append(f"with --num-steps {total} the base learning rate goes on at {new:.3g} instead of {old:.3g}")
    return Options(options), lines


def kept_options(options: Options) -> dict[str, Any]:
    """The options as a snapshot stores them: all but ``given``, the names that were on the command line."""
    return {name: value for name, value in vars(options).items() if name != "given"}


def compare_data(data: VOCSegmentation, device: str, ids: str | None, classes: list[str] | None) -> str:
    """Compare the training data with that of the other processes and of the resumed run.

    Args:
        device: the type of device.
        ids: the result of this function when the run was begun; None for a new run.
        classes: the class names of the resumed run; None for a new run, or if nobody gave names.

    Returns:
        A checksum of the ids in their order, as the order determines which images are drawn.

    Raises:
        UserError: something differs; raised on all processes.
    """
    distributed.check_same({"kinds of device": device, **what_is_compared(data)})
    found = hashlib.sha256("\n".join(data.ids).encode()).hexdigest()
    if ids not in (None, found):
        raise UserError(f"--resume: the list of {len(data)} images is not the one that the run was begun with; pass that one")
    if classes and data.names and list(data.names) != classes:
        name, begun = next((a, b) for a, b in zip(data.names, classes) if a != b)
        raise UserError(
            f"--resume: the run was begun with the class {begun!r}, but {data.root} now names it {name!r}; resume with the "
            "same classes, or start another run with --restore-from"
        )
    return found


def new_run(options: Options, ids: list[str], net: Net) -> str:
    """The identifier of a new run: a checksum of options, ids and initial weights. The same command is the same run."""
    kept = {name: value for name, value in vars(options).items() if name not in ("snapshot_dir", "resume")}
    digest = hashlib.sha256(json.dumps([kept, ids]).encode())
    for tensor in net.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


class Misfit(Exception):
    """A checkpoint does not fit its run; the text says what it holds and what was expected."""


def compare_meta(checkpoint: dict[str, Any]) -> None:
    """Raise :class:`Misfit` if a checkpoint's meta, its options included, is not what a run writes."""
    meta, step = checkpoint["meta"], checkpoint["step"]
    if not isinstance(meta, dict) or not isinstance(meta.get("args"), dict) or not {"backbone", "num_classes"} <= meta.keys():
        raise Misfit("its meta is not that of a run")
    if type(step) is not int or step < 0 or step != meta.get("step"):
        raise Misfit(
            f"its step is {brief(step)}, and {brief(meta.get('step'))} in its meta; expected the number of steps done in both"
        )
    classes, numbers, ids = meta.get("classes"), checkpoint.get("numbers"), checkpoint.get("ids")
    if classes is not None and not (_is_list(classes, str) and len(classes) == meta["num_classes"]):
        raise Misfit(f"its classes are not the names of {brief(meta['num_classes'])} classes")
    if not _is_list(meta.get("given") or [], str):
        raise Misfit("its given options are not names")
    if not all(isinstance(value, str | None) for value in (ids, meta.get("run"), meta.get("seen_voc_val", ""))):
        raise Misfit("its ids, run or seen_voc_val is not a text")
    if numbers is not None and not (_is_list(numbers, int) and all(0 < number <= step for number in numbers)):
        raise Misfit("its numbers are not the steps of snapshots")
    if not (isinstance(prefix := checkpoint.get("prefix", "VOC12"), str) and re.fullmatch(PREFIX, prefix)):
        raise Misfit(f"its prefix of snapshot names is {brief(prefix)}")
    weights: Any = checkpoint.get("class_weights")
    right = _is_list(weights, float) and len(weights) == meta["num_classes"] and all(0 <= x < math.inf for x in weights)
    if not right and (meta["args"].get("class_weights") or weights is not None):
        raise Misfit(f"its class weights are {brief(weights)}; expected {brief(meta['num_classes'])} numbers of at least 0")
    for action in training_parser("", batch_size=1, iter_size=1, snapshot_dir="")._actions:
        if not _could_give(action, value := meta["args"].get(action.dest, action.default)):
            raise Misfit(f"its option {flag(action.dest)} is {brief(value)}")
    if not all(isinstance(name, str) for name in meta["args"]):
        raise Misfit("the names of its options are not texts")


def _could_give(action: Any, value: Any) -> bool:
    """Whether ``action``, one of argparse's, can give its option this value."""
    if type(value) is type(action.default) and value == action.default:
        return True
    if action.nargs == 0:  # a flag without a value
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
    """The net of a checkpoint, on the CPU. Before anything is loaded, the whole file is compared with what the run would build.

    The hyperparameters in the optimiser's groups are not compared: the run sets them itself, and their names differ between
    versions of torch.

    Raises:
        Misfit: a name, a shape, a dtype or a parameter's group differs.
    """
    try:
        with torch.device("meta"):
            net = make_net({name: value for name, value in checkpoint["meta"].items() if name in CONFIG}, options.batch_norm)
    except Exception as error:  # of many kinds, depending on what is wrong
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
        raise Misfit("its model or its optimizer is not what torch saves") from None
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
    net.load_state_dict(checkpoint["model"])  # a copy: tensors in a file may share their memory
    return net


def _group_of_each(groups: Iterable[dict[str, Any]], name_of: Callable[[Any], str]) -> dict[str, str]:
    """The settings of each parameter's group in the optimiser, in words."""
    return {
        f"group of {name_of(parameter)}": f"learning rate x{group['lr_scale']:g}, weight decay x{group['decay_scale']:g}"
        for group in groups
        for parameter in group["params"]
    }


def _kind(value: object, device: str = "cpu") -> str:
    """The dtype and the shape of a tensor on ``device``, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested or value.layout != torch.strided or value.device.type != device:
        return "a tensor that is not a plain dense one"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def plain(value: Any) -> Any:
    """A value as JSON stores it: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value


def brief(value: object) -> str:
    """A value from a file, on one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number with too many digits, or too many nested levels
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)
