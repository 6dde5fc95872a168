"""Synthetic landscapes: a fractal height field rendered in perspective with sunlight and haze, and balloons in the sky."""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

CLASSES = ("sky", "water", "grass", "forest", "rock", "snow", "balloon")
COLORS = ((70, 130, 180), (30, 80, 200), (120, 200, 80), (20, 100, 40), (130, 120, 110), (245, 245, 250), (220, 40, 40))  # RGB
SKY, WATER, GRASS, FOREST, ROCK, SNOW, BALLOON = range(7)
SIDE = 1024  # of the height field, cells
NEAR, FAR = 25.0, 700.0  # the camera's range, cells
STEPS = 500  # along each ray
VIEWS = 8  # images per terrain
SUNLIT = np.array(
    [(120, 90, 45), (60, 135, 110), (38, 72, 45), (105, 115, 125), (245, 240, 235)], np.float32
)  # BGR, WATER to SNOW
GRAIN = np.array((0.03, 0.12, 0.22, 0.16, 0.03), np.float32)  # how much each of these colours varies
HORIZON_COLOR, ZENITH_COLOR, REFLECTED = (
    np.array(bgr, np.float32) for bgr in ((235, 215, 190), (205, 135, 75), (215, 180, 140))
)


class Terrain(NamedTuple):
    """Height, colour and class of each cell.

    Attributes:
        height: (SIDE, SIDE) float32, in cells; lakes are at 0.
        color: (SIDE, SIDE, 3) float32 BGR, in sunlight and shade.
        label: (SIDE, SIDE) uint8 classes.
    """

    height: np.ndarray
    color: np.ndarray
    label: np.ndarray


