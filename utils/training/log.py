"""The log of a training run: a progress bar or lines, ``log.jsonl``, ``args.json`` and, if asked for, TensorBoard scalars."""

import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils.checkpoint import PREFIX
from utils.command import UserError, put
from utils.files import end_of, remove_torn, save_json, write_atomically
from utils.metrics import Scores
from utils.outputs import is_output
from utils.training.lock import HOLDER, FolderLock
from utils.visualize import save_image


class RunLog:
    """The log of one run, kept by the main process.

    ``log.jsonl`` gets one JSON object per logged step: step (from 1), the losses (means since the last line, over all
    processes), lr, images_per_s, data_wait (the share of the time that the device waited for images), seconds of running
    (those before a restart included) and memory_mb (the peak); and one per validation, see :meth:`scores`. A resumed run
    appends after the step of its checkpoint; the lines of later steps, which are done again, are removed.

    A full or missing disk does not end a run: lines of ``log.jsonl`` then wait until one can be written, and TensorBoard ends.

    Args:
        lock: of the snapshot folder; while it is lost, lines wait.
        options: the run's options, saved as ``args.json``.
        first_step: the number of steps done already.

    Attributes:
        scored: whether the log already holds the validation of ``first_step``.
    """

    def __init__(self, lock: FolderLock, options: dict[str, Any], first_step: int = 0) -> None:
        self.lock, self.folder, self.path = lock, lock.folder, lock.folder / "log.jsonl"
        lock.check()
        remove_torn(self.folder, is_ours)
        remove_torn(self.folder / "images", lambda name: name.endswith(".png"))
        if first_step == 0:
            put_aside(self.path, self.folder / "args.json")
        save_json(self.folder / "args.json", options)
        lines = cut_log(self.path, first_step)
        self.scored = any("val_mean_iou" in line and line["step"] == first_step for line in lines)
        self.start = time.perf_counter() - max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self.waiting = ""  # lines that could not be written yet
        self.num_steps = options["num_steps"]
        bar = {"total": self.num_steps, "initial": first_step, "unit": "step", "dynamic_ncols": True, "smoothing": 0.1}
        self.bar = tqdm(**bar, disable=None)  # a bar in a terminal, else one line per entry
        self.writer = None
        if options["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom used

            self.writer = SummaryWriter(str(self.folder), purge_step=first_step + 1)
        self.images_per_step = options["batch_size"] * options["iter_size"]
        self.last_time = time.perf_counter()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.waiting:
            self._write("")
        self._board(lambda writer: writer.close())

    def say(self, *lines: str) -> None:
        """Print the lines that are not empty, above the bar if there is one. A closed standard output does not end the run."""
        self.bar.clear()
        put(sys.stdout, *filter(None, lines))
        self.bar.refresh()

    def _write(self, line: str) -> None:
        """Add a line to ``log.jsonl``, after those that wait."""
        warned, self.waiting = bool(self.waiting), self.waiting + line
        if self.lock.lost():  # the next save reports whether another run has the folder now
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if file.write(data := self.waiting.encode()) < len(data):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.waiting = ""
        except OSError as error:
            if not warned:
                self.say(f"WARNING: {self.path} cannot be written ({error.strerror}); its lines wait until it can")

    def _board(self, write: Callable[[Any], object]) -> None:
        """Write to TensorBoard if it was asked for, until its file cannot be written."""
        try:
            if self.writer:
                write(self.writer)
        except OSError as error:
            self.writer = None
            self.say(f"WARNING: TensorBoard's file cannot be written ({error.strerror}) and ends here; log.jsonl goes on")

    @property
    def seconds(self) -> float:
        """How long the run has been going, parts before a restart included."""
        return time.perf_counter() - self.start

    def line(
        self, step: int, losses: dict[str, float], lr: float, steps: int, data_wait: float, rates: Sequence[float]
    ) -> None:
        """Write one line.

        Args:
            step: the number of steps done.
            losses: name -> mean over the last ``steps`` steps.
            lr: base learning rate of the last step.
            steps: the number of steps since the last line.
            data_wait: share of the time since then that the device waited for data, 0..1.
            rates: learning rates of the parameter groups, for TensorBoard.
        """
        now = time.perf_counter()
        speed = steps * self.images_per_step / (now - self.last_time)
        self.last_time = now
        entry = {"step": step, **{name: round(value, 6) for name, value in losses.items()}, "lr": lr}
        entry.update(images_per_s=round(speed, 3), data_wait=round(data_wait, 3))
        entry.update(seconds=round(self.seconds, 2), memory_mb=peak_memory())
        self._write(json.dumps(entry) + "\n")
        text = f"loss {entry['loss']:.4f}, lr {lr:.2e}, {speed:.2f} images/s, waiting {data_wait:.0%}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.say(f"step {step} of {self.num_steps}: {text}")
        scalars = {name: entry[name] for name in entry.keys() - {"step", "seconds"}}
        self._add_scalars(step, scalars | {f"rate/group_{number}": rate for number, rate in enumerate(rates)})

    def scores(self, step: int, scores: Scores, names: Sequence[str]) -> None:
        """Write a line of validation: step, val_mean_iou, and val_iou, one number per class (null if it does not occur)."""
        ious = [None if math.isnan(iou) else round(iou, 6) for iou in scores.class_iou.tolist()]
        entry = {"step": step, "val_mean_iou": round(scores.mean_iou, 6), "val_iou": dict(zip(names, ious))}
        self._write(json.dumps(entry) + "\n")
        self.last_time = time.perf_counter()  # validation does not count in images_per_s
        known = {f"val_iou/{name}": iou for name, iou in zip(names, ious) if iou is not None}
        self._add_scalars(step, {"val_mean_iou": scores.mean_iou} | known)

    def image(self, name: str, step: int, image_rgb: np.ndarray) -> None:
        """Save an image of step ``step``, (H, W, 3) uint8 RGB, in ``images/`` and to TensorBoard.

        Raises:
            UserError: it would replace a file that no run wrote.
        """
        path = self.folder / "images" / f"{step:06d}_{end_of(name.replace('/', '_'), 200)}.png"
        if os.path.lexists(path) and not is_output(path):
            raise UserError(f"{path} was not written by a run; move it")
        save_image(path, image_rgb)
        self._board(lambda writer: writer.add_image(name, image_rgb, step, dataformats="HWC"))

    def _add_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._board(lambda writer: [writer.add_scalar(name, value, step) for name, value in scalars.items()])


def peak_memory() -> int:
    """The peak memory so far, in MB: of the GPU if one is used, else of this process; 0 if the system does not report it."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines of ``path`` up to ``step``, and return them. A line that a killed run left incomplete is removed, too."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the log of this run; move it away") from None
    kept = [(line, entry) for line, entry in log_entries(text) if entry["step"] <= step]
    write_atomically(path, lambda file: file.write("".join(line + "\n" for line, _ in kept).encode()))
    return [entry for _, entry in kept]


def log_entries(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a ``log.jsonl`` that a run can have written, each with its JSON object; damaged lines are left out."""
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        known = isinstance(entry, dict) and type(entry.get("step")) is int and is_number(entry["step"])
        if known and is_number(entry.get("seconds", 0.0)) and entry["step"] >= 0:
            yield line, entry


def is_number(value: object) -> bool:
    """Whether a value from a file is a number that can be compared, added and plotted."""
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]  # it is one of the two


def is_ours(name: str) -> bool:
    """Whether a run writes a file of this name into its snapshot folder."""
    kept = ("last.ckpt", "best.pth", "args.json", "log.jsonl", HOLDER)
    return name in kept or re.fullmatch(rf"{PREFIX}_scenes_\d+\.pth", name) is not None


def put_aside(*paths: Path) -> None:
    """Rename the files that an earlier run left, ``log.jsonl`` to ``log.1.jsonl`` or the next free number."""
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_suffix(f".{number}{path.suffix}"))
