"""The one evaluation loop: decoding, the net and the CRF overlap, and no prediction is kept longer than its picture."""

import os
import sys
from argparse import Namespace
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import DATASETS, IGNORE_LABEL, VOCSegmentation, absent_classes, one_class_warning
from dataset.classes import read_classes
from deeplab import Net
from deeplab.weights import Weights
from utils import distributed
from utils.checkpoint import dataset_of
from utils.command import UserError, shown
from utils.device import select_device
from utils.evaluation.comparison import open_other
from utils.evaluation.crf_pool import open_pool
from utils.evaluation.images import Sample
from utils.evaluation.predict import (
    check_same_work,
    open_trained_net,
    prediction_options,
    snapshot_colors,
    to_device,
)
from utils.evaluation.report import Report, head_of, prepare_folder
from utils.evaluation.report import planned as report_outputs
from utils.evaluation.score import score, share
from utils.files import save_json
from utils.loader import open_dataset, what_is_compared
from utils.metrics import ConfusionMatrix
from utils.options import CITYSCAPES, settle_dataset
from utils.outputs import OUTPUT_MARK, Output, check_outputs
from utils.visualize import Classes, class_names, make_palette, save_panel, save_prediction


def run(args: Namespace) -> int:
    """Evaluate as ``args`` say (see :mod:`utils.evaluation.options`), print the scores and save what was asked for."""
    with ExitStack() as stack:
        # The pool comes first: where its processes are forked, they are copies of this still small one.
        pool = distributed.start(lambda: stack.enter_context(open_pool(args)) if args.crf else None)
        net, device, weights, lines, data, data_list, classes = distributed.everywhere(lambda: open_work(args))
        check_same_work(args, device, weights, what_is_compared(data))
        outputs, reads = planned_outputs(args, data), what_is_read(args, data, data_list)
        distributed.everywhere(lambda: check_outputs(outputs, *reads))  # nobody writes before all have looked
        page = open_report(args, data, classes)
        distributed.everywhere(lambda: to_device(net, device, args.compile))
        notes = []
        if weights.seen_voc_val and "val" in data_list.stem and dataset_of(weights.meta) == args.dataset:
            notes.append(f"warning: scores on {data.TITLE} val mean nothing here: {weights.seen_voc_val}")
        told = len(notes)
        if distributed.is_main():
            print(*lines, f"{len(data)} pictures of {data_list}", *notes, sep="\n")

        hidden = None if distributed.is_main() else True  # None: shown in a terminal only
        bar = stack.enter_context(tqdm(total=len(share(data)), unit="image", disable=hidden, dynamic_ncols=True))

        def finish(sample: Sample, prediction: np.ndarray) -> None:
            if args.save_dir:
                save_prediction(Path(args.save_dir) / f"{sample.id}.png", prediction, classes.palette)
            if args.save_panels:
                path, image = Path(args.save_panels) / f"{sample.id}.png", sample.image[:, :, ::-1]
                save_panel(path, image, sample.label, prediction, classes)
            if page:
                page.add(sample, prediction)
            bar.update()

        options = {**prediction_options(args), "canvas": args.input_size, "num_workers": args.num_workers}
        matrices = score(net, data, device, **options, pool=pool, finish=finish)
    matrix = next(iter(matrices.values()))
    if warning := one_class_warning(matrix.present()):
        notes.append(f"warning: these scores mean little: {warning}")
    elif absent := absent_classes(matrix.present(), classes.names, matrix.ignore_label):
        notes.append(f"no label has the classes {absent}")
    records = distributed.gather(page.records) if page else []
    result = {"made_by": OUTPUT_MARK, "restore_from": args.restore_from, "weights": weights.scheme}
    result.update(step=weights.meta.get("step"))
    result.update(data_list=str(data_list), scales=args.scales, mirror=args.mirror, input_size=args.input_size)
    result.update(fuse=args.fuse, window=args.window, overlap=str(args.overlap))

    def write() -> None:
        result.update(print_scores(classes, matrices))
        for note in notes[told:]:
            print(f"\n{note}")
        if args.save_json:
            save_json(args.save_json, result)
        if page:
            page.write(chain.from_iterable(records), result, head_of(args, weights, data_list, len(data), notes))
            print(f"open {Path(args.report) / 'index.html'}")

    distributed.from_main(write)
    distributed.stop()
    return 0


