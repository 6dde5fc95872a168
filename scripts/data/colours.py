"""Conversion of masks to class indices: from colours, from values, or from one mask per label."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dataset.classes import IGNORE_LABEL, Color, voc_palette
from dataset.labels import BadLabel, check_values, decode_label, read_png, single_channel
from scripts.data.polygons import Region

PHOTO = "looks like a photograph"  # start of the message about one
MOST = 100  # values or colours in a mask; no image has as many classes
NO_COLORS = "has colours"  # start of the message about a colour mask if no class has a colour


class Labels(NamedTuple):
    """The labels of one mask.

    Attributes:
        values: (H, W) uint8.
        source: "stored" for values as in the file, "colours" or "grey" for labels by colour.
        palette: the colour of each stored value that occurs; {} without a palette.
    """

    values: np.ndarray
    source: str
    palette: Mapping[int, Color] = {}


def read_labels(data: bytes, table: Mapping[Color, int], num_classes: int, guessed: bool = False) -> Labels:
    """The labels of a PNG: by the displayed colours of its pixels, see :func:`to_indices`, or as stored.

    Args:
        table: label of each colour; {} keeps the values as stored.
        num_classes: labels 0..num_classes-1 are classes.
        guessed: whether ``table`` is a default. If so, a mask that holds a value without a colour in it keeps its values,
            provided that it is grey or has the palette of VOC's colour map.

    Raises:
        BadLabel: no PNG, a damaged one, colours of no class, semi-transparent pixels, an index without a colour, or grey values
            that are both colours and class indices.
    """
    pixels, palette, mode = read_png(data)
    if pixels.ndim == 2 and pixels.dtype != np.uint8:
        pixels, mode = _eight_bits(pixels), "L"
    if mode == "P" and pixels.max() >= len(palette):
        raise BadLabel(f"holds the index {pixels.max()}, but its palette has {len(palette)} colours")
    if table:
        try:
            return _by_color(data, pixels, palette, mode, table, num_classes)
        except BadLabel:
            if not guessed:
                raise
            stored = _as_stored(pixels, palette, mode)
            if stored is None or not all(color in (tuple(voc_palette()[i]), (i, i, i)) for i, color in stored.palette.items()):
                raise
            return _no_photo(stored)
    stored = _as_stored(pixels, palette, mode)
    if stored is None and mode != "LA" and (count := len(np.unique(_codes(pixels[..., :3])))) > MOST:
        raise BadLabel(f"{PHOTO}: it holds {count} colours; expected a mask")
    if stored is None:
        raise BadLabel(f"{NO_COLORS}, but their classes are not given; expected `name r g b` per line in classes.txt")
    check_values(np.unique(_no_photo(stored).values).tolist(), num_classes)
    return stored


def _no_photo(labels: Labels) -> Labels:
    """``labels``; BadLabel if they are the grey values of a photograph."""
    if not labels.palette and (count := len(np.unique(labels.values))) > MOST:
        raise BadLabel(f"{PHOTO}: it is grey and holds {count} values; expected class indices")
    return labels


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit grey as (H, W) uint8; BadLabel for values above 255, except white (65535) in a mask of black and white."""
    if bool(((pixels == 0) | (pixels == 65535)).all()):
        return (pixels // 257).astype(np.uint8)
    if pixels.max() > 255:
        raise BadLabel(f"is grey of 16 bits and holds {pixels.max()}; expected values of 0..255")
    return pixels.astype(np.uint8)


def is_reordered(palette: Mapping[int, Color]) -> bool:
    """Whether colours are those of VOC's colour map at other values, as after re-ordering by a tool."""
    home = {color: index for index, color in enumerate(map(tuple, voc_palette().tolist()))}
    colors = set(palette.values())
    return 1 < len(palette) == len(colors) and colors <= home.keys() and any(home[c] != i for i, c in palette.items())


def _as_stored(pixels: np.ndarray, palette: np.ndarray, mode: str) -> Labels | None:
    """The values of a mask of one channel or of equal channels; None for colours."""
    if mode in ("LA", "RGB", "RGBA"):
        channels, alpha = (pixels, None) if mode == "RGB" else (pixels[..., :-1], pixels[..., -1])
        whole = alpha is None or bool((alpha == 255).all())
        return Labels(channels[..., 0].copy(), "stored") if whole and (channels == channels[..., :1]).all() else None
    single_channel(pixels, mode)
    present = np.unique(pixels).tolist() if mode == "P" else []
    return Labels(pixels, "stored", {i: tuple(palette[i].tolist()) for i in present})


def _by_color(
    data: bytes, pixels: np.ndarray, palette: np.ndarray, mode: str, table: Mapping[Color, int], num_classes: int
) -> Labels:
    if mode == "P":
        return Labels(to_indices(palette[pixels], table), "colours")
    if mode in ("LA", "RGBA") and (half := int(((pixels[..., -1] > 0) & (pixels[..., -1] < 255)).sum())):
        raise BadLabel(f"holds {half} semi-transparent pixels; expected opaque colours")
    if mode in ("RGB", "RGBA"):
        return Labels(to_indices(pixels[..., :3], table), "colours")
    values = pixels[..., 0] if mode == "LA" else pixels
    stretch = 255 // (2 ** min(data[24], 8) - 1)  # grey of fewer than 8 bits is displayed as 0..255, too
    # Only black and white, and white is the colour of a class: a binary mask, not class 0 and the ignore label.
    binary = (255, 255, 255) in table and bool(((values == 0) | (values == 255)).all())
    indices = bool(((values < num_classes) | (values == IGNORE_LABEL)).all()) and not binary
    try:
        labels = to_indices(np.repeat((values * stretch)[..., None], 3, axis=2), table)
    except BadLabel:
        if indices:
            return Labels(values, "stored")
        raise
    if indices and not np.array_equal(labels, values):
        raise BadLabel(
            "is grey, and its values are both colours of classes and class indices; save it as RGB if they are colours"
        )
    return Labels(labels, "grey")


def join_layers(layers: Sequence[tuple[int, bytes | Region]], rest: int) -> np.ndarray:
    """Join masks or regions of one class each to one mask of class indices, (H, W) uint8.

    Later regions cover earlier ones, as in the tools. The order of masks is unknown, so pixels in two of them become 255.

    Args:
        layers: pairs of class and either a PNG, 255 at the pixels of the class and else 0, or a region.
        rest: the class of pixels without one, or 255.

    Raises:
        BadLabel: a mask has other values or another size.
    """
    labels, taken = np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=bool)
    for place, (index, layer) in enumerate(layers):
        here = layer.mask() if isinstance(layer, Region) else _binary(layer)
        if place == 0:
            labels, taken = np.full(here.shape, rest, dtype=np.uint8), np.zeros(here.shape, dtype=bool)
        if here.shape != labels.shape:
            raise BadLabel(f"is {labels.shape[::-1]} pixels, but another mask of its image is {here.shape[::-1]}")
        twice = here & taken & (labels != index) & (not isinstance(layer, Region))
        labels[here] = index
        labels[twice] = IGNORE_LABEL
        taken |= here
    return labels