def fractal(rng: np.random.Generator, side: int, cells: int, octaves: int, gain: float) -> np.ndarray:
    """(side, side) float32 noise, mean 0, deviation 1: ``cells`` bumps per side, ``gain`` times twice as many, and so on."""
    total = np.zeros((side, side), dtype=np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((cells << octave, cells << octave), dtype=np.float32)
        total += gain**octave * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    return (total - total.mean()) / total.std()


def gradient(height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slope along x and along y, cells per cell."""
    return cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=1 / 8)


@lru_cache(maxsize=1)
def make_terrain(*seed: int) -> Terrain:
    """Mountains, woods, meadows and lakes, lit by a sun in a random direction."""
    rng = np.random.default_rng(seed)
    height = 13 * fractal(rng, SIDE, 5, 8, 0.47) - 26 * np.abs(fractal(rng, SIDE, 4, 8, 0.48))  # hills and ridges
    height = np.maximum(height - np.quantile(height, 0.35), 0)
    height = height * (0.35 + height / height.max())  # flat shores, steep summits
    summit, slope = np.quantile(height, 0.95), np.hypot(*gradient(height))
    detail, patches = fractal(rng, SIDE, 160, 3, 0.7), fractal(rng, SIDE, 14, 5, 0.6)

    label = np.full(height.shape, GRASS, dtype=np.uint8)
    label[(slope > 0.85 + 0.06 * detail) | (height > summit * (0.75 + 0.05 * detail))] = ROCK
    label[(patches > 0.15) & (height < summit * (0.62 + 0.12 * patches)) & (slope < 1.2)] = FOREST
    label[(height > summit * (1 + 0.1 * patches)) & (slope < 1.6)] = SNOW
    label[height == 0] = WATER
    height = height + (label == FOREST) * (0.8 + 0.9 * np.abs(fractal(rng, SIDE, 340, 2, 0.8)))  # the crowns of trees

    angle, up = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.9)
    dx, dy = gradient(height)
    towards_sun = (up - dx * np.cos(angle) - dy * np.sin(angle)) / np.sqrt((1 + up**2) * (1 + dx**2 + dy**2))
    light = 0.42 + 0.75 * np.clip(towards_sun, 0, 1)
    light *= 1 + GRAIN[label - 1] * (detail + 0.5 * patches)
    return Terrain(height.astype(np.float32), (SUNLIT[label - 1] * light[:, :, None]).astype(np.float32), label)


def look(rng: np.random.Generator, terrain: Terrain, height: int, width: int, horizon: float) -> tuple[np.ndarray, ...]:
    """The view of a camera near the shore, in the most mountainous of eight directions.

    Along each column's ray the highest projected ground so far hides everything behind it; a pixel shows the first ground that
    reaches its row.

    Returns:
        The distance of the ground (inf for sky) and its x and y in cells, (height, width) float32 each.
    """
    focal = 0.9 * width
    x0, y0 = min(rng.uniform(0, SIDE, (60, 2)), key=lambda place: terrain.height[int(place[1]), int(place[0])])
    distances = np.geomspace(NEAR, FAR, STEPS, dtype=np.float32)[:, None]
    across = ((np.arange(width, dtype=np.float32) - width / 2) / focal)[None]
    views = []
    for angle in np.arange(8) * np.pi / 4 + rng.uniform(0, 1):
        x = (x0 + distances * (np.cos(angle) - across * np.sin(angle))).astype(np.float32)
        y = (y0 + distances * (np.sin(angle) + across * np.cos(angle))).astype(np.float32)
        ground = cv2.remap(terrain.height, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        eye = max(16.0, ground[: STEPS // 3].max() + 3)
        rows = focal * (ground - eye) / distances + (1 - horizon) * height  # above the lower edge of the image
        views.append((np.std(rows.max(axis=0)) + 0.3 * rows[-150:].max(), x, y, np.maximum.accumulate(rows)))
    _, x, y, rows = max(views, key=lambda view: view[0])
    distance, seen_x, seen_y = np.full((3, height, width), np.inf, dtype=np.float32)
    wanted = height - 0.5 - np.arange(height, dtype=np.float32)
    for column in range(width):
        step = np.searchsorted(rows[:, column], wanted)
        hit = step < STEPS
        after = np.maximum(step[hit], 1)
        low, high = rows[after - 1, column], rows[after, column]
        part = np.clip((wanted[hit] - low) / np.maximum(high - low, 1e-6), 0, 1)
        for target, values in ((distance, distances[:, 0]), (seen_x, x[:, column]), (seen_y, y[:, column])):
            target[hit, column] = values[after - 1] * (1 - part) + values[after] * part
    return distance, seen_x, seen_y


def paint_sky(rng: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """(height, width, 3) float32 BGR: blue, paler towards the horizon, with clouds."""
    up = np.clip(1 - np.arange(height, dtype=np.float32) / (height * horizon), 0, 1)[:, None, None]
    sky = HORIZON_COLOR + up * (ZENITH_COLOR - HORIZON_COLOR)
    clouds = cv2.resize(fractal(rng, 512, 3, 7, 0.55)[:, :256], (width, height), interpolation=cv2.INTER_LINEAR)[:, :, None]
    cover = np.clip((clouds - rng.uniform(0.1, 0.9)) * 0.9, 0, 0.95) * np.minimum(1, 0.35 + up)
    return sky + cover * (248 - 12 * clouds - sky)


def draw_balloon(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> None:
    """Draw a striped balloon with its basket in front of the sky, in place; none if it does not fit."""
    height, width = labels.shape
    radius = rng.uniform(0.035, 0.1) * height
    room = np.ones((int(3.4 * radius), int(2.4 * radius)), np.uint8)
    places = np.argwhere(cv2.erode((labels == SKY).astype(np.uint8), room, borderType=cv2.BORDER_CONSTANT, borderValue=0))
    if not len(places):
        return
    y, x = places[rng.integers(len(places))]
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    u, v = (xs - x) / radius, (ys - y + 0.3 * radius) / radius
    half = np.where(v < 0.25, np.sqrt(np.clip(1 - (v / 1.05) ** 2, 0, 1)), np.clip(0.971 - 0.86 * (v - 0.25), 0, 1))
    envelope = (np.abs(u) < half) & (v < 1.12) & (v > -1.05)
    below = (np.abs(u) < 0.16) & (v > 1.3) & (v < 1.56)  # the basket, then the ropes
    below |= (np.abs(np.abs(u) - 0.13) < 0.02 + 0.6 / radius) & (v >= 1.1) & (v <= 1.3)
    hues = [[(hue, saturation, 1.0) for hue, saturation in zip(rng.uniform(0, 360, 2), (0.85, 0.45))]]
    first, second = 235 * cv2.cvtColor(np.array(hues, np.float32), cv2.COLOR_HSV2BGR)[0]
    stripes = np.sin(2 * rng.integers(4, 7) * np.arcsin(np.clip(u / np.maximum(half, 1e-3), -1, 1))) > 0
    shade = 1.05 - 0.35 * np.clip(0.7 * u + 0.4 * v, -1, 1)
    painted = np.where(stripes[:, :, None], first, second) * shade[:, :, None]
    painted[below] = (40, 60, 90)
    inside = envelope | below
    opacity = 0.8 + 0.2 * cv2.GaussianBlur(inside.astype(np.float32), (3, 3), 0.7)
    image[inside] += (opacity[:, :, None] * (painted - image))[inside]
    labels[inside] = BALLOON


def make_landscape(seed: int, split: int, number: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One (height, width, 3) uint8 BGR image and its (height, width) uint8 labels. ``VIEWS`` images share a terrain."""
    terrain = make_terrain(seed, split, number // VIEWS)
    rng = np.random.default_rng((seed, split, number))
    horizon = rng.uniform(0.34, 0.5)
    distance, x, y = look(rng, terrain, height, width, horizon)
    ground = np.isfinite(distance)
    x, y = np.where(ground, x, 0), np.where(ground, y, 0)

    def seen(values: np.ndarray, how: int = cv2.INTER_LINEAR) -> np.ndarray:
        return cv2.remap(values, x, y, how, borderMode=cv2.BORDER_REFLECT_101)

    labels = np.where(ground, seen(terrain.label, cv2.INTER_NEAREST), SKY).astype(np.uint8)
    image, water = seen(terrain.color), (labels == WATER)[:, :, None]
    shine = 0.25 + 0.5 * np.clip(distance / FAR, 0, 1)[:, :, None]  # water seen at a flat angle reflects the sky
    ripples = 1 + 0.08 * seen(fractal(rng, SIDE, 200, 2, 0.5))[:, :, None]
    image = np.where(water, ripples * (image + shine * (REFLECTED - image)), image)
    haze = 1 - np.exp(-np.maximum(distance - NEAR, 0) / rng.uniform(350, 900))[:, :, None]
    image += haze * (HORIZON_COLOR - 6 - image)
    image = np.where(ground[:, :, None], image, paint_sky(rng, height, width, horizon))
    skyline = cv2.morphologyEx(ground.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    image[skyline] = cv2.GaussianBlur(image, (3, 3), 0.6)[skyline]
    for _ in range(rng.integers(1, 4)):
        draw_balloon(rng, image, labels)
    image += 3 * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(np.round(image), 0, 255).astype(np.uint8), labels
