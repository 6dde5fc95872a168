"""Fetch the data sets and the published weights.

    python scripts/download.py list                              # what there is
    python scripts/download.py VOC2012 SBD                       # into data/, unpacked
    python scripts/download.py resnet101-v1                      # into weights/
    python scripts/download.py coco-init --from ~/Downloads/x.pth  # a file fetched in a browser

A broken download goes on where it stopped when the same command is given again. A file gets its name after its check sum has
been found right. Sums and addresses come from torchvision (VOC 2012, SBD, its ResNets) and from the pages of the authors; what
nobody has checked is told by `list`.
"""

import argparse
import difflib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.data.archive import unpack, unpacked
from scripts.data.download import Item, check, disk_errors, fetch, take
from utils.command import UserError, positive, run_command

KAZUTO = "https://github.com/kazuto1011/deeplab-pytorch/releases/download/v1.0/"
VLLAB = "http://vllab1.ucmerced.edu/~whung/adv-semi-seg/"
DRIVE = "https://drive.google.com/file/d/{}/view?resourcekey={}"
PREPARE = "python scripts/prepare_voc.py --data-dir {directory}/VOCdevkit/VOC2012 --sbd {directory}/SBD/benchmark_RELEASE"
EVALUATE, TRAIN = "python evaluate.py --restore-from {path}", "python train.py --restore-from {path}"
HEAD_START = TRAIN + " --not-restore-last"


def drive(name: str, filename: str, key: tuple[str, str], unverified: str, after: str) -> Item:
    page = DRIVE.format(*key)
    return Item(name, filename, "weights", "MIT (repository)", about="177 MB", manual=page, unverified=unverified, after=after)


def kazuto(name: str, filename: str, about: str, after: str) -> Item:
    return Item(
        name, filename, "weights", "MIT (repository)", (KAZUTO + filename,), about=about, unverified="size", after=after
    )


def torchvision(name: str, filename: str, about: str) -> Item:
    """Sizes and addresses of ``torchvision.models.resnet``; the name carries the prefix that ``torch.hub`` checks."""
    option = "" if name.startswith("resnet101") else f" --backbone {name.split('-')[0]}"
    url, prefix = f"https://download.pytorch.org/models/{filename}", filename.split("-")[1].removesuffix(".pth")
    licence = "BSD-3-Clause; ImageNet terms"
    return Item(name, filename, "weights", licence, (url,), about=about, sha256_prefix=prefix, after=TRAIN + option)


