"""Everything that can be downloaded: URLs, sizes, checksums, licences, and what nobody has checked.

Checksums and URLs come from torchvision (VOC 2012, SBD, its ResNets) and from the pages of the authors.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One file to download. Paths are relative to ``--data-dir`` or ``--weights-dir``."""

    name: str
    filename: str
    kind: str  # "data" (--data-dir) or "weights" (--weights-dir)
    licence: str
    urls: tuple[str, ...] = ()  # mirrors, tried in order
    size: int | None = None  # bytes, if the exact size is known
    about: str = ""  # the approximate size otherwise, e.g. "over 1 GB"
    md5: str = ""
    sha1: str = ""
    sha256: str = ""
    sha256_prefix: str = ""  # torch.hub's convention: the file name has the first 8 hex digits
    sum_certain: bool = True  # False: the checksum is of another copy, so a mismatch only warns
    folder: str = ""  # of the file
    unpack: str = ""  # the folder to unpack an archive into
    holds: str = ""  # what must exist after unpacking
    gives: str = ""  # what the user works with, if it is not ``holds``
    manual: str = ""  # a page to open in a browser, if no script can download the file
    unverified: str = ""  # what nobody has checked
    after: str = ""  # the next command; {path} is ``place()``, {directory} the folder

    def path(self, directory: Path) -> Path:
        """The file itself."""
        return directory / self.folder / self.filename

    def place(self, directory: Path) -> Path:
        """The final path: of the file, or of what an archive unpacks to."""
        return directory / (self.gives or self.holds) if self.unpack else self.path(directory)


KAZUTO = "https://github.com/kazuto1011/deeplab-pytorch/releases/download/v1.0/"
VLLAB = "http://vllab1.ucmerced.edu/~whung/adv-semi-seg/"
DRIVE = "https://drive.google.com/file/d/{}/view?resourcekey={}"
PREPARE = "python scripts/prepare_voc.py --data-dir {directory}/VOCdevkit/VOC2012 --sbd {directory}/SBD/benchmark_RELEASE"
EVALUATE, TRAIN = "python evaluate.py --restore-from {path}", "python train.py --restore-from {path}"
HEAD_START = TRAIN + " --not-restore-last"
STUFF = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
COCO = "http://images.cocodataset.org/zips/"
CHECK = "python scripts/check_dataset.py --dataset cocostuff --data-dir {directory}/cocostuff"


def drive(name: str, filename: str, key: tuple[str, str], unverified: str, after: str) -> Item:
    page = DRIVE.format(*key)
    return Item(name, filename, "weights", "MIT (repository)", about="177 MB", manual=page, unverified=unverified, after=after)


def coco(
    name: str,
    url: str,
    about: str,
    folder: str,
    holds: str,
    after: str,
    licence: str = "images: Flickr terms; labels: CC BY 4.0",
) -> Item:
    """An archive of COCO or COCO-Stuff, for which no checksums are published."""
    unverified = "size; whether the server still responds; the folders in the archive"
    return Item(name, url.rpartition("/")[2], "data", licence, (url,), about=about, folder=folder, unpack=folder, holds=holds,
                unverified=unverified, after=after)  # fmt: skip


def kazuto(name: str, filename: str, about: str, after: str) -> Item:
    url = KAZUTO + filename
    return Item(name, filename, "weights", "MIT (repository)", (url,), about=about, unverified="size", after=after)


def torchvision(name: str, filename: str, about: str) -> Item:
    """Sizes and addresses of ``torchvision.models.resnet``; the file name has the prefix that ``torch.hub`` checks."""
    option = "" if name.startswith("resnet101") else f" --backbone {name.split('-')[0]}"
    url, prefix = f"https://download.pytorch.org/models/{filename}", filename.split("-")[1].removesuffix(".pth")
    licence = "BSD-3-Clause; ImageNet terms"
    return Item(name, filename, "weights", licence, (url,), about=about, sha256_prefix=prefix, after=TRAIN + option)


