"""Segment pictures of your own: masks as indexed PNGs, and panels to look at. No labels are needed.

    python scripts/predict.py --restore-from snapshots/VOC12_scenes_20000.pth --save-dir predictions photo.jpg folder/

A folder stands for the pictures in it, without those in its sub-folders. The net is rebuilt from the weights file; no option
has to be repeated.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command import UserError, numbers, positive, run_command
from utils.files import Output, check_outputs
from utils.options import TRAINED_WEIGHTS, add_device_options, add_net_options

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("pictures", nargs="+", type=Path, help="picture files, or folders of them")
    parser.add_argument(
        "--restore-from", default=TRAINED_WEIGHTS, help="a snapshot or published weights (default: %(default)s)"
    )
    parser.add_argument("--save-dir", type=Path, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument("--num-classes", type=positive, help="default: that of the weights file")
    parser.add_argument("--scales", type=partial(numbers, float), default=(1.0,), help="fused by maximum (default: 1)")
    parser.add_argument("--mirror", action="store_true", help="average with the prediction of the mirrored picture")
    parser.add_argument("--crf", action="store_true", help="refine with the dense CRF")
    parser.add_argument("--panels", action="store_true", help="also save <name>_panel.png: picture | prediction")
    add_net_options(parser)
    add_device_options(parser)
    return parser.parse_intermixed_args(argv)  # pictures before and after the options


def find_pictures(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """The files among ``paths`` and the pictures in the folders among them, and a line for each folder that holds more.

    Raises:
        UserError: a path does not exist, or a folder holds no picture.
    """
    found, lines = [], []
    for path in paths:
        if not path.exists():
            raise UserError(f"the picture {path} does not exist")
        if not path.is_dir():
            found.append(path)
            continue
        kinds = {entry: _kind(entry) for entry in sorted(path.iterdir()) if not entry.name.startswith(".")}  # ._a.jpg: macOS
        inside = [entry for entry, kind in kinds.items() if kind == "picture"]
        left_out = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds.values()).items() if kind != "picture")
        if not inside:
            more = f" (only {left_out})" if left_out else ""
            raise UserError(f"the folder {path} holds no picture{more}; expected files ending in {', '.join(SUFFIXES)}")
        if left_out:
            lines.append(f"{path}: {len(inside)} pictures; left out: {left_out}")
        found += inside
    return list(dict.fromkeys(found)), lines


def _kind(entry: Path) -> str:
    """What an entry of a folder is: ``"picture"``, or a word for the count of what is left out."""
    if entry.is_dir():
        return "sub-folder"
    return "picture" if entry.suffix.lower() in SUFFIXES else entry.suffix or "without suffix"


def planned_outputs(pictures: list[Path], folder: Path, panels: bool) -> list[Output]:
    """Every file that will be written: for each picture a mask and, if asked for, a panel."""
    endings = {"mask": ".png", "panel": "_panel.png"} if panels else {"mask": ".png"}
    return [
        Output("--save-dir", folder, f"{path.stem}{ending}", f"the {kind} of {path}")
        for path in pictures
        for kind, ending in endings.items()
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    pictures, left_out = find_pictures(args.pictures)

    import torch
    from tqdm import tqdm

    from dataset import DatasetError, read_image
    from deeplab.crf import find_densecrf
    from deeplab.multiscale import canvas_size, enlarge_to_classes
    from utils import distributed
    from utils.crf_pool import refine
    from utils.evaluation import checked, compile_for_prediction, open_trained_net, predict_batch
    from utils.visualize import save_indexed_png, save_panel

    if args.crf:
        find_densecrf()
    device = distributed.select_device(args.device, args.gpu, not args.no_tf32)
    net, _, lines = open_trained_net(args)
    check_outputs(planned_outputs(pictures, args.save_dir, args.panels), [*pictures, args.restore_from])
    net.to(device).to(memory_format=torch.channels_last)
    if args.compile:
        distributed.check_compiler(device)
        compile_for_prediction(net, device)
    print(*lines, *left_out, sep="\n")
    broken = []
    with torch.inference_mode():
        for path in tqdm(pictures, unit="image", disable=None):
            try:
                image = read_image(path)
            except DatasetError as error:
                broken.append(str(error))
                continue
            size = image.shape[:2]
            logits = predict_batch(net, [image], canvas_size(size), device, args.scales, args.mirror, args.amp)[0]
            prediction = checked(str(path), enlarge_to_classes(logits, size))
            if args.crf:
                prediction = refine(image, logits.cpu())
            save_indexed_png(args.save_dir / f"{path.stem}.png", prediction)
            if args.panels:
                save_panel(args.save_dir / f"{path.stem}_panel.png", image[:, :, ::-1], None, prediction)
    print(f"{len(pictures) - len(broken)} masks in {args.save_dir}/")
    if broken:
        print(f"{len(broken)} of {len(pictures)} pictures were left out:", *broken, sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    run_command(main)
