"""The one evaluation loop: decoding, the net and the CRF overlap, and no prediction is kept longer than its picture."""

from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import (
    IGNORE_LABEL,
    VAL_LISTS,
    VOCSegmentation,
    absent_classes,
    default_names,
    one_class_warning,
    read_class_names,
    to_input,
)
from dataset.classes import read_classes
from dataset.voc import LABEL_DIRS
from deeplab import DeepLabV2, fold_batch_norm
from deeplab.multiscale import NO_CLASS, enlarge_to_classes, predict_grid
from deeplab.weights import Weights
from utils import distributed
from utils.checkpoint import load_init
from utils.command import UserError
from utils.crf_pool import CRFPool
from utils.files import Output, check_outputs, save_json
from utils.loader import make_loader, open_dataset, running
from utils.metrics import ConfusionMatrix
from utils.options import TRAINED_WEIGHTS
from utils.samples import Sample, Samples, group_by_canvas, only_one
from utils.visualize import save_indexed_png, save_panel


class NotFinite(UserError):
    """The net's logits are no numbers."""

    exit_status = 1


def run(args: Namespace) -> int:
    """Evaluate as ``args`` say (see :func:`utils.options.evaluation_parser`), print the scores and save what was asked for."""
    # The pool comes first: where its processes are forked, they are copies of this still small one.
    with ExitStack() as stack:
        pool = stack.enter_context(CRFPool(args.crf_workers, args.crf_prune)) if args.crf else None
        device = distributed.select_device(args.device, args.gpu, not args.no_tf32)
        distributed.start()
        net, weights, lines = open_trained_net(args)
        check_classes(args, net.num_classes)
        lines += settle_void(args, weights)
        data, data_list = open_dataset(args, VAL_LISTS, net.num_classes)
        names = class_names(args.data_dir, weights, net.num_classes)
        if 0 <= args.ignore_label < net.num_classes:
            names[args.ignore_label] += " (void)"
        check_outputs(planned_outputs(args, data), *what_is_read(args, data, data_list))
        net.to(device).to(memory_format=torch.channels_last)
        if args.compile:
            distributed.check_compiler(device)
            compile_for_prediction(net, device)
        if distributed.is_main():
            print(*lines, f"{len(data)} pictures of {data_list}", sep="\n")
            if weights.seen_voc_val and "val" in data_list.stem:
                print(f"warning: scores on VOC val mean nothing here: {weights.seen_voc_val}")

        hidden = None if distributed.is_main() else True  # None: shown in a terminal only
        bar = stack.enter_context(tqdm(total=len(share(data)), unit="image", disable=hidden, dynamic_ncols=True))

        def finish(sample: Sample, prediction: np.ndarray) -> None:
            if args.save_dir:
                save_indexed_png(Path(args.save_dir) / f"{sample.id}.png", prediction)
            if args.save_panels:
                save_panel(Path(args.save_panels) / f"{sample.id}.png", sample.image[:, :, ::-1], sample.label, prediction)
            bar.update()

        options = {name: getattr(args, name) for name in ("scales", "mirror", "batch_size", "amp", "num_workers")}
        matrices = score(net, data, device, **options, canvas=args.input_size, pool=pool, finish=finish)
    if distributed.is_main():
        report(args, data_list, weights, names, matrices)
    distributed.stop()
    return 0


