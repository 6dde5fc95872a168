"""The parts about prediction: a forward pass, the evaluation from disk to counts, and the dense CRF."""

import itertools
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset import to_input
from deeplab import dense_crf
from deeplab.multiscale import canvas_size, enlarge
from scripts.bench import reference
from scripts.bench.inputs import compiled_remarks, folded_net, open_pictures, our_modes, reference_net
from scripts.bench.measure import Part, Runner, Variant
from utils.crf_pool import CRFPool
from utils.distributed import autocast
from utils.evaluation import predict_batch, score
from utils.options import evaluation_parser
from utils.samples import Sample, Samples

COUNTED_PIXELS = 20000  # the sample from which the time of counting in Python is extrapolated


def predict(args: Namespace, device: torch.device) -> Part:
    """One forward pass."""
    torch.backends.cudnn.benchmark = False
    image = open_pictures(args).load(0)[0]
    size = canvas_size(image.shape[:2])

    def published() -> Runner:
        net = reference_net(args, device).eval()
        inputs = reference.on_canvas(image, args.canvas).to(device)

        def run() -> None:
            with torch.no_grad():
                net(inputs)

        return Runner(run, net)

    def ours(amp: str, compiled: bool) -> Runner:
        net = folded_net(args, device, compiled)
        inputs = torch.zeros(1, 3, *size).contiguous(memory_format=torch.channels_last)
        inputs[0, :, : image.shape[0], : image.shape[1]] = to_input(image)
        inputs = inputs.to(device)

        def run() -> None:
            with torch.inference_mode(), autocast(device, amp):
                net(inputs)

        return Runner(run, net)

    variants = [Variant(f"reference, on {args.canvas[0]}x{args.canvas[1]}", published, 1)]
    for name, amp, compiled in our_modes(args, compiled=args.compile is not False):
        flops_of = "ours" if compiled else ""
        variants.append(Variant(name, partial(ours, amp, compiled), 1, amp, flops_of, memory=not compiled))
    title = (
        f"forward pass: a picture of {image.shape[0]}x{image.shape[1]} (padded {size[0]}x{size[1]}), {args.backbone}, float32"
    )
    return Part(title, variants, remarks=compiled_remarks)


def evaluate(args: Namespace, device: torch.device) -> Part:
    """Pictures and masks from the disk, logits, classes, counts."""
    torch.backends.cudnn.benchmark = False
    data = open_pictures(args)
    counting = []  # seconds a picture, one sample a run

    def published() -> Runner:
        net = reference_net(args, device).eval()

        def run() -> float:
            start = time.perf_counter()
            pixels = 0
            for image_id in data.ids:
                image = cv2.imread(str(data.image_path(image_id)), cv2.IMREAD_COLOR)
                label = np.array(Image.open(data.label_path(image_id)))
                prediction = reference.predict(net, image, args.canvas, device)
                labels, predictions = np.asarray(label, int).flatten(), prediction.flatten()
                pixels += labels.size
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            sample = slice(0, COUNTED_PIXELS)
            reference.count(labels[sample], predictions[sample], args.num_classes)
            a_pixel = (time.perf_counter() - start) / labels[sample].size
            counting.append(a_pixel * pixels / (os.cpu_count() or 1) / len(data))
            return seconds + counting[-1] * len(data)

        return Runner(run, net)

    def ours(amp: str, compiled: bool) -> Runner:
        net = folded_net(args, device, compiled)
        workers = evaluation_parser("").parse_args([]).num_workers if args.num_workers is None else args.num_workers

        def run() -> None:
            score(net, data, device, amp=amp, num_workers=workers)[""].scores()

        return Runner(run, net)

    variants = [Variant(f"reference, on {args.canvas[0]}x{args.canvas[1]}", published, len(data))]
    for name, amp, compiled in our_modes(args, compiled=args.compile is not False):
        flops_of = "ours" if compiled else ""
        variants.append(Variant(name, partial(ours, amp, compiled), len(data), amp, flops_of, memory=not compiled))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        seconds = rows[variants[0].name]["counting_s_per_picture"] = float(np.median(counting))
        yield (
            f"the reference counts pixels one by one in Python, on all {os.cpu_count()} cores at once as published: "
            f"{seconds:.3f} s a picture, extrapolated from {COUNTED_PIXELS} pixels"
        )
        yield from compiled_remarks(rows)

    return Part(f"evaluation: {len(data)} pictures from disk to counts, {args.backbone}, float32", variants, remarks=remarks)


