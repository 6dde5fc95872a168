"""Gaussian filtering of values at N points of a d-dimensional space, on the permutohedral lattice, in torch operations.

Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Computer Graphics Forum 29(2), 2010
(page numbers below), with the blur and the scaling of Kraehenbuehl & Koltun's program (arXiv:1210.5644), to rounding.

The lattice is in the hyperplane of R^(d+1) whose coordinates sum to 0. Its points are the integer vectors x whose coordinates
all have the same remainder modulo d + 1. They cut the hyperplane into equal simplices of d + 1 vertices. The filter is three
sparse products:

    splat: each point adds its value to the d + 1 vertices around it, with its barycentric coordinates as weights
    blur:  along each of the d + 1 axes, each vertex becomes itself + half of its two neighbours
    slice: each point reads the vertices around it, with the same weights

All differences x_i - x_d are multiples of d + 1, and y_i = (x_i - x_d) / (d + 1), i < d, identifies a vertex uniquely
(x_d = -sum(y)). In y, a step along axis i < d adds 1 to y_i, and a step along axis d subtracts 1 from every y_i. So with y
packed into one int64, a step along an axis adds a constant: neither the vertices of a simplex, nor the list of all vertices,
nor their neighbours need a hash table or vectors of integers.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LIMIT = 2**63 - 1  # the largest packed vertex
CPU_VALUES = 2**18  # the block size of a product on a CPU, in values


class Lattice:
    """The vertices around a set of points, and the filter over them.

    Args:
        features: (B, d, N) float32, the coordinates of B independent sets of N points each, in standard deviations of the
            Gaussian, at least 0.
        bounds: the largest value of each of the d coordinates, known without reading ``features`` back from the device.

    Attributes:
        vertices: the number of vertices of all sets.

    Raises:
        ValueError: the space between 0 and ``bounds`` holds more lattice points than an int64 can number.
    """

    def __init__(self, features: Tensor, bounds: list[float]) -> None:
        sets, d, points = features.shape
        device = features.device
        # The authors' program works on four points at a time and pads the last four with points at 0, whose vertices take
        # part in the blur.
        padded = points + -points % 4
        axes = F.pad(features, (0, padded - points)).movedim(1, 0).reshape(d, sets * padded)
        corner, rank, weights = _simplices(axes)

        low, radix = _digits(bounds, sets)
        places = [math.prod(radix[:i]) for i in range(d + 1)]  # of y_0 .. y_(d-1), and of the number of the set
        steps = [*places[:d], -sum(places[:d])]  # a step along axis i adds steps[i] to a packed vertex
        keys = torch.arange(sets, device=device).repeat_interleave(padded) * places[d]
        for i in range(d):
            keys += (corner[i] - low[i]) * places[i]
        # From the corner of remainder 0 to the next corner, the axis of the largest rank falls by d and all others rise by 1:
        # a step back along that axis. The other corners follow in the order of the ranks.
        by_rank = torch.empty_like(rank)
        for axis, step in enumerate(steps):
            by_rank.scatter_(0, rank[axis : axis + 1], step)
        keys = torch.cat([keys[None], keys - by_rank.flip(0)[:d].cumsum(0)])  # (d + 1, sets * padded)

        sorted_keys, order = keys.flatten().sort(stable=True)
        new = torch.cat([sorted_keys.new_ones(1, dtype=torch.bool), sorted_keys[1:] != sorted_keys[:-1]])
        starts = new.nonzero().flatten()  # the only host sync
        unique, count = sorted_keys[starts], starts.shape[0]
        vertex = torch.empty_like(order).scatter_(0, order, new.cumsum(0) - 1).view(d + 1, sets, padded)[..., :points]

        point = order % padded
        real = point < points
        row = torch.where(real, order % (sets * padded) // padded * points + point, 0)
        self.vertices = count
        self._tables: dict[int, Tensor] = {}
        self._points = sets * points
        self._splat_rows = row.int()
        # The row after the last vertex stands for a missing neighbour: nothing is added to it, so it is 0.
        self._splat_starts = torch.cat([starts, starts.new_full((2,), order.shape[0])]).int()
        self._splat_weights = weights.flatten()[order] * real
        self._slice_rows = vertex.permute(1, 2, 0).flatten().int()
        self._slice_starts = torch.arange(0, (d + 1) * self._points + 1, d + 1, device=device, dtype=torch.int32)
        alpha = 1 / (1 + 2.0**-d)
        self._slice_weights = weights.view(d + 1, sets, padded)[..., :points].permute(1, 2, 0).flatten() * alpha
        self._blur_rows = [_neighbours(unique, step, count) for step in steps]
        self._blur_starts = torch.cat(
            [torch.arange(0, 3 * count + 1, 3, device=device), starts.new_full((1,), 3 * count)]
        ).int()
        self._blur_weights = torch.full((count, 3), 0.5, device=device)
        self._blur_weights[:, 0] = 1
        self._blur_weights = self._blur_weights.flatten()

    def __call__(self, values: Tensor) -> Tensor:
        """Filter ``values`` (B * N, C) float32; returns the same shape. On a CPU the next call overwrites the result."""
        table = self._product(0, self._splat_rows, self._splat_starts, self._splat_weights, values)
        for axis, rows in enumerate(self._blur_rows):
            table = self._product((axis + 1) % 2, rows, self._blur_starts, self._blur_weights, table)
        return self._product(2, self._slice_rows, self._slice_starts, self._slice_weights, table)

    def _product(self, place: int, rows: Tensor, starts: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        """The sparse product sum_k weights[k] * table[rows[k]] over starts[i] <= k < starts[i + 1], for each i.

        On a CPU it is written in blocks into one of three tables that are kept: allocating large memory anew each time is slow.
        """
        count = starts.shape[0] - 1
        product = partial(F.embedding_bag, mode="sum", include_last_offset=True)
        if table.device.type != "cpu":
            return product(rows, table, starts, per_sample_weights=weights)
        result = self._tables.get(place)
        if result is None or result.shape[1] != table.shape[1]:
            result = self._tables[place] = table.new_empty(count, table.shape[1])
        size = max(1, CPU_VALUES // table.shape[1])
        for first in range(0, count, size):
            part = starts[first : first + size + 1]
            a, b = int(part[0]), int(part[-1])
            result[first : first + size] = product(rows[a:b], table, part - a, per_sample_weights=weights[a:b])
        return result

    def normalise(self, weight: float) -> "Lattice":
        """Turn the filter k_ij into weight * k_ij / sqrt(n_i n_j), n_i = sum_j k_ij, at no cost per call."""
        scale = (self(self._splat_weights.new_ones(self._points, 1)).flatten() + 1e-20).rsqrt()
        self._splat_weights = self._splat_weights * scale[self._splat_rows]
        corners = self._slice_weights.shape[0] // self._points
        self._slice_weights = self._slice_weights * (scale * weight).repeat_interleave(corners)
        return self


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around each point (p. 5 and 10).

    The order of the operations and their rounding are those of the authors' program, since ties decide which vertices exist.

    Args:
        features: (d, N) float32.

    Returns:
        y of the vertex of remainder 0, (d, N) int64; the rank of each coordinate by its distance from that vertex, largest
        first, (d + 1, N) int64; the barycentric coordinates of the vertices of remainders 0 .. d, (d + 1, N) float32.
    """
    d, points = features.shape
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))  # of the whole filter (p. 6)
    elevated = features.new_empty(d + 1, points)
    total = features.new_zeros(points)
    for i in range(d, 0, -1):
        scaled = features[i - 1] * (deviation / math.sqrt((i + 1) * i))
        elevated[i] = total - i * scaled
        total = total + scaled
    elevated[0] = total

    corner = (elevated * (1 / (d + 1))).round()  # half to even
    excess = corner.sum(0)
    rest = elevated - corner * (d + 1)
    rank = torch.zeros_like(corner)
    for i in range(d):
        for j in range(i + 1, d + 1):
            less = (rest[i] < rest[j]).float()
            rank[i] += less
            rank[j] += 1 - less
    rank += excess  # a vertex off the hyperplane moves back along the coordinates with the largest rounding error
    wrap = (rank < 0).float() - (rank > d).float()
    rank += wrap * (d + 1)
    corner += wrap
    rank = rank.long()

    rest = (elevated - corner * (d + 1)) * (1 / (d + 1))
    ordered = torch.empty_like(rest).scatter_(0, rank, rest)  # largest first
    weights = torch.empty_like(ordered)
    weights[1:] = (ordered[:d] - ordered[1:]).flip(0)
    weights[0] = ordered[d] + (1 - ordered[0])
    corner = corner.long()
    return corner[:d] - corner[d], rank, weights


