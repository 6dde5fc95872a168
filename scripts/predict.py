"""Segment your own images and videos: masks as indexed PNGs, optionally overlays and panels. No labels are needed.

    python scripts/predict.py --restore-from snapshots/VOC12_scenes_20000.pth --save-dir predictions photo.jpg folder/
    python scripts/predict.py --overlays "holiday/**/*.jpg" film.mp4
    torchrun --nproc_per_node=4 scripts/predict.py --skip-existing --batch-size 8 a_million_images/

A folder stands for the images in it, without its sub-folders. A pattern in quotes stands for all files that match it, and their
masks keep the sub-folders. A video gives <name>.mp4, with the classes as an overlay, and a folder <name> with one mask per
frame. The net is rebuilt from the weights file, without further options. Under torchrun the processes share the files.
"""

import argparse
import glob
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DATASETS
from utils.argtypes import Parser, helpers, positive, target
from utils.command import UserError, run_command
from utils.files import write_atomically
from utils.options import Options, add_device_options, add_net_options, add_prediction_options, trained_weights
from utils.outputs import Output, check_outputs, mark_zip
from utils.processes import default_processes

if TYPE_CHECKING:
    import torch

    from deeplab import Net
    from deeplab.weights import Weights
    from utils.evaluation.crf_device import DeviceCRF
    from utils.evaluation.crf_pool import CRFPool
    from utils.evaluation.images import NamedImage
    from utils.visualize import Classes

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


class Source(NamedTuple):
    """An image or video, and the name of its outputs: a path below ``--save-dir``, without suffix."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split(":")[0])
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help="images, videos, folders of them, patterns in quotes")
    parser.add_argument(
        "--restore-from", default=trained_weights(), help="a snapshot or published weights (default: %(default)s)"
    )
    parser.add_argument("--save-dir", type=target, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument("--num-classes", type=positive, help="default: that of the weights file")
    parser.add_argument(
        "--dataset", choices=DATASETS, help="data set for class names and colours (default: those in the weights file)"
    )
    add_prediction_options(parser)
    parser.add_argument("--panels", action="store_true", help="also save <name>_panel.png: image | prediction, with a legend")
    parser.add_argument("--overlays", action="store_true", help="also save <name>_overlay.png: the classes over the image")
    text = "write class names into the regions of panels, overlays and videos, where they fit"
    parser.add_argument("--names", action="store_true", help=text)
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also save <name>.npz: the net's probabilities, (C, H, W) float16, without the CRF, and the class names",
    )
    parser.add_argument("--skip-existing", action="store_true", help="skip files whose outputs exist (after an interruption)")
    parser.add_argument(
        "--num-workers", type=helpers, default=default_processes(4), help="processes that read images (default: %(default)s)"
    )
    add_net_options(parser)
    add_device_options(parser)
    parser.set_defaults(input_size=None)  # the size of each image
    return parser.parse_intermixed_args(argv)  # images before and after the options


def find_sources(arguments: Iterable[str]) -> tuple[list[Source], list[str]]:
    """The images and videos that the arguments stand for, and a line for each folder or pattern with other files.

    Raises:
        UserError: a path does not exist, or a folder or pattern holds no image.
    """
    from dataset.lists import IMAGE_SUFFIXES

    found: dict[Path, Source] = {}
    lines = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            root, entries = path, sorted(path.iterdir())
        elif path.exists():
            found.setdefault(path, Source(path, path.stem))
            continue
        elif glob.has_magic(argument):
            root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
            entries = sorted(map(Path, glob.glob(argument, recursive=True)))
        else:
            raise UserError(f"the image {path} does not exist")
        kinds = {entry: _kind(entry, IMAGE_SUFFIXES) for entry in entries if not entry.name.startswith(".")}  # ._a.jpg: macOS
        inside = [entry for entry, kind in kinds.items() if kind == "image"]
        left_out = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds.values()).items() if kind != "image")
        if not inside:
            more = f" (only {left_out})" if left_out else ""
            what = f"the folder {path} holds" if path.is_dir() else f"the pattern {path} matches"
            raise UserError(f"{what} no image{more}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        if left_out:
            lines.append(f"{path}: {len(inside)} images; left out: {left_out}")
        for entry in inside:
            found.setdefault(entry, Source(entry, entry.relative_to(root).with_suffix("").as_posix()))
    return list(found.values()), lines


def _kind(entry: Path, suffixes: tuple[str, ...]) -> str:
    """The kind of a folder's entry: ``"image"``, or a word for the count of entries left out."""
    if entry.is_dir():
        return "sub-folder"
    return "image" if entry.suffix.lower() in (*suffixes, *VIDEO_SUFFIXES) else entry.suffix or "without suffix"


