"""The exports of labelling tools: the masks in them and the images that they belong to."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from dataset.folders import IMAGE_FOLDERS, MASK_FOLDERS, split_of
from dataset.lists import FOREIGN_SUFFIXES, IMAGE_DIR, IMAGE_SUFFIXES, Listing
from scripts.data.polygons import Region, polygons, read_coco, read_jsons, read_labelme
from scripts.data.splits import LISTS
from utils.command import UserError

LAYOUTS = (
    ("SegmentationClassPNG", IMAGE_DIR),
    ("SegmentationClass", IMAGE_DIR),
    ("SegmentationClassAug", IMAGE_DIR),
    ("masks_machine", "img"),
    (MASK_FOLDERS, IMAGE_FOLDERS),
    (f"(.+)[_-](?:{MASK_FOLDERS})", None),
    ("(.+)annot", None),
)
"""Names of the folder of masks and of the folder of images beside it, anywhere in an export: labelme2voc (the first has the
PNGs) and CVAT, Supervisely, common use, CamVid (``train_labels`` and ``train``), SegNet (``trainannot`` and ``train``)."""
SUFFIXES = (("", ""), ("___fuse", ""), ("_mask", ""), ("_mask", "_sat"), ("_L", ""))
"""What the names of masks and of their images add to the id: SuperAnnotate, Roboflow, DeepGlobe, CamVid."""
# Label Studio: the control's name is before the label's, which may hold dashes
_LAYER = re.compile(r"(task-\d+)-annotation-(\d+)-by-[^-]*-[^-]+-(.+)-\d+")


class Labelled(NamedTuple):
    """The masks of a folder.

    Attributes:
        masks: id -> mask; an id is a path below the folder of the masks, without suffixes (x.jpg.png is x).
        images: id -> image, for ids that have one; None for a folder of masks only.
        lists: the folder with the lists of ids, which need not exist.
        others: number of files other than PNGs in a folder of masks only.
        layers: id -> [(label, mask of 0 and 255, or region)], if the labels of an image are separate.
        labels: of all layers, in the order of their classes.
    """

    masks: dict[str, Path]
    images: dict[str, Path] | None
    lists: Path
    others: int = 0
    layers: Mapping[str, Sequence[tuple[str, Path | Region]]] = {}
    labels: Sequence[str] = ()


def find_labelled(root: Path, suffix: str, image_suffix: str = "") -> Labelled:
    """The masks and images in the folder ``root``; ``root`` may also be a single mask.

    Args:
        suffix: what the names of masks add to the id: ``"_mask"``; "" tries those of SUFFIXES.
        image_suffix: what the names of images add to the id: ``"_sat"``.

    Raises:
        UserError: there are no masks, two have one name, or there are polygons instead.
    """
    if not root.exists():
        raise UserError(f"{root} does not exist; expected a folder of masks, or one PNG")
    if root.is_file():
        return Labelled(_by_id([root], root.parent, "") or _no_masks(root, "", []), None, root.parent / LISTS)
    files = _files(root)
    pngs = [path for path in files if path.suffix.lower() == ".png"]
    if layers := _layers(pngs):
        masks = {image_id: found[0][1] for image_id, found in layers.items()}
        labels = sorted({label for found in layers.values() for label, _ in found})
        return Labelled(masks, _task_images(files), root / LISTS, 0, layers, labels)
    endings = [(suffix, image_suffix)] if suffix or image_suffix else SUFFIXES
    without_images = None
    for ending, image_ending in endings:
        for mask_dir, image_dir in LAYOUTS:
            masks, places = _in_folders(root, pngs, ending, mask_dir, image_dir)
            images = _find_images(root, masks, places, image_ending)
            if images:
                return Labelled(masks, images, root / LISTS)
            if masks and not without_images:
                without_images = Labelled(masks, images, root / LISTS)
        masks = _by_id(pngs, root, ending)
        images = _find_images(root, masks, {image_id: image_id for image_id in masks}, image_ending)
        if suffix and masks and not images:
            _check_names(root, masks, _images(root, files))
        if (images and not _are_images(files)) or (suffix and masks):
            return Labelled(masks, images, root / LISTS)
    if without_images:
        _check_names(root, without_images.masks, _images(root, files))
        return without_images
    masks = {} if suffix else _by_id(pngs, root, "")
    if not masks or _are_images(files):
        return _annotated(root, files) or _no_masks(root, suffix, files)
    others = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.suffix.lower() != ".png"]
    if found := _elsewhere(root, pngs, others, endings):
        return found
    if 2 * len(others) >= len(masks):
        _check_names(root, masks, others)
    return Labelled(masks, None, root.parent / LISTS, len(files) - len(masks))


def _images(root: Path, files: Iterable[Path]) -> list[Path]:
    """The images of an export: files of other formats than PNG, and PNGs in a folder named for images."""
    names = re.compile(IMAGE_FOLDERS, re.IGNORECASE)
    return [
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES
        and (path.suffix.lower() != ".png" or any(map(names.fullmatch, path.relative_to(root).parts[:-1])))
    ]


def _elsewhere(root: Path, pngs: Sequence[Path], others: Iterable[Path], endings: Iterable[tuple[str, str]]) -> Labelled | None:
    """Masks and their images of another format, in folders of any name; None if no image has the name of a mask."""
    by_stem = defaultdict(list)
    for path in others:
        by_stem[path.stem].append(path)
    home = Path(os.path.commonpath([path.parent for path in pngs]))
    for ending, image_ending in endings:
        masks = _by_id(pngs, home, ending)
        found = {image_id: by_stem.get(image_id.rpartition("/")[2] + image_ending, []) for image_id in masks}
        if images := {image_id: paths[0] for image_id, paths in found.items() if len(paths) == 1}:
            return Labelled(masks, images, root / LISTS)
    return None


def _check_names(root: Path, masks: Mapping[str, Path], images: Sequence[Path]) -> None:
    """Raise :class:`UserError` if there are images, but none has the name of a mask."""
    if not images:
        return
    stems = {path.stem for path in images}
    some = list(masks.values())[:20]
    endings = {mask.stem[len(stem) :] for mask in some for stem in stems if mask.stem.startswith(stem)} - {""}
    advice = f"pass --suffix {endings.pop()}" if len(endings) == 1 else "pass their endings with --suffix and --image-suffix"
    raise UserError(
        f"{root} holds {len(masks)} masks, such as {next(iter(masks.values()))}, and {len(images)} images, such as "
        f"{images[0]}, but no image has the name of a mask; {advice}"
    )


def _files(folder: Path) -> list[Path]:
    """The files in a folder and its sub-folders, without hidden ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _bare_stem(name: str) -> str:
    """``name`` without the suffix of an image: ``"p0.jpg"`` -> ``"p0"``, ``"p0.5"`` as it is."""
    path = Path(name)
    return path.stem if path.suffix.lower() in (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES) else name


