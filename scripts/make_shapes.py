"""Make a small data set of textured shapes, or of landscapes, in the layout of PASCAL VOC.

    python scripts/make_shapes.py --out data/shapes
    python scripts/make_shapes.py --kind landscapes --out data/landscapes

A net learns it from scratch in minutes, so training and evaluation can be tried without real data. Shapes: each class has its
own shape, texture and range of hues, and every image holds two to four complete objects that do not touch. Landscapes:
mountains, woods and lakes with balloons above them (scripts/data/landscapes.py). The image sizes are odd numbers and vary.
The script writes

    JPEGImages/<id>.jpg               RGB, quality 95
    SegmentationClassAug/<id>.png     palette PNG of classes; 255 (ignored) along the outline of every shape
    ImageSets/Segmentation/train.txt  one id per line; and val.txt
    classes.txt                       one name per line, line 1 = label 0; for landscapes also a colour

and a hidden file that marks the folder: the script writes only to an empty folder or to one that it has made.
An image depends only on the seed, its list and its number: the same command writes the same bytes, and asking for more images
does not change the first ones.
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.classes import IGNORE_LABEL
from scripts.data import landscapes
from utils.argtypes import Parser, size, target
from utils.command import UserError, run_command
from utils.visualize import save_indexed_png

CLASSES = ("background", "disc", "square", "triangle", "ring", "star", "cross")
SPLITS = ("train", "val")
SUPERSAMPLING = 4  # outlines are drawn at this scale and averaged down
OUTLINE_WIDTH = 5  # width in pixels of the brush that draws the ignored border
CLEARANCE = 8  # free pixels around an object


class Placed(NamedTuple):
    label: int
    x: float  # centre, pixels
    y: float
    radius: float  # of the circle around the object, pixels


def outline(label: int) -> list[np.ndarray]:
    """The contours of a class inside the unit circle, (n, 2) float64 each; a second contour is a hole."""

    def polygon(corners: int, radius: float = 1.0) -> np.ndarray:
        angles = np.arange(corners) * 2 * np.pi / corners
        return radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)

    name = CLASSES[label]
    if name == "square":
        return [polygon(4)]
    if name == "triangle":
        return [polygon(3)]
    if name == "star":
        points = polygon(10)
        points[1::2] *= 0.5
        return [points]
    if name == "cross":
        arm, reach = 0.38, 0.92
        quarter = np.array([(reach, -arm), (reach, arm), (arm, arm)])
        turn = np.array([(0.0, 1.0), (-1.0, 0.0)])  # row vectors times this turn by 90 degrees
        return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]
    return [polygon(72), polygon(72, 0.45)] if name == "ring" else [polygon(72)]


def texture(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pattern of a class, 0..1, at coordinates u and v in periods of the pattern."""
    u, v = 2 * np.pi * u, 2 * np.pi * v
    wave = {
        "disc": lambda: np.sin(np.hypot(u, v)),  # circles
        "square": lambda: np.sin(u),  # stripes
        "triangle": lambda: np.cos(u) + np.cos(v) - 0.6,  # dots
        "ring": lambda: np.zeros_like(u),  # plain
        "star": lambda: 2 * np.sin(u / 2) * np.sin(v / 2),  # chequers
        "cross": lambda: np.sin(u + 2.5 * np.sin(v / 2)),  # waves
    }[CLASSES[label]]()
    return 0.5 + 0.5 * np.tanh(2.5 * wave)


def place(rng: np.random.Generator, height: int, width: int, first_label: int) -> list[Placed]:
    """Two to four complete, separate objects, the first of a given class."""
    labels = [first_label, *rng.integers(1, len(CLASSES), rng.integers(1, 4)).tolist()]
    smallest, room = 0.18 * min(height, width), 0.14 * min(height, width)
    while True:
        placed: list[Placed] = []
        for label in labels:
            for _ in range(30):
                radius = smallest + room * rng.random()
                margin = radius + CLEARANCE
                x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
                if all(np.hypot(x - p.x, y - p.y) > radius + p.radius + CLEARANCE for p in placed):
                    placed.append(Placed(label, x, y, radius))
                    break
        if len(placed) == len(labels):
            return placed
        room *= 0.8  # start again with smaller ones


def ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The background, (height, width, 3) float32: clouds of two sizes and grain around one dull colour."""
    image = np.full((height, width, 3), rng.uniform(70, 180) + rng.uniform(-25, 25, 3), dtype=np.float32)
    for cells, strength in ((4, 22), (20, 14)):
        clouds = rng.standard_normal((cells, cells, 1)) * strength + rng.standard_normal((cells, cells, 3)) * strength / 3
        image += cv2.resize(clouds.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return image + rng.standard_normal((height, width, 1), dtype=np.float32) * 5


def two_colors(rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a light colour (BGR, float32). The hue ranges of the classes do not overlap."""
    hue = (label * 360 / (len(CLASSES) - 1) + rng.uniform(-18, 18)) % 360
    other = (hue + rng.uniform(-10, 10)) % 360
    hsv = np.array(
        [[(hue, rng.uniform(0.5, 0.9), rng.uniform(0.25, 0.45)), (other, rng.uniform(0.3, 0.8), rng.uniform(0.75, 1))]]
    )
    dark, light = 255 * cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2BGR)[0]
    return dark, light