def crf_inputs(args: Namespace, device: torch.device) -> list[tuple[Sample, Tensor]]:
    """``--crf-pictures`` pictures and their (C, h, w) logits: the net's with ``--restore-from``, else made from the masks."""
    data = open_pictures(args)
    pictures = Samples(data)
    samples = [pictures[index] for index in range(len(data))]
    if not args.restore_from:
        samples = [sample for sample in samples if sample.label.size == 375 * 500] or samples
    net = folded_net(args, device, False) if args.restore_from else None
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for sample in itertools.islice(itertools.cycle(samples), args.crf_pictures):
        canvas = canvas_size(sample.label.shape)
        if net:
            with torch.inference_mode():
                logits = predict_batch(net, [sample.image], canvas, device)[0].cpu()
        else:
            classes = torch.from_numpy(sample.label).long() % 255
            one_hot = F.one_hot(classes, args.num_classes).permute(2, 0, 1).float()
            logits = F.adaptive_avg_pool2d(one_hot, [(side - 1) // 8 + 1 for side in canvas])
            logits = 8 * logits + 0.5 * torch.randn(logits.shape, generator=generator)
        inputs.append((sample, logits))
    return inputs


def crf(args: Namespace, device: torch.device) -> Part:
    """The dense CRF."""
    inputs = crf_inputs(args, device)
    results: dict[str, list[np.ndarray]] = {}

    def in_turn(name: str, refine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Runner:
        def refine_one(sample: Sample, logits: Tensor) -> np.ndarray:
            probabilities = enlarge(logits[None], sample.label.shape)[0].softmax(dim=0).numpy()
            return refine(sample.image[:, :, ::-1], probabilities)

        def run() -> None:
            results[name] = [refine_one(*entry) for entry in inputs]

        return Runner(run, warm_up=lambda: refine_one(*inputs[0]))

    def pooled(name: str, workers: int, prune: float) -> Runner:
        pool = CRFPool(workers, prune)

        def run() -> None:
            results[name] = [prediction for _, prediction in pool.refine(inputs)]

        return Runner(run, warm_up=lambda: list(pool.refine(inputs[:1])), close=pool.close)

    options = {"counted": False, "memory": False}
    name = "reference, one after another"
    variants = [Variant(name, partial(in_turn, name, reference.crf), len(inputs), **options)]
    name = "ours, in this process"
    variants.append(
        Variant(name, partial(in_turn, name, lambda *pair: dense_crf(*pair).argmax(axis=0)), len(inputs), **options)
    )
    for prune in (0.0, 0.01, 0.05):
        for workers in args.crf_workers if not prune else args.crf_workers[-1:]:
            name = f"ours, {workers} worker{'s' * (workers > 1)}" + f" --crf-prune {prune}" * (prune > 0)
            variants.append(Variant(name, partial(pooled, name, workers, prune), len(inputs), **options))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        truth = results[variants[0].name]
        for name, row in rows.items():
            same = sum(int((a == b).sum()) for a, b in zip(results[name], truth))
            row["agreement"] = same / sum(a.size for a in truth)
        for name, row in rows.items():
            seconds, same = row["median_s"] / row["items"], 100 * row["agreement"]
            yield f"{name}: {seconds:.2f} s a picture, {same:.3f} % of the pixels as the reference has them"
        if not args.restore_from:
            yield "the probabilities are made up: see what pruning does to real ones with --data-dir and --restore-from"

    sizes = ", ".join(sorted({f"{sample.label.shape[0]}x{sample.label.shape[1]}" for sample, _ in inputs}))
    title = f"dense CRF: pictures of {sizes} ({len(inputs)} a round), {args.num_classes} classes, 10 iterations"
    return Part(title, variants, remarks=remarks, repeats=args.crf_repeats)
