"""The places of captions against an exhaustive search; the text stays inside its region."""

import numpy as np
import pytest

from utils.captions import font, place_captions, write_captions
from utils.visualize import Classes, blend, panel

NAMES = {1: "cat", 2: "pottedplant"}


def blobs(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Labels 0..2 in random overlapping ellipses, and some of the ignore label."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.uint8)
    for _ in range(7):
        (cy, cx), (ry, rx) = rng.uniform(0, shape), rng.uniform(3, (20, 45))
        labels[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = rng.choice([0, 1, 2, 255])
    return labels


def regions_of(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask, as masks."""
    left, found = mask.copy(), []
    while left.any():
        region = np.zeros_like(mask)
        region[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            grown &= mask
            if (grown == region).all():
                break
            region = grown
        found.append(region)
        left &= ~region
    return found


def best_distance(region: np.ndarray, width: int, height: int) -> float:
    """The largest distance from the region's edge among the centres of all boxes inside the region; 0 if no box fits."""
    outside = np.argwhere(~np.pad(region, 1)) - 1
    best = 0.0
    for top in range(region.shape[0] - height + 1):
        for left in range(region.shape[1] - width + 1):
            if region[top : top + height, left : left + width].all():
                center = (top + height // 2, left + width // 2)
                best = max(best, np.sqrt(((outside - center) ** 2).sum(axis=1).min()))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_captions_are_where_the_region_is_deepest(seed):
    labels = blobs(seed, (50, 91))
    captions = place_captions(labels, NAMES)
    for label in NAMES:
        mine = [caption for caption in captions if caption.label == label]
        left, top, right, bottom = font(11).getbbox(NAMES[label], stroke_width=1)  # at 91 pixels only the smallest size remains
        width, height = round(right) - round(left), round(bottom) - round(top)
        for region in regions_of(labels == label):
            inside = [caption for caption in mine if region[caption.top, caption.left]]
            best = best_distance(region, width, height)
            assert len(inside) == (best > 0)
            for caption in inside:
                assert (caption.width, caption.height, caption.size) == (width, height, 11)
                center = (caption.top + height // 2, caption.left + width // 2)
                outside = np.argwhere(~np.pad(region, 1)) - 1
                assert np.sqrt(((outside - center) ** 2).sum(axis=1).min()) == pytest.approx(best, abs=1e-3)


def test_the_largest_size_that_fits_is_used_and_the_text_stays_in_its_region():
    labels = np.zeros((300, 400), np.uint8)
    labels[10:90, 10:390] = 1
    labels[150:166, 20:60] = 1  # lower, and narrower
    labels[200:204, 20:300] = 1  # too low for any size
    labels[220:290, 10:50] = 2  # too narrow
    captions = place_captions(labels, NAMES)
    assert [(caption.label, caption.size) for caption in captions] == [(1, 20), (1, 14)]  # 0.05 and 0.036 of 400 pixels
    for color in (0, 128, 255):
        image = np.full((300, 400, 3), color, np.uint8)
        written = write_captions(image, labels, NAMES)
        changed = (written != image).any(axis=2)
        boxes = np.zeros_like(changed)
        for caption in captions:
            boxes[caption.top : caption.top + caption.height, caption.left : caption.left + caption.width] = True
            part = written[caption.top : caption.top + caption.height, caption.left : caption.left + caption.width]
            assert {0, 255} <= set(part.ravel().tolist())  # white letters, black outlines, on any background
        assert not changed[~boxes].any()
        assert (image == color).all()


def test_the_background_and_ignored_pixels_have_no_caption():
    labels = np.zeros((120, 160), np.uint8)
    labels[60:] = 255
    image = np.full((120, 160, 3), 90, np.uint8)
    for name, count in (("background", 0), ("road", 1)):
        classes = Classes([name, "cat"])
        assert len(place_captions(labels, classes.captions)) == count
        assert (blend(image, labels, classes, names=True) == blend(image, labels, classes)).all() == (count == 0)
        assert (panel(image, None, labels, classes, True) == panel(image, None, labels, classes)).all() == (count == 0)