def draw(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray, item: Placed) -> None:
    """Paint one object into ``image`` (H, W, 3 float32 BGR) and ``labels`` (H, W uint8), in place."""
    height, width = labels.shape
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    contours = [(points @ turn * item.radius + (item.x + 0.5, item.y + 0.5)) * SUPERSAMPLING for points in outline(item.label)]
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    cv2.fillPoly(fine, [np.round(points).astype(np.int32) for points in contours], 255)
    cover = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)

    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    dx, dy = xs - item.x, ys - item.y
    period = rng.uniform(0.055, 0.07) * min(height, width)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / period
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / period
    dark, light = two_colors(rng, item.label)
    pattern = texture(item.label, u, v)[:, :, None]
    light_from = rng.uniform(0, 2 * np.pi)
    shade = 1 + 0.15 * (dx * np.cos(light_from) + dy * np.sin(light_from))[:, :, None] / item.radius
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * 4
    painted = (dark + (light - dark) * pattern) * shade + grain
    opacity = cover[:, :, None].astype(np.float32) / 255
    image += opacity * (painted - image)

    inside = (cover > 127).astype(np.uint8)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (OUTLINE_WIDTH, OUTLINE_WIDTH))
    labels[inside == 1] = item.label
    labels[cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, brush) == 1] = IGNORE_LABEL


def make_image(
    seed: int, split: int, number: int, largest: tuple[int, int], kind: str = "shapes"
) -> tuple[np.ndarray, np.ndarray]:
    """One (H, W, 3) uint8 BGR image and its (H, W) uint8 labels; the sides are odd, from 5/6 of ``largest`` up to it."""
    rng = np.random.default_rng((seed, split, number))
    height, width = (int(rng.choice(np.arange(side * 5 // 6 | 1, side + 1, 2))) for side in largest)
    if kind == "landscapes":
        return landscapes.make_landscape(seed, split, number, height, width)
    image = ground(rng, height, width)
    labels = np.zeros((height, width), dtype=np.uint8)
    for item in place(rng, height, width, first_label=1 + number % (len(CLASSES) - 1)):
        draw(rng, image, labels, item)
    return np.clip(np.round(image), 0, 255).astype(np.uint8), labels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(
        description="Make a small data set of textured shapes, or of landscapes, in the layout of PASCAL VOC.",
        formatter_class=formatter,
    )
    parser.add_argument("--kind", choices=("shapes", "landscapes"), default="shapes", help="content of the images")
    text = "output folder; created if missing"
    parser.add_argument("--out", type=target, required=True, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files, byte for byte")
    parser.add_argument("--train", type=int, default=200, help="number of training images")
    parser.add_argument("--val", type=int, default=40, help="number of validation images")
    parser.add_argument("--size", type=size, default="193,225", metavar="H,W", help="height and width of the largest images")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; expected 0 or more")
    if args.train < 0 or args.val < 0 or args.train + args.val == 0:
        raise UserError(f"--train is {args.train} and --val {args.val}; expected 0 or more, and at least one image")
    if min(args.size) < 97:
        found = ",".join(map(str, args.size))
        raise UserError(f"--size is {found}; expected sides of at least 97 pixels, to leave room for the shapes")
    names, colors = (landscapes.CLASSES, landscapes.COLORS) if args.kind == "landscapes" else (CLASSES, ())
    mark = args.out / ".made_by_make_shapes"
    try:
        if args.out.is_dir() and any(args.out.iterdir()) and not mark.exists():
            raise UserError(f"{args.out} holds other files; choose an empty or new folder with --out")
        args.out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        lists = args.out / "ImageSets" / "Segmentation"
        for folder in (lists, args.out / "JPEGImages", args.out / "SegmentationClassAug"):
            folder.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(map(str, (name, *color))) for name, color in zip_longest(names, colors, fillvalue=())]
        (args.out / "classes.txt").write_text("".join(f"{line}\n" for line in lines))
        for split in SPLITS:  # the lists are written last: an interrupted run leaves none
            (lists / f"{split}.txt").unlink(missing_ok=True)
        ids: dict[str, list[str]] = {}
        for s, (split, count) in enumerate(zip(SPLITS, (args.train, args.val))):
            ids[split] = [f"{split}_{number:05}" for number in range(count)]
            for number, image_id in enumerate(ids[split]):
                image, labels = make_image(args.seed, s, number, args.size, args.kind)
                _, jpeg = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 95))
                (args.out / "JPEGImages" / f"{image_id}.jpg").write_bytes(jpeg.tobytes())
                save_indexed_png(args.out / "SegmentationClassAug" / f"{image_id}.png", labels)
        for split in SPLITS:
            (lists / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids[split]))
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}; choose another folder with --out") from None
    print(f"{args.out}: {args.train} training and {args.val} validation images of {len(names)} classes ({', '.join(names)})")
    return 0


if __name__ == "__main__":
    run_command(main)
