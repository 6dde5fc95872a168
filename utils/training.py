"""The one training loop: train.py and train_msc.py differ in the loss function that they pass and in their defaults."""

import hashlib
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset import (
    Crop,
    DatasetError,
    PadCrop,
    RandomMirror,
    RandomScale,
    StepSampler,
    TrainTransform,
    VOCSegmentation,
    to_input,
)
from deeplab.auxiliary import ChannelDropout
from utils import distributed
from utils.checked_options import check_net_options, choose_device, settle_options
from utils.checkpoint import Snapshots, make_meta
from utils.class_watch import ClassWatch
from utils.command import UserError
from utils.files import DiskError
from utils.loader import crop_warning, fitting_workers, layout_words, make_loader, open_dataset, running, what_is_compared
from utils.lock import FolderLock
from utils.log import RunLog
from utils.meter import DataWait, Meter
from utils.meter import Diverged as Diverged  # part of what run() raises
from utils.objective import LossFunction, Objective, loss_options
from utils.options import shared_options
from utils.schedule import GuardedSGD, poly_lr, set_lr
from utils.start import SETTLED, Start, begin, loss_name, resume, run_folder
from utils.stop import StopRequest
from utils.validation import Validation, save_panels
from utils.visualize import Classes, class_names, make_palette

PICTURES_TO_JUDGE = 200  # labels that are looked at before it is said which classes they lack


def run(args: Namespace, loss_function: LossFunction) -> int:
    """Train as ``args`` say (see :func:`utils.options.training_parser`).

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
                with distributed.autocast(device, args.amp):
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


def last_words(args: Namespace, data: VOCSegmentation, done: int, began: int, unscored: bool) -> str:
    """What was saved, and what to do next; ``unscored`` tells that the last validation was not finished."""
    folder = Path(args.snapshot_dir)
    if done < args.num_steps:
        saved = f"saved {folder / 'last.ckpt'} at step {done} of {args.num_steps}" if done > began else "no step was finished"
        return f"{saved}; add --resume to go on" if done else f"{saved}, nothing was saved"
    if unscored:
        return f"all {done} steps are done and saved, but the last net is not scored; add --resume, which does that"
    if done == began:
        return f"nothing is left to do: all {done} steps are done; to train on, add a larger --num-steps"
    words = ["python", "evaluate.py", "--data-dir", args.data_dir, "--restore-from", folder / f"{data.SHORT}_scenes_{done}.pth"]
    if not any((data.root / name).exists() for name in data.lists("val", data.image_folder)):
        words += ["--data-list", "LIST"]
    return f"saved {words[5]}; next: {shlex.join(map(str, words + layout_words(args)))}"


def read(batches: Iterator[Crop], count: int) -> tuple[list[Crop], Exception | None]:
    """The next ``count`` batches, or what went wrong: a process that raised at once would leave the others waiting."""
    try:
        return [next(batches) for _ in range(count)], None
    except Exception as error:  # a picture, a label, a worker
        return [], error


def check_weights(net: nn.Module, step: int) -> None:
    """Raise :class:`Diverged` if the last step has made a weight infinite, which no loss has shown yet."""
    finite = [tensor.isfinite().all() for tensor in net.state_dict().values() if tensor.is_floating_point()]
    if not bool(torch.stack(finite).all()):
        advice = "the snapshots are as they were; lower --learning-rate"
        raise Diverged(f"weights of the net are not finite after step {step}: {advice}")


def open_training_data(args: Namespace) -> tuple[VOCSegmentation, Path]:
    """The training set with its augmentation, and the list of ids it comes from."""
    transforms: list[Callable] = [RandomScale(*args.scale_range)] if args.random_scale else []
    transforms += [RandomMirror()] if args.random_mirror else []
    transforms += [PadCrop(args.input_size)]
    return open_dataset(args, "train", args.num_classes, TrainTransform(args.random_seed, transforms))


def check_ids(ids: list[str], resumed: Start | None) -> str:
    """A check sum of the ids in their order, which the draws depend on.

    Raises:
        UserError: the run that is resumed has other ids.
    """
    found = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    if resumed and resumed.checkpoint.get("ids") not in (None, found):
        raise UserError(f"--resume: the list of {len(ids)} pictures is not the one that the run was begun with; pass that one")
    return found


def check_classes(data: VOCSegmentation, start: Start) -> None:
    """Raise :class:`UserError` if the data name other classes than the run that is resumed was begun with."""
    if start.checkpoint and start.classes and data.names and list(data.names) != start.classes:
        name, begun = next((a, b) for a, b in zip(data.names, start.classes) if a != b)
        raise UserError(
            f"--resume: the run was begun with the class {begun!r} where {data.root} now names {name!r}; resume with the same "
            "classes, or start another run with --restore-from"
        )


def head_lines(args: Namespace, data: VOCSegmentation, data_list: Path) -> list[str]:
    """What is about to happen."""
    lines = [f"{len(data)} pictures of {data_list}; {args.batch_size * args.iter_size} pictures a step, {args.num_steps} steps"]
    lines += [f"warning: {text}, so scores on that list will mean nothing" for text in [seen_val(data)] if text]
    lines += [crop_warning(data, args.input_size)]
    if distributed.world_size() > 1 and args.batch_norm != "frozen" and not args.sync_bn:
        share = args.batch_size // distributed.world_size()
        lines.append(
            f"note: with --batch-norm {args.batch_norm} each process takes batch statistics of its own {share} pictures, which "
            "is another run than that of a single process; between GPUs, --sync-bn shares them"
        )
    return lines


def describe(batch: int, args: Namespace, data: VOCSegmentation) -> str:
    """The step of a batch, its pictures in all processes, and what else makes a loss explode."""
    draws = StepSampler(len(data), args.batch_size, args.random_seed).batch(batch)
    pictures = ", ".join(data.ids[index] for index, _ in draws)
    how = f"--learning-rate {args.learning_rate:g}, --batch-norm {args.batch_norm}, weights {args.restore_from or 'none'}"
    return f"step {batch // args.iter_size + 1}, pictures {pictures} ({how})"


def seen_val(data: VOCSegmentation) -> str:
    """Why scores on the validation list of ``data`` mean nothing after training on it; "" where they mean something."""
    for path in (data.root / name for name in data.lists("val", data.image_folder)):
        with suppress(DatasetError):  # no such list, or none that can be read
            if common := {entry.id for entry in data.read_list(path, data.image_folder)} & set(data.ids):
                return f"{len(common)} of the pictures that it was trained on are on {path.name}"
    return ""
