"""The one evaluation loop: decoding, the net and the CRF overlap, and no prediction is kept longer than its picture."""

import ctypes
import multiprocessing
import signal
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing  # lets tensors travel between processes in shared memory
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import VAL_LISTS, VOC_CLASSES, VOCSegmentation, read_class_names, to_input
from deeplab import dense_crf, fold_batch_norm
from deeplab.multiscale import canvas_size, enlarge_rows, predict_grid
from deeplab.weights import Weights
from utils import distributed
from utils.checkpoint import load_init
from utils.command import UserError
from utils.files import save_json
from utils.loader import make_loader, open_dataset
from utils.metrics import ConfusionMatrix
from utils.options import TRAINED_WEIGHTS
from utils.visualize import save_indexed_png, save_panel

MAX_WAITING = 64  # pictures that may wait for others of their padded size


@dataclass
class Sample:
    """One picture on its way through the evaluation."""

    id: str
    image: np.ndarray  # H W 3 uint8 BGR
    label: np.ndarray  # H W uint8, 255 void


class Samples:
    """The data set as :class:`Sample` entries, for a loader."""

    def __init__(self, data: VOCSegmentation) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.data.ids[index], *self.data.load(index))


def run(args: Namespace) -> int:
    """Evaluate as ``args`` say (see :func:`utils.options.evaluation_parser`), print the scores and save what was asked for."""
    pool = (
        CRFPool(args.crf_workers, args.crf_prune) if args.crf else None
    )  # first: its processes start as copies of this still small one
    try:
        return evaluate(args, pool)
    finally:
        if pool:
            pool.executor.shutdown(wait=False, cancel_futures=True)


def evaluate(args: Namespace, pool: "CRFPool | None") -> int:
    """:func:`run`, with the processes for the CRF."""
    device = distributed.select_device(args.device, args.gpu)
    distributed.start()
    net, weights, lines = open_net(args)
    net.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_for_prediction(net, device)
    data, data_list = open_dataset(args, VAL_LISTS, net.num_classes)
    names = class_names(args.data_dir, weights, net.num_classes)
    if distributed.is_main():
        print(*lines, f"{len(data)} pictures of {data_list}", sep="\n")
        if weights.seen_voc_val and "val" in data_list.stem:
            print(f"warning: scores on VOC val mean nothing here: {weights.seen_voc_val}")

    before, after = (ConfusionMatrix(net.num_classes, where) for where in (device, "cpu"))
    mine = range(distributed.rank(), len(data), distributed.world_size())
    loader = make_loader(
        Samples(data), [[index] for index in mine], args.num_workers, device, collate_fn=lambda items: items[0]
    )
    bar = tqdm(total=len(mine), unit="image", disable=not distributed.is_main(), dynamic_ncols=True)

    def finish(sample: Sample, prediction: np.ndarray) -> None:
        if args.save_dir:
            save_indexed_png(Path(args.save_dir) / f"{sample.id}.png", prediction)
        if args.save_panels:
            save_panel(Path(args.save_panels) / f"{sample.id}.png", sample.image[:, :, ::-1], sample.label, prediction)
        bar.update()

    with torch.inference_mode():
        for samples, canvas in group_by_canvas(loader, args.input_size, args.batch_size):
            for sample, logits in zip(samples, predict_batch(net, samples, canvas, args, device)):
                prediction = count(sample, logits, before)
                if pool is None:
                    finish(sample, prediction.cpu().numpy())
                    continue
                for refined_sample, refined in pool.refine(sample, logits):
                    count_refined(refined_sample, refined, after)
                    finish(refined_sample, refined)
        for refined_sample, refined in pool.rest() if pool else ():
            count_refined(refined_sample, refined, after)
            finish(refined_sample, refined)
    bar.close()
    report(args, data_list, weights, names, {"before CRF": before, "after CRF": after} if pool else {"": before})
    distributed.stop()
    return 0


