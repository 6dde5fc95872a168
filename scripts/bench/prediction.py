"""The parts about prediction: a forward pass, the evaluation from disk to counts, and the dense CRF."""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import to_input
from deeplab.multiscale import canvas_size
from scripts.bench import reference
from scripts.bench.inputs import compiled_remarks, folded_net, open_pictures, our_modes, reference_net
from scripts.bench.measure import Part, Runner, Variant
from utils.command import usable_cores
from utils.crf_pool import CRFPool
from utils.distributed import autocast
from utils.evaluation import score
from utils.prediction import predict_batch
from utils.samples import Sample, Samples

COUNTED_PIXELS = 20000  # the sample from which the time of counting in Python is extrapolated


def prediction_part(
    args: Namespace, title: str, items: int, published: Callable[[], Runner], ours: Callable[[str, bool], Runner]
) -> Part:
    """Both parts that run the net; ``ours(amp, compiled)``."""
    torch.backends.cudnn.benchmark = False
    variants = [Variant(f"reference, on {args.canvas[0]}x{args.canvas[1]}", published, items)]
    for name, amp, compiled in our_modes(args, compiled=args.compile is not False):
        flops_of = "ours" if compiled else ""
        variants.append(Variant(name, partial(ours, amp, compiled), items, amp, flops_of, memory=not compiled))
    return Part(f"{title}, {args.net}, {args.backbone}, float32", variants, compiled_remarks)


def predict(args: Namespace, device: torch.device) -> Part:
    """One forward pass."""
    image = open_pictures(args).load(0)[0]
    height, width = image.shape[:2]
    size = canvas_size((height, width))

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
        inputs[0, :, :height, :width] = to_input(image)
        inputs = inputs.to(device)

        def run() -> None:
            with torch.inference_mode(), autocast(device, amp):
                net(inputs)

        return Runner(run, net)

    title = f"forward pass: a picture of {height}x{width} (padded {size[0]}x{size[1]})"
    return prediction_part(args, title, 1, published, ours)


def evaluate(args: Namespace, device: torch.device) -> Part:
    """Pictures and masks from the disk, logits, classes, counts."""
    data = open_pictures(args)
    counting = []  # seconds a picture, one sample a run

    def published() -> Runner:
        net = reference_net(args, device).eval()

        def run() -> float:
            start = time.perf_counter()
            pixels = 0
            for image_id in data.ids:
                image, label = reference.read(data.image_path(image_id), data.label_path(image_id))
                predictions = reference.predict(net, image, args.canvas, device).flatten()
                labels = np.asarray(label, int).flatten()
                pixels += labels.size
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            reference.count(labels[:COUNTED_PIXELS], predictions[:COUNTED_PIXELS], args.num_classes)
            a_pixel = (time.perf_counter() - start) / min(labels.size, COUNTED_PIXELS)
            counting.append(a_pixel * pixels / usable_cores() / len(data))
            return seconds + counting[-1] * len(data)

        return Runner(run, net)

    def ours(amp: str, compiled: bool) -> Runner:
        net = folded_net(args, device, compiled)

        def run() -> None:
            score(net, data, device, amp=amp, num_workers=args.num_workers or 0)[""].scores()

        return Runner(run, net)

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        first = next(iter(rows.values()))
        first["counting_s_per_picture"] = float(np.median(counting))
        yield (
            f"the reference counts pixels one by one in Python, on all {usable_cores()} cores at once as published: "
            f"{first['counting_s_per_picture']:.3f} s a picture, extrapolated from {COUNTED_PIXELS} pixels"
        )
        yield from compiled_remarks(rows)

    part = prediction_part(args, f"evaluation: {len(data)} pictures from disk to counts", len(data), published, ours)
    part.remarks = remarks
    return part


def crf_inputs(args: Namespace, device: torch.device) -> list[tuple[Sample, Tensor]]:
    """``--crf-pictures`` pictures and their (C, h, w) logits: the net's with ``--restore-from``, else made from the masks."""
    pictures = Samples(open_pictures(args))
    samples = [pictures[index] for index in range(len(pictures))]
    net = folded_net(args, device, False) if args.restore_from else None
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for sample in itertools.islice(itertools.cycle(samples), args.crf_pictures or 3 * max(args.crf_workers)):
        canvas = canvas_size(sample.label.shape)
        if net:
            with torch.inference_mode():
                logits = predict_batch(net, [sample.image], canvas, device)[0].cpu()
        else:
            classes = torch.from_numpy(sample.label).long() % 255
            one_hot = F.one_hot(classes, args.num_classes).permute(2, 0, 1).float()
            logits = 8 * F.adaptive_avg_pool2d(one_hot, ((canvas[0] - 1) // 8 + 1, (canvas[1] - 1) // 8 + 1))
            logits += 0.5 * torch.randn(logits.shape, generator=generator)
        inputs.append((sample, logits))
    return inputs


def crf(args: Namespace, device: torch.device) -> Part:
    """The dense CRF, on as many processes of the reference as of ours."""
    inputs = crf_inputs(args, device)
    results: dict[str, list[np.ndarray]] = {}

    def published(name: str, workers: int) -> Runner:
        pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        images, logits = [sample.image for sample, _ in inputs], [logits.numpy() for _, logits in inputs]

        def run() -> None:
            results[name] = list(pool.map(reference.crf, images, logits))

        return Runner(run, close=pool.shutdown)

    def ours(name: str, workers: int, prune: float) -> Runner:
        pool = CRFPool(workers, prune)

        def run() -> None:
            results[name] = [prediction for _, prediction in pool.refine(inputs)]

        return Runner(run, close=pool.close)

    variants = []
    for workers in dict.fromkeys(args.crf_workers):
        processes = f"{workers} process{'es' * (workers > 1)}"
        base = f"reference, {processes}"
        variants.append(Variant(base, partial(published, base, workers), len(inputs), flops_of=None, memory=False, base=base))
        for prune in (0.0, 0.01, 0.05) if workers == args.crf_workers[-1] else (0.0,):
            name = f"ours, {processes}" + f" --crf-prune {prune}" * (prune > 0)
            build = partial(ours, name, workers, prune)
            variants.append(Variant(name, build, len(inputs), flops_of=None, memory=False, base=base))

    def remarks(rows: dict[str, dict]) -> Iterator[str]:
        truth = next(iter(results.values()))
        for name, row in rows.items():
            same = sum(int((a == b).sum()) for a, b in zip(results[name], truth))
            row["agreement"] = same / sum(a.size for a in truth)
            seconds, percent = row["median_s"] / row["items"], 100 * row["agreement"]
            yield f"{name}: {seconds:.2f} s a picture, {percent:.3f} % of the pixels as the reference has them"
        yield "x ref: against the reference on as many processes"
        if not args.restore_from:
            yield "the probabilities are made up: see what pruning does to real ones with --data-dir and --restore-from"

    sizes = ", ".join(sorted({f"{sample.label.shape[0]}x{sample.label.shape[1]}" for sample, _ in inputs}))
    title = f"dense CRF: pictures of {sizes} ({len(inputs)} a round), {args.num_classes} classes, 10 iterations"
    return Part(title, variants, remarks, args.crf_repeats)
