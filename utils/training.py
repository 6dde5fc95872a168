"""The one training loop: train.py and train_msc.py differ in the loss function that they pass and in their defaults."""

import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import (
    TRAIN_LISTS,
    PadCrop,
    RandomMirror,
    RandomScale,
    StepSampler,
    TrainTransform,
    VOCSegmentation,
    read_class_names,
    to_input,
)
from deeplab import deeplabv2, multi_scale_backward, predict
from utils import distributed
from utils.checkpoint import build_net, load_checkpoint, load_init, make_meta, save_snapshot
from utils.command import UserError
from utils.loader import make_loader, open_dataset
from utils.log import RunLog
from utils.options import INITIAL_WEIGHTS
from utils.schedule import param_groups, poly_lr, set_lr
from utils.visualize import save_panel


class Diverged(UserError):
    """The loss is no longer a number."""

    exit_status = 1


class Objective(nn.Module):
    """The net and its loss as one module, so that DistributedDataParallel sees one forward pass whatever the scales."""

    def __init__(self, net: nn.Module, loss_function: Callable, **options) -> None:
        super().__init__()
        self.net, self.loss_function, self.options = net, loss_function, options

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """The losses, or the logits where there are no labels."""
        return self.net(images) if labels is None else self.loss_function(self.net, images, labels, **self.options)


