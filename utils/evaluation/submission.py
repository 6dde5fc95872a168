"""Submissions to the evaluation servers of the data sets: the masks of the test images, packed as the servers require."""

import io
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import DATASETS, DatasetError
from dataset.voc import Server
from deeplab import Net
from deeplab.weights import Weights
from utils import distributed
from utils.command import UserError
from utils.data import list_of
from utils.evaluation.crf_device import open_crf
from utils.evaluation.images import ImageFiles, reading
from utils.evaluation.options import settled
from utils.evaluation.predict import check_same_work, open_trained_net, prediction_options, predictions, to_device
from utils.evaluation.score import share
from utils.files import write_atomically
from utils.options import Options
from utils.outputs import OUTPUT_MARK, Output, check_outputs, marked_gzip
from utils.visualize import indexed_png


def run(args: Namespace) -> int:
    """Predict the images of the test list and pack the masks into the ``--submission`` file; no labels are needed.

    Raises:
        UserError: the net has other classes than the server, or the file name has another suffix than the server expects.
    """
    path = Path(args.submission)
    with ExitStack() as stack:
        pool = open_crf(args, stack)
        work = distributed.everywhere(lambda: open_work(args, path))
        options, net, weights, device, server, data_list, files, lines = work
        check_same_work(options, device, weights, {"images": [f"{id} {file.name}" for id, file in files.items()]})
        output = Output("--submission", path.parent, path.name, "the submission")
        read, folder = [*files.values(), options.restore_from, data_list], Path(options.data_dir) / options.image_dir
        distributed.everywhere(lambda: check_outputs([output], read, [folder]))
        distributed.everywhere(lambda: to_device(net, device, options.compile))
        order = share(len(files))
        if distributed.is_main():
            print(*lines, f"{len(files)} images of {data_list}", sep="\n")
        bar = stack.enter_context(tqdm(total=len(order), unit="image", disable=not distributed.is_main(), dynamic_ncols=True))

        def predict() -> dict[str, bytes]:
            masks = {}
            with reading(ImageFiles(list(files.items())), order, options.num_workers, device) as images:
                for image in predictions(net, images, device, pool=pool, **prediction_options(options)):
                    masks[image.id] = encode(image.mask, server)
                    bar.update()
            return masks

        masks = distributed.everywhere(predict)
    parts = distributed.gather(masks)

    def write() -> None:
        pack(path, {id: mask for part in parts for id, mask in part.items()}, files, server)
        print(f"{path}: {len(files)} masks, each of the size of its image; {server.advice}")

    distributed.from_main(write)
    distributed.stop()
    return 0


def open_work(
    args: Namespace, path: Path
) -> tuple[Options, Net, Weights, torch.device, Server, Path, dict[str, Path], list[str]]:
    """Open everything that the command line names, without communication; the last item is lines to print.

    Raises:
        UserError, WeightsError, DatasetError: something is missing, or does not fit.
    """
    net, weights, device, lines = open_trained_net(args)
    options = settled(args, weights)
    title, server = DATASETS[options.dataset].TITLE, DATASETS[options.dataset].SERVER
    if server is None:
        raise UserError(f"--submission: {title} has no server that accepts masks; leave it out to evaluate against labels")
    if net.num_classes != (count := len(server.classes)):
        raise UserError(
            f"{options.restore_from} has {net.num_classes} classes; the server expects {title}'s {count}; see --dataset"
        )
    if not path.name.endswith(server.suffixes):
        kind = "zip" if server.mode == "L" else "gzipped tar"
        raise UserError(f"--submission {path}: the {title} server accepts {kind} files; end the name in {server.suffixes[0]}")
    data_list = list_of(options, "test")
    return options, net, weights, device, server, data_list, test_files(options, data_list), lines


def test_files(options: Options, data_list: Path) -> dict[str, Path]:
    """The image files of the list by id.

    Raises:
        DatasetError: an image is missing, an id has a folder, which the server does not accept, or an id has two images.
    """
    root = Path(options.data_dir)
    files: dict[str, Path] = {}
    for id, image, _ in DATASETS[options.dataset].read_list(data_list, options.image_dir):
        if "/" in id:
            raise DatasetError(f"the list of image ids {data_list} holds {id}; the server accepts only ids without folders")
        place = root / image if image else root / options.image_dir / f"{id}.jpg"
        if files.setdefault(id, place) != place:
            raise DatasetError(
                f"the list of image ids {data_list} holds {id} twice, for {files[id]} and {place}; leave one out"
            )
        if not files[id].is_file():
            raise DatasetError(f"the image {files[id]} does not exist; the test images are a separate download")
    return files


def encode(labels: np.ndarray, server: Server) -> bytes:
    """The PNG file of an image's (H, W) uint8 classes, with the server's ids as values."""
    ids = np.array([row.id for row in server.classes], dtype=np.uint8)[labels]
    if server.mode == "P":
        return indexed_png(ids)
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, masks: Mapping[str, bytes], files: Mapping[str, Path], server: Server) -> None:
    """Write the archive after checking ids and sizes as the server does.

    Raises:
        UserError: a mask is missing, or has another size than its image, or a value that is not the id of a class.
    """
    if missing := files.keys() - masks.keys():
        raise UserError(f"{len(missing)} images have no mask, for example {min(missing)}; run all processes again")
    ids = {row.id for row in server.classes}
    for id in sorted(files):
        with Image.open(files[id]) as image, Image.open(io.BytesIO(masks[id])) as mask:
            if mask.size != image.size or mask.mode != server.mode or not ids.issuperset(np.unique(mask).tolist()):
                raise UserError(
                    f"the mask of {files[id]} is {mask.size} {mask.mode}; expected {image.size} {server.mode} with the "
                    f"labels {', '.join(map(str, sorted(ids)))}"
                )
    archive = io.BytesIO()
    if server.mode == "L":
        with zipfile.ZipFile(archive, "w") as packed:  # PNGs are compressed already
            packed.comment = OUTPUT_MARK.encode()
            for id in sorted(files):
                packed.writestr(f"{files[id].stem}.png", masks[id])
    else:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for id in sorted(files):
                entry = tarfile.TarInfo(f"{server.folder}{id}.png")
                entry.size = len(masks[id])
                tar.addfile(entry, io.BytesIO(masks[id]))
    data = archive.getvalue() if server.mode == "L" else marked_gzip(archive.getvalue())
    write_atomically(path, lambda file: file.write(data))
