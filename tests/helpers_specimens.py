"""A small file of every kind that the project reads, with its reader, for tests/hostile.py to damage."""

import gzip
import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from scipy.io import savemat

from dataset.classes import read_classes, voc_palette
from dataset.images import read_with_orientation
from dataset.labels import read_label
from dataset.lists import read_list
from deeplab.weights import load_weights
from scripts.data.archive import unpack
from scripts.data.catalogue import Item
from scripts.data.masks import convert, read_ready, read_sbd, ready_masks, sbd_ids
from tests.helpers_legacy_tar import tar_torch
from tests.helpers_pngs import GREY, PALETTE, RGB, png
from tests.helpers_published import caffe_bytes, kazuto_state, narrow_state, semseg_state, tensorflow_arrays
from utils.checkpoint import load_checkpoint
from utils.training.validation import mean_iou_of

HEIGHT, WIDTH = 30, 40


class Specimen(NamedTuple):
    """A file and its reader.

    Attributes:
        filename: some readers depend on it.
        data: the bytes to damage.
        read: path -> content, for comparison; raises if the file is refused.
        sums: whether checksums cover all content, so that it must not change.
        wrap: applied to the damaged bytes, e.g. to recompute checksums, as if the damage came before writing.
    """

    filename: str
    data: bytes
    read: Callable[[Path], Any]
    sums: bool = False
    wrap: Callable[[bytes], bytes] = bytes


def specimens() -> dict[str, Specimen]:
    """All specimens by name; the same bytes on every call."""
    return labels() | images() | texts() | weights() | archives()