@contextmanager
def kept_statistics(net: nn.Module) -> Iterator[None]:
    """A context in which a forward pass in training mode leaves the running statistics as they are."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


def run(args: Namespace, loss_function: Callable) -> int:
    """Train as ``args`` say (see :func:`utils.options.training_parser`).

    Args:
        loss_function: (net, images, labels, size=...) -> {"loss": scalar, ...}, such as ``deeplab.single_scale_loss``.

    Returns:
        The exit status: 0, or 130 where Ctrl-C or SIGTERM ended the run early (with a checkpoint written).
    """
    device = distributed.select_device(args.device, args.gpu)
    check_options(args, device)
    distributed.start(device)
    torch.manual_seed(args.random_seed)
    torch.backends.cudnn.benchmark = True  # the crops are all of one size
    folder = Path(args.snapshot_dir)

    data, data_list = open_training_data(args)
    net, resumed, lines, seen_voc_val = open_net(args, folder)
    first_step = resumed["step"] if resumed else 0
    classes = read_class_names(args.data_dir, args.num_classes)
    net.to(device, memory_format=torch.channels_last).train()
    net.grad_checkpoint = args.grad_checkpoint
    if args.sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    groups = param_groups(net, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        torch.set_rng_state(resumed["rng"])
    if args.compile:
        net.compile()
    objective = distributed.wrap(Objective(net, loss_function, size=args.loss_size), device)

    shards = {"shard": distributed.rank(), "num_shards": distributed.world_size()}
    sampler = StepSampler(len(data), args.batch_size, args.random_seed, start=first_step * args.iter_size, **shards)
    batches = iter(make_loader(data, sampler, args.num_workers, device))

    log = RunLog(folder, args, first_step) if distributed.is_main() else None
    if log:
        images_a_step = args.batch_size * args.iter_size
        log.say(f"{len(data)} pictures of {data_list}; {images_a_step} pictures a step, {args.num_steps} steps", *lines)

    def scale_loss(loss: Tensor) -> Tensor:
        return scaler.scale(loss / args.iter_size)

    def forward(images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        with distributed.autocast(device, args.amp):
            return objective(images, labels)

    def backward(images: Tensor, labels: Tensor, last: bool) -> dict[str, Tensor]:
        """Add the gradients of one batch; processes share them after the last batch of a step."""
        if args.one_scale_at_a_time:
            around = lambda last_scale: distributed.no_sync(objective, skip=not (last and last_scale))  # noqa: E731
            options = {"size": args.loss_size, "scale_loss": scale_loss, "around": around}
            return multi_scale_backward(forward, images, labels, probe=kept_statistics(net)(forward), **options)
        with distributed.no_sync(objective, skip=not last):
            losses = forward(images, labels)
            scale_loss(losses["loss"]).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def save(step: int, numbered: bool) -> None:
        if not log:
            return
        meta = make_meta(net, classes, step, vars(args), seen_voc_val=seen_voc_val)
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(), "step": step}
        save_snapshot(folder / "last.ckpt", net, meta, **state)
        if numbered:
            save_snapshot(folder / f"VOC12_scenes_{step}.pth", net, meta)
            save_panels(net, data, folder / "images", step, args.save_num_images, device)

    stop = StopRequest()
    total = torch.zeros((), device=device)  # of the losses since the last log line
    bad_batch = torch.full((), -1, device=device)  # the first batch whose loss was not finite
    for step in range(first_step, args.num_steps):
        set_lr(optimizer, lr := poly_lr(args.learning_rate, step, args.num_steps, args.power))
        for batch in range(step * args.iter_size, (step + 1) * args.iter_size):
            images, labels = next(batches)  # N3HW float32, NHW int64
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)
            last = batch == (step + 1) * args.iter_size - 1
            losses = backward(images, labels, last)
            loss = losses["loss"]
            bad_batch = torch.where((bad_batch < 0) & ~loss.isfinite(), batch, bad_batch)
            total += loss / args.iter_size

        done, end = step + 1, step + 1 == args.num_steps or stop
        numbered = done % args.save_pred_every == 0 or done == args.num_steps
        logged = done % args.log_every == 0 or done == first_step + 1 or end
        if logged or numbered or device.type == "cpu":  # on a GPU, reading the loss makes the host wait for it
            check_finite(bad_batch, sampler, data, args)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if log:
            log.step(done, lr, losses, total, logged)
        if logged:
            total.zero_()
        if numbered or end:
            save(done, numbered)
        if end:
            break
    if log:
        log.close()
    distributed.stop()
    return 130 if stop else 0


class StopRequest:
    """True once Ctrl-C or SIGTERM has come: the loop then finishes its step, saves and ends. A second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def __bool__(self) -> bool:
        return self.requested

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def check_options(args: Namespace, device: torch.device) -> None:
    """Settle options that depend on each other.

    Raises:
        UserError: they contradict each other.
    """
    if args.is_training and args.batch_norm == "frozen":
        args.batch_norm = "stats"
    if args.restore_from.lower() == "none":
        args.restore_from = ""
    if args.sync_bn and args.batch_norm == "frozen":
        raise UserError("--sync-bn has nothing to do with frozen batch norm; add --batch-norm full")
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn works between CUDA devices only, and this run is on {device.type}; leave it out")
    processes = distributed.world_size()
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} does not divide into {processes} processes; choose a multiple")


def open_training_data(args: Namespace) -> tuple[VOCSegmentation, Path]:
    """The training set with its augmentation, and the list of ids it comes from."""
    transforms = [RandomScale(*args.scale_range)] if args.random_scale else []
    transforms += [RandomMirror()] if args.random_mirror else []
    transforms += [PadCrop(args.input_size)]
    return open_dataset(args, TRAIN_LISTS, args.num_classes, TrainTransform(args.random_seed, transforms))