CATALOGUE = (
    Item(
        "VOC2012", "VOCtrainval_11-May-2012.tar", "data", "pictures: Flickr terms",
        ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
         "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar"),
        size=1_999_639_040,
        md5="6cd6e144f989b92b3379bac3b3de84fd",
        sha1="4e443f8a2eca6b1dac8a6c57641b67dd40621a49",
        sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        unpack=".", holds="VOCdevkit/VOC2012/JPEGImages", gives="VOCdevkit/VOC2012",
        unverified="whether the second mirror still answers",
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
        unverified="the sum is that of the second mirror, whether the first has the same file is not known (a difference only "
        "warns); size; number of masks (12,031 expected)",
        after="python scripts/prepare_voc.py --data-dir {directory}/VOCdevkit/VOC2012 --aug {path}",
    ),
    drive(
        "coco-init", "MS_DeepLab_resnet_pretrained_COCO_init.pth",
        ("0BxhUwxvLPO7TVFJQU1dwbXhHdEk", "0-7UxnHrm5eDCyvz2G35aKgA"),
        "size (derived); whether the link still answers; the head in it is meaningless", TRAIN,
    ),
    Item(
        "coco-init-vllab", "resnet101COCO-41f33a49.pth", "weights", "not known", (VLLAB + "resnet101COCO-41f33a49.pth",),
        sha256_prefix="41f33a49", sum_certain=False,
        unverified="that the name carries the SHA-256's first digits (a difference only warns); size; whether the server still "
        "answers", after=HEAD_START,
    ),
    Item(
        "imagenet-init-vllab", "DeepLab_resnet_pretrained_init-f81d91e8.pth", "weights", "not known",
        ("http://vllab.ucmerced.edu/ytsai/CVPR18/DeepLab_resnet_pretrained_init-f81d91e8.pth",),
        sha256_prefix="f81d91e8", sum_certain=False,
        unverified="that the name carries the SHA-256's first digits (a difference only warns); size; whether the server still "
        "answers", after=HEAD_START,
    ),
    Item(
        "caffe", "prototxt_and_model.zip", "weights", "not known",
        ("http://liangchiehchen.com/projects/released/deeplab_aspp_resnet101/prototxt_and_model.zip",),
        about="over 1 GB", folder="caffe", unpack="caffe", holds="caffe/train_iter_20000.caffemodel",
        unverified="size; whether the server still answers; the exact list of files in it (train2_iter_20000 has seen val: do "
        "not score it there)", after=EVALUATE,
    ),
    Item(
        "caffe-init", "deeplabv2_resnet101_init.caffemodel", "weights", "not known",
        ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/deeplabv2_resnet101_init.caffemodel",),
        about="171 MB", folder="caffe",
        unverified="size (derived); whether it is the init.caffemodel of the official archive", after=HEAD_START,
    ),
    drive(
        "voc-isht7", "MS_DeepLab_resnet_trained_VOC.pth",
        ("0BxhUwxvLPO7TeXFNQ3YzcGI4Rjg", "0-dPyNi9NU2Eo8Qw5kIHPUNA"),
        "size (derived); whether the link still answers", EVALUATE,
    ),
    drive(
        "voc-isht7-pytorch", "VOC12_scenes_16000.pth",
        ("0BxhUwxvLPO7TT0Y5UndZckIwMVE", "0-dN8LmTrIU54tOySJQpSjVg"),
        "size (derived); file name; whether the link still answers", EVALUATE,
    ),
    Item(
        "voc-speedinghzl", "VOC12_scenes_20000.pth", "weights", "none; 'free to use' (author)",
        about="177 MB", manual="https://pan.baidu.com/s/1bP52R8",
        unverified="size (derived); whether the link still answers", after=EVALUATE,
    ),
    kazuto("voc-kazuto1011", "deeplabv2_resnet101_msc-vocaug-20000.pth", "177 MB", EVALUATE),
    kazuto("cocostuff10k-kazuto1011", "deeplabv2_resnet101_msc-cocostuff10k-20000.pth", "224 MB", HEAD_START),
    kazuto("cocostuff164k-kazuto1011", "deeplabv2_resnet101_msc-cocostuff164k-100000.pth", "224 MB", HEAD_START),
    torchvision("resnet18-v1", "resnet18-f37072fd.pth", "44.7 MiB"),
    torchvision("resnet34-v1", "resnet34-b627a593.pth", "83.3 MiB"),
    torchvision("resnet50-v1", "resnet50-0676ba61.pth", "97.8 MiB"),
    torchvision("resnet50-v2", "resnet50-11ad3fa6.pth", "97.8 MiB"),
    torchvision("resnet101-v1", "resnet101-63fe2227.pth", "170.5 MiB"),
    torchvision("resnet101-v2", "resnet101-cd907fc2.pth", "170.5 MiB"),
    torchvision("resnet152-v1", "resnet152-394f9c45.pth", "230.4 MiB"),
    torchvision("resnet152-v2", "resnet152-f82ba261.pth", "230.5 MiB"),
)  # fmt: skip


def print_table(items: tuple[Item, ...], data_dir: Path, weights_dir: Path) -> None:
    """Name, size, licence, check sum and place of every item, and below what is to be known about some of them."""
    rows = [("name", "size", "licence", "check sum", "goes to")]
    notes = []
    for item in items:
        directory = data_dir if item.kind == "data" else weights_dir
        found = [(kind, getattr(item, kind)) for kind in ("sha256", "sha1", "md5") if getattr(item, kind)]
        if found:
            known = f"{found[0][0]} {found[0][1][:16]}..."
        else:
            known = f"sha256 starts {item.sha256_prefix}" if item.sha256_prefix else "not known"
        size = f"{item.size / 1e9:.1f} GB" if item.size else item.about or "not known"
        uncertain = " (?)" if not item.sum_certain else ""
        rows.append((item.name, size, item.licence, known + uncertain, str(item.place(directory))))
        if item.manual:
            notes.append(f"{item.name}: by hand, from {item.manual}")
        plain = [url for url in item.urls if url.startswith("http:")]
        if plain:
            notes.append(f"{item.name}: no https address is published for {plain[0]}")
        if item.unverified:
            notes.append(f"{item.name}: not verified: {item.unverified}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(
        "\n(repository): the licence of the repository that publishes the file. starts: the digits that the file name\n"
        "carries, as torch.hub checks them. (?): may not hold for this copy, so a difference only warns.\n"
        "not known: not checked, and the SHA-256 found is printed."
    )
    print("\n".join(["", *notes]))