def _by_id(paths: Iterable[Path], folder: Path, suffix: str) -> dict[str, Path]:
    """{id: mask} of the PNGs with names ending in ``suffix``; UserError if two have one id."""
    masks: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() != ".png" or not path.stem.endswith(suffix) or path.stem == suffix:
            continue
        _add(masks, path.relative_to(folder).with_name(_bare_stem(path.stem.removesuffix(suffix))).as_posix(), path)
    return masks


def _add(masks: dict[str, Path], image_id: str, path: Path) -> None:
    if (first := masks.setdefault(image_id, path)) != path:
        raise UserError(f"{first} and {path} would be written to one file; rename one of them")


def _in_folders(
    root: Path, pngs: Iterable[Path], suffix: str, mask_dir: str, image_dir: str | None
) -> tuple[dict[str, Path], dict[str, str]]:
    """{id: mask} of the PNGs in folders named ``mask_dir``, and {id: path of its image, without suffix}.

    Args:
        image_dir: name of the folder of images beside it; None means the group of ``mask_dir``.
    """
    masks: dict[str, Path] = {}
    places: dict[str, str] = {}
    folders: dict[Path, tuple[str, str] | None] = {}  # folder of masks -> prefixes of ids and images
    for path in pngs:
        if path.parent not in folders:
            folders[path.parent] = _beside(root, path.parent.relative_to(root).parts, mask_dir, image_dir)
        stem = _bare_stem(path.stem.removesuffix(suffix))
        if (where := folders[path.parent]) and stem and path.stem.endswith(suffix):
            _add(masks, image_id := where[0] + stem, path)
            places[image_id] = where[1] + stem
    return masks, places


def _beside(root: Path, parts: tuple[str, ...], mask_dir: str, image_dir: str | None) -> tuple[str, str] | None:
    """The prefixes of ids and images for the masks in a folder; None if no part of its path is named ``mask_dir``."""
    for at, part in enumerate(parts):
        if found := re.fullmatch(mask_dir, part, re.IGNORECASE):
            name = image_dir or rf"{re.escape(found[1])}([_-](?:{IMAGE_FOLDERS}))?"
            images = name if name == IMAGE_DIR else _folder(root.joinpath(*parts[:at]), name)
            if images:
                kept = [found[1]] if found.lastindex else []
                ids, places = ([*parts[:at], *new, *parts[at + 1 :], ""] for new in (kept, [images]))
                return "/".join(ids), "/".join(places)
    return None


def _folder(parent: Path, name: str) -> str | None:
    """The folder in ``parent`` whose name matches ``name``, in any case."""
    names = sorted(path.name for path in parent.iterdir() if path.is_dir())
    return next((found for found in names if re.fullmatch(name, found, re.IGNORECASE)), None)


