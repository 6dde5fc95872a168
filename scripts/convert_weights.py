"""Convert a weights file: from any scheme that the project reads to a snapshot, or to another scheme that fits the net.

    python scripts/convert_weights.py train_iter_20000.caffemodel weights/caffe.pth
    python scripts/convert_weights.py snapshots/VOC12_scenes_20000.pth out.pth --to kazuto

``--to`` accepts, for any net:

    snapshot           {"model", "meta"}: what train.py writes and every command here reads without flags (the default)
    safetensors        the canonical names, with the snapshot's meta in the header (the default if OUT ends in .safetensors)

for resnet50, 101 and 152 with the stride in the 1x1 convolutions (as in all published nets except torchvision's) and a head
of rates 6,12,18,24:

    published          a bare state_dict with the published names, for any DeepLab-ResNet code
    kazuto             the names of kazuto1011/deeplab-pytorch

and for resnet18 and 34, and for larger ones with the stride in the 3x3 convolutions (as in torchvision's):

    torchvision-trunk  the backbone for RGB input, for torchvision's resnet without its fc

``--trunk`` says how to read a ResNet with torchvision's names; by default its first layer decides. A ResNet with the head of
another net needs ``--trunk``, since its weights do not show where the stride sits; only its backbone is used.
``--atrous-rates 6,12`` keeps the first two of a head's four branches, for weights that were trained with those alone.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.argtypes import Parser
from utils.command import UserError, run_command
from utils.options import add_file_options

SCHEMES = ("snapshot", "published", "kazuto", "torchvision-trunk", "safetensors")
TRUNKS = ("auto", "torchvision", "caffe", "rgb-1x1", "bgr-3x3")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="the weights file to read; its scheme is recognised")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--to", choices=SCHEMES, help="the scheme of OUT (default: by its suffix)")
    parser.add_argument(
        "--trunk", choices=TRUNKS, default="auto", help="how to read a bare ResNet (default: by its first layer)"
    )
    add_file_options(parser)
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    args = parser.parse_args(argv)
    args.to = args.to or ("safetensors" if args.target.suffix == ".safetensors" else "snapshot")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_target(args.source, args.target, args.to, args.force)
    from deeplab.weights import export, load_weights

    weights = load_weights(args.source, args.trunk, args.abn, args.atrous_rates)
    print(*weights.lines(), sep="\n")
    content = export(weights, args.to)
    meta = snapshot_meta(content["meta"] if args.to == "snapshot" else export(weights, "snapshot")["meta"], args)
    if args.to == "snapshot":
        content["meta"] = meta
    write(args.target, content, meta if args.to == "safetensors" else None)
    print(f"wrote {args.target} ({args.to}, {args.target.stat().st_size / 1e6:.1f} MB)")
    return 0


def check_target(source: Path, target: Path, scheme: str, force: bool) -> None:
    """Refuse a target that cannot be written or read again, before any work is done.

    Raises:
        UserError: it is the source, it exists, its folder does not exist, or its suffix is that of another format.
    """
    if target.is_dir():
        raise UserError(f"{target} is a folder; name the file to write in it")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target} is the file to read, which is never overwritten; choose another name for OUT")
    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another name or add --force to overwrite it")
    if not target.parent.is_dir():
        raise UserError(f"the folder {target.parent} does not exist; make it first or choose another")
    if target.suffix in (".caffemodel", ".npy", ".npz") or (target.suffix == ".safetensors") != (scheme == "safetensors"):
        expected = ".safetensors" if scheme == "safetensors" else ".pth"
        raise UserError(f"{target} has the suffix {target.suffix!r}; --to {scheme} writes {expected} files")


def snapshot_meta(meta: dict, args: argparse.Namespace) -> dict:
    """A snapshot's meta with all entries that train.py writes; ``args`` records the options that IN was read with."""
    from dataset import MEAN_BGR
    from deeplab.weights import VERSION

    asked = {"trunk": args.trunk, "abn": args.abn, "atrous_rates": args.atrous_rates}
    return {"classes": None, "mean": list(MEAN_BGR), "step": 0, "args": asked, "version": VERSION} | meta


def write(target: Path, content: dict, meta: dict | None) -> None:
    """Write ``content`` as a torch file, or as a safetensors file with ``meta`` in its header: whole, or not at all."""
    from utils.files import remove_torn_files, write_atomically

    remove_torn_files([target])
    if meta is None:
        import torch

        write_atomically(target, lambda file: torch.save(content, file))
    else:
        from safetensors.torch import save

        tensors = {key: value.contiguous() for key, value in content.items()}
        write_atomically(target, lambda file: file.write(save(tensors, {"format": "pt", "meta": json.dumps(meta)})))


if __name__ == "__main__":
    run_command(main)
