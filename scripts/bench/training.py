"""The parts about training: a step on one scale and on three, the samples, and the way to the first step."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dataset import StepSampler
from deeplab import multi_scale_backward, multi_scale_loss, single_scale_loss
from scripts.bench import reference
from scripts.bench.inputs import REFERENCE, compiled_remarks, make_net, open_pictures, our_modes, reference_net
from scripts.bench.measure import Part, Runner, Variant
from utils.checkpoint import make_meta, save_snapshot
from utils.command import UserError
from utils.distributed import autocast
from utils.loader import make_loader
from utils.options import training_parser
from utils.schedule import param_groups
from utils.training import Objective, open_training_data

ROOT = Path(__file__).resolve().parents[2]
RATE = 0.0  # of the optimisers: the same arithmetic, and the values stay as they are, however many steps are taken


def random_batch(args: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) float32 in the range of pictures, and (N, H, W) int64 labels in patches, some of them void."""
    generator = torch.Generator().manual_seed(0)
    images = 60 * torch.randn(args.batch_size, 3, *args.input_size, generator=generator)
    patches = torch.randint(-1, args.num_classes, (args.batch_size, 1, 9, 9), generator=generator)
    labels = F.interpolate(patches.float(), size=args.input_size, mode="nearest")[:, 0].long()
    return images.to(device), labels.masked_fill(labels < 0, 255).to(device)


def reference_step(args: Namespace, device: torch.device, loss_function: Callable, norm: Callable) -> Runner:
    net = reference_net(args, device, norm).train()
    optimizer = reference.make_optimizer(net, RATE)
    images, labels = random_batch(args, device)

    def run() -> None:
        reference.train_step(net, optimizer, images, labels, loss_function)

    return Runner(run, net, training=True)


