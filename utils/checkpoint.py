"""Snapshots on disk: written whole or not at all, and self-describing."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from dataset import MEAN_BGR
from deeplab import Net, make_net
from deeplab.weights import (
    VERSION,
    LoadReport,
    Weights,
    WeightsError,
    build_net,
    check_sums,
    check_version,
    load_weights,
)
from utils.command import UserError
from utils.files import DiskError, check_writable, write_atomically

ANEW = "or begin another run in a new folder, with --restore-from and the newest numbered snapshot"


def make_meta(net: Net, classes: Sequence[str] | None, step: int, args: dict, **more: Any) -> dict:
    """What a snapshot says of itself; ``evaluate.py`` rebuilds the net from it without flags."""
    return {
        **net.config,
        "classes": list(classes) if classes else None,
        "mean": list(MEAN_BGR),
        "step": step,
        "args": args,
        "version": VERSION,
        **more,
    }


def dataset_of(meta: dict) -> str:
    """The data set that a snapshot's net was trained on; ``"voc"`` where its meta does not tell."""
    return (meta.get("args") or {}).get("dataset", "voc")


def save_snapshot(path: str | Path, net: nn.Module, meta: dict, **more: Any) -> None:
    """Save ``{"model": state_dict, "meta": meta, **more}`` atomically.

    Raises:
        DiskError: it cannot be written.
    """
    write_atomically(path, lambda file: torch.save({"model": net.state_dict(), "meta": meta, **more}, file))


class Snapshots:
    """The snapshots of a run: ``last.ckpt``, to go on from, and numbered ones, of which the newest ``keep`` stay (0: all).

    Args:
        numbers: steps of the numbered ones that this run wrote before; nothing else is ever deleted.
        prefix: of their published names, the data set's.
    """

    def __init__(self, folder: Path, keep: int, numbers: Sequence[int], prefix: str = "VOC12") -> None:
        self.folder, self.keep, self.prefix = folder, keep, prefix
        self.numbers = [step for step in numbers if _is_snapshot(self.path(step), step)]

    def path(self, step: int) -> Path:
        """The numbered snapshot of a step, by its published name."""
        return self.folder / f"{self.prefix}_scenes_{step}.pth"

    def save(self, net: nn.Module, meta: dict, numbered: bool, **state: Any) -> str:
        """Save ``last.ckpt`` with ``state`` and, if ``numbered``, the step's own snapshot without it.

        Returns:
            What could not be written, in sentences, else ""; the files of before are then as they were.
        """
        step, problems = meta["step"], []
        numbers = [number for number in self.numbers if number != step] + [step] * numbered
        try:
            save_snapshot(self.folder / "last.ckpt", net, meta, **state, step=step, numbers=numbers)
        except DiskError as error:
            problems.append(str(error))
        if numbered:
            try:
                save_snapshot(self.path(step), net, meta)
                self.numbers = numbers[-self.keep :]  # of 0: all
                for number in numbers[: -len(self.numbers)]:
                    self.path(number).unlink(missing_ok=True)
            except (DiskError, OSError) as error:
                problems.append(str(error))
        return "; ".join(problems)

    def check_space(self, net: nn.Module, optimizer: optim.Optimizer, count: int) -> str:
        """Make sure, before any work is done, that what is saved first can be written.

        Args:
            count: the numbered snapshots that are going to be made.

        Returns:
            A sentence where they do not all fit, else "".

        Raises:
            DiskError: not even the first fits, or nothing can be written.
        """
        check_writable(self.folder)
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        model, momentum = (sum(tensor.nbytes for tensor in part) for part in (net.state_dict().values(), state))
        last = model + momentum
        disk = shutil.disk_usage(self.folder)
        free = disk.free if disk.total else math.inf  # some network disks do not tell
        room = f"{self.folder} has {free / 1e6:.0f} MB free"
        if free < last + model:
            raise DiskError(
                f"{room}, and the first snapshots need {(last + model) / 1e6:.0f} MB (last.ckpt {last / 1e6:.0f}, "
                f"{self.prefix}_scenes_<step>.pth {model / 1e6:.0f}); free space, or choose another --snapshot-dir"
            )
        count = min(count, self.keep + 1) if self.keep else count  # the oldest goes when the newest is there
        whole = (count - 1) * model + 2 * last  # a new last.ckpt is written beside the old one
        if count > 1 and free < whole:
            return (
                f"note: {room}, and this run's {count} snapshots need {whole / 1e6:.0f} MB; free space, or keep the newest N "
                "alone with --keep N"
            )
        return ""


def _is_snapshot(path: Path, step: int) -> bool:
    """Whether a file is the snapshot of that step, not another that was put there under its name."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]["step"] == step
    except Exception:  # torch.load raises many kinds
        return False


def load_init(path: str, abn: str | None = None, **options: Any) -> tuple[Net, Weights, LoadReport]:
    """Load a weights file and build its net: :func:`load_weights`, then :func:`build_net` with ``options``."""
    weights = load_weights(path, abn=abn)
    net, report = build_net(weights, **options)
    return net, weights, report


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A ``last.ckpt``: model, meta, optimizer, step, scaler, ids, numbers.

    Raises:
        UserError: the file is missing, broken, of a newer format, or a snapshot without the optimiser's state.
    """
    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume: there is no {path}") from None
    except WeightsError as error:
        raise UserError(f"--resume: {path}: {error}; {ANEW}") from None
    except Exception as error:  # torch.load raises many kinds for broken files
        raise UserError(f"--resume: {path} is not a checkpoint that torch can read ({type(error).__name__}); {ANEW}") from None
    if not isinstance(content, dict) or not {"model", "meta", "optimizer", "scaler", "step"} <= content.keys():
        raise UserError(f"--resume: {path} holds no optimiser state; give a last.ckpt, or use --restore-from to start from it")
    if isinstance(content["meta"], dict):
        try:
            check_version(content["meta"])
        except WeightsError as error:
            raise UserError(f"--resume: {path}: {error}") from None
    return content


