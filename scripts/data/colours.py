"""Masks of colours, of values and of single labels as class indices."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dataset.classes import IGNORE_LABEL, Color, voc_palette
from dataset.labels import BadLabel, check_values, decode_label, read_png, single_channel
from scripts.data.polygons import Region

PHOTO = "looks like a photograph"  # how the problem of one begins
MOST = 100  # values or colours of a mask; one image has fewer classes
NO_COLORS = "has colours"  # how the problem of a mask begins that has colours, where no class has one


class Labels(NamedTuple):
    """The labels of one mask.

    Attributes:
        values: (H, W) uint8.
        source: "stored" for the values that the file holds, "colours" or "grey" for those of its colours.
        palette: of a file whose values are as they are stored, the colour of each that occurs; {} without a palette.
    """

    values: np.ndarray
    source: str
    palette: Mapping[int, Color] = {}


def read_labels(data: bytes, table: Mapping[Color, int], num_classes: int, guessed: bool = False) -> Labels:
    """The labels of a PNG by the colours that its pixels are shown in, see :func:`to_indices`, or as they are stored.

    Args:
        table: label of each colour; {} takes the values as they are stored.
        num_classes: labels 0..num_classes-1 are classes.
        guessed: nobody gave ``table``: where a grey mask, or one with the palette of VOC's colour map, holds a value without a
            colour in it, its values stay.

    Raises:
        BadLabel: no PNG, a damaged one, colours of no class, half transparent pixels, an index without a colour, or grey values
            that can be read as colours and as class indices.
    """
    pixels, palette, mode = read_png(data)
    if pixels.ndim == 2 and pixels.dtype != np.uint8:
        pixels, mode = _eight_bits(pixels), "L"
    if mode == "P" and pixels.max() >= len(palette):
        raise BadLabel(f"holds the index {pixels.max()}, and its palette has {len(palette)} colours")
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
        raise BadLabel(f"{NO_COLORS}, and nothing says which class each is; expected `name r g b` a line in a classes.txt")
    check_values(np.unique(_no_photo(stored).values).tolist(), num_classes)
    return stored


def _no_photo(labels: Labels) -> Labels:
    """The same; BadLabel where they are the grey values of a photograph."""
    if not labels.palette and (count := len(np.unique(labels.values))) > MOST:
        raise BadLabel(f"{PHOTO}: it is grey and holds {count} values; expected class indices")
    return labels


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey of 16 bits, (H, W) uint8; BadLabel for values above 255 other than white, 65535, in a mask of black and white."""
    if bool(((pixels == 0) | (pixels == 65535)).all()):
        return (pixels // 257).astype(np.uint8)
    if pixels.max() > 255:
        raise BadLabel(f"is grey of 16 bits and holds {pixels.max()}; expected values of 0..255, class indices or void")
    return pixels.astype(np.uint8)


def is_reordered(palette: Mapping[int, Color]) -> bool:
    """Whether colours are those of VOC's colour map, but stand at other values, as tools re-order them."""
    home = {color: index for index, color in enumerate(map(tuple, voc_palette().tolist()))}
    colors = set(palette.values())
    return 1 < len(palette) == len(colors) and colors <= home.keys() and any(home[c] != i for i, c in palette.items())


def _as_stored(pixels: np.ndarray, palette: np.ndarray, mode: str) -> Labels | None:
    """The values of a mask of one channel, or of equal channels; None for colours."""
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
        raise BadLabel(f"holds {half} half transparent pixels; expected whole colours")
    if mode in ("RGB", "RGBA"):
        return Labels(to_indices(pixels[..., :3], table), "colours")
    values = pixels[..., 0] if mode == "LA" else pixels
    stretch = 255 // (2 ** min(data[24], 8) - 1)  # grey of fewer than 8 bits is shown from black to white, too
    # Black and white alone are a binary mask where white is the colour of a class: class 0 and void would tell nothing apart.
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
            "is grey, and its values are colours of classes as well as class indices; save it as RGB if they are colours"
        )
    return Labels(labels, "grey")


def join_layers(layers: Sequence[tuple[int, bytes | Region]], rest: int) -> np.ndarray:
    """Masks or regions of one class each as one mask of class indices, (H, W) uint8.

    Later regions cover earlier ones, as tools show them; of masks nobody knows the order, so that where two are is 255.

    Args:
        layers: class, and PNG of 255 where it is, else 0, or region.
        rest: the class of the pixels that have none, or 255.

    Raises:
        BadLabel: a mask that holds other values, or is of another size.
    """
    labels, taken = np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=bool)
    for place, (index, layer) in enumerate(layers):
        here = layer.mask() if isinstance(layer, Region) else _binary(layer)
        if place == 0:
            labels, taken = np.full(here.shape, rest, dtype=np.uint8), np.zeros(here.shape, dtype=bool)
        if here.shape != labels.shape:
            raise BadLabel(f"is {labels.shape[::-1]} pixels, another mask of its image {here.shape[::-1]}")
        twice = here & taken & (labels != index) & (not isinstance(layer, Region))
        labels[here] = index
        labels[twice] = IGNORE_LABEL
        taken |= here
    return labels


def _binary(data: bytes) -> np.ndarray:
    values = decode_label(data)[0]
    if other := sorted(set(np.unique(values).tolist()) - {0, 255}):
        raise BadLabel(f"holds {', '.join(map(str, other[:8]))}; expected 255 where its label is, and 0")
    return values == 255


def to_indices(colors: np.ndarray, table: Mapping[Color, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8 labels; BadLabel where a colour is not in the table, with its number of pixels."""
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
    """(..., 3) uint8 RGB as one number a pixel."""
    return colors.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