def our_step(
    args: Namespace,
    device: torch.device,
    loss_function: Callable,
    amp: str = "off",
    compiled: bool = False,
    grad_checkpoint: bool = False,
    one_scale: bool = False,
    read: bool = False,
) -> Runner:
    """A step of ``utils.training``, without its log; ``read`` takes each batch from the training loader."""
    net = make_net(args).to(device, memory_format=torch.channels_last).train()
    net.grad_checkpoint = grad_checkpoint
    if compiled:
        net.compile()
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(param_groups(net, 5e-4), lr=RATE, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    objective = Objective(net, loss_function)
    batches = iter(training_loader(args, args.num_workers, device)) if read else itertools.repeat(random_batch(args, device))

    def forward(images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        with autocast(device, amp):
            return objective(images, labels)

    def run() -> None:
        images, labels = next(batches)
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        if one_scale:
            multi_scale_backward(forward, images, labels, scale_loss=scaler.scale)
        else:
            scaler.scale(forward(images, labels)["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Runner(run, net, training=True)


def training_part(args: Namespace, device: torch.device, title: str, losses: tuple[Callable, Callable], last: dict) -> Part:
    """Both training parts; ``last`` is (row: option of :func:`our_step`) of the row after ours."""
    torch.backends.cudnn.benchmark = True  # as both training loops do
    published, ours = losses

    def same_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return ours(net, images, labels)["loss"]

    items = args.batch_size
    variants = [Variant(REFERENCE, partial(reference_step, args, device, published, reference.batch_norm), items)]
    if ours is single_scale_loss:
        build = partial(reference_step, args, device, same_loss, FrozenBatchNorm2d)
        variants.append(Variant("unfolded, frozen batch norm", build, items))
    for name, amp, compiled in our_modes(args, compiled=args.compile is True):
        build = partial(our_step, args, device, ours, amp, compiled)
        memory = not compiled or device.type == "cuda"  # on a CPU the compiler itself would be most of the resident set
        variants.append(Variant(name, build, items, amp, "ours" if compiled else "", memory=memory))
    if ours is single_scale_loss and (device.type == "cuda" or args.num_workers is not None):
        build = partial(our_step, args, device, ours, amp, compiled, read=True)
        variants.append(Variant(f"{name}, reading pictures", build, items, amp, "ours", memory=False))
    for name, option in last.items():
        variants.append(Variant(f"ours {name}", partial(our_step, args, device, ours, **option), items))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        yield from compiled_remarks(rows)
        base = rows[REFERENCE].get("beyond_bytes")
        parts = [
            f"{name} {row['beyond_bytes'] / base:.2f}x"
            for name, row in list(rows.items())[1:]
            if base and "beyond_bytes" in row
        ]
        if parts:
            yield "memory beyond weights, gradients and momentum, of the reference's: " + ", ".join(parts)

    return Part(title, variants, remarks=remarks)


def describe_batch(args: Namespace) -> str:
    height, width = args.input_size
    return f"batch {args.batch_size} of {height}x{width}, {args.backbone}, {args.num_classes} classes, float32"


def train(args: Namespace, device: torch.device) -> Part:
    """A single-scale training step."""
    losses = (reference.single_scale_loss, single_scale_loss)
    last = {"--grad-checkpoint": {"grad_checkpoint": True}}
    return training_part(args, device, f"training step, single scale: {describe_batch(args)}", losses, last)


def msc(args: Namespace, device: torch.device) -> Part:
    """A multi-scale training step."""
    losses = (reference.multi_scale_loss, multi_scale_loss)
    last = {"--one-scale-at-a-time": {"one_scale": True}}
    return training_part(args, device, f"training step, scales 1, 0.75, 0.5: {describe_batch(args)}", losses, last)


def training_loader(args: Namespace, workers: int | None, device: torch.device):
    """The loader of ``utils.training`` with scaling, mirroring and cropping."""
    options = ["--data-dir", args.data_dir, "--random-scale", "--random-mirror", "--batch-size", str(args.batch_size)]
    options += ["--input-size", ",".join(map(str, args.input_size)), "--num-classes", str(args.num_classes)]
    options += ["--data-list", args.data_list] if args.data_list else []
    parsed = training_parser("", batch_size=1, iter_size=1, snapshot_dir="").parse_args(options)
    data, _ = open_training_data(parsed)
    sampler = StepSampler(len(data), args.batch_size, parsed.random_seed)
    return make_loader(data, sampler, parsed.num_workers if workers is None else workers, device)


def data(args: Namespace, device: torch.device) -> Part:
    """Training samples a second: read, scale, mirror, crop."""
    pictures = open_pictures(args)
    batches = max(1, 48 // args.batch_size)

    def published() -> Runner:
        random.seed(0)
        paths = itertools.cycle([(pictures.image_path(i), pictures.label_path(i)) for i in pictures.ids])

        def run() -> None:
            for _ in range(batches * args.batch_size):
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

    items = batches * args.batch_size
    options = {"counted": False, "memory": False}
    variants = [Variant("reference, in this process", published, items, **options)]
    for workers in (0, 1, 2):
        name = f"ours, {workers} worker{'s' * (workers != 1)}" if workers else "ours, in this process"
        variants.append(Variant(name, partial(ours, workers), items, **options))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        for workers, row in zip((1, 1, 1, 2), rows.values()):
            row["items_per_s_per_process"] = row["items_per_s"] / workers
        rates = ", ".join(f"{name} {row['items_per_s_per_process']:.1f}" for name, row in rows.items())
        yield f"images/s a process: {rates}"

    height, width = args.input_size
    return Part(f"training data: scale, mirror, crop {height}x{width}, batch {args.batch_size}", variants, remarks=remarks)


def startup(args: Namespace, device: torch.device) -> Part:
    """From the command to the first training step."""
    scratch = Path(args.scratch)
    snapshot = args.restore_from
    if not snapshot:
        net = make_net(args)
        snapshot = str(scratch / "net.pth")
        save_snapshot(snapshot, net, make_meta(net, None, 0, {}))
    code = "import sys, torch, torchvision, cv2; torch.load(sys.argv[1], map_location='cpu', weights_only=True)"
    options = ["--restore-from", snapshot, "--data-dir", args.data_dir, "--num-steps", "1", "--device", str(device)]
    options += ["--num-classes", str(args.num_classes), "--batch-size", str(args.batch_size)]
    options += ["--input-size", ",".join(map(str, args.input_size))]
    options += ["--data-list", args.data_list] if args.data_list else []

    def imports() -> None:
        subprocess.run([sys.executable, "-c", code, snapshot], check=True)

    def to_first_step() -> float:
        folder = tempfile.mkdtemp(dir=scratch)
        command = [sys.executable, str(ROOT / "train.py"), *options, "--snapshot-dir", folder]
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        line = ""
        try:
            for line in process.stdout:
                if " pictures a step" in line:
                    return time.perf_counter() - start
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        raise UserError(f"train.py did not get to its first step; the last that it said: {line.strip()}")

    plain = {"counted": False, "memory": False}
    variants = [Variant("import torch, torchvision, cv2; read the file", lambda: Runner(imports), 1, **plain)]
    variants.append(Variant("train.py, from the command to its first step", lambda: Runner(to_first_step), 1, **plain))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        _, ours = rows.values()
        yield f"train.py takes {1 / ours['speedup']:.2f}x the time of the imports and the file"

    return Part(f"start-up: {args.backbone} from a snapshot", variants, "starts", remarks)