def obtain(item: Item, directory: Path, args: argparse.Namespace) -> None:
    """Bring one item to its place: fetched or copied, checked, unpacked. Does nothing where it is there already."""
    target, place = item.path(directory), item.place(directory)
    if item.unpack is not None and not args.force:
        if unpacked(item, directory):
            print(f"{item.name}: {place} is there and complete; nothing to do")
            if args.remove_archive:
                target.unlink(missing_ok=True)
            return
        ours = target.with_name(target.name + ".unpacked").exists()
        if (directory / item.holds).exists() and not ours and args.file is None:
            print(f"{item.name}: {place} is there, unpacked by other means and not checked; nothing done (--force: anew)")
            return
    if target.exists() and not args.force:
        try:
            with disk_errors(target):
                check(item, target)
        except UserError as error:
            raise UserError(f"{error}; move it away, or pass --force to replace it") from error
        print(f"{item.name}: {target} is there")
    elif args.file is not None:
        take(item, args.file, target)
    elif item.urls:
        print(f"{item.name}: fetching {item.filename} to {target.parent}")
        fetch(item, target, args.tries, args.timeout)
    else:
        raise UserError(
            f"{item.name} cannot be fetched by a script; open {item.manual} in a browser, save {item.filename}, and run: "
            f"python scripts/download.py {item.name} --from FILE"
        )
    if item.unpack is not None:
        unpack(item, directory)
        if args.remove_archive:
            target.unlink()
    print(f"{item.name}: {place}")


def select(names: list[str], items: tuple[Item, ...]) -> list[Item]:
    known = {key.lower(): item for item in items for key in (item.filename, item.name)}
    for name in names:
        if name.lower() not in known:
            close = difflib.get_close_matches(name, [item.name for item in items], n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise UserError(f"unknown name {name!r}; {hint}`python scripts/download.py list` shows the names")
    return list(dict.fromkeys(known[name.lower()] for name in names))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help='what to fetch; "list" shows what there is')
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a file fetched by hand: checked and copied")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: %(default)s")
    parser.add_argument("--weights-dir", type=Path, default=Path("weights"), help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="fetch again what is there")
    parser.add_argument("--remove-archive", action="store_true", help="delete an archive once it is unpacked")
    parser.add_argument(
        "--tries", type=positive, default=5, help="attempts without progress, per mirror (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=positive, default=30, help="seconds without an answer (default: %(default)s)")
    args = parser.parse_args(argv)
    if "list" in args.names and len(args.names) > 1:
        parser.error("list stands alone")
    if args.file is not None and len(args.names) > 1:
        parser.error(f"--from is one file and goes with one name, not with {len(args.names)}")
    return args


def main(argv: list[str] | None = None, items: tuple[Item, ...] = CATALOGUE) -> int:
    args = parse_args(argv)
    if args.names == ["list"]:
        print_table(items, args.data_dir, args.weights_dir)
        return 0
    status, commands = 0, []
    for item in select(args.names, items):
        directory = args.data_dir if item.kind == "data" else args.weights_dir
        try:
            obtain(item, directory, args)
            path = shlex.quote(str(item.place(directory)))
            commands.append(item.after.format(path=path, directory=shlex.quote(str(directory))))
        except UserError as error:  # the others may still come
            print(f"download.py: error: {error}", file=sys.stderr)
            status = max(status, error.exit_status)
    if commands:
        print("next:", *dict.fromkeys(commands), sep="\n  ")
    return status


if __name__ == "__main__":
    run_command(main)