CATALOGUE = (
    Item(
        "VOC2012", "VOCtrainval_11-May-2012.tar", "data", "images: Flickr terms",
        ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
         "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar"),
        size=1_999_639_040,
        md5="6cd6e144f989b92b3379bac3b3de84fd",
        sha1="4e443f8a2eca6b1dac8a6c57641b67dd40621a49",
        sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        unpack=".", holds="VOCdevkit/VOC2012/JPEGImages", gives="VOCdevkit/VOC2012",
        unverified="whether the second server still responds",
        after=PREPARE,
    ),
    Item(
        "SBD", "benchmark.tgz", "data", "none stated",
        ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
        about="1.4 GB",
        md5="82b4d87ceb2ed10f6038a1cba92111cb",
        sha1="7129e0a480c2d6afb02b517bb18ac54283bfaa35",
        sha256="6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
        folder="SBD", unpack="SBD", holds="SBD/benchmark_RELEASE/dataset", gives="SBD/benchmark_RELEASE",
        unverified="the exact size",
        after=PREPARE,
    ),
    Item(
        "SegmentationClassAug", "SegmentationClassAug.zip", "data", "not known",
        ("https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip?dl=1", VLLAB + "SegmentationClassAug.zip"),
        sha256="63b2c2e40badf93e7c4a91e2c5e6dd2eb68ace6a639736f9a2447b446ec2a13d", sum_certain=False,
        unpack=".", holds="SegmentationClassAug",
        unverified="whether the first server has the same file as the second, which the checksum belongs to (a mismatch only "
        "warns); size; number of masks (12,031 expected)",
        after="python scripts/prepare_voc.py --data-dir {directory}/VOCdevkit/VOC2012 --aug {path}",
    ),
    coco("coco-train2017", COCO + "train2017.zip", "18 GB", "cocostuff/images", "cocostuff/images/train2017", CHECK),
    coco("coco-val2017", COCO + "val2017.zip", "1 GB", "cocostuff/images", "cocostuff/images/val2017", CHECK),
    coco(
        "cocostuff164k", STUFF + "stuffthingmaps_trainval2017.zip", "659 MB", "cocostuff/annotations",
        "cocostuff/annotations/train2017", CHECK, "CC BY 4.0",
    ),
    coco(
        "cocostuff10k", STUFF + "cocostuff-10k-v1.1.zip", "2.0 GB", "cocostuff10k", "cocostuff10k/imageLists",
        "python scripts/prepare_cocostuff.py --data-dir {directory}/cocostuff10k",
    ),
    drive(
        "coco-init", "MS_DeepLab_resnet_pretrained_COCO_init.pth",
        ("0BxhUwxvLPO7TVFJQU1dwbXhHdEk", "0-7UxnHrm5eDCyvz2G35aKgA"),
        "size (derived); whether the link still works (the head in it is meaningless)", TRAIN,
    ),
    Item(
        "coco-init-vllab", "resnet101COCO-41f33a49.pth", "weights", "not known", (VLLAB + "resnet101COCO-41f33a49.pth",),
        sha256_prefix="41f33a49", sum_certain=False,
        unverified="that the name has the SHA-256's first digits (a mismatch only warns); size; whether the server still "
        "responds", after=HEAD_START,
    ),
    Item(
        "imagenet-init-vllab", "DeepLab_resnet_pretrained_init-f81d91e8.pth", "weights", "not known",
        ("http://vllab.ucmerced.edu/ytsai/CVPR18/DeepLab_resnet_pretrained_init-f81d91e8.pth",),
        sha256_prefix="f81d91e8", sum_certain=False,
        unverified="that the name has the SHA-256's first digits (a mismatch only warns); size; whether the server still "
        "responds", after=HEAD_START,
    ),
    Item(
        "caffe", "prototxt_and_model.zip", "weights", "not known",
        ("http://liangchiehchen.com/projects/released/deeplab_aspp_resnet101/prototxt_and_model.zip",),
        about="over 1 GB", folder="caffe", unpack="caffe", holds="caffe/train_iter_20000.caffemodel",
        unverified="size; whether the server still responds; its exact contents (train2_iter_20000 was trained on val: do not "
        "evaluate it there)", after=EVALUATE,
    ),
    Item(
        "caffe-init", "deeplabv2_resnet101_init.caffemodel", "weights", "not known",
        (STUFF + "deeplabv2_resnet101_init.caffemodel",),
        about="171 MB", folder="caffe",
        unverified="size (derived); whether it is the init.caffemodel of the official archive", after=HEAD_START,
    ),
    Item(
        "mit-resnet101", "resnet101-imagenet.pth", "weights", "not known",
        ("http://sceneparsing.csail.mit.edu/model/pretrained_resnet/resnet101-imagenet.pth",),
        unverified="size; whether the server still responds; which input it was trained with", after=TRAIN + " --net pspnet",
    ),
    drive(
        "voc-isht7", "MS_DeepLab_resnet_trained_VOC.pth",
        ("0BxhUwxvLPO7TeXFNQ3YzcGI4Rjg", "0-dPyNi9NU2Eo8Qw5kIHPUNA"),
        "size (derived); whether the link still works", EVALUATE,
    ),
    drive(
        "voc-isht7-pytorch", "VOC12_scenes_16000.pth",
        ("0BxhUwxvLPO7TT0Y5UndZckIwMVE", "0-dN8LmTrIU54tOySJQpSjVg"),
        "size (derived); file name; whether the link still works", EVALUATE,
    ),
    Item(
        "voc-speedinghzl", "VOC12_scenes_20000.pth", "weights", "none; 'free to use' (author)",
        about="177 MB", manual="https://pan.baidu.com/s/1bP52R8",
        unverified="size (derived); whether the link still works", after=EVALUATE,
    ),
    kazuto("voc-kazuto1011", "deeplabv2_resnet101_msc-vocaug-20000.pth", "177 MB", EVALUATE),
    kazuto("cocostuff10k-kazuto1011", "deeplabv2_resnet101_msc-cocostuff10k-20000.pth", "224 MB",
           EVALUATE + " --dataset cocostuff --data-dir data/cocostuff10k"),
    kazuto("cocostuff164k-kazuto1011", "deeplabv2_resnet101_msc-cocostuff164k-100000.pth", "224 MB",
           EVALUATE + " --dataset cocostuff"),
    torchvision("resnet18-v1", "resnet18-f37072fd.pth", "44.7 MiB"),
    torchvision("resnet34-v1", "resnet34-b627a593.pth", "83.3 MiB"),
    torchvision("resnet50-v1", "resnet50-0676ba61.pth", "97.8 MiB"),
    torchvision("resnet50-v2", "resnet50-11ad3fa6.pth", "97.8 MiB"),
    torchvision("resnet101-v1", "resnet101-63fe2227.pth", "170.5 MiB"),
    torchvision("resnet101-v2", "resnet101-cd907fc2.pth", "170.5 MiB"),
    torchvision("resnet152-v1", "resnet152-394f9c45.pth", "230.4 MiB"),
    torchvision("resnet152-v2", "resnet152-f82ba261.pth", "230.5 MiB"),
)  # fmt: skip