def open_net(args: Namespace, folder: Path) -> tuple[nn.Module, dict | None, list[str], str]:
    """The net to train: from a checkpoint (``--resume``), from weights (``--restore-from``) or from random values.

    Returns:
        The net, the checkpoint or None, lines for the log, and why the net's scores on VOC val mean nothing ("" if they do).

    Raises:
        UserError: nothing to restore from, or a folder that holds another run.
    """
    checkpoint_path = folder / "last.ckpt" if args.resume in (None, "last") else Path(args.resume)
    lines = []
    if args.resume and (args.resume != "last" or checkpoint_path.exists()):
        checkpoint = load_checkpoint(checkpoint_path)
        net, lines = resume_net(args, checkpoint)
        lines.insert(0, f"resumed from {checkpoint_path} at step {checkpoint['step']}")
        return net, checkpoint, lines, checkpoint["meta"]["seen_voc_val"]
    if args.resume:
        lines.append(f"no {checkpoint_path} to resume from: starting at step 0")
    elif checkpoint_path.exists():
        advice = "add --resume to go on with it, choose another --snapshot-dir, or delete it"
        raise UserError(f"--snapshot-dir {folder} holds a run already ({checkpoint_path.name}); {advice}")
    options = {"backbone": args.backbone, "num_classes": args.num_classes, "atrous_rates": args.atrous_rates}
    if not args.restore_from:
        if args.batch_norm == "frozen":
            lines.append("warning: a net from scratch learns little with frozen batch norm; use --batch-norm full")
        net, report = build_net(None, **options, batch_norm=args.batch_norm)
        return net, None, lines + report.notes, ""
    if args.restore_from == INITIAL_WEIGHTS and not Path(INITIAL_WEIGHTS).exists():
        advice = "`python scripts/download.py list` shows how to get it"
        raise UserError(f'{INITIAL_WEIGHTS} does not exist: {advice}; --restore-from "" trains from scratch')
    restore_last = not args.not_restore_last
    net, weights, report = load_init(args.restore_from, **options, batch_norm=args.batch_norm, restore_last=restore_last)
    lines += [f"{args.restore_from}: {weights.scheme}", *report.lines()]
    return net, None, lines, weights.seen_voc_val


def resume_net(args: Namespace, checkpoint: dict) -> tuple[nn.Module, list[str]]:
    """The net of a checkpoint, and a line for each option that has changed since."""
    meta, before = checkpoint["meta"], checkpoint["meta"]["args"]
    for name in ("backbone", "num_classes", "atrous_rates"):
        asked = getattr(args, name)
        asked = list(asked) if isinstance(asked, tuple) else asked
        if asked is not None and asked != meta[name]:
            raise UserError(
                f"--resume: the checkpoint has {name} {meta[name]}, but {asked} was asked for; leave the option out"
            )
    if args.batch_norm != before["batch_norm"]:
        raise UserError(f"--resume: the run has --batch-norm {before['batch_norm']}; it cannot change to {args.batch_norm}")
    config = {name: meta[name] for name in ("backbone", "num_classes", "atrous_rates", "stride_in_3x3", "batch_norm_eps")}
    net = deeplabv2(**config, batch_norm=args.batch_norm)
    net.load_state_dict(checkpoint["model"])
    changed = {name for name in before if before[name] != vars(args).get(name)} - {"resume"}
    return net, [f"changed since then: {name} {before[name]} -> {vars(args).get(name)}" for name in sorted(changed)]


def check_finite(bad_batch: Tensor, sampler: StepSampler, data: VOCSegmentation, args: Namespace) -> None:
    """Raise :class:`Diverged`, naming the step and its pictures, if some batch's loss was not finite."""
    if (batch := int(bad_batch)) < 0:
        return
    ids = ", ".join(data.ids[index] for index, _ in sampler.batch(batch))
    advice = "the snapshots are as they were; look at these pictures or lower --learning-rate"
    raise Diverged(f"the loss is not finite at step {batch // args.iter_size + 1}, pictures {ids}: {advice}")


def save_panels(net: nn.Module, data: VOCSegmentation, folder: Path, step: int, count: int, device: torch.device) -> None:
    """Save picture | label | prediction of the first ``count`` pictures as they are, without augmentation."""
    net.eval()
    for index in range(min(count, len(data))):
        image, label = data.load(index)
        with torch.inference_mode():
            logits = predict(net.forward, to_input(image).to(device))
        name = f"{step:06d}_{data.ids[index].replace('/', '_')}.png"
        save_panel(folder / name, image[:, :, ::-1], label, logits.argmax(0).byte().cpu().numpy())
    net.train()
