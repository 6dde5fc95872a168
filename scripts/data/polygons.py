"""Polygons that labelling tools export instead of masks: COCO JSON and labelme are converted, others are refused by name."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.images import LARGEST
from utils.command import UserError

_POLYGONS = (  # tool, keys of its JSON, key of the image name, advice
    ("COCO JSON", {"images", "annotations"}, ("images", "file_name"), "it lacks `categories`; export them, too"),
    ("labelme's JSON", {"shapes", "imagePath"}, ("", "imagePath"), "pass it with its images"),
    ("Supervisely's JSON", {"objects", "size"}, ("", ""), "export masks with its app `Export as masks`"),
    ("SuperAnnotate's JSON", {"instances", "metadata"}, ("metadata", "name"), "export fused masks (___fuse.png)"),
)


class Region(NamedTuple):
    """The pixels of an annotation.

    Attributes:
        size: (H, W) of the image.
        polygons: x and y alternately, in pixels from the upper left corner of the image.
        counts: lengths of runs alternately outside and inside, column by column (COCO's uncompressed RLE).
    """

    size: tuple[int, int]
    polygons: Sequence[Sequence[float]] = ()
    counts: Sequence[int] = ()

    def mask(self) -> np.ndarray:
        """(H, W) bool: pixels with their centre in one of the polygons (even-odd rule), or those of the runs."""
        height, width = self.size
        if self.counts:
            runs = np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts)
            return runs.reshape(width, height).T
        covered = np.zeros(self.size, dtype=bool)
        for polygon in self.polygons:
            points = np.array(polygon, dtype=np.float64).reshape(-1, 2) - 0.5  # the centre of the first pixel is (0, 0)
            left, top = np.floor(points.min(axis=0)).clip(0, (width, height)).astype(int)
            right, bottom = np.ceil(points.max(axis=0)).clip(0, (width, height)).astype(int)
            crossings = np.zeros((bottom - top, right - left + 1), dtype=np.int32)  # set at the first pixel right of an edge
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
                low, high = np.ceil(sorted((y0, y1))).clip(top, bottom).astype(int)
                if len(rows := np.arange(low, high)):
                    x = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
                    crossings[rows - top, np.ceil(x).clip(left, right).astype(int) - left] += 1
            covered[top:bottom, left:right] |= crossings.cumsum(axis=1)[:, :-1] % 2 == 1
        return covered


class Annotated(NamedTuple):
    """An image of a JSON file: its name there, and [(category, region)] in the order of the file."""

    origin: Path
    name: str
    regions: list[tuple[str, Region]]


def read_coco(files: Sequence[Path]) -> tuple[list[Annotated], list[str]]:
    """The annotated images in the COCO JSON files among ``files``, and the categories sorted by id.

    Raises:
        UserError: the files have different categories, or a region is no polygon.
    """
    images: list[Annotated] = []
    categories: list[str] = []
    for path, content in read_jsons(files):
        if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
            continue
        try:
            found, names = _read_one(path, content)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"{path} is no complete COCO JSON ({type(error).__name__}: {error}); expected images with file_name, height "
                "and width, and annotations with category_id, image_id and segmentation"
            ) from None
        if categories not in ([], names):
            raise UserError(f"{path} has the categories {names}, but another JSON file has {categories}; pass only one of them")
        images, categories = images + found, names
    return images, categories


def _read_one(path: Path, content: Mapping[str, Any]) -> tuple[list[Annotated], list[str]]:
    names = {row["id"]: str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])}
    used = {row["category_id"] for row in content["annotations"]}
    above = {row.get("supercategory") for row in content["categories"]}  # Roboflow lists these, too
    categories = [name for number, name in names.items() if number in used or name not in above]
    rows = {row["id"]: row for row in content["images"]}
    sizes = {number: (int(row["height"]), int(row["width"])) for number, row in rows.items()}
    if wrong := next((size for size in sizes.values() if min(size) < 1 or size[0] * size[1] > LARGEST), None):
        raise ValueError(f"an image of {wrong[1]}x{wrong[0]} pixels")
    regions = {number: [(categories[0], Region(size))] for number, size in sizes.items()}
    for row in content["annotations"]:
        number = row["image_id"]
        regions[number].append((names[row["category_id"]], _region(path, row, sizes[number])))
    files = {number: str(row["file_name"]).replace("\\", "/") for number, row in rows.items()}
    return [Annotated(path, files[number], found) for number, found in regions.items()], categories


def _region(path: Path, row: Mapping[str, Any], size: tuple[int, int]) -> Region:
    shape = row.get("segmentation")
    if isinstance(shape, list) and shape and all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in shape):
        polygons = [[float(value) for value in polygon] for polygon in shape]
        if all(abs(value) < LARGEST for polygon in polygons for value in polygon):  # no NaN either
            return Region(size, polygons)
    counts = shape["counts"] if isinstance(shape, dict) else None
    if isinstance(counts, list) and min(counts, default=0) >= 0 and sum(counts) == size[0] * size[1]:
        return Region(size, counts=[int(count) for count in counts])
    kind = "RLE of another kind or size" if isinstance(shape, dict) else "a box without polygon" if not shape else "no polygon"
    raise UserError(
        f"annotation {row.get('id')} in {path} is {kind}; expected polygons: export them, or make masks with pycocotools "
        "(COCO.annToMask) and pass their folder"
    )


IGNORED = "__ignore__"  # labelme's name for the ignore label


def read_labelme(files: Sequence[Path]) -> tuple[list[Annotated], list[str]]:
    """The images of labelme's JSON files, one per file, and their labels sorted by name; [] for files of another kind.

    Raises:
        UserError: a file is incomplete, or a shape is not an area.
    """
    paths = [path for path in files if path.suffix.lower() == ".json"]
    if not any(isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys() for _, content in read_jsons(paths)):
        return [], []
    images = []
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            size = int(content["imageHeight"]), int(content["imageWidth"])
            shapes = [(str(row["label"]), Region(size, [_outline(row)])) for row in content["shapes"]]
            images.append((size, Annotated(path, str(content["imagePath"]).replace("\\", "/"), shapes)))
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"{path} is not labelme's JSON of polygons, rectangles and circles ({type(error).__name__}: {error}); draw "
                "such shapes, or make masks with labelme2voc.py of labelme's repository and pass its output folder"
            ) from None
    labels = sorted({label for _, each in images for label, _ in each.regions} - {IGNORED})
    if not labels:
        raise UserError(f"{paths[0]} and the other {len(paths) - 1} files of labelme hold no label")
    # An empty region of the first label, so that an image without shapes has a size.
    return [each._replace(regions=[(labels[0], Region(size)), *each.regions]) for size, each in images], labels


def _outline(shape: Mapping[str, Any]) -> list[float]:
    """The polygon of a labelme shape: x and y alternately."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    kind = shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind == "circle":
        (x0, y0), (x1, y1) = points
        turns, radius = 2 * np.pi * np.arange(64) / 64, np.hypot(x1 - x0, y1 - y0)
        points = list(zip((x0 + radius * np.cos(turns)).tolist(), (y0 + radius * np.sin(turns)).tolist()))
    elif kind not in ("polygon", "rectangle") or len(points) < 3:
        raise ValueError(f"a {kind} of {len(points)} points")
    return [value for point in points for value in point]


def read_jsons(files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """The first few JSON files and their contents; there may be one per image, all of one kind."""
    for path in [path for path in files if path.suffix.lower() == ".json"][:20]:
        with suppress(OSError, ValueError, RecursionError):
            yield path, json.loads(path.read_bytes())


def polygons(content: Any) -> tuple[str, str, set[str]] | None:
    """The tool whose polygons JSON holds, the advice, and the names of its images; None if it holds no polygons."""
    if isinstance(content, list):
        advice = "export `Brush labels to PNG` or COCO format, and pass that folder"
        return ("Label Studio's JSON", advice, set()) if content and "annotations" in _dict(content[0]) else None
    content = _dict(content)
    for whose, keys, (place, name), advice in _POLYGONS:
        if keys <= content.keys():
            rows = content[place] if place else content
            return whose, advice, _names(rows if isinstance(rows, list) else [rows], name)
    regions = _dict(content.get("_via_img_metadata", content)).values()
    if regions and all("regions" in _dict(value) for value in regions):
        advice = "export COCO format from VIA, and pass its folder with the images"
        return "VIA's JSON", advice, _names(regions, "filename")
    return None


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _names(rows: Iterable[Any], key: str) -> set[str]:
    return {Path(str(_dict(row).get(key, ""))).name for row in rows}