def _find_images(root: Path, masks: dict[str, Path], places: dict[str, str], image_suffix: str) -> dict[str, Path]:
    """{id: image}; the suffix in a mask's own name, as in ``p0.jpg.png``, is preferred."""
    listing = Listing(root)
    found = {}
    for image_id, place in places.items():
        own = Path(re.split("___", masks[image_id].stem)[0]).suffix.lower()
        suffixes = [own, *IMAGE_SUFFIXES] if own in IMAGE_SUFFIXES else IMAGE_SUFFIXES
        name = listing.find(place + image_suffix, suffixes)
        if name and root / name != masks[image_id]:
            found[image_id] = root / name
    return found


def _layers(pngs: Iterable[Path]) -> dict[str, list[tuple[str, Path]]]:
    """The masks of Label Studio's brush export by task, each with its label; {} if there are none.

    Their names are like ``task-1-annotation-5-by-1-tag-car-0.png``; a mask is 255 at the pixels of its label, else 0.
    """
    layers = defaultdict(list)
    annotation: dict[str, str] = {}
    for path in pngs:
        if found := _LAYER.fullmatch(path.stem):
            task, number, label = found.groups()
            if annotation.setdefault(task, number) != number:
                raise UserError(
                    f"{path.parent} holds two annotations of {task}, {annotation[task]} and {number}; expected one: "
                    "move the masks of the other to another folder"
                )
            layers[task].append((label, path))
    return dict(layers)


def _annotated(root: Path, files: Sequence[Path]) -> Labelled | None:
    """The images of COCO or labelme JSON with their polygons; None if there are none.

    If the name of the JSON file has a split (``instances_train.json``) and no folder of the image does, the id begins with it.
    """
    found, labels = read_coco(files)
    found, labels = (found, labels) if found else read_labelme(files)
    by_name = defaultdict(list)
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            by_name[path.name].append(path)
    masks: dict[str, Path] = {}
    for each in found:
        splits = [split for split in map(split_of, re.split("[^A-Za-z0-9]", each.origin.stem)) if split]
        image = _named(root, each.origin.parent, each.name, by_name, splits)
        parts = [part for part in image.relative_to(root).parts[:-1] if part != "images"]
        image_id = "/".join([*([] if any(map(split_of, parts)) else splits[:1]), *parts, _bare_stem(image.stem)])
        if image_id in masks:
            raise UserError(f"{each.origin} annotates {image_id} again; expected each image once, in one JSON file")
        masks[image_id] = image
    layers = {image_id: each.regions for image_id, each in zip(masks, found)}
    images = {image_id: path for image_id, path in masks.items() if path.is_file()}
    return Labelled(masks, images, root / LISTS, 0, layers, labels) if found else None


def _named(root: Path, folder: Path, name: str, by_name: Mapping[str, Sequence[Path]], splits: Sequence[str | None]) -> Path:
    """The image with this name in a JSON in ``folder``; its expected path if missing. UserError if ambiguous."""
    places = by_name.get(Path(name).name, [])
    for near in (
        [folder / name],
        [root / name],
        [path for path in places if set(splits) & set(map(split_of, path.parts))],
        places,
    ):
        if fits := [path for path in near if path in places]:
            if len(fits) > 1:
                raise UserError(f"{name} may be {fits[0]} or {fits[1]}; put the JSON into the folder of its images")
            return fits[0]
    return folder / Path(name).name


def _task_images(files: Sequence[Path]) -> dict[str, Path]:
    """{task: image} of Label Studio's tasks, by its JSON export and by files named after tasks, as in ``task-1.jpg``."""
    images = {path.name: path for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    found = {path.stem: path for path in images.values() if re.fullmatch(r"task-\d+", path.stem)}
    rows = (row for _, content in read_jsons(files) if isinstance(content, list) for row in content if isinstance(row, dict))
    for row in rows:
        data = row.get("data")
        values = data.values() if isinstance(data, dict) else ()
        names = (unquote(value).rpartition("/")[2] for value in values if isinstance(value, str))
        found |= {f"task-{row.get('id')}": images[name] for name in names if name in images}
    return found


def _are_images(files: Sequence[Path]) -> bool:
    """Whether the PNGs of a folder are images for which a JSON beside them has polygons."""
    pngs = {path.name for path in files if path.suffix.lower() == ".png"}
    return any(found[2] & pngs for path, content in read_jsons(files) if (found := polygons(content)))


def _no_masks(root: Path, suffix: str, files: Sequence[Path]) -> Any:
    """Raise :class:`UserError`: there are no masks; the message names what there is instead."""
    for path, content in read_jsons(files):
        if found := polygons(content):
            raise UserError(f"{root} holds no masks, but polygons: {path} is {found[0]}; {found[1]}")
    kinds = sorted({path.suffix.lower() for path in files if path.suffix})
    which = f"PNG whose name ends in {suffix}.png" if suffix else "PNG"
    holds = f", but {', '.join(kinds[:8])} files" if kinds else ""
    lossless = [kind for kind in kinds if kind in (".gif", ".bmp", ".tif", ".tiff")]
    how = f", such as with ImageMagick's `mogrify -format png *{lossless[0]}`" if lossless else ""
    raise UserError(f"{root} holds no {which}{holds}; save masks of other formats as PNG without loss{how}")
