"""What the PASCAL VOC evaluation server takes: the masks of the test pictures, packed as its development kit says."""

import io
import tarfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import VOC_CLASSES, DatasetError, find_list, read_list
from utils import distributed
from utils.command import UserError
from utils.crf_pool import CRFPool
from utils.files import Output, check_outputs, write_atomically
from utils.loader import make_loader, running
from utils.prediction import checked, open_trained_net, predict, to_device
from utils.samples import Pictures, only_one
from utils.visualize import indexed_png

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"  # comp6: any training data but the test set
TEST_LISTS = ("ImageSets/Segmentation/test.txt",)


def run(args: Namespace) -> int:
    """Predict the test list and pack the masks as ``--submission``; no labels are needed.

    Raises:
        UserError: the net has other classes than VOC's, or the name is that of another kind of file.
    """
    path = Path(args.submission)
    if not path.name.endswith((".tgz", ".tar.gz")):
        raise UserError(f"--submission {path}: the server takes gzipped tar files; end the name in .tgz")
    with CRFPool(args.crf_workers, args.crf_prune) if args.crf else nullcontext() as pool:
        device = distributed.select_device(args.device, args.gpu, not args.no_tf32, args.deterministic)
        distributed.start()
        net, _, lines = open_trained_net(args)
        if net.num_classes != len(VOC_CLASSES):
            raise UserError(f"{args.restore_from} has {net.num_classes} classes; the server expects VOC's {len(VOC_CLASSES)}")
        data_list = find_list(args.data_dir, args.data_list, TEST_LISTS)
        files = test_files(args, data_list)
        output = Output("--submission", path.parent, path.name, "the submission")
        check_outputs([output], [*files.values(), args.restore_from, data_list], [Path(args.data_dir) / args.image_dir])
        to_device(net, device, args.compile)
        if distributed.is_main():
            print(*lines, f"{len(files)} pictures of {data_list}", sep="\n")

        share = list(files.items())[distributed.rank() :: distributed.world_size()]
        options = {name: getattr(args, name) for name in ("scales", "mirror", "batch_size", "amp")}
        loader = make_loader(Pictures(share), [[index] for index in range(len(share))], args.num_workers, device, only_one)
        masks: dict[str, bytes] = {}
        bar = tqdm(total=len(share), unit="image", disable=not distributed.is_main(), dynamic_ncols=True)
        with torch.inference_mode(), running(loader) as pictures, bar:
            predicted = predict(net, pictures, device, canvas=args.input_size, **options)
            classes = ((picture, logits, checked(picture.id, labels)) for picture, logits, labels in predicted)
            plain = ((picture, labels) for picture, _, labels in classes)
            for picture, labels in pool.refine((picture, logits.cpu()) for picture, logits, _ in classes) if pool else plain:
                masks[picture.id] = indexed_png(labels)
                bar.update()
    parts = distributed.gather(masks)
    if distributed.is_main():
        pack(path, {id: mask for part in parts for id, mask in part.items()}, files)
        print(f"{path}: {len(files)} masks, each of its picture's size; upload it as comp6 of the segmentation challenge")
    distributed.stop()
    return 0


def test_files(args: Namespace, data_list: Path) -> dict[str, Path]:
    """The pictures of the list by their ids.

    Raises:
        DatasetError: a picture is not there; an id that the server's layout has no place for.
    """
    root = Path(args.data_dir)
    files = {}
    for id, image, _ in read_list(data_list, args.image_dir):
        if "/" in id:
            raise DatasetError(f"the list of image ids {data_list} holds {id}; the server takes ids without folders")
        files[id] = root / image if image else root / args.image_dir / f"{id}.jpg"
        if not files[id].is_file():
            raise DatasetError(f"the picture {files[id]} does not exist; the test pictures are a download of their own")
    return files


def pack(path: Path, masks: Mapping[str, bytes], files: Mapping[str, Path]) -> None:
    """Write the archive, once every id and size is as the server checks them.

    Raises:
        UserError: a mask is missing, or has another size than its picture or another label than 0..20.
    """
    if missing := files.keys() - masks.keys():
        raise UserError(f"{len(missing)} pictures have no mask, {min(missing)} among them; run all processes again")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for id in sorted(files):
            with Image.open(files[id]) as picture, Image.open(io.BytesIO(masks[id])) as mask:
                if mask.size != picture.size or mask.mode != "P" or np.asarray(mask).max() >= len(VOC_CLASSES):
                    raise UserError(
                        f"the mask of {files[id]} is {mask.size} {mask.mode}; expected {picture.size} with labels 0..20"
                    )
            entry = tarfile.TarInfo(f"{FOLDER}/{id}.png")
            entry.size = len(masks[id])
            tar.addfile(entry, io.BytesIO(masks[id]))
    write_atomically(path, lambda file: file.write(archive.getvalue()))
