"""Segment pictures of your own: masks as indexed PNGs, and panels to look at. No labels are needed.

    python scripts/predict.py --restore-from snapshots/VOC12_scenes_20000.pth --save-dir predictions photo.jpg folder/

A folder stands for the pictures in it. The net is rebuilt from the weights file; no option has to be repeated.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command import UserError, numbers, run_command
from utils.options import TRAINED_WEIGHTS, add_device_options, add_net_options

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("pictures", nargs="+", type=Path, help="picture files, or folders of them")
    parser.add_argument(
        "--restore-from", default=TRAINED_WEIGHTS, help="a snapshot or published weights (default: %(default)s)"
    )
    parser.add_argument("--save-dir", type=Path, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument("--num-classes", type=int, help="default: that of the weights file")
    parser.add_argument("--scales", type=partial(numbers, float), default=(1.0,), help="fused by maximum (default: 1)")
    parser.add_argument("--mirror", action="store_true", help="average with the prediction of the mirrored picture")
    parser.add_argument("--crf", action="store_true", help="refine with the dense CRF")
    parser.add_argument("--panels", action="store_true", help="also save <name>_panel.png: picture | prediction")
    add_net_options(parser)
    add_device_options(parser)
    return parser.parse_args(argv)


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files among ``paths`` and the pictures in the folders among them.

    Raises:
        UserError: a path does not exist, a folder holds no picture, or two pictures would share one mask file.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"the folder {path} holds no picture; expected files ending in {', '.join(SUFFIXES)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"the picture {path} does not exist")
    names = [path.stem for path in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several pictures are called {twice[0]} and would share {twice[0]}.png; predict them in separate runs")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    pictures = find_pictures(args.pictures)

    import numpy as np
    import torch
    from tqdm import tqdm

    from dataset import read_image
    from deeplab import dense_crf
    from deeplab.multiscale import canvas_size, enlarge, enlarge_rows
    from utils import distributed
    from utils.evaluation import Sample, compile_for_prediction, open_net, predict_batch
    from utils.visualize import save_indexed_png, save_panel

    device = distributed.select_device(args.device, args.gpu)
    net, _, lines = open_net(args)
    net.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_for_prediction(net, device)
    print(*lines, sep="\n")
    with torch.inference_mode():
        for path in tqdm(pictures, unit="image"):
            image = read_image(path)
            size = image.shape[:2]
            logits = predict_batch(net, [Sample(path.stem, image, np.empty(size, np.uint8))], canvas_size(size), args, device)
            if args.crf:
                probabilities = enlarge(logits, size)[0].softmax(dim=0).cpu().numpy()
                prediction = dense_crf(np.ascontiguousarray(image[:, :, ::-1]), probabilities).argmax(axis=0).astype(np.uint8)
            else:
                prediction = np.empty(size, np.uint8)
                for rows, block in enlarge_rows(logits, size):
                    prediction[rows] = block[0].max(dim=0).indices.cpu().numpy()
            save_indexed_png(args.save_dir / f"{path.stem}.png", prediction)
            if args.panels:
                save_panel(args.save_dir / f"{path.stem}_panel.png", image[:, :, ::-1], None, prediction)
    print(f"{len(pictures)} masks in {args.save_dir}/")
    return 0


if __name__ == "__main__":
    run_command(main)
