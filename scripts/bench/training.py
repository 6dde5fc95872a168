"""The parts about training: a step on one scale and on three, and the samples."""

import itertools
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d

from dataset import Crop, StepSampler, to_input
from deeplab import multi_scale_loss, single_scale_loss
from scripts.bench import reference
from scripts.bench.inputs import REFERENCE, compiled_remarks, open_pictures, our_modes, random_net, reference_net
from scripts.bench.measure import Part, Runner, Variant
from utils.distributed import autocast
from utils.loader import make_loader
from utils.objective import Objective
from utils.options import training_parser
from utils.schedule import GuardedSGD
from utils.training import open_training_data

RATE = 0.0  # of the optimisers: the same arithmetic, and the values stay as they are, however many steps are taken

LOSS_OPTIONS = {"size": "input", "aux_weight": 0.4}  # of the nets with an auxiliary head, as published
AS_PUBLISHED: dict[str, dict] = {"deeplabv2": {}, "deeplabv3": LOSS_OPTIONS, "pspnet": LOSS_OPTIONS}

Loss = Callable[..., dict[str, Tensor]]
ReferenceLoss = Callable[..., Tensor]


def random_batch(args: Namespace, device: torch.device) -> Crop:
    """Pictures of noise, and labels in patches, some of them void."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, *args.input_size, 3), generator=generator, dtype=torch.uint8)
    patches = torch.randint(-1, args.num_classes, (args.batch_size, 1, 9, 9), generator=generator)
    labels = F.interpolate(patches.float(), size=args.input_size, mode="nearest")[:, 0].long()
    labels = labels.masked_fill(labels < 0, 255).byte()
    return Crop(images.to(device), labels.to(device), torch.ones(args.batch_size, 256, dtype=torch.bool))


def reference_step(
    args: Namespace, device: torch.device, loss: Callable[..., Tensor], norm: Callable[..., nn.Module]
) -> Runner:
    net = reference_net(args, device, norm).train()
    optimizer = reference.make_optimizer(net, RATE) if args.net == "deeplabv2" else torch.optim.SGD(net.parameters(), RATE)
    pictures, bytes_, _ = random_batch(args, device)
    images, labels = to_input(pictures).contiguous(), bytes_.long()

    def run() -> None:
        reference.train_step(net, optimizer, images, labels, loss)

    return Runner(run, net, training=True)


def our_step(
    args: Namespace,
    device: torch.device,
    loss: Loss,
    amp: str = "off",
    compiled: bool = False,
    grad_checkpoint: bool = False,
    one_scale: bool = False,
    read: bool = False,
) -> Runner:
    """A step of ``utils.training``, without its log; ``read`` takes each batch from the training loader."""
    net = random_net(args).to(device).to(memory_format=torch.channels_last).train()
    net.grad_checkpoint = grad_checkpoint
    if compiled:
        net.compile()
    options = {"one_scale_at_a_time": True} if one_scale else {}
    objective = Objective(net, loss, **AS_PUBLISHED[args.net], **options)
    optimizer = GuardedSGD(net, RATE)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    loader = training_loader(args, args.num_workers, device) if read else itertools.repeat(random_batch(args, device))
    batches = iter(loader)

    def run() -> None:
        images, labels, _ = next(batches)
        images = to_input(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True).long()
        with autocast(device, amp):
            losses = objective(images, labels)
        scaler.scale(losses["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Runner(run, net, training=True)


def training_part(
    args: Namespace, device: torch.device, what: str, published: ReferenceLoss, ours: Loss, last: dict[str, dict]
) -> Part:
    """Both training parts; ``last`` is (row: option of :func:`our_step`) of the row after ours."""
    torch.backends.cudnn.benchmark = True  # as both training loops do
    items = args.batch_size
    plain = partial(
        reference_step, args, device, lambda *batch: ours(*batch, **AS_PUBLISHED[args.net])["loss"], FrozenBatchNorm2d
    )
    first = REFERENCE if args.net == "deeplabv2" else "unfolded, frozen batch norm, NCHW"
    variants = [Variant(first, plain, items)]
    if args.net == "deeplabv2":
        variants = [Variant(first, partial(reference_step, args, device, published, reference.batch_norm), items)]
        if ours is single_scale_loss:
            variants.append(Variant("unfolded, frozen batch norm", plain, items))
    for name, amp, compiled in our_modes(args, compiled=args.compile is True):
        build = partial(our_step, args, device, ours, amp, compiled)
        memory = not compiled or device.type == "cuda"  # on a CPU the compiler itself would be most of the resident set
        variants.append(Variant(name, build, items, amp, "ours" if compiled else "", memory))
    if ours is single_scale_loss and (device.type == "cuda" or args.num_workers is not None):
        build = partial(our_step, args, device, ours, amp, compiled, read=True)
        variants.append(Variant(f"{name}, reading pictures", build, items, amp, "ours", memory=False))
    for name, option in last.items():
        variants.append(Variant(f"ours {name}", partial(our_step, args, device, ours, **option), items))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        yield from compiled_remarks(rows)
        if base := rows[first].get("beyond_bytes"):
            shares = [f"{name} {row['beyond_bytes'] / base:.2f}x" for name, row in rows.items() if "beyond_bytes" in row]
            yield "memory beyond weights, gradients and momentum, of the reference's: " + ", ".join(shares[1:])

    height, width = args.input_size
    batch = f"batch {args.batch_size} of {height}x{width}, {args.net}, {args.backbone}, {args.num_classes} classes, float32"
    return Part(f"training step, {what}: {batch}", variants, remarks)


def train(args: Namespace, device: torch.device) -> Part:
    """A single-scale training step."""
    last = {"--grad-checkpoint": {"grad_checkpoint": True}}
    return training_part(args, device, "single scale", reference.single_scale_loss, single_scale_loss, last)


def msc(args: Namespace, device: torch.device) -> Part:
    """A multi-scale training step."""
    last = {"--one-scale-at-a-time": {"one_scale": True}}
    return training_part(args, device, "scales 1, 0.75, 0.5", reference.multi_scale_loss, multi_scale_loss, last)


def training_loader(args: Namespace, workers: int | None, device: torch.device) -> DataLoader:
    """The loader of ``utils.training`` with scaling, mirroring and cropping."""
    options = ["--data-dir", args.data_dir, "--random-scale", "--random-mirror", "--batch-size", str(args.batch_size)]
    options += ["--input-size", ",".join(map(str, args.input_size)), "--num-classes", str(args.num_classes)]
    options += ["--data-list", args.data_list] if args.data_list else []
    parsed = training_parser("", batch_size=1, iter_size=1, snapshot_dir="").parse_args(options)
    pictures, _ = open_training_data(parsed)
    sampler = StepSampler(len(pictures), args.batch_size, parsed.random_seed)
    return make_loader(pictures, sampler, parsed.num_workers if workers is None else workers, device)


def data(args: Namespace, device: torch.device) -> Part:
    """Training samples a second: read, scale, mirror, crop."""
    pictures = open_pictures(args)
    batches = max(1, 48 // args.batch_size)
    items = batches * args.batch_size

    def published() -> Runner:
        random.seed(0)
        paths = itertools.cycle([(pictures.image_path(i), pictures.label_path(i)) for i in pictures.ids])

        def run() -> None:
            for _ in range(items):
                reference.training_sample(*next(paths), args.input_size)

        return Runner(run)

    def ours(workers: int) -> Runner:
        stream = iter(training_loader(args, workers, device))

        def run() -> float:
            for _ in range(2 * workers):  # what the workers had ready
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            return time.perf_counter() - start

        return Runner(run)

    variants = [Variant("reference, in this process", published, items, flops_of=None, memory=False)]
    for workers in (0, 1, 2):
        name = f"ours, {workers} worker{'s' * (workers > 1)}" if workers else "ours, in this process"
        variants.append(Variant(name, partial(ours, workers), items, flops_of=None, memory=False))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        for workers, row in zip((1, 1, 1, 2), rows.values()):
            row["items_per_s_per_process"] = row["items_per_s"] / workers
        rates = ", ".join(f"{name} {row['items_per_s_per_process']:.1f}" for name, row in rows.items())
        yield f"images/s a process: {rates}"

    height, width = args.input_size
    return Part(f"training data: scale, mirror, crop {height}x{width}, batch {args.batch_size}", variants, remarks)
