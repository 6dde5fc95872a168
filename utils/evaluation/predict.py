"""Predictions of a trained net. evaluate.py and scripts/predict.py both use them, so the same images give the same classes."""

import hashlib
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset import to_input
from dataset.classes import Color
from deeplab import Net, fold_batch_norm
from deeplab.inference import NO_CLASS, OVERLAP, enlarge_to_classes, predict_grid, predict_windows
from deeplab.weights import Weights, build_net, load_weights
from utils import distributed
from utils.command import UserError
from utils.device import autocast, check_compiler, select_device, to_host
from utils.evaluation.crf_device import DeviceCRF
from utils.evaluation.crf_pool import CRFPool, logits_stride
from utils.evaluation.images import AnyImage, group_by_canvas
from utils.options import TRAINED_WEIGHTS, Options, shared_options


class NotFinite(UserError):
    """The net's logits are infinite or NaN."""

    exit_status = 1


def open_trained_net(args: Namespace) -> tuple[Net, Weights, torch.device, list[str]]:
    """The net of ``--restore-from``, ready to predict, its weights file, its device, and lines that say what was loaded.

    Raises:
        UserError: the device or the file does not exist, or the file has no head or one that does not fit: nothing is
            predicted with a parameter that no file gave.
    """
    device = select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    path = args.restore_from
    if path == TRAINED_WEIGHTS and not Path(TRAINED_WEIGHTS).exists():
        advice = "train with `python train.py`, see `python scripts/download.py list`, or pass --restore-from"
        raise UserError(f"{TRAINED_WEIGHTS} does not exist: {advice}")
    weights = load_weights(path, abn=args.abn, atrous_rates=args.atrous_rates)
    net, report = build_net(weights, net=args.net, backbone=args.backbone)
    theirs = weights.config.get("net")
    if theirs and theirs != net.config["net"]:
        raise UserError(f"{path} holds the head of a {theirs}, which --net {args.net} cannot use; leave the option out")
    if report.missing:
        raise UserError(f"{path} ({weights.scheme}) holds no usable head; train it first with train.py")
    if args.num_classes not in (None, net.num_classes):
        raise UserError(
            f"{path} is a net for {net.num_classes} classes, which --num-classes {args.num_classes} cannot change; "
            f"train a net for {args.num_classes} classes with train.py, or name another file"
        )
    fold_batch_norm(net.eval())
    return net, weights, device, [f"{path}: {weights.scheme}", *report.lines()]