def _binary(data: bytes) -> np.ndarray:
    values = decode_label(data)[0]
    if other := sorted(set(np.unique(values).tolist()) - {0, 255}):
        raise BadLabel(f"holds {', '.join(map(str, other[:8]))}; expected 255 at the pixels of its label, else 0")
    return values == 255


def to_indices(colors: np.ndarray, table: Mapping[Color, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8 labels; BadLabel if a colour is not in the table, with its number of pixels."""
    codes = _codes(colors)
    keys, labels = zip(*sorted((red * 65536 + green * 256 + blue, label) for (red, green, blue), label in table.items()))
    places = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    known = np.array(keys, dtype=np.uint32)[places] == codes
    if not known.all():
        unknown, counts = np.unique(codes[~known], return_counts=True)
        if len(unknown) > MOST:
            raise BadLabel(f"{PHOTO}: it holds {len(unknown)} colours of no class; expected a mask")
        order = np.argsort(-counts, kind="stable")[:8]
        shown = [f"({c >> 16}, {c >> 8 & 255}, {c & 255}) on {n} pixels" for c, n in zip(unknown[order], counts[order])]
        hint = "; colours between those of the classes come from resizing or from JPEG" if len(unknown) > 8 else ""
        raise BadLabel(f"holds {len(unknown)} colours of no class: {', '.join(shown)}{', ...' * (len(unknown) > 8)}{hint}")
    return np.array(labels, dtype=np.uint8)[places]


def _codes(colors: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB as one number per pixel."""
    return colors.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