def open_net(args: Namespace) -> tuple[nn.Module, Weights, list[str]]:
    """The net of ``--restore-from``, ready to predict, its weights file and lines that say what was loaded.

    Raises:
        UserError: there is no such file, or no head in it, or one for other classes.
    """
    if args.restore_from == TRAINED_WEIGHTS and not Path(TRAINED_WEIGHTS).exists():
        advice = "train with `python train.py`, see `python scripts/download.py list`, or pass --restore-from"
        raise UserError(f"{TRAINED_WEIGHTS} does not exist: {advice}")
    options = {"backbone": args.backbone, "atrous_rates": args.atrous_rates}
    net, weights, report = load_init(args.restore_from, **options)
    lines = [f"{args.restore_from}: {weights.scheme}", *report.lines()]
    if not any(key.startswith("layer5.") for key in weights.state):
        raise UserError(f"{args.restore_from} ({weights.scheme}) holds no usable head; train it first with train.py")
    if args.num_classes not in (None, net.num_classes):
        raise UserError(f"{args.restore_from} is a net for {net.num_classes} classes, --num-classes says {args.num_classes}")
    return fold_batch_norm(net.eval()), weights, lines


def compile_for_prediction(net: nn.Module, device: torch.device) -> None:
    """Compile a folded net in place: for pictures of any size at once, and on a CPU with its weights as constants."""
    if device.type == "cpu":
        net.compile(dynamic=True, options={"freezing": True})
    else:
        net.compile()


def class_names(data_dir: str, weights: Weights, num_classes: int) -> list[str]:
    """The names of the classes: the snapshot's, else those of ``classes.txt``, else VOC's for 21 classes, else numbers."""
    names = weights.meta.get("classes") or read_class_names(data_dir, num_classes)
    if not names and num_classes == len(VOC_CLASSES):
        names = [entry.name for entry in VOC_CLASSES]
    return names or [f"class {i}" for i in range(num_classes)]


def group_by_canvas(
    samples: Iterable[Sample], fixed: tuple[int, int] | None, batch_size: int
) -> Iterator[tuple[list[Sample], tuple[int, int]]]:
    """Gather pictures of one padded size, so that pictures of mixed sizes run in batches.

    Yields:
        Up to ``batch_size`` pictures and their canvas (H, W).

    Raises:
        UserError: a picture does not fit the fixed canvas.
    """
    waiting: dict[tuple[int, int], list[Sample]] = {}
    count_waiting = 0
    for sample in samples:
        size = sample.image.shape[:2]
        if fixed and (size[0] > fixed[0] or size[1] > fixed[1]):
            advice = "enlarge --input-size, or leave it out to use each picture's own size"
            raise UserError(
                f"picture {sample.id} of {size[0]}x{size[1]} does not fit --input-size {fixed[0]}x{fixed[1]}; {advice}"
            )
        canvas = canvas_size(fixed or size)
        waiting.setdefault(canvas, []).append(sample)
        count_waiting += 1
        if len(waiting[canvas]) == batch_size or count_waiting == MAX_WAITING:
            fullest = max(waiting, key=lambda key: len(waiting[key]))
            count_waiting -= len(waiting[fullest])
            yield waiting.pop(fullest), fullest
    yield from ((group, canvas) for canvas, group in waiting.items())


def predict_batch(
    net: nn.Module, samples: list[Sample], canvas: tuple[int, int], args: Namespace, device: torch.device
) -> Tensor:
    """The logits of pictures of one canvas on its stride-8 grid: (N, C, h, w) float32 on the device."""
    images = torch.zeros(len(samples), 3, *canvas).contiguous(memory_format=torch.channels_last)
    for image, sample in zip(images, samples):
        height, width = sample.label.shape
        image[:, :height, :width] = to_input(sample.image)
    images = images.to(device, non_blocking=True)
    with distributed.autocast(device, args.amp):
        return predict_grid(net, images, args.scales, args.mirror).float()