def labels() -> dict[str, Specimen]:
    grid = np.add.outer(np.arange(HEIGHT) // 3, np.arange(WIDTH) // 4) % 4

    def read(path: Path) -> np.ndarray:
        return read_label(path, 21)

    palette = png(grid, 8, PALETTE, voc_palette()[:21].tolist())
    return {
        "label, palette": Specimen("a.png", palette, read, sums=True),
        "label, palette of 2 bits": Specimen("a.png", png(grid, 2, PALETTE, voc_palette()[:4].tolist()), read, sums=True),
        "label, grey of 4 bits": Specimen("a.png", png(grid, 4, GREY), read, sums=True),
        "label, new sums": Specimen("a.png", palette, read, wrap=with_new_crcs),
    }


def images() -> dict[str, Specimen]:
    image = np.random.default_rng(0).integers(0, 255, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    exif = Image.Exif()
    exif[0x0112] = 6

    def encoded(kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        Image.fromarray(image).save(out, kind, **options)
        return out.getvalue()

    turned = encoded("PNG", exif=exif)
    files = {
        "JPEG": encoded("JPEG", exif=exif),
        "progressive JPEG": encoded("JPEG", progressive=True),
        "BMP": encoded("BMP"),
        "TIFF": encoded("TIFF", compression="tiff_lzw"),
        "TIFF, raw": encoded("TIFF"),
        "WebP": encoded("WEBP"),
        "WebP, lossless": encoded("WEBP", lossless=True, exif=exif),
    }
    found = {f"image, {name}": Specimen("a.jpg", data, read_with_orientation) for name, data in files.items()}
    found["image, PNG"] = Specimen("a.png", turned, read_with_orientation, sums=True)
    found["image, PNG of 16 bits"] = Specimen("a.png", png(image * np.int64(257), 16, RGB), read_with_orientation, sums=True)
    found["image, PNG, new sums"] = Specimen("a.png", turned, read_with_orientation, wrap=with_new_crcs)
    return found


def with_new_crcs(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks recomputed, as far as the chunks can be found."""
    out, position = bytearray(data), 8
    while position + 12 <= len(out):
        end = position + 8 + int.from_bytes(out[position : position + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = crc(bytes(out[position + 4 : end]))
        position = end + 4
    return bytes(out)


def crc(data: bytes) -> bytes:
    return zipfile.crc32(data).to_bytes(4, "big")


def texts() -> dict[str, Specimen]:
    ids = "\n".join(f"2007_{number:06}" for number in range(40))
    pairs = "\n".join(f"/JPEGImages/{number}.jpg /SegmentationClassAug/{number}.png" for number in range(20))
    classes = "\n".join(["background 0 0 0", "café 128 0 0", "road, wet 0 128 0", "sky"])
    return {
        "list of ids": Specimen("a.txt", ids.encode(), read_list),
        "list of pairs": Specimen("a.txt", pairs.encode(), read_list),
        "classes.txt": Specimen("classes.txt", classes.encode(), read_classes),
    }


def weights() -> dict[str, Specimen]:
    torch.manual_seed(0)
    small, middle, large = narrow_state("resnet18"), narrow_state("resnet50"), narrow_state("resnet101")
    layers = tensorflow_arrays(middle, "resnet50")
    flat = {f"{layer}/{leaf}": value for layer, entry in layers.items() for leaf, value in entry.items()}
    auxiliary = {key.replace("layer5", "layer6"): value for key, value in small.items() if key.startswith("layer5")}
    auxiliary = {key: torch.cat([value, value], 1) if value.ndim == 4 else value for key, value in auxiliary.items()}
    resnet = {key: value for key, value in small.items() if not key.startswith("layer5")} | {"fc.weight": torch.rand(9, 2)}
    meta = {"backbone": "resnet18", "num_classes": 21, "atrous_rates": [6, 12, 18, 24], "seen_voc_val": "", "step": 3}
    meta |= {"stride_in_3x3": False, "batch_norm_eps": 1e-5, "classes": None, "args": {"power": 0.9}, "version": 1}
    slots = {"state": {0: {"momentum_buffer": torch.rand(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    checkpoint = {"model": small, "meta": meta, "optimizer": slots, "step": 3, "scaler": {}, "rng": torch.get_rng_state()}

    def saved(content: Any, old: bool = False) -> bytes:
        out = io.BytesIO()
        torch.save(content, out, _use_new_zipfile_serialization=not old)
        return out.getvalue()

    def numpy_bytes(write: Callable, *args: Any, **arrays: Any) -> bytes:
        write(out := io.BytesIO(), *args, **arrays)
        return out.getvalue()

    def read(path: Path) -> Any:
        found = load_weights(path)
        return found.state, found.config, found.meta, found.skipped, found.seen_voc_val

    snapshot = saved({"model": small, "meta": meta})
    semseg = saved(semseg_state(middle))
    segmentation = {f"backbone.{key}": value for key, value in resnet.items() if not key.startswith("fc.")}
    segmentation |= {f"classifier.{key}": torch.rand(2) for key in ("0.weight", "1.running_var", "4.weight", "4.bias")}
    objects = numpy_bytes(np.save, np.array(layers, dtype=object))
    tar = tar_torch(small, "argument")
    found = {
        "zip .pth": Specimen("a.pth", saved(small), read, sums=True),
        "snapshot": Specimen("a.pth", snapshot, read, sums=True),
        "snapshot, new sums": Specimen("a.pth", member_of(snapshot, "data.pkl"), read, wrap=with_member(snapshot, "data.pkl")),
        "kazuto's": Specimen("a.pth", saved(kazuto_state(large, "resnet101")), read, sums=True),
        "two-level": Specimen("a.pth", saved(small | auxiliary), read, sums=True),
        "semseg's, new sums": Specimen("a.pth", member_of(semseg, "data.pkl"), read, wrap=with_member(semseg, "data.pkl")),
        "torchvision's FCN": Specimen("a.pth", saved(segmentation), read, sums=True),
        "ResNet": Specimen("a.pth", saved(resnet), read, sums=True),
        "legacy pickle": Specimen("a.pth", saved(small, old=True), read),
        "tar .pth": Specimen("a.pth", tar, read),
        "npy of objects": Specimen("a.npy", objects, read),
        "npz": Specimen("a.npz", numpy_bytes(np.savez, **flat), read, sums=True),
        "npz, compressed": Specimen("a.npz", numpy_bytes(np.savez_compressed, **flat), read, sums=True),
        "npz of objects, new sums": Specimen("a.npz", objects, read, wrap=lambda data: zipped({"arr_0.npy": data})),
        "safetensors": Specimen("a.safetensors", save(small, {"meta": "{}", "format": "pt"}), read),
        "caffemodel": Specimen("a.caffemodel", caffe_bytes(middle, "resnet50", suffixes=("", "_res05"), eps=1e-5), read),
        "last.ckpt": Specimen("last.ckpt", saved(checkpoint), load_checkpoint, sums=True),
        "best.pth": Specimen("best.pth", saved({"model": small, "meta": meta | {"val_mean_iou": 0.5}}), mean_iou_of, sums=True),
    }
    inner = member_of(saved(checkpoint), "data.pkl")
    wrap = with_member(saved(checkpoint), "data.pkl")
    return found | {"last.ckpt, new sums": Specimen("last.ckpt", inner, load_checkpoint, wrap=wrap)}


def member_of(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as package:
        return package.read(next(each for each in package.namelist() if each.endswith(name)))


def with_member(archive: bytes, name: str) -> Callable[[bytes], bytes]:
    """A function that replaces one member of a zip file by other bytes."""
    with zipfile.ZipFile(io.BytesIO(archive)) as package:
        members = {each: package.read(each) for each in package.namelist()}
    place = next(each for each in members if each.endswith(name))
    return lambda data: zipped(members | {place: data})


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as package:
        for name, data in members.items():
            package.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def archives() -> dict[str, Specimen]:
    mask = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 300 % 21
    savemat(mat := io.BytesIO(), {"GTcls": {"Segmentation": mask.astype(np.uint8)}}, do_compression=True)
    members = {f"benchmark_RELEASE/dataset/cls/{number}.mat": mat.getvalue() for number in range(3)}
    members |= {f"benchmark_RELEASE/dataset/{name}.txt": f"{name}_1\n{name}_2\n".encode() for name in ("train", "val")}
    masks = {f"SegmentationClassAug/{number}.png": png(mask + number, 8, GREY) for number in range(3)}

    def unpacked(path: Path, holds: str = "benchmark_RELEASE/dataset") -> dict[str, bytes]:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            place = Path(folder)
            archive = path.rename(place / path.name)
            unpack(Item("x", path.name, "data", "", unpack="in", holds=f"in/{holds}"), place)
            assert {each.name for each in place.iterdir()} == {path.name, "in", f"{archive.name}.unpacked"}
            files = [each for each in sorted(place.rglob("in/**/*")) if not each.is_dir()]
            return {str(each.relative_to(place)): each.read_bytes() for each in files}

    def sbd(path: Path) -> tuple[Any, Any]:
        return sbd_ids(path), dict(read_sbd(path, {f"cls/{number}.mat" for number in range(3)}))

    def ready(path: Path) -> dict[str, Any]:
        names = ready_masks(path)
        return {name: converted("png", data, path) for name, data in read_ready(path, names, set(names))}

    def converted(kind: str, data: bytes, path: Path) -> Any:
        (path.parent / "JPEGImages").mkdir(exist_ok=True)
        cv2.imwrite(str(path.parent / "JPEGImages/a.jpg"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        _, outcome = convert("a", kind, data, path.parent, path.parent, overwrite=True)
        if outcome not in ("there", "new", "replaced"):
            return Refused(outcome)
        return read_label(path.parent / "SegmentationClassAug/a.png", 21)

    def read_mat(path: Path) -> Any:
        return converted("mat", path.read_bytes(), path)

    tar, raw = tarred(members), io.BytesIO()
    savemat(raw, {"GTcls": {"Segmentation": mask.astype(np.uint8)}})
    packed = gzip.compress(tar, mtime=0)
    return {
        "zip archive": Specimen("a.zip", zipped(masks), partial(unpacked, holds="SegmentationClassAug"), sums=True),
        "zip archive, compressed": Specimen("a.zip", zipped(members, zipfile.ZIP_DEFLATED), unpacked, sums=True),
        "tgz archive": Specimen("a.tgz", packed, unpacked, sums=True),
        "tgz archive, new sums": Specimen("a.tgz", tar, unpacked, wrap=lambda data: gzip.compress(data, 1, mtime=0)),
        "SBD's archive": Specimen("benchmark.tgz", packed, sbd, sums=True),
        "SBD's archive, new sums": Specimen("benchmark.tgz", tar, sbd, wrap=lambda data: gzip.compress(data, 1, mtime=0)),
        "SBD's mask": Specimen("a.mat", mat.getvalue(), read_mat, sums=True),
        "SBD's mask, raw": Specimen("a.mat", raw.getvalue(), read_mat),
        "zip of masks": Specimen("a.zip", zipped(masks), ready, sums=True),
    }


class Refused(str):
    """The message of a reader that returns it instead of raising."""
