"""The run of evaluate.py: from the command line to the scores, masks and report."""

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
from dataset.classes import read_class_file
from deeplab import Net
from deeplab.weights import Weights
from utils import distributed
from utils.checkpoint import dataset_of
from utils.command import UserError, shown
from utils.data import images_of, open_dataset, other_dataset, what_is_compared
from utils.evaluation.comparison import open_other
from utils.evaluation.crf_device import open_crf
from utils.evaluation.images import Sample
from utils.evaluation.options import settled
from utils.evaluation.predict import check_same_work, open_trained_net, prediction_options, snapshot_colors, to_device
from utils.evaluation.report import Report, head_of, prepare_folder, settings_of
from utils.evaluation.report import planned as report_outputs
from utils.evaluation.score import score, share
from utils.files import save_json
from utils.metrics import ConfusionMatrix
from utils.options import Options
from utils.outputs import OUTPUT_MARK, Output, check_outputs
from utils.visualize import Classes, class_names, make_palette, save_panel, save_prediction


def run(args: Namespace) -> int:
    """Evaluate with the options ``args`` (see :mod:`utils.evaluation.options`), print the scores and save the outputs."""
    with ExitStack() as stack:
        pool = open_crf(args, stack)
        options, net, weights, device, data, data_list, classes, lines = distributed.everywhere(lambda: open_work(args))
        check_same_work(options, device, weights, what_is_compared(data))
        # No process writes before all have checked the outputs.
        distributed.everywhere(lambda: check_outputs(planned_outputs(options, data), *what_is_read(options, data, data_list)))
        page = open_report(options, data, classes)
        distributed.everywhere(lambda: to_device(net, device, options.compile))
        notes = [text] if (text := data.remark()) else []
        on_val = "val" in data_list.stem or data_list in [data.root / name for name in data.lists("val", data.image_folder)]
        if weights.seen_voc_val and on_val and dataset_of(weights.meta) == options.dataset:
            notes.append(f"warning: scores on {data.TITLE} val mean nothing here: {weights.seen_voc_val}")
        if distributed.is_main():
            print(*lines, images_of(data, data_list), *notes, sep="\n")
        printed = len(notes)

        hidden = None if distributed.is_main() else True  # None: shown only in a terminal
        bar = stack.enter_context(tqdm(total=len(share(len(data))), unit="image", disable=hidden, dynamic_ncols=True))

        def finish(sample: Sample, mask: np.ndarray) -> None:
            if options.save_dir:
                save_prediction(Path(options.save_dir) / f"{sample.id}.png", mask, classes.palette)
            if options.save_panels:
                path, image = Path(options.save_panels) / f"{sample.id}.png", sample.image[:, :, ::-1]
                save_panel(path, image, sample.label, mask, classes, options.names)
            if page:
                page.add(sample, mask)
            bar.update()

        prediction = {**prediction_options(options), "num_workers": options.num_workers, "pool": pool}
        matrices = distributed.everywhere(lambda: score(net, data, device, **prediction, finish=finish))
    for matrix in matrices.values():
        distributed.sum_(matrix.counts)
    present = next(iter(matrices.values())).present()
    if warning := one_class_warning(present):
        notes.append(f"warning: these scores mean little: {warning}")
    elif absent := absent_classes(present, classes.names, data.ignore_label, data.UNUSED):
        notes.append(f"no label has the classes {absent}")
    records = distributed.gather(page.records) if page else []

    def write() -> None:
        result = {"made_by": OUTPUT_MARK, "restore_from": options.restore_from, "weights": weights.scheme}
        result |= {"step": weights.meta.get("step"), "data_list": str(data_list)}
        result |= {name: getattr(options, name) for name in ("scales", "mirror", "input_size", "fuse", "window")}
        result |= {"overlap": str(options.overlap), **print_scores(classes, matrices, bool(data.UNUSED))}
        for note in notes[printed:]:
            print(f"\n{note}")
        if options.save_json:
            save_json(options.save_json, result)
        if page:
            settings, head = settings_of(options, weights, data_list), head_of(options, weights, data_list, len(data), notes)
            page.write(chain.from_iterable(records), result, head, settings)
            if page.other:
                changes = "; ".join(f"{name} {there} -> {here}" for name, there, here in page.other.differing(settings))
                print(f"compared with {options.compare}: {changes or 'the same settings'}")
            print(f"open {Path(options.report) / 'index.html'}")

    distributed.from_main(write)
    distributed.stop()
    return 0