def _digits(bounds: list[float], sets: int) -> tuple[list[int], list[int]]:
    """The lowest value and the number of values of each y, neighbours of the vertices included; ValueError if too many."""
    d = len(bounds)
    largest = [bound * math.sqrt(2 / 3) / math.sqrt((i + 2) * (i + 1)) for i, bound in enumerate(bounds)]  # scaled / (d + 1)
    low = [math.floor(-i * largest[i - 1] if i else 0) - 4 for i in range(d)]
    high = [math.ceil(sum(largest[i:]) + d * largest[d - 1]) + 4 for i in range(d)]
    radix = [b - a + 1 for a, b in zip(low, high, strict=True)]
    if math.prod(radix) * sets > LIMIT:
        raise ValueError(f"a lattice of {' x '.join(map(str, radix))} points for each of {sets} images does not fit in 64 bits")
    return low, radix


def _neighbours(unique: Tensor, step: int, count: int) -> Tensor:
    """The rows of each vertex, of the next and of the previous one along an axis, (3 * count,) int32; ``count`` if missing."""
    here = torch.arange(count, device=unique.device)
    after = torch.searchsorted(unique, unique + step)
    found = unique[after.clamp(max=count - 1)] == unique + step
    after = torch.where(found, after, count)
    before = torch.full((count + 1,), count, device=unique.device).scatter_(0, after, here)[:count]
    return torch.stack([here, after, before], 1).flatten().int()