def open_work(args: Namespace) -> tuple[Net, torch.device, Weights, list[str], VOCSegmentation, Path, Classes]:
    """What this process evaluates: the net and its device, its file, lines about that, the data set, its list, the classes."""
    device = select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
    net, weights, lines = open_trained_net(args)
    settle_dataset(args, CITYSCAPES, dataset_of(weights.meta))
    check_classes(args, net.num_classes)
    lines += settle_void(args, weights)
    data, data_list = open_dataset(args, "val", net.num_classes)
    return net, device, weights, lines, data, data_list, classes_of(args.ignore_label, data, weights)


def check_classes(args: Namespace, num_classes: int) -> None:
    """Raise :class:`UserError` if the classes of the data set are not those of a net for ``num_classes``."""
    kind, path = DATASETS[args.dataset], Path(args.data_dir) / "classes.txt"
    count = len(kind.NAMES) or (len(read_classes(path)) if path.is_file() else num_classes)
    if count != num_classes:
        raise UserError(
            f"{args.restore_from} is a net for {num_classes} classes, but {kind.TITLE if kind.NAMES else path} names {count}; "
            "it can be scored only on data of the classes that it was trained on, and train.py makes a net for these, from "
            "this file as well"
        )


def settle_void(args: Namespace, weights: Weights) -> list[str]:
    """Take a label that means void and was not given from the run that trained the net; returns the lines that say so."""
    if args.ignore_label is not None:
        return []
    args.ignore_label = (weights.meta.get("args") or {}).get("ignore_label", IGNORE_LABEL)
    return [f"--ignore-label {args.ignore_label}, as it was trained with"] if args.ignore_label != IGNORE_LABEL else []


def classes_of(ignore_label: int, data: VOCSegmentation, weights: Weights) -> Classes:
    """How the classes are called and drawn: colours of the data set come before those of the snapshot."""
    names = class_names(data.num_classes, weights.meta.get("classes"), data.names)
    if 0 <= ignore_label < data.num_classes:
        names[ignore_label] += " (void)"
    return Classes(names, make_palette(data.colors or snapshot_colors(weights)))


def planned_outputs(args: Namespace, data: VOCSegmentation) -> list[Output]:
    """Every file that the evaluation will write."""
    outputs = []
    for option, folder, kind in (("--save-dir", args.save_dir, "mask"), ("--save-panels", args.save_panels, "panel")):
        if folder:
            content = f"the {kind} of {{}}"
            outputs += [
                Output(option, Path(folder), f"{id}.png", content.format(data.image_path(id))) for id in dict.fromkeys(data.ids)
            ]
    if args.report:
        outputs += report_outputs(Path(args.report))
    if args.save_json:
        outputs.append(Output("--save-json", Path(args.save_json).parent, Path(args.save_json).name, "the scores"))
    return outputs


def what_is_read(args: Namespace, data: VOCSegmentation, data_list: Path) -> tuple[list[str | Path], list[Path]]:
    """The files that the evaluation reads, and the folders of the data, for :func:`utils.outputs.check_outputs`."""
    files = [args.restore_from, data_list, data.root / "classes.txt"]
    files += [path(id) for id in data.ids for path in (data.image_path, data.label_path)]
    return files, [data.image_dir, *(data.root / name for name in (*data.LABEL_DIRS, args.label_dir) if name)]


def print_scores(classes: Classes, matrices: dict[str, ConfusionMatrix]) -> dict[str, dict]:
    """Print a table for each matrix, and return the same for JSON."""
    palette = classes.palette if sys.stdout.isatty() and "NO_COLOR" not in os.environ else None
    stream = getattr(sys.stdout, "stream", sys.stdout)  # colours are escapes of our own
    names = list(map(shown, classes.names))
    result = {}
    for title, matrix in matrices.items():
        scores = matrix.scores()
        print(*filter(None, ("", title, scores.table(names, palette))), sep="\n", file=stream)
        entry = {**scores.as_dict(classes.names), "confusion_matrix": matrix.matrix.tolist()}
        result[title.replace(" ", "_").lower() or "scores"] = entry
    return result


def open_report(args: Namespace, data: VOCSegmentation, classes: Classes) -> Report | None:
    """What ``--report`` asks for; it is compared with what ``--compare`` names."""
    if not args.report:
        return None
    folder = Path(args.report)
    other = distributed.everywhere(lambda: open_other(args.compare, folder, data.ids, classes) if args.compare else None)
    distributed.from_main(lambda: prepare_folder(folder))
    return Report(folder, data.ids, classes, data.ignore_label, args.crf, other)
