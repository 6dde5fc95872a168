"""The setup of a training run: everything that the loop needs, built in order."""

import inspect
import sys
from argparse import Namespace
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset import IGNORE_LABEL, StepSampler, TrainTransform, VOCSegmentation, one_class_warning
from dataset.arrays import ArraySegmentation, classes_of
from dataset.classes import ClassFile, read_class_file
from dataset.transforms import training_transforms
from deeplab.loss import LossFunction, Objective, Ohem
from deeplab.toolbox import ChannelDropout
from utils import distributed
from utils.checkpoint import Snapshots, make_meta, prefix_of
from utils.command import UserError, put
from utils.data import list_of, open_dataset
from utils.device import check_compiler, select_device
from utils.loader import fitting_workers, make_loader, running
from utils.options import Options, shared_options, with_own_places
from utils.training.class_weights import find_weights
from utils.training.identity import compare_data, loss_name, new_run
from utils.training.lock import FolderLock
from utils.training.log import RunLog
from utils.training.messages import added_lines, head_lines, net_line, optimizer_line, seen_val
from utils.training.monitor import ClassWatch, DataWait, Meter
from utils.training.optimizer import GuardedSGD
from utils.training.options import check_net_options, settle, training_parser
from utils.training.start import begin, find_checkpoint, resume, run_folder
from utils.training.stop import Ending
from utils.training.validation import Validation
from utils.visualize import Classes, class_names, make_palette

LABELS_TO_JUDGE = 200  # the number of labels in which missing classes are looked for