def score(
    net: nn.Module,
    data: VOCSegmentation,
    device: torch.device,
    *,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    canvas: tuple[int, int] | None = None,
    batch_size: int = 1,
    amp: str = "off",
    num_workers: int = 0,
    pool: CRFPool | None = None,
    finish: Callable[[Sample, np.ndarray], None] = lambda sample, prediction: None,
) -> dict[str, ConfusionMatrix]:
    """Predict a data set and count.

    Under torchrun each process takes its share of the pictures, and all get the sum of the counts.

    Args:
        net: on ``device``, in eval mode.
        scales, mirror: see :func:`deeplab.multiscale.predict_grid`.
        canvas: (H, W) to which every picture is padded; None takes each picture's own size.
        batch_size: pictures of one padded size at once.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``.
        num_workers: processes that read pictures.
        pool: refines the predictions; they are counted before and after.
        finish: called with each picture and its (H, W) uint8 classes, refined where there is a pool.

    Returns:
        ``{"": matrix}``, or with a pool ``{"before CRF": matrix, "after CRF": matrix}``.

    Raises:
        UserError: a picture does not fit ``canvas``; the net's logits are not finite (:class:`NotFinite`).
    """
    before, after = (ConfusionMatrix(data.num_classes, where, data.ignore_label) for where in (device, "cpu"))
    loader = make_loader(Samples(data), [[index] for index in share(data)], num_workers, device, collate_fn=only_one)

    def predictions() -> Iterator[tuple[Sample, Tensor, np.ndarray]]:
        """Each picture, counted, with its (C, h, w) logits on the stride-8 grid and its (H, W) uint8 classes, on the host.

        The device is a batch ahead: it computes the next one while this one is copied, saved or refined.
        """
        under_way: deque[tuple[Sample, Callable[[], Tensor], Callable[[], Tensor]]] = deque()
        for samples, size in group_by_canvas(pictures, canvas, batch_size):
            images = [sample.image for sample in samples]
            for sample, logits in zip(samples, predict_batch(net, images, size, device, scales, mirror, amp)):
                label = torch.from_numpy(sample.label).to(device, non_blocking=True)
                classes = enlarge_to_classes(logits, label.shape)
                before.update(label, classes)
                under_way.append((sample, to_host(logits), to_host(classes)))
            while len(under_way) > len(samples):
                yield arrived(*under_way.popleft())
        yield from (arrived(*entry) for entry in under_way)

    with torch.inference_mode(), running(loader) as pictures:
        if pool is None:
            for sample, _, prediction in predictions():
                finish(sample, prediction)
        else:
            for sample, refined in pool.refine((sample, logits) for sample, logits, _ in predictions()):
                after.update(torch.from_numpy(sample.label), torch.from_numpy(refined))
                finish(sample, refined)
    matrices = {"before CRF": before, "after CRF": after} if pool else {"": before}
    for matrix in matrices.values():
        distributed.sum_(matrix.counts)
    return matrices


def share(data: VOCSegmentation) -> range:
    """The indices of the pictures that this process predicts."""
    return range(distributed.rank(), len(data), distributed.world_size())


def open_trained_net(args: Namespace) -> tuple[DeepLabV2, Weights, list[str]]:
    """The net of ``--restore-from``, ready to predict, its weights file and lines that say what was loaded.

    Raises:
        UserError: there is no such file, no head in it, or one that does not fit: nothing is predicted with a parameter that no
            file gave.
    """
    path = args.restore_from
    if path == TRAINED_WEIGHTS and not Path(TRAINED_WEIGHTS).exists():
        advice = "train with `python train.py`, see `python scripts/download.py list`, or pass --restore-from"
        raise UserError(f"{TRAINED_WEIGHTS} does not exist: {advice}")
    net, weights, report = load_init(path, backbone=args.backbone, atrous_rates=args.atrous_rates)
    rates, asked = weights.config.get("atrous_rates"), net.config["atrous_rates"]
    if report.missing and rates and list(rates) != list(asked):
        of_file, of_option = (",".join(map(str, values)) for values in (rates, asked))
        raise UserError(
            f"the head of {path} has the rates {of_file}, but --atrous-rates says {of_option}; leave the option out"
        )
    if report.missing:
        raise UserError(f"{path} ({weights.scheme}) holds no usable head; train it first with train.py")
    if args.num_classes not in (None, net.num_classes):
        raise UserError(
            f"{path} is a net for {net.num_classes} classes, which --num-classes {args.num_classes} cannot change; "
            f"train a net for {args.num_classes} classes with train.py, or name another file"
        )
    fold_batch_norm(net.eval())
    return net, weights, [f"{path}: {weights.scheme}", *report.lines()]


def compile_for_prediction(net: nn.Module, device: torch.device) -> None:
    """Compile a folded net in place: for pictures of any size at once, and on a CPU with its weights as constants."""
    if device.type == "cpu":
        net.compile(dynamic=True, options={"freezing": True})
    else:
        net.compile()


def check_classes(args: Namespace, num_classes: int) -> None:
    """Raise :class:`UserError` if the classes of the data set are not those of a net for ``num_classes``."""
    path = Path(args.data_dir) / "classes.txt"
    if path.is_file() and (count := len(read_classes(path))) != num_classes:
        raise UserError(
            f"{args.restore_from} is a net for {num_classes} classes, but {path} names {count}; it can be scored only on "
            "data of the classes that it was trained on, and train.py makes a net for these, from this file as well"
        )