def planned_outputs(source: Source, options: Options) -> list[Output]:
    """The output files of a source; for a video its .mp4 (finished last), its first mask, and all masks that already exist."""
    if source.is_video:
        there = (options.save_dir / source.name).glob("[0-9]*.png")
        numbers = sorted({"000000", *(path.stem for path in there if path.stem.isdecimal())})
        endings = {f"mask of frame {number}": f"/{number}.png" for number in numbers} | {"video": ".mp4"}
    else:
        endings = {"mask": ".png"}
        endings |= {"panel": "_panel.png"} if options.panels else {}
        endings |= {"overlay": "_overlay.png"} if options.overlays else {}
        endings |= {"probabilities": ".npz"} if options.probabilities else {}
    return [
        Output("--save-dir", options.save_dir, f"{source.name}{ending}", f"the {kind} of {source.path}")
        for kind, ending in endings.items()
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from utils import distributed
    from utils.evaluation.crf_device import open_crf
    from utils.evaluation.predict import check_same_work, to_device

    with ExitStack() as stack:
        pool = open_crf(args, stack)
        work = distributed.everywhere(lambda: open_work(args))
        images = [f"{source.name}{source.path.suffix}" for source in work.sources]
        check_same_work(work.options, work.device, work.weights, {"images": images})
        outputs = distributed.everywhere(lambda: {source: planned_outputs(source, work.options) for source in work.sources})
        read = [*(source.path for source in work.sources), args.restore_from]
        distributed.everywhere(lambda: check_outputs(chain.from_iterable(outputs.values()), read))  # before any process writes
        distributed.everywhere(lambda: to_device(work.net, work.device, args.compile))
        # Divided before any file is skipped: the processes may not all find the same existing files.
        mine = work.sources[distributed.rank() :: distributed.world_size()]
        done = [source for source in mine if args.skip_existing and all(output.path.exists() for output in outputs[source])]
        left = [source for source in mine if source not in set(done)]
        if distributed.is_main():
            print(*work.lines, sep="\n")
        broken = distributed.everywhere(lambda: segment(work, left, pool))
    counts = distributed.gather((len(done), len(left) - len(broken)))
    broken = list(chain.from_iterable(distributed.gather(broken)))
    if distributed.is_main():
        there, made = (sum(numbers) for numbers in zip(*counts))
        print(f"masks of {made} files in {args.save_dir}/" + (f"; {there} existed already" if there else ""))
        if broken:
            print(f"{len(broken)} of {made + len(broken)} files were left out:", *broken, sep="\n", file=sys.stderr)
    distributed.stop()
    return 1 if broken else 0


class Work(NamedTuple):
    """The files that all processes predict, and everything that they need for it.

    Attributes:
        lines: lines to print before predicting.
    """

    options: Options
    sources: list[Source]
    net: "Net"
    weights: "Weights"
    device: "torch.device"
    classes: "Classes"
    lines: list[str]


def open_work(args: argparse.Namespace) -> Work:
    """Open everything that the command line names, without communication.

    Raises:
        UserError, WeightsError, DatasetError: something is missing, or does not fit.
    """
    from utils.evaluation.predict import open_trained_net, snapshot_colors
    from utils.visualize import Classes, class_names, make_palette

    sources, lines = find_sources(args.pictures)
    if args.probabilities and (videos := [source.path for source in sources if source.is_video]):
        raise UserError(f"--probabilities of a video ({videos[0]}) would fill the disk; leave it out, or extract single frames")
    if args.names and not (args.panels or args.overlays or any(source.is_video for source in sources)):
        raise UserError("--names writes into panels, overlays and videos; add --overlays or --panels, or leave it out")
    net, weights, device, loaded = open_trained_net(args)
    data = DATASETS[args.dataset or "voc"]
    if data.NAMES and net.num_classes != (count := len(data.NAMES)):
        raise UserError(
            f"{args.restore_from} has {net.num_classes} classes, not the {count} of {data.TITLE}; leave --dataset out"
        )
    names = class_names(net.num_classes, weights.meta.get("classes"), data.NAMES)
    colors = snapshot_colors(weights) or data.COLORS
    return Work(Options(vars(args)), sources, net, weights, device, Classes(names, make_palette(colors)), [*loaded, *lines])


def segment(work: Work, sources: list[Source], pool: "CRFPool | DeviceCRF | None") -> list[str]:
    """Predict images and videos, and write their outputs; returns the error messages of those that could not be read."""
    from tqdm import tqdm

    from utils import distributed
    from utils.evaluation.images import ReadableImageFiles, readable, reading
    from utils.evaluation.predict import logits_stride, prediction_options, predictions
    from utils.evaluation.video import BrokenVideo, VideoFile, check_frames, open_video, read_frames
    from utils.visualize import blend, save_image, save_panel, save_prediction

    options, net, device, classes, broken = work.options, work.net, work.device, work.classes, list[str]()
    prediction = {**prediction_options(options), "pool": pool}
    targets = {str(source.path): str(options.save_dir / source.name) for source in sources}
    videos = [source.path for source in sources if source.is_video]
    images = ReadableImageFiles([(str(source.path), source.path) for source in sources if not source.is_video])
    workers = min(options.num_workers, len(images))
    bar = tqdm(total=len(sources), unit="file", disable=None if distributed.is_main() else True, dynamic_ncols=True)
    with bar:
        with reading(images, range(len(images)), workers, device) as stream:
            for item in predictions(net, readable(stream, broken), device, keep_logits=options.probabilities, **prediction):
                target, image, mask = targets[item.id], item.image[:, :, ::-1], item.mask
                if options.probabilities:
                    write_probabilities(Path(f"{target}.npz"), item, classes.names, logits_stride(options.window))
                if options.panels:
                    save_panel(Path(f"{target}_panel.png"), image, None, mask, classes, options.names)
                if options.overlays:
                    overlay = blend(np.ascontiguousarray(image), mask, classes, options.names)
                    save_image(Path(f"{target}_overlay.png"), overlay)
                save_prediction(Path(f"{target}.png"), mask, classes.palette)
                bar.update()
        for path in videos:
            target, decoded = targets[str(path)], 0
            try:
                video, rate = open_video(path)
                with VideoFile(Path(f"{target}.mp4"), rate) as film:
                    for decoded, frame in enumerate(predictions(net, read_frames(video), device, **prediction), 1):
                        save_prediction(Path(target, f"{frame.id}.png"), frame.mask, classes.palette)
                        image = np.ascontiguousarray(frame.image[:, :, ::-1])
                        film.write(blend(image, frame.mask, classes, options.names), frame.time)
                        bar.set_postfix_str(f"{path.name}: frame {decoded}", refresh=False)
                    check_frames(path, video, decoded)
                if film.note():
                    bar.write(f"{path}: {film.note()}")
            except BrokenVideo as error:
                broken.append(str(error))
                with suppress(OSError):
                    Path(target).rmdir()  # the folder of the masks, if it is empty
            bar.update()
    return broken


def write_probabilities(path: Path, item: "NamedImage", names: Sequence[str], stride: int) -> None:
    """Save the softmax of an image's (C, h, w) logits (their stride is ``stride``) at the image's size, in blocks of rows."""
    from deeplab.inference import enlarge_rows

    size, logits = item.image.shape[:2], item.logits
    probabilities = np.empty((len(logits), *size), dtype=np.float16)
    for rows, block in enlarge_rows(logits[None], size, stride=stride):
        probabilities[:, rows] = block[0].softmax(dim=0).half().cpu().numpy()

    def write(file: IO[bytes]) -> None:
        np.savez_compressed(file, probabilities=probabilities, classes=np.array(names))
        mark_zip(file)

    write_atomically(path, write)


if __name__ == "__main__":
    run_command(main)