def open_work(
    args: Namespace,
) -> tuple[Options, Net, Weights, torch.device, VOCSegmentation, Path, Classes, list[str]]:
    """Open everything that the command line names, without communication; the last item is lines to print.

    Raises:
        UserError, WeightsError, DatasetError: something is missing, or does not fit.
    """
    net, weights, device, lines = open_trained_net(args)
    options = settled(args, weights)
    kind = DATASETS[options.dataset]
    file = None if kind.NAMES else read_class_file(options.data_dir)
    count = len(file.rows) if file and file.rows is not None else len(kind.NAMES) or net.num_classes
    if count != net.num_classes:
        raise UserError(
            f"{options.restore_from} is a net for {net.num_classes} classes, but {file.path if file else kind.TITLE} names "
            f"{count}; evaluate it on data with the classes that it was trained on, or train a net for these classes: train.py "
            "can start from this file"
        )
    if args.ignore_label is None and options.ignore_label != IGNORE_LABEL:
        lines.append(f"--ignore-label {options.ignore_label}, as in training")
    if file and file.rows is None and not weights.meta.get("args") and (text := other_dataset(options, net.num_classes)):
        lines.append(f"warning: no file says that these labels have the {net.num_classes} classes of the net; {text}")
    data, data_list = open_dataset(options, "val", net.num_classes, classes=file)
    names = class_names(net.num_classes, weights.meta.get("classes"), data.names)
    if 0 <= options.ignore_label < net.num_classes:
        names[options.ignore_label] += " (void)"
    classes = Classes(names, make_palette(data.colors or snapshot_colors(weights)))
    return options, net, weights, device, data, data_list, classes, lines


def planned_outputs(options: Options, data: VOCSegmentation) -> list[Output]:
    """Every file that the evaluation will write."""
    outputs = []
    for option, folder, kind in (("--save-dir", options.save_dir, "mask"), ("--save-panels", options.save_panels, "panel")):
        for id in dict.fromkeys(data.ids) if folder else ():
            outputs.append(Output(option, Path(folder), f"{id}.png", f"the {kind} of {data.image_path(id)}"))
    if options.report:
        outputs += report_outputs(Path(options.report))
    if options.save_json:
        path = Path(options.save_json)
        outputs.append(Output("--save-json", path.parent, path.name, "the scores"))
    return outputs


def what_is_read(options: Options, data: VOCSegmentation, data_list: Path) -> tuple[list[str | Path], list[Path]]:
    """The files that the evaluation reads, and the data folders, for :func:`utils.outputs.check_outputs`."""
    files = [options.restore_from, data_list, data.root / "classes.txt"]
    files += [path(id) for id in data.ids for path in (data.image_path, data.label_path)]
    return files, [data.image_dir, *data.label_dirs, *(data.root / name for name in data.LABEL_DIRS)]


def print_scores(classes: Classes, matrices: dict[str, ConfusionMatrix], labelled: bool) -> dict[str, dict]:
    """Print a table for each matrix, with the mean IoU of labelled classes if ``labelled``; return the scores for JSON."""
    palette = classes.palette if sys.stdout.isatty() and "NO_COLOR" not in os.environ else None
    stream = getattr(sys.stdout, "stream", sys.stdout)  # unfiltered: the escape sequences of the colours are ours
    names = list(map(shown, classes.names))
    result = {}
    for title, matrix in matrices.items():
        scores = matrix.scores()
        print(*filter(None, ("", title, scores.table(names, palette, labelled))), sep="\n", file=stream)
        entry = {**scores.as_dict(classes.names, labelled), "confusion_matrix": matrix.matrix.tolist()}
        result[title.replace(" ", "_").lower() or "scores"] = entry
    return result


def open_report(options: Options, data: VOCSegmentation, classes: Classes) -> Report | None:
    """The report of ``--report``, compared with that of ``--compare``; None without ``--report``."""
    if not options.report:
        return None
    folder = Path(options.report)
    other = distributed.everywhere(lambda: open_other(options.compare, folder, data.ids, classes) if options.compare else None)
    distributed.from_main(lambda: prepare_folder(folder))
    return Report(folder, data.ids, classes, data.ignore_label, options.crf, other, options.names)