class Misfit(Exception):
    """What a checkpoint holds, and what was expected."""


def compare_meta(checkpoint: dict[str, Any]) -> None:
    """Make sure that what a checkpoint says of its run can be read.

    Raises:
        Misfit: it cannot.
    """
    meta, step = checkpoint["meta"], checkpoint["step"]
    if not isinstance(meta, dict) or not isinstance(meta.get("args"), dict) or not {"backbone", "num_classes"} <= meta.keys():
        raise Misfit("its meta is not that of a run")
    if type(step) is not int or step < 0 or step != meta.get("step"):
        raise Misfit(
            f"its step is {shown(step)}, and {shown(meta.get('step'))} in its meta; expected the number of steps that are done"
        )
    classes, numbers, ids = meta.get("classes"), checkpoint.get("numbers"), checkpoint.get("ids")
    if classes is not None and not (_is_list(classes, str) and len(classes) == meta["num_classes"]):
        raise Misfit(f"its classes are not the names of {shown(meta['num_classes'])} classes")
    if not all(isinstance(value, str | None) for value in (ids, meta.get("run"), meta.get("seen_voc_val", ""))):
        raise Misfit("its ids, run or seen_voc_val is no text")
    if numbers is not None and not (_is_list(numbers, int) and all(0 < number <= step for number in numbers)):
        raise Misfit("its numbers are not steps of snapshots")


def net_of_checkpoint(checkpoint: dict[str, Any], config: dict[str, Any], batch_norm: str, momentum: float, amp: str) -> Net:
    """The net of a checkpoint, on the CPU. All of the file is compared with what the run would build before any is loaded.

    The hyperparameters in the optimiser's groups are not looked at: they are the run's, and their names differ between versions
    of torch.

    Args:
        config: of the net.
        batch_norm, momentum, amp: the run's.

    Raises:
        Misfit: a name, a shape, a type, or a parameter's group differs.
    """
    try:
        with torch.device("meta"):
            net = make_net(config, batch_norm)
    except Exception as error:  # of many kinds, by what is wrong in it
        raise Misfit(f"its meta describes no net ({type(error).__name__}: {shown(error)})") from None
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = [
        (group["lr_scale"], group["decay_scale"], [names[id(p)] for p in group["params"]]) for group in net.parameter_groups()
    ]
    learning = [name for _, _, members in groups for name in members]
    expected = {name: _kind(tensor, "meta") for name, tensor in net.state_dict().items()}
    expected |= {f"momentum of {name}": expected[name] for name in learning if momentum}
    expected |= {f"group of {name}": f"rate x{rate:g}, decay x{decay:g}" for rate, decay, members in groups for name in members}
    try:
        found = _contents(checkpoint, dict(enumerate(learning)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Misfit("its model, or its optimizer, is not what torch saves") from None
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if wrong:
        more = f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        what = f"{found.get(wrong[0], 'missing')}{more}; the run has {expected.get(wrong[0], 'nothing of that name')}"
        raise Misfit(f"its {shown(wrong[0])} is {what}")
    scaler = checkpoint["scaler"]
    if not isinstance(scaler, dict) or (amp == "fp16") != bool(scaler):
        raise Misfit(f"its loss scaling is not that of --amp {amp}")
    scale, tracker = (scaler.get("scale"), scaler.get("_growth_tracker")) if scaler else (1.0, 0)
    if type(scale) is not float or not 0 < scale < math.inf or type(tracker) is not int or tracker < 0:
        raise Misfit(
            f"its loss scaling has the scale {shown(scale)} after {shown(tracker)} steps; expected a finite number above 0"
        )
    net.to_empty(device="cpu")
    net.load_state_dict(checkpoint["model"])  # copied: tensors in a file may share their memory
    return net


def _contents(checkpoint: dict[str, Any], learning: dict[int, str]) -> dict[str, str]:
    """Name -> kind of all that a checkpoint holds, as :func:`net_of_checkpoint` expects it."""
    optimizer = checkpoint["optimizer"]
    found = {name: _kind(tensor) for name, tensor in checkpoint["model"].items()}
    for number, state in optimizer["state"].items():
        if (buffer := state.get("momentum_buffer")) is not None:
            found[f"momentum of {learning[number]}"] = _kind(buffer)
    for group in optimizer["param_groups"]:
        kind = f"rate x{group['lr_scale']:g}, decay x{group['decay_scale']:g}"
        found |= {f"group of {learning[number]}": kind for number in group["params"]}
    return found


def _kind(value: object, device: str = "cpu") -> str:
    """The type and the shape of a tensor on ``device``, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested or value.layout != torch.strided or value.device.type != device:
        return "a tensor that does not hold a number for each place"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def shown(value: object) -> str:
    """A value from a file, in one line and a few signs."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of too many digits, or what is wound too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)
