"""The parts without training: evaluation, from disk to the confusion matrix, and the dense CRF."""

import itertools
import timeit
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import timer

from deeplab import CRFParams, dense_crf, fold_batch_norm
from deeplab.inference import canvas_size, enlarge
from scripts.bench import reference
from scripts.bench.inputs import open_images, our_modes, random_net, reference_net
from scripts.bench.measure import Row, Runner, Table
from utils.evaluation.crf_device import DeviceCRF
from utils.evaluation.crf_pool import CRFPool
from utils.evaluation.images import Sample, Samples
from utils.evaluation.predict import to_device
from utils.evaluation.score import score
from utils.processes import default_processes, usable_cores


def evaluate(args: Namespace, device: torch.device) -> Table:
    """The part ``evaluate``: images and labels from disk, logits, classes, confusion matrix."""
    torch.backends.cudnn.benchmark = False  # as in evaluate.py: image sizes vary
    data = open_images(args)

    def published() -> Runner:
        net = reference_net(args, device).eval()
        cores = usable_cores()
        pool = ProcessPoolExecutor(cores)

        def run() -> None:
            labels, predictions = [], []
            for image_id in data.ids:
                image, label = reference.read(data.image_path(image_id), data.label_path(image_id))
                labels.append(np.asarray(label, int).flatten())
                predictions.append(reference.predict(net, image, reference.CANVAS, device).flatten())
            shares = (np.array_split(np.concatenate(pixels), cores) for pixels in (labels, predictions))
            sum(pool.map(reference.count, *shares, itertools.repeat(args.num_classes)))

        return Runner(run, close=pool.shutdown, net=net)

    def ours(amp: str, compiled: bool) -> Runner:
        net = fold_batch_norm(random_net(args).eval())
        to_device(net, device, compiled)
        return Runner(lambda: score(net, data, device, amp=amp)[""].scores(), net=net)

    height, width = reference.CANVAS
    rows = [Row("reference, as published", published, len(data))]
    for name, amp, compiled in our_modes(args, compiled=args.compile is not False):
        rows.append(Row(name, partial(ours, amp, compiled), len(data), amp, compiled))
    title = f"evaluation: {len(data)} images from disk to confusion matrix, {args.backbone}, reference on {height}x{width}"
    return Table(title, rows)


def crf_inputs(args: Namespace, count: int) -> list[tuple[Sample, Tensor]]:
    """``count`` images, each with (C, h, w) logits made of its label and noise."""
    generator = torch.Generator().manual_seed(0)
    samples = Samples(open_images(args))
    inputs = []
    for index in itertools.islice(itertools.cycle(range(len(samples))), count):
        sample = samples[index]
        height, width = canvas_size(sample.label.shape)
        one_hot = F.one_hot(torch.from_numpy(sample.label).long() % 255, args.num_classes).permute(2, 0, 1).float()
        logits = 8 * F.adaptive_avg_pool2d(one_hot, ((height - 1) // 8 + 1, (width - 1) // 8 + 1))
        inputs.append((sample, logits + 0.5 * torch.randn(logits.shape, generator=generator)))
    return inputs


def torch_parts(sample: Sample, logits: Tensor, device: torch.device) -> dict[str, float]:
    """Seconds for the lattices and per iteration of the CRF in torch, and its largest difference from pydensecrf."""
    image = torch.from_numpy(sample.image).to(device)
    probabilities = enlarge(logits[None].to(device), image.shape[:2])[0].softmax(dim=0)
    seconds = {}
    for iterations in (1, 11):
        run = partial(dense_crf, image, probabilities, CRFParams(iterations), backend="torch")
        run()
        seconds[iterations] = timeit.Timer(run, timer=timer).timeit(1)
    each = (seconds[11] - seconds[1]) / 10
    apart = (dense_crf(image, probabilities) - dense_crf(image, probabilities, backend="torch")).abs().max()
    return {"lattices_s": seconds[1] - each, "iteration_s": each, "difference": float(apart)}


def crf(args: Namespace, device: torch.device) -> Table:
    """The part ``crf``: the dense CRF in one process and on all cores, for ours and the reference."""
    processes = sorted({1, default_processes(32)})
    inputs = crf_inputs(args, args.pictures * processes[-1])
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

    def on_device(name: str) -> Runner:
        refine = DeviceCRF(args.batch_size if device.type == "cuda" else 1).refine

        def run() -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # so a CPU uses one core
            results[name] = [prediction for _, prediction in refine((sample, x.to(device)) for sample, x in inputs)]
            torch.set_num_threads(threads)

        return Runner(run)

    rows = []
    for workers in processes:
        where = f"{workers} process{'es' * (workers > 1)}"
        base = f"reference, {where}"
        rows.append(Row(base, partial(published, base, workers), len(inputs), base=base))
        for prune in (0.0, 0.05) if workers == processes[-1] else (0.0,):
            name = f"ours, {where}" + f" --crf-prune {prune}" * (prune > 0)
            rows.append(Row(name, partial(ours, name, workers, prune), len(inputs), base=base))

    name = f"ours --crf-backend torch, {'one core' if device.type == 'cpu' else device.type}"
    rows.append(Row(name, partial(on_device, name), len(inputs), base=rows[0].name))

    def remarks(entries: dict[str, dict]) -> Iterator[str]:
        expected = np.concatenate([classes.flatten() for classes in results[rows[0].name]])
        for name, entry in entries.items():
            found = np.concatenate([classes.flatten() for classes in results[name]])
            entry["agreement"] = float(np.mean(found == expected))
            yield f"{name}: same class as the reference at {100 * entry['agreement']:.3f} % of the pixels"
        yield "x ref: relative to the reference with as many processes; the probabilities are synthetic"
        parts = torch_parts(*inputs[0], device)
        entries[rows[-1].name].update(parts)
        lattices, iteration = 1000 * parts["lattices_s"], 1000 * parts["iteration_s"]
        yield f"torch, per image: lattices {lattices:.0f} ms, {iteration:.1f} ms per iteration"
        yield f"torch and pydensecrf: largest difference of a probability {parts['difference']:.1e}"

    title = f"dense CRF: {len(inputs)} images, {args.num_classes} classes, 10 iterations"
    return Table(title, rows, nets=False, repeats=args.crf_repeats, remarks=remarks)