def check_same_work(options: Options, device: torch.device, weights: Weights, data: Mapping[str, Any]) -> None:
    """Check that all processes have the same options, net and ``data``, see :func:`utils.distributed.check_same`.

    Raises:
        UserError: on all processes, with the first difference.
    """
    if distributed.world_size() == 1:
        return
    total = hashlib.sha256(repr((weights.config, weights.meta)).encode())
    for name, tensor in weights.state.items():
        total.update(name.encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    found = {"kinds of device": device.type, "weights, by their checksum": total.hexdigest()[:16]}
    distributed.check_same({**shared_options(options), **found, **data})


def to_device(net: nn.Module, device: torch.device, compiled: bool) -> None:
    """Move a net to the device on which it predicts; compile it if ``compiled``."""
    net.to(device).to(memory_format=torch.channels_last)
    if compiled:
        check_compiler(device)
        # On a CPU: compile once for all image sizes, with the weights as constants.
        net.compile(**({"dynamic": True, "options": {"freezing": True}} if device.type == "cpu" else {}))


def snapshot_colors(weights: Weights) -> dict[int, Color]:
    """The class colours of the data set that a snapshot was trained on; empty if the file does not give them."""
    colors = weights.meta.get("colors") or []
    return {label: (red, green, blue) for label, (red, green, blue) in enumerate(colors)}


def prediction_options(options: Options) -> dict[str, Any]:
    """The options that :func:`predictions` takes."""
    names = ("scales", "fuse", "mirror", "window", "overlap", "batch_size", "amp")
    return {name: getattr(options, name) for name in names} | {"canvas": options.input_size}


@torch.inference_mode()
def predictions(
    net: Callable[[Tensor], Tensor],
    items: Iterable[AnyImage],
    device: torch.device,
    *,
    pool: CRFPool | DeviceCRF | None = None,
    **options: Any,
) -> Iterator[AnyImage]:
    """The one prediction loop, which evaluation, validation, submission and scripts/predict.py share.

    The device is a batch ahead: it computes the next batch while this one is copied, refined, counted or saved. The host waits
    only for the copy of the image that is yielded next.

    Args:
        net: on ``device``, in eval mode; (N, 3, H, W) -> (N, C, h, w).
        pool: refines the net's predictions with the CRF.
        batch_size: the number of images of one padded size (with a sliding window: of one size) predicted at once.
        canvas: (H, W) to which every image is padded; None uses the size of each image.
        window: (H, W) of the tiles of the sliding window; None predicts whole images.
        keep_logits: keep the logits, for probabilities; their stride is :func:`logits_stride`.
        scales, fuse, mirror, overlap, amp: see :func:`predict_batch`.

    Yields:
        The images with ``classes``, ``prediction``, ``mask`` and, with a pool or ``keep_logits``, ``logits``.

    Raises:
        UserError: an image does not fit ``canvas``.
        NotFinite: the net's logits are not finite.
    """
    logits_to: Callable[[Tensor], Callable[[], Tensor]] | None = None
    if pool:
        logits_to = to_host if pool.on_host else lambda logits: lambda: logits
    predicted = _predicted(net, items, device, logits_to=logits_to, **options)
    if pool:
        pairs = pool.refine((item, item.logits) for item in predicted)
    else:
        pairs = ((item, item.prediction) for item in predicted)
    for item, mask in pairs:
        item.mask = mask
        yield item


def _predicted(
    net: Callable[[Tensor], Tensor],
    items: Iterable[AnyImage],
    device: torch.device,
    *,
    logits_to: Callable[[Tensor], Callable[[], Tensor]] | None,
    batch_size: int = 1,
    canvas: tuple[int, int] | None = None,
    window: tuple[int, int] | None = None,
    keep_logits: bool = False,
    **options: Any,
) -> Iterator[AnyImage]:
    """:func:`predictions` up to the CRF; ``logits_to`` copies the logits to the CRF's device."""
    stride = logits_stride(window)
    ahead: deque[tuple[AnyImage, Callable[[], Tensor], Callable[[], Tensor] | None]] = deque()  # being copied to the host
    for group, size in group_by_canvas(items, canvas, batch_size, stride):
        images = [item.image for item in group]
        for item, logits in zip(group, predict_batch(net, images, size, device, window=window, **options)):
            item.classes = enlarge_to_classes(logits, item.image.shape[:2], stride)
            if keep_logits:
                item.logits = logits
            ahead.append((item, to_host(item.classes), logits_to(logits) if logits_to else None))
            if len(ahead) > batch_size:
                yield arrived(*ahead.popleft())
    yield from (arrived(*entry) for entry in ahead)


def arrived(item: AnyImage, classes: Callable[[], Tensor], logits: Callable[[], Tensor] | None) -> AnyImage:
    """Wait for the copies of an image's results (:func:`to_host`) and store them in it.

    Raises:
        NotFinite: its logits were not finite: :func:`deeplab.inference.enlarge_to_classes` then returns NO_CLASS.
    """
    item.prediction = classes().numpy()
    if item.prediction[0, 0] == NO_CLASS:
        raise NotFinite(
            f"the net's logits are not finite for image {item.id}: its numbers overflow; leave --amp out if it was given, "
            "or use weights that are not damaged"
        )
    if logits:
        item.logits = logits()
    return item


def predict_batch(
    net: Callable[[Tensor], Tensor],
    images: Sequence[np.ndarray],
    canvas: tuple[int, int],
    device: torch.device,
    *,
    scales: Sequence[float] = (1.0,),
    fuse: str = "max",
    mirror: bool = False,
    window: tuple[int, int] | None = None,
    overlap: Fraction = OVERLAP,
    amp: str = "off",
) -> Tensor:
    """The logits of images padded to one canvas, at stride 8, or at stride 1 with a sliding window: (N, C, h, w) float32.

    Args:
        images: (H, W, 3) uint8 BGR each.
        canvas: (H, W) to which they are padded; with a sliding window, their own size.
        scales, fuse, mirror: see :func:`deeplab.inference.predict_grid`.
        window, overlap: see :func:`deeplab.predict_windows`.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``.
    """
    batch = torch.zeros(len(images), 3, *canvas, device=device).contiguous(memory_format=torch.channels_last)
    for padded, image in zip(batch, images):
        height, width = image.shape[:2]
        padded[:, :height, :width] = to_input(torch.from_numpy(image).to(device, non_blocking=True))
    with autocast(device, amp):
        if window:
            return predict_windows(net, batch, window, overlap, scales, mirror, fuse)
        return predict_grid(net, batch, scales, mirror, fuse).float()