class Run:
    """A training run, set up: everything that the loop needs, built in order and compared between the processes.

    Args:
        stack: closes what has to be closed when the run ends.
        items: a dataset to train on instead of files.

    Attributes:
        options: settled.
        start: the number of steps done already.
        saved: the step of the last save, even if that failed.
        objective: (images, labels) -> losses; the net and its loss, in DistributedDataParallel if there are several processes.
        ids: checksum of the training set's ids.
        meta: the meta of every snapshot of the run, except for its step.
        log: on the main process; None on the others.

    Raises:
        UserError, DatasetError, WeightsError: nothing was trained, and no file was overwritten.
    """

    def __init__(self, args: Namespace, loss_function: LossFunction, stack: ExitStack, items: Dataset | None = None) -> None:
        # The options and the start: new or resumed.
        loss = loss_name(loss_function)
        distributed.start()
        asked = distributed.everywhere(lambda: settle(args))
        if items is not None and "data_dir" not in asked.given:
            asked = asked.replace(data_dir="")
        distributed.check_same(shared_options(asked))
        self.lock = FolderLock(run_folder(asked))
        locked = distributed.from_main(lambda: stack.enter_context(self.lock))
        path = find_checkpoint(asked)
        resumed = distributed.from_main(lambda: resume(asked, loss, path)) if path else None
        options = with_own_places(resumed.options, asked, True) if resumed else asked
        self.device = device = distributed.everywhere(lambda: choose_device(options, items))  # before any weights are read
        class_file = distributed.everywhere(lambda: find_classes(options, items))
        start = resumed or distributed.from_main(lambda: begin(asked, loss, class_file))
        self.options = options = with_own_places(start.options, asked, resumed is not None)
        distributed.everywhere(lambda: check_net_options(options))
        self.start = self.saved = start.step

        # The data.
        self.data, data_list = distributed.everywhere(lambda: open_training_data(options, class_file, items))
        data = self.data
        self.ids = compare_data(data, device.type, start.checkpoint.get("ids"), start.classes if resumed else None)
        distributed.from_main(lambda: check_not_binary(data))
        names = data.names or start.classes
        self.classes = Classes(class_names(options.num_classes, names), make_palette(data.colors))

        # The net, its loss and the optimiser.
        run_id = start.run if resumed else new_run(start.options, data.ids, start.net)
        torch.backends.cudnn.benchmark = not options.deterministic  # all crops have the same size
        net = distributed.everywhere(lambda: start.net.to(device).to(memory_format=torch.channels_last).train())
        net.grad_checkpoint = options.grad_checkpoint
        self.net = net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if options.sync_bn else net
        rank, processes = distributed.rank(), distributed.world_size()
        for dropout in (module for module in net.modules() if isinstance(module, ChannelDropout)):
            dropout.shard = (rank, processes)
        self.optimizer = GuardedSGD(net, options.learning_rate, options.momentum, options.weight_decay)
        if options.aux_weight == 0:  # no loss reaches that head, and DistributedDataParallel would wait for its gradients
            net.dsn.requires_grad_(False)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        if start.checkpoint:
            self.optimizer.load_momentum(start.checkpoint["optimizer"])
            scale = {name: start.checkpoint["scaler"].get(name) for name in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict(self.scaler.state_dict() | scale)
        self.class_weights: list[float] = []
        if options.class_weights:
            begun, given = start.checkpoint.get("class_weights"), "class_weights" in asked.given
            self.class_weights = find_weights(options, data, begun, given)
        class_weights = torch.tensor(self.class_weights, device=device) if self.class_weights else None
        objective = Objective(net, loss_function, **loss_options(loss_function, options, class_weights))
        if options.compile:  # net and loss in one graph; --one-scale-at-a-time recomputes the scales outside the net
            (net if getattr(options, "one_scale_at_a_time", False) else objective).compile(dynamic=False)
        self.objective = distributed.wrap(objective, device)

        # The batches.
        crop_bytes = 4 * options.input_size[0] * options.input_size[1]
        workers, note = fitting_workers(options.num_workers, options.batch_size // processes * crop_bytes)
        first = start.step * options.iter_size
        sampler = StepSampler(len(data), options.batch_size, options.random_seed, first, shard=rank, num_shards=processes)
        self.ending = stack.enter_context(Ending())  # before the workers, which inherit its handlers
        loader = make_loader(data, sampler, workers, device)
        self.batches = distributed.everywhere(lambda: stack.enter_context(running(loader)))

        # Snapshots, validation, monitors and the log.
        seen, colors = seen_val(data), self.classes.palette[: options.num_classes].tolist()
        own_meta = {"seen_voc_val": start.seen_voc_val or seen, "colors": colors, "run": run_id, "given": start.given}
        self.meta = make_meta(net, names, start.step, vars(start.options), **own_meta)
        own = class_file.rows is not None and data.SHORT == VOCSegmentation.SHORT and not resumed
        prefix = start.checkpoint.get("prefix") or (prefix_of(data.root) if own else data.SHORT)
        self.snapshots = Snapshots(Path(options.snapshot_dir), options.keep, start.checkpoint.get("numbers") or [], prefix)
        stack.callback(self.last_save)  # whatever ends the run
        planned = -(-options.num_steps // options.save_pred_every) - start.step // options.save_pred_every
        space = distributed.from_main(lambda: self.snapshots.check_space(net, self.optimizer, planned))
        self.validation = Validation(options, class_file, run_id) if options.val_every else None
        self.losses = Meter(device, self.describe)
        self.data_wait = DataWait(device, workers)
        labels = min(LABELS_TO_JUDGE, len(data))
        self.class_watch = ClassWatch(
            labels, self.classes.names, options.ignore_label, fixed=bool(data.NAMES), unused=data.UNUSED
        )

        new_log = partial(RunLog, self.lock, vars(start.options), start.step)
        self.log = distributed.everywhere(lambda: stack.enter_context(new_log()) if rank == 0 else None)
        if self.log:
            head = head_lines(options, data, data_list, seen, device)
            recipe = [net_line(net, options, start.given), optimizer_line(self.optimizer, options.learning_rate)]
            recipe += added_lines(options, self.class_weights)
            self.log.say(*head, locked, *start.lines, *recipe, note, space)

    def last_save(self) -> None:
        """Wait for the snapshot that is being written, and print a warning if that fails."""
        if problem := self.snapshots.wait():
            put(sys.stderr, f"WARNING: step {self.saved} is not saved: {problem}")

    def due(self, every: int, done: int) -> bool:
        """Whether ``done`` is a multiple of ``every``, or the last step."""
        return done % every == 0 or done == self.options.num_steps

    def meta_at(self, done: int, **more: Any) -> dict[str, Any]:
        """The meta of a snapshot after ``done`` steps."""
        return {**self.meta, "step": done, **more}

    def describe(self, batch: int) -> str:
        """The step of a batch, its images in all processes, and the options that commonly make a loss diverge."""
        options, ids = self.options, self.data.ids
        draws = StepSampler(len(ids), options.batch_size, options.random_seed).batch(batch)
        images = ", ".join(ids[index] for index, _ in draws)
        weights = options.restore_from or "none"
        how = f"--learning-rate {options.learning_rate:g}, --batch-norm {options.batch_norm}, weights {weights}"
        return f"step {batch // options.iter_size + 1}, images {images} ({how})"


def find_classes(options: Options, items: Dataset | None) -> ClassFile:
    """The classes that ``items`` state, else those in the ``classes.txt`` of ``--data-dir``."""
    classes = classes_of(items)
    return read_class_file(options.data_dir) if classes.rows is None and options.data_dir else classes


def choose_device(options: Options, items: Dataset | None) -> torch.device:
    """The device of this process. Also checks that the data set exists and that the options fit the processes and the device.

    Raises:
        UserError, DatasetError: a check failed.
    """
    device = select_device(options.device, options.gpu, not options.no_tf32, options.deterministic)
    processes = distributed.world_size()
    if options.batch_size % processes:
        raise UserError(f"--batch-size {options.batch_size} cannot be divided among {processes} processes; choose a multiple")
    if options.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn works between CUDA devices only, and this run is on {device.type}; leave it out")
    if options.compile:
        check_compiler(device)
    if items is None:
        list_of(options, "train", options.num_classes)
    elif options.val_every and not options.data_dir:
        raise UserError("--val-every evaluates on images in --data-dir, which is not given; pass it, or leave --val-every out")
    return device


def open_training_data(
    options: Options, classes: ClassFile | None = None, items: Dataset | None = None
) -> tuple[VOCSegmentation, Path]:
    """The training set with its augmentation, and the list file of its ids; for ``items``, the name of their class instead."""
    transform = TrainTransform(options.random_seed, training_transforms(options))
    if items is None:
        return open_dataset(options, "train", options.num_classes, transform, classes)
    data = ArraySegmentation(items, classes or classes_of(items), options.num_classes, options.ignore_label, transform)
    return data, data.root


def check_not_binary(data: VOCSegmentation) -> None:
    """Raise :class:`UserError` if the labels (at most LABELS_TO_JUDGE are read) hold nothing but 0 and 255."""
    values: set[int] = set()
    for index in np.linspace(0, len(data) - 1, min(LABELS_TO_JUDGE, len(data)), dtype=int).tolist():
        with suppress(Exception):  # training reports an unreadable label
            values |= set(np.unique(data.load_label(index)).tolist())
        if values - {0, IGNORE_LABEL}:
            return
    if values == {0, IGNORE_LABEL}:
        raise UserError(f"nothing was trained: {one_class_warning(values)}")


def loss_options(loss_function: LossFunction, options: Options, class_weights: Tensor | None = None) -> dict[str, object]:
    """The keyword arguments of a loss function, beside net, images and labels; those that are off are not passed.

    An option that a script adds to the command line is passed as well, if the function has a parameter of its name or accepts
    ``**options``. A resumed run passes the values that the run was begun with.

    Raises:
        UserError: the function lacks a parameter for an option that is on.
    """
    chosen: dict[str, object] = {"size": options.loss_size, "aux_weight": options.aux_weight or 0.0}
    if options.ohem:
        chosen["ohem"] = Ohem(options.ohem_threshold, options.ohem_keep)
    if class_weights is not None:
        chosen["class_weights"] = class_weights
    parameters = inspect.signature(loss_function).parameters
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_all and (missing := [name for name in chosen if name not in parameters]):
        text = f"the loss {loss_name(loss_function)} has no parameter {' or '.join(missing)}; add **options to its parameters"
        raise UserError(text + (" to ignore it, or leave --class-weights out" if missing == ["class_weights"] else ""))
    ours = vars(training_parser("", batch_size=1, iter_size=1, snapshot_dir="").parse_args([])).keys() | {"loss"}
    return chosen | {
        name: value for name, value in vars(options).items() if name not in ours and (takes_all or name in parameters)
    }
