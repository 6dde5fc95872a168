"""Snapshots on disk: written whole or not at all, and self-describing."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from dataset import MEAN_BGR
from deeplab import Net
from deeplab.weights import VERSION, WeightsError, check_sums, check_version
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
