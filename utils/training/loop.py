"""The one training loop: train.py and train_msc.py differ only in their loss function and their defaults."""

from argparse import Namespace
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import to_input
from deeplab.loss import LossFunction
from utils import distributed
from utils.device import autocast
from utils.files import DiskError
from utils.options import Options
from utils.training.messages import last_words
from utils.training.monitor import check_weights
from utils.training.optimizer import clip_gradients, poly_lr, set_lr
from utils.training.setup import Run
from utils.training.validation import save_panels


def run(args: Namespace, loss_function: LossFunction, data: Dataset | None = None) -> int:
    """Train with the options ``args`` (see :func:`utils.training.options.training_parser`).

    Args:
        loss_function: (net, images, labels, size=...) -> {"loss": scalar, ...}, such as ``deeplab.single_scale_loss``.
        data: a dataset to train on instead of the files of ``--data-dir``; see :class:`dataset.arrays.ArraySegmentation`.

    Returns:
        The exit status: 0, or 128 + the number of the signal that ended the run early (with a checkpoint written).

    Raises:
        UserError, DatasetError, WeightsError: the user's mistake; the steps done are saved.
        Diverged: the loss is no longer finite; the snapshots are unchanged.
    """
    with ExitStack() as stack:
        run = Run(args, loss_function, stack, data)
        train(run)
    distributed.stop()
    return run.ending.status()


def train(run: Run) -> None:
    """The steps of a run, from its first to its last one, or until something ends it early."""
    options, device, ending = run.options, run.device, run.ending
    done = run.start
    catch_up(run)
    for step in range(run.start, options.num_steps):
        with run.data_wait.reading():
            crops = ending.read(run.batches, options.iter_size)
        if ending.is_due():  # in any process: all leave the loop before the same step
            break
        set_lr(run.optimizer, learning_rate(options, step))
        for number, (images, labels, present) in enumerate(crops, start=1):
            images = to_input(images.to(device, non_blocking=True))  # N 3 H W float32, mean-subtracted BGR, channels last
            labels = labels.to(device, non_blocking=True).long()  # N H W
            seed_dropout(options.random_seed, step, number)
            run.objective.require_backward_grad_sync = number == options.iter_size  # at the last batch of the step
            with autocast(device, options.amp):
                losses = run.objective(images, labels)
            run.scaler.scale(losses["loss"] / options.iter_size).backward()
            run.losses.add(losses, step * options.iter_size + number - 1)
            run.class_watch.add(present)
        if options.clip_grad_norm:
            clip_gradients(run.optimizer, run.scaler, options.clip_grad_norm)
        run.optimizer.bad = run.losses.end_step()  # 1 after a non-finite loss: the step then does nothing
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()

        done = step + 1
        if run.due(options.save_pred_every, done) or done % options.log_every == 0 or step == run.start:
            report(run, done)
        warning = run.class_watch.warning()
        if run.log:
            run.log.bar.update()
            run.log.say(warning, not_saved(run, run.snapshots.problem()))
        if run.due(options.save_pred_every, done):
            save(run, done)  # in a thread, while training goes on
        if run.validation and run.due(options.val_every, done):
            run.losses.check()
            if run.log:  # no worker is forked while a snapshot is written
                run.log.say(not_saved(run, run.snapshots.wait()))
            run.validation.run(run, done)
            if ending.failed:
                break
    finish(run, done)


def learning_rate(options: Options, step: int) -> float:
    """The base learning rate of step ``step``, from 0."""
    return poly_lr(options.learning_rate, step, options.num_steps, options.power, options.warmup_steps)


def seed_dropout(seed: int, step: int, batch: int) -> None:
    """Seed dropout for this batch, so that a resumed run, or a run of several processes, draws the same masks."""
    sequence = np.random.SeedSequence((seed, step, batch))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def catch_up(run: Run) -> None:
    """Make what the resumed run still lacks for its last step (it was killed, or its disk full): the snapshot, the mean IoU."""
    done, snapshots, validation = run.start, run.snapshots, run.validation
    if not done:
        return
    if run.due(run.options.save_pred_every, done) and distributed.from_main(lambda: not snapshots.path(done).exists()):
        save(run, done)
    if validation and run.due(run.options.val_every, done):
        if distributed.from_main(lambda: bool(run.log and run.log.scored)):
            validation.done = done
        else:
            validation.run(run, done)
            run.ending.raise_error()


def report(run: Run, done: int) -> None:
    """Log the mean losses since the last report, over all processes."""
    steps, means, waited = run.losses.steps, run.losses.means(), run.data_wait.share()
    if run.log:
        lr = learning_rate(run.options, done - 1)
        run.log.line(done, means, lr, steps, waited, [group["lr"] for group in run.optimizer.param_groups])
        run.log.say(run.data_wait.warning())


def save(run: Run, done: int, numbered: bool = True) -> None:
    """Save step ``done``. If a loss or a weight is not finite, all processes raise and nothing is saved."""
    run.losses.check()
    check_weights(run.net, done)
    distributed.from_main(lambda: write(run, done, numbered))
    run.saved = done


def write(run: Run, done: int, numbered: bool) -> None:
    """Start to write ``last.ckpt`` and, if ``numbered``, the step's snapshot; save the step's panels."""
    assert run.log
    run.lock.check()
    run.log.say(not_saved(run, run.snapshots.wait()))
    state: dict[str, Any] = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "ids": run.ids}
    if run.class_weights:
        state["class_weights"] = run.class_weights
    run.snapshots.save(run.net, run.meta_at(done), numbered, **state)
    run.log.say(save_panels(run, done) if numbered else "")


def not_saved(run: Run, problem: str) -> str:
    """The warning that the last save has failed, "" without a ``problem``. The run goes on, as with a full disk."""
    text = f"WARNING: step {run.saved} is not saved: {problem}; training goes on and tries again at the next snapshot"
    return text if problem else ""


def finish(run: Run, done: int) -> None:
    """Save what is not saved yet, print what to do next, and raise the error that ended the run."""
    if done > run.saved:
        if run.losses.steps:
            report(run, done)
        save(run, done, numbered=done == run.options.num_steps)
    problem = distributed.from_main(run.snapshots.wait)
    run.ending.is_due()  # again, for a signal or an error during the last save or validation
    if run.log and not problem:
        run.log.say(last_words(run, done))
    run.ending.raise_error()
    if problem:
        raise DiskError(f"the run ended at step {done}, which is not saved: {problem}; then add --resume")
