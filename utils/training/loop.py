"""The one training loop: train.py and train_msc.py differ in the loss function that they pass and in their defaults."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset import (
    Crop,
    StepSampler,
    VOCSegmentation,
    to_input,
)
from deeplab.loss import LossFunction, Objective
from deeplab.toolbox import ChannelDropout
from utils import distributed
from utils.checkpoint import Snapshots, make_meta
from utils.command import UserError
from utils.device import autocast
from utils.files import DiskError
from utils.loader import fitting_workers, make_loader, running, what_is_compared
from utils.options import shared_options
from utils.training.lock import FolderLock
from utils.training.log import RunLog
from utils.training.monitor import ClassWatch, DataWait, Meter, check_weights
from utils.training.monitor import Diverged as Diverged
from utils.training.optimizer import GuardedSGD, poly_lr, set_lr
from utils.training.options import settle_options
from utils.training.setup import (
    PICTURES_TO_JUDGE,
    check_ids,
    check_net_options,
    choose_device,
    describe,
    head_lines,
    last_words,
    loss_options,
    open_training_data,
    seen_val,
)
from utils.training.start import SETTLED, Start, begin, loss_name, resume, run_folder
from utils.training.stop import StopRequest
from utils.training.validation import Validation, save_panels
from utils.visualize import Classes, class_names, make_palette


def run(args: Namespace, loss_function: LossFunction) -> int:
    """Train as ``args`` say (see :func:`utils.training.options.training_parser`).

    Args:
        loss_function: (net, images, labels, size=...) -> {"loss": scalar, ...}, such as ``deeplab.single_scale_loss``.

    Returns:
        The exit status: 0, or 128 + the number of the signal that ended the run early (with a checkpoint written).

    Raises:
        UserError, DatasetError, WeightsError: the user's to mend; what was reached is saved.
        Diverged: the loss is no longer a number; the snapshots are as they were.
    """
    with ExitStack() as stack:
        loss = loss_name(loss_function)
        distributed.start()
        distributed.everywhere(lambda: settle_options(args))
        distributed.check_same(shared_options(args))
        lock = FolderLock(run_folder(args))
        locked = distributed.from_main(lambda: stack.enter_context(lock))
        start = resume(args, loss)
        args = Namespace(**start.options) if start else args
        device = distributed.everywhere(lambda: choose_device(args))
        torch.manual_seed(args.random_seed)
        start = start or begin(args, loss)
        for name in SETTLED:
            setattr(args, name, start.options[name])
        distributed.everywhere(lambda: check_net_options(args))
        data, data_list = distributed.everywhere(lambda: open_training_data(args))
        distributed.check_same({"kinds of device": device.type, **what_is_compared(data)})
        ids = check_ids(data.ids, start)
        distributed.everywhere(lambda: check_classes(data, start))
        if not start.checkpoint:
            start.identify(data.ids)

        torch.backends.cudnn.benchmark = not args.deterministic  # the crops are all of one size
        net = distributed.everywhere(lambda: start.build_net().to(device).to(memory_format=torch.channels_last).train())
        net.grad_checkpoint = args.grad_checkpoint
        if args.sync_bn:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for dropout in (module for module in net.modules() if isinstance(module, ChannelDropout)):
            dropout.shard = (distributed.rank(), distributed.world_size())
        optimizer = GuardedSGD(net, args.learning_rate, args.momentum, args.weight_decay)
        if args.aux_weight == 0:  # the auxiliary head has no part in the loss, so DistributedDataParallel must not wait for it
            net.dsn.requires_grad_(False)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        if start.checkpoint:
            optimizer.load_momentum(start.checkpoint["optimizer"])
            scale = {name: start.checkpoint["scaler"].get(name) for name in ("scale", "_growth_tracker")}
            scaler.load_state_dict(scaler.state_dict() | scale)
        snapshots = Snapshots(Path(args.snapshot_dir), args.keep, start.checkpoint.get("numbers") or [], data.SHORT)
        planned = -(-args.num_steps // args.save_pred_every) - start.step // args.save_pred_every
        space = distributed.from_main(lambda: snapshots.check_space(net, optimizer, planned))
        if args.compile:
            net.compile()
        objective = distributed.wrap(Objective(net, loss_function, **loss_options(args)), device)

        crop_bytes = 4 * args.input_size[0] * args.input_size[1]
        workers, note = fitting_workers(args.num_workers, args.batch_size // distributed.world_size() * crop_bytes)
        shards = {"shard": distributed.rank(), "num_shards": distributed.world_size()}
        sampler = StepSampler(len(data), args.batch_size, args.random_seed, start.step * args.iter_size, **shards)
        stop = stack.enter_context(StopRequest())  # from here on there is something to save, and workers have its handlers
        loader = make_loader(data, sampler, workers, device)
        batches = distributed.everywhere(lambda: stack.enter_context(running(loader)))
        wait = DataWait(device, workers)
        meter = Meter(device, lambda batch: describe(batch, args, data))
        names = data.names or start.classes
        classes = Classes(class_names(args.num_classes, names), make_palette(data.colors))
        watch = ClassWatch(min(PICTURES_TO_JUDGE, len(data)), classes.names, args.ignore_label, fixed=bool(data.NAMES))
        validation = Validation(args, classes, device, start.run) if args.val_every else None

        def open_log() -> RunLog | None:
            return stack.enter_context(RunLog(lock, start.options, start.step)) if distributed.is_main() else None

        if log := distributed.everywhere(open_log):
            log.say(*head_lines(args, data, data_list), locked, *start.lines, note, space)

        def report() -> None:
            steps, means, waited = meter.steps, meter.means(), wait.share()
            if log:
                log.line(done, means, lr, steps, waited, [group["lr"] for group in optimizer.param_groups])
                log.say(wait.warning())

        def meta_of_now(**more: object) -> dict:
            seen, colors = start.seen_voc_val or seen_val(data), classes.palette[: args.num_classes].tolist()
            return make_meta(net, names, done, start.options, seen_voc_val=seen, colors=colors, run=start.run, **more)

        def write(numbered: bool) -> str:
            lock.check()
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            problem = snapshots.save(net, meta_of_now(), numbered, **state, ids=ids)
            if log:
                later = "; training goes on, and tries again at the next snapshot" if done < args.num_steps else ""
                log.say(f"WARNING: step {done} is not saved: {problem}{later}" if problem else "")
                log.say(save_panels(net, data, classes, log, done, args.save_num_images, device) if numbered else "")
            return problem

        def save(numbered: bool) -> str:
            meter.check()  # on all processes: none of them saves after a bad step
            check_weights(net, done)
            return distributed.from_main(lambda: write(numbered))  # what process 0 cannot write the others hear of

        def snapshot_due(step: int) -> bool:
            return step % args.save_pred_every == 0 or step == args.num_steps

        done = saved = start.step
        lr = args.learning_rate
        error: Exception | None = None
        unsaved = ""
        signal = failed = 0
        # What a run that was killed, or whose disk was full, still lacks of its last step.
        if done and snapshot_due(done) and distributed.from_main(lambda: not snapshots.path(done).exists()):
            unsaved = save(numbered=True)
        if done and validation and validation.due(done):
            if distributed.from_main(lambda: bool(log and log.scored)):
                validation.scored = done
            else:
                broken, error = validation.run(net, done, stop, log, meta_of_now)
                if broken:
                    distributed.raise_any(error)
        for step in range(start.step, args.num_steps):
            with wait.reading():
                crops, error = read(batches, args.iter_size)
            signal, failed = distributed.agree(stop.signal, int(error is not None))
            if signal or failed:  # in any process: all leave before the same step
                break
            set_lr(optimizer, lr := poly_lr(args.learning_rate, step, args.num_steps, args.power))
            for number, (images, labels, present) in enumerate(crops, start=1):
                images = to_input(images.to(device, non_blocking=True))  # N3HW float32, channels last
                labels = labels.to(device, non_blocking=True).long()  # NHW
                seed_dropout(args.random_seed, step, number)
                objective.require_backward_grad_sync = number == args.iter_size  # shared after the last batch of the step
                with autocast(device, args.amp):
                    losses = objective(images, labels)
                scaler.scale(losses["loss"] / args.iter_size).backward()
                meter.add(losses, step * args.iter_size + number - 1)
                watch.add(present)
            optimizer.bad = meter.end_step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            if snapshot_due(done) or done % args.log_every == 0 or done == start.step + 1:
                report()
            warning = watch.warning()
            if log:
                log.bar.update()
                log.say(warning)
            if snapshot_due(done):
                unsaved = save(numbered=True)  # where the disk is full the run goes on, and tries again at the next snapshot
                saved = done
            if validation and validation.due(done):
                meter.check()
                broken, error = validation.run(net, done, stop, log, meta_of_now)
                if failed := int(broken):
                    break

        signal, failed = distributed.agree(stop.signal, failed)  # one that came in the last save or the last validation
        if done > saved:  # something ended the run before its last step
            if meter.steps:
                report()
            unsaved = save(numbered=done == args.num_steps)
        if log and not unsaved:
            unscored = bool(validation and validation.due(done) and validation.scored < done)
            log.say(last_words(args, data, done, start.step, unscored))
        if failed and not signal:  # what a stop leaves unread shows again when the run goes on
            distributed.raise_any(error)
        if unsaved:
            raise DiskError(f"the run ended at step {done}, which is not saved: {unsaved}; then add --resume")
    distributed.stop()
    signal = signal or stop.signal  # one that came after the last words
    return 128 + signal if signal else 0


def seed_dropout(seed: int, step: int, batch: int) -> None:
    """Let dropout draw what belongs to this batch, so that a resumed run, or one of several processes, draws the same."""
    sequence = np.random.SeedSequence((seed, step, batch))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def read(batches: Iterator[Crop], count: int) -> tuple[list[Crop], Exception | None]:
    """The next ``count`` batches, or what went wrong: a process that raised at once would leave the others waiting."""
    try:
        return [next(batches) for _ in range(count)], None
    except Exception as error:  # a picture, a label, a worker
        return [], error


def check_classes(data: VOCSegmentation, start: Start) -> None:
    """Raise :class:`UserError` if the data name other classes than the run that is resumed was begun with."""
    if start.checkpoint and start.classes and data.names and list(data.names) != start.classes:
        name, begun = next((a, b) for a, b in zip(data.names, start.classes) if a != b)
        raise UserError(
            f"--resume: the run was begun with the class {begun!r} where {data.root} now names {name!r}; resume with the same "
            "classes, or start another run with --restore-from"
        )
