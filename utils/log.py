"""What a training run tells: a progress bar, ``log.jsonl``, ``args.json`` and, if asked for, TensorBoard scalars."""

import json
import time
from argparse import Namespace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from utils.files import save_json


class RunLog:
    """The log of one run, kept by the main process.

    ``log.jsonl`` gets one JSON object a logged step: step (from 1), loss (mean since the last line), the last batch's loss of
    each scale where there are several, lr, images_per_s and seconds since the start. A resumed run appends to it.

    Args:
        folder: the snapshot folder.
        args: the run's options, saved as ``args.json``.
        first_step: steps that are done already.
    """

    def __init__(self, folder: Path, args: Namespace, first_step: int) -> None:
        save_json(folder / "args.json", vars(args))
        self.file = open(folder / "log.jsonl", "a" if first_step else "w", buffering=1)  # noqa: SIM115
        self.bar = tqdm(total=args.num_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)
        self.writer = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to load, and seldom asked for

            self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self.images_a_step = args.batch_size * args.iter_size
        self.start = self.last_time = time.perf_counter()
        self.last_step = first_step

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        for line in lines:
            self.bar.write(line)

    def step(self, done: int, lr: float, losses: dict[str, Tensor], total: Tensor, logged: bool) -> None:
        """Count a step; where it is to be logged, read the losses (which waits for a GPU) and write them down.

        Args:
            done: steps done so far.
            lr: base rate of this step.
            losses: scalars of the last batch, ``"loss"`` among them.
            total: scalar, sum over the steps since the last logged one.
            logged: whether this step is to be logged.
        """
        self.bar.update()
        if not logged:
            return
        now = time.perf_counter()
        steps = done - self.last_step
        speed = steps * self.images_a_step / (now - self.last_time)
        entry = {"step": done, "loss": round(total.item() / steps, 6)}
        entry.update({name: round(value.item(), 6) for name, value in losses.items() if name != "loss"})
        entry.update(lr=lr, images_per_s=round(speed, 3), seconds=round(now - self.start, 2))
        self.file.write(json.dumps(entry) + "\n")
        self.bar.set_postfix_str(f"loss {entry['loss']:.4f}, lr {lr:.2e}, {speed:.2f} images/s")
        if self.writer:
            for name in entry.keys() - {"step", "seconds"}:
                self.writer.add_scalar(name, entry[name], done)
        self.last_step, self.last_time = done, now

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.close()
        self.file.close()
        if self.writer:
            self.writer.close()