def count(sample: Sample, logits: Tensor, matrix: ConfusionMatrix) -> Tensor:
    """Enlarge one picture's (C, h, w) logits, take the class and count it, in blocks of rows on the device.

    Returns:
        (H, W) uint8 classes on the device.
    """
    label = torch.from_numpy(sample.label).to(logits.device, non_blocking=True)
    prediction = torch.empty_like(label)
    for rows, block in enlarge_rows(logits[None], label.shape):
        prediction[rows] = block[0].max(dim=0).indices.byte()  # on a CPU ten times as fast as argmax
    matrix.update(label, prediction)
    return prediction


def count_refined(sample: Sample, refined: np.ndarray, matrix: ConfusionMatrix) -> None:
    """Count a refined (H, W) uint8 prediction."""
    matrix.update(torch.from_numpy(sample.label), torch.from_numpy(refined))


class CRFPool:
    """Processes that refine predictions while the net goes on: pydensecrf holds Python's lock, so threads would take turns.

    Pictures and probabilities travel in shared memory. A bounded number of pictures is on its way at a time, and they come back
    in the order in which they went in.
    """

    def __init__(self, workers: int, prune: float = 0.0) -> None:
        self.prune = prune
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
        self.executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_crf_worker)
        for future in [self.executor.submit(int) for _ in range(workers)]:
            future.result()  # have the processes started now
        self.running: deque[tuple[Sample, Future]] = deque()
        self.capacity = workers + 2

    def refine(self, sample: Sample, logits: Tensor) -> Iterator[tuple[Sample, np.ndarray]]:
        """Take a picture and its (C, h, w) logits; yields pictures that are done, with their (H, W) uint8 classes."""
        size = sample.label.shape
        probabilities = torch.empty(logits.shape[0], *size).share_memory_()  # C H W
        for rows, block in enlarge_rows(logits[None], size):
            probabilities[:, rows] = F.softmax(block[0], dim=0).cpu()
        image = torch.from_numpy(np.ascontiguousarray(sample.image[:, :, ::-1]))
        self.running.append((sample, self.executor.submit(_refine, image, probabilities, self.prune)))
        while self.running and (len(self.running) > self.capacity or self.running[0][1].done()):
            yield self._next()

    def rest(self) -> Iterator[tuple[Sample, np.ndarray]]:
        """The pictures that are still on their way."""
        while self.running:
            yield self._next()

    def _next(self) -> tuple[Sample, np.ndarray]:
        sample, future = self.running.popleft()
        return sample, future.result().numpy()


def _start_crf_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # The CRF allocates the same large blocks for each picture. By default glibc returns them to the system each time, and
    # having them mapped and zeroed again takes a sixth of the time (mallopt(3): M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1).
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def _refine(image: Tensor, probabilities: Tensor, prune: float) -> Tensor:
    refined = dense_crf(image.numpy(), probabilities.numpy(), prune=prune)
    return torch.from_numpy(refined.argmax(axis=0).astype(np.uint8))


def report(args: Namespace, data_list: Path, weights: Weights, names: list[str], matrices: dict[str, ConfusionMatrix]) -> None:
    """Add the matrices up over the processes, print the scores and save them."""
    result = {"restore_from": args.restore_from, "weights": weights.scheme, "step": weights.meta.get("step")}
    result.update(data_list=str(data_list), scales=args.scales, mirror=args.mirror, input_size=args.input_size)
    for title, matrix in matrices.items():
        distributed.sum_(matrix.counts)
        if not distributed.is_main():
            continue
        scores = matrix.scores()
        print(f"\n{title}\n{scores.table(names)}" if title else f"\n{scores.table(names)}")
        entry = {**scores.as_dict(names), "confusion_matrix": matrix.matrix.tolist()}
        result[title.replace(" ", "_").lower() or "scores"] = entry
    if args.save_json and distributed.is_main():
        save_json(args.save_json, result)