def settle_void(args: Namespace, weights: Weights) -> list[str]:
    """Take a label that means void and was not given from the run that trained the net; returns the lines that say so."""
    if args.ignore_label is not None:
        return []
    args.ignore_label = (weights.meta.get("args") or {}).get("ignore_label", IGNORE_LABEL)
    return [f"--ignore-label {args.ignore_label}, as it was trained with"] if args.ignore_label != IGNORE_LABEL else []


def class_names(data_dir: str, weights: Weights, num_classes: int) -> list[str]:
    """The names of the classes: the snapshot's, else those of ``classes.txt``, else VOC's for 21 classes, else numbers."""
    return list(weights.meta.get("classes") or read_class_names(data_dir, num_classes) or default_names(num_classes))


def planned_outputs(args: Namespace, data: VOCSegmentation) -> list[Output]:
    """Every file that the evaluation will write."""
    outputs = []
    for option, folder, kind in (("--save-dir", args.save_dir, "mask"), ("--save-panels", args.save_panels, "panel")):
        if folder:
            content = f"the {kind} of {{}}"
            outputs += [
                Output(option, Path(folder), f"{id}.png", content.format(data.image_path(id))) for id in dict.fromkeys(data.ids)
            ]
    if args.save_json:
        outputs.append(Output("--save-json", Path(args.save_json).parent, Path(args.save_json).name, "the scores"))
    return outputs


def what_is_read(args: Namespace, data: VOCSegmentation, data_list: Path) -> tuple[list[str | Path], list[Path]]:
    """The files that the evaluation reads, and the folders of the data, for :func:`utils.files.check_outputs`."""
    files = [args.restore_from, data_list, data.root / "classes.txt"]
    files += [path(id) for id in data.ids for path in (data.image_path, data.label_path)]
    return files, [data.image_dir, *(data.root / name for name in (*LABEL_DIRS, args.label_dir) if name)]


def predict_batch(
    net: nn.Module,
    images: Sequence[np.ndarray],
    canvas: tuple[int, int],
    device: torch.device,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    amp: str = "off",
) -> Tensor:
    """The logits of pictures, (H, W, 3) uint8 BGR each, on the stride-8 grid of one canvas: (N, C, h, w) float32."""
    batch = torch.zeros(len(images), 3, *canvas, device=device).contiguous(memory_format=torch.channels_last)
    for padded, image in zip(batch, images):
        height, width = image.shape[:2]
        padded[:, :height, :width] = to_input(torch.from_numpy(image).to(device, non_blocking=True))
    with distributed.autocast(device, amp):
        return predict_grid(net, batch, scales, mirror).float()


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; what is returned waits until it is there, and for nothing that came later."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy, there = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait


def arrived(sample: Sample, logits: Callable[[], Tensor], classes: Callable[[], Tensor]) -> tuple[Sample, Tensor, np.ndarray]:
    """A picture whose results are on their way (:func:`to_host`), with them; raises as :func:`checked` does."""
    return sample, logits(), checked(sample.id, classes())


def checked(name: str, classes: Tensor) -> np.ndarray:
    """A picture's (H, W) uint8 classes, brought to the host.

    Raises:
        NotFinite: its logits were not finite, which :func:`deeplab.multiscale.enlarge_to_classes` tells by NO_CLASS.
    """
    prediction = classes.cpu().numpy()
    if prediction[0, 0] == NO_CLASS:
        raise NotFinite(
            f"the net's logits are not finite for picture {name}: its numbers overflow; leave --amp out if it was given, "
            "or take weights that are not damaged"
        )
    return prediction


def report(args: Namespace, data_list: Path, weights: Weights, names: list[str], matrices: dict[str, ConfusionMatrix]) -> None:
    """Print the scores and save them."""
    result = {"restore_from": args.restore_from, "weights": weights.scheme, "step": weights.meta.get("step")}
    result.update(data_list=str(data_list), scales=args.scales, mirror=args.mirror, input_size=args.input_size)
    for title, matrix in matrices.items():
        scores = matrix.scores()
        print(f"\n{title}\n{scores.table(names)}" if title else f"\n{scores.table(names)}")
        entry = {**scores.as_dict(names), "confusion_matrix": matrix.matrix.tolist()}
        result[title.replace(" ", "_").lower() or "scores"] = entry
    matrix = next(iter(matrices.values()))
    if warning := one_class_warning(matrix.present()):
        print(f"\nwarning: these scores mean little: {warning}")
    elif absent := absent_classes(matrix.present(), names, matrix.ignore_label):
        print(f"\nno label has the classes {absent}")
    if args.save_json:
        save_json(args.save_json, result)
