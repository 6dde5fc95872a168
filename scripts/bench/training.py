"""The training parts: a step at one scale and at three scales, and data loading."""

import itertools
import random
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dataset import Pad, RandomCrop, RandomMirror, RandomScale, StepSampler, TrainTransform, to_input
from deeplab import multi_scale_loss, single_scale_loss
from deeplab.loss import Objective
from scripts.bench import reference
from scripts.bench.inputs import open_images, our_modes, random_net, reference_net
from scripts.bench.measure import Row, Runner, Table
from utils.device import autocast
from utils.loader import make_loader
from utils.training.optimizer import GuardedSGD

LEARNING_RATE = 0.0  # same arithmetic, and the weights never change


def random_batch(args: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, H, W, 3) uint8 noise and (N, H, W) uint8 labels in patches, some of them 255 (ignored)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, *args.input_size, 3), generator=generator, dtype=torch.uint8)
    patches = torch.randint(-1, args.num_classes, (args.batch_size, 1, 9, 9), generator=generator)
    labels = F.interpolate(patches.float(), size=args.input_size, mode="nearest")[:, 0].long()
    return images.to(device), labels.masked_fill(labels < 0, 255).byte().to(device)


def reference_step(
    args: Namespace, device: torch.device, loss: Callable[..., Tensor], norm: Callable[..., nn.Module] = reference.batch_norm
) -> Runner:
    """A training step of the reference; ``loss(net, images, labels)`` returns a scalar."""
    net = reference_net(args, device, norm).train()
    optimizer = reference.make_optimizer(net, LEARNING_RATE)
    images, labels = random_batch(args, device)
    images, labels = to_input(images).contiguous(), labels.long()  # N 3 H W float32, N H W int64
    return Runner(lambda: reference.train_step(net, optimizer, images, labels, loss), net=net, training=True)


def our_step(
    args: Namespace,
    device: torch.device,
    loss: Callable[..., dict[str, Tensor]],
    amp: str = "off",
    compiled: bool = False,
    grad_checkpoint: bool = False,
    **loss_options: object,
) -> Runner:
    """A step of the training loop, without data loading and logging."""
    net = random_net(args).to(device).to(memory_format=torch.channels_last).train()
    net.grad_checkpoint = grad_checkpoint
    objective = Objective(net, loss, **loss_options)
    if compiled:
        objective.compile(dynamic=False)
    optimizer = GuardedSGD(net, LEARNING_RATE)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    images, labels = random_batch(args, device)

    def run() -> None:
        with autocast(device, amp):
            losses = objective(to_input(images), labels.long())
        scaler.scale(losses["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Runner(run, net=net, training=True)


def step_table(args: Namespace, device: torch.device, scales: str, published: Callable, loss: Callable) -> Table:
    """The reference's step and ours; each part adds rows."""
    torch.backends.cudnn.benchmark = True  # as in the training loop: all crops have one size
    rows = [Row("reference, as published", partial(reference_step, args, device, published), args.batch_size)]
    for name, amp, compiled in our_modes(args, compiled=args.compile is True):
        rows.append(Row(name, partial(our_step, args, device, loss, amp, compiled), args.batch_size, amp, compiled))
    height, width = args.input_size
    return Table(f"training step, {scales}: batch {args.batch_size} of {height}x{width}, {args.backbone}", rows)


def train(args: Namespace, device: torch.device) -> Table:
    """The part ``train``: a step of train.py."""
    table = step_table(args, device, "one scale", reference.single_scale_loss, single_scale_loss)
    frozen = partial(reference_step, args, device, lambda *batch: single_scale_loss(*batch)["loss"], FrozenBatchNorm2d)
    table.rows.insert(1, Row("unfolded, frozen batch norm", frozen, args.batch_size))
    checkpointed = partial(our_step, args, device, single_scale_loss, grad_checkpoint=True)
    table.rows.append(Row("ours --grad-checkpoint", checkpointed, args.batch_size))
    return table


def msc(args: Namespace, device: torch.device) -> Table:
    """The part ``msc``: a step of train_msc.py."""
    table = step_table(args, device, "scales 1, 0.75, 0.5", reference.multi_scale_loss, multi_scale_loss)
    one_at_a_time = partial(our_step, args, device, multi_scale_loss, one_scale_at_a_time=True)
    table.rows.append(Row("ours --one-scale-at-a-time", one_at_a_time, args.batch_size))
    return table


def data(args: Namespace, device: torch.device) -> Table:
    """The part ``data``: read, scale, flip horizontally, crop."""
    batches = max(1, 48 // args.batch_size)
    images = batches * args.batch_size

    def published() -> Runner:
        random.seed(0)
        files = open_images(args)
        paths = itertools.cycle([(files.image_path(image_id), files.label_path(image_id)) for image_id in files.ids])
        return Runner(lambda: [reference.training_sample(*next(paths), args.input_size) for _ in range(images)])

    def ours(workers: int) -> Runner:
        transform = TrainTransform(
            0, [RandomScale(0.5, 1.5), RandomMirror(), RandomCrop(args.input_size), Pad(args.input_size)]
        )
        files = open_images(args, transform)
        stream = iter(make_loader(files, StepSampler(len(files), args.batch_size, 0), workers, device))
        take = lambda count: [next(stream) for _ in range(count)]  # noqa: E731
        return Runner(partial(take, batches), setup=partial(take, 2 * workers))  # setup takes the batches that are prefetched

    rows = [Row("reference, in this process", published, images), Row("ours, in this process", partial(ours, 0), images)]
    rows.append(Row("ours, 1 worker", partial(ours, 1), images))
    height, width = args.input_size
    title = f"data loading: scale, flip, crop {height}x{width}, {batches} batches of {args.batch_size}"
    return Table(title, rows, nets=False)
