"""Snapshots on disk: written whole or not at all, and self-describing."""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_map

from dataset import MEAN_BGR
from deeplab import Net
from deeplab.weights import VERSION, WeightsError, check_sums, check_version
from utils.command import UserError
from utils.files import DiskError, check_writable, end_of, write_atomically

PREFIX = r"\w[\w-]*"  # of snapshot names
ANEW = "or begin another run in a new folder, with --restore-from and the newest numbered snapshot"


def make_meta(net: Net, classes: Sequence[str] | None, step: int, args: dict, **more: Any) -> dict:
    """The meta of a snapshot: ``evaluate.py`` rebuilds the net from it without options."""
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
    """The data set that a snapshot's net was trained on; ``"voc"`` if its meta does not say."""
    return (meta.get("args") or {}).get("dataset", "voc")


def save_snapshot(path: str | Path, net: nn.Module, meta: dict, **more: Any) -> None:
    """Save ``{"model": state_dict, "meta": meta, **more}`` atomically.

    Raises:
        DiskError: the file cannot be written.
    """
    _save(Path(path), net.state_dict(), meta, **more)


def _save(path: Path, model: Mapping[str, Tensor], meta: dict, **more: Any) -> None:
    write_atomically(path, lambda file: torch.save({"model": model, "meta": meta, **more}, file))


def _copy(value: Any) -> Any:
    """A copy of a tensor on the host; anything else unchanged."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def prefix_of(folder: str | Path) -> str:
    """The snapshot prefix for the user's own data: its folder's name, with "_" for all but letters, digits, "-" and "_"."""
    return re.sub(r"[^\w-]|^-", "_", end_of(Path(folder).resolve().name, 150)) or "data"  # "/" has no name


class Snapshots:
    """The snapshots of a run: ``last.ckpt``, to resume from, and the newest ``keep`` numbered ones (0: all of them).

    Args:
        numbers: the steps of the numbered snapshots that this run has written; no other file is ever deleted.
        prefix: of their names, see :func:`prefix_of`.
    """

    def __init__(self, folder: Path, keep: int, numbers: Sequence[int], prefix: str = "VOC12") -> None:
        self.folder, self.keep, self.prefix = folder, keep, prefix
        self.numbers = [step for step in numbers if _is_snapshot(self.path(step), step)]
        self.writing: Future[str] | None = None

    def path(self, step: int) -> Path:
        """The numbered snapshot of a step."""
        return self.folder / f"{self.prefix}_scenes_{step}.pth"

    def save(self, net: nn.Module, meta: dict, numbered: bool, **state: Any) -> None:
        """Save ``last.ckpt`` with ``state`` and, if ``numbered``, the step's own snapshot without it, while training goes on.

        The tensors are copied to the host, and a thread writes the files. There is one thread at a time: a save waits for the
        one before it. :meth:`problem` reports whether it worked.
        """
        self.wait()
        model = net.state_dict()  # changed in place, which keeps its _metadata
        for name, tensor in model.items():
            model[name] = _copy(tensor)
        self.writing = Future()
        # Not a pool: its idle thread would still run when workers are forked.
        write = partial(self._write, model, meta, numbered, tree_map(_copy, state))
        Thread(target=_run, args=(self.writing, write), name="snapshot").start()

    def _write(self, model: Mapping[str, Tensor], meta: dict, numbered: bool, state: dict[str, Any]) -> str:
        """Write both files; returns what could not be written, else "". A failed write leaves the earlier file unchanged."""
        step, problems = meta["step"], []
        numbers = [number for number in self.numbers if number != step] + [step] * numbered
        try:
            _save(self.folder / "last.ckpt", model, meta, **state, step=step, numbers=numbers, prefix=self.prefix)
        except DiskError as error:
            problems.append(str(error))
        if numbered:
            try:
                _save(self.path(step), model, meta)
                self.numbers = numbers[-self.keep :]  # keep 0: all
                for number in numbers[: -len(self.numbers)]:
                    self.path(number).unlink(missing_ok=True)
            except (DiskError, OSError) as error:
                problems.append(str(error))
        return "; ".join(problems)

    def problem(self) -> str:
        """What the last save could not write, reported once, after it has ended; else ""."""
        return self.wait() if self.writing and self.writing.done() else ""

    def wait(self) -> str:
        """Wait for the end of the last save; returns :meth:`problem`."""
        writing, self.writing = self.writing, None
        return writing.result() if writing else ""

    def check_space(self, net: nn.Module, optimizer: optim.Optimizer, count: int) -> str:
        """Check, before any work is done, that the disk has space for the first snapshots.

        Args:
            count: the number of numbered snapshots to come.

        Returns:
            A note if the disk has no space for all of them, else "".

        Raises:
            DiskError: it has no space even for the first ones, or the folder cannot be written.
        """
        check_writable(self.folder)
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        model, momentum = (sum(tensor.nbytes for tensor in part) for part in (net.state_dict().values(), state))
        last = model + momentum
        disk = shutil.disk_usage(self.folder)
        free = disk.free if disk.total else math.inf  # some network disks do not report it
        room = f"{self.folder} has {free / 1e6:.0f} MB free"
        if free < last + model:
            raise DiskError(
                f"{room}, and the first snapshots need {(last + model) / 1e6:.0f} MB (last.ckpt {last / 1e6:.0f}, "
                f"{self.prefix}_scenes_<step>.pth {model / 1e6:.0f}); free space, or choose another --snapshot-dir"
            )
        count = min(count, self.keep + 1) if self.keep else count  # the oldest is deleted after the newest is written
        whole = (count - 1) * model + 2 * last  # a new last.ckpt is written beside the old one
        if count > 1 and free < whole:
            return (
                f"note: {room}, and this run's {count} snapshots need {whole / 1e6:.0f} MB; free space, or keep the newest N "
                "only with --keep N"
            )
        return ""


def _run(future: "Future[str]", write: Callable[[], str]) -> None:
    """Call ``write`` in this thread, and give its result to ``future``."""
    try:
        future.set_result(write())
    except BaseException as error:
        future.set_exception(error)


def _is_snapshot(path: Path, step: int) -> bool:
    """Whether a file is the snapshot of that step, not another file of the same name."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]["step"] == step
    except Exception:  # torch.load raises many kinds
        return False


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a ``last.ckpt``: model, meta, optimizer, step, scaler, ids, numbers, prefix.

    Raises:
        UserError: the file is missing, broken, of a newer format, or a snapshot without the state of the optimiser.
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
