"""The permutohedral lattice against a dictionary of integer vectors, point by point in float64, and against the Gaussian."""

import numpy as np
import pytest
import torch

from deeplab import permutohedral
from deeplab.permutohedral import Lattice


def simplex_around(point):
    """The vertices around a point of d coordinates, as tuples of d + 1 integers, and their weights (the paper, p. 5, 10)."""
    d = len(point)
    scaled = [point[i] * np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
    elevated = np.array([sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)])
    corner = np.round(elevated / (d + 1)).astype(int) * (d + 1)
    nearest_last = sorted(range(d + 1), key=lambda i: (-(elevated - corner)[i], i))
    excess = corner.sum() // (d + 1)
    if excess > 0:
        corner[nearest_last[-excess:]] -= d + 1
    if excess < 0:
        corner[nearest_last[:-excess]] += d + 1
    by_rest = sorted(range(d + 1), key=lambda i: (-(elevated - corner)[i], i))
    vertices = []
    for remainder in range(d + 1):
        vertex = corner + remainder
        vertex[by_rest[d + 1 - remainder :]] -= d + 1
        vertices.append(vertex)
    system = np.vstack([np.array(vertices).T, np.ones(d + 1)])
    weights = np.linalg.lstsq(system, np.append(elevated, 1), rcond=None)[0]
    np.testing.assert_allclose(system @ weights, np.append(elevated, 1), atol=1e-6)
    assert (weights > -1e-6).all()
    return [(tuple(vertex), weight) for vertex, weight in zip(vertices, weights, strict=True)]


def naive_filter(features, values):
    """Splat, blur and slice with all vertices in a dictionary: (d, N), (N, C) -> (N, C) float64, and the number of vertices."""
    d, points = features.shape
    filled = np.concatenate([features, np.zeros((d, -points % 4))], axis=1)  # the authors' program pads to fours
    around = [simplex_around(point) for point in filled.T]
    lattice = {vertex: np.zeros(values.shape[1]) for simplex in around for vertex, _ in simplex}
    for simplex, value in zip(around[:points], values, strict=True):
        for vertex, weight in simplex:
            lattice[vertex] = lattice[vertex] + weight * value
    none = np.zeros(values.shape[1])
    for axis in range(d + 1):
        step = np.full(d + 1, -1)
        step[axis] = d
        lattice = {
            vertex: value + (lattice.get(tuple(vertex + step), none) + lattice.get(tuple(vertex - step), none)) / 2
            for vertex, value in lattice.items()
        }
    sliced = [sum(weight * lattice[vertex] for vertex, weight in simplex) for simplex in around[:points]]
    return np.array(sliced) / (1 + 2.0**-d), len(lattice)


@pytest.mark.parametrize(("d", "points", "spread"), [(1, 7, 3), (2, 40, 9), (3, 21, 2), (5, 33, 4), (5, 1, 80), (6, 10, 3)])
def test_filter_equals_one_on_vectors_of_integers(d, points, spread):
    rng = np.random.default_rng(d)
    features, values = rng.random((2, d, points)) * spread, rng.random((2, points, 3))
    lattice = Lattice(torch.from_numpy(features).float(), [spread] * d)
    found = lattice(torch.from_numpy(values).float().flatten(0, 1)).view(2, points, 3)
    vertices = 0
    for i in range(2):
        expected, count = naive_filter(features[i], values[i])
        np.testing.assert_allclose(found[i], expected, atol=2e-5)
        vertices += count
    assert lattice.vertices == vertices  # the two sets share none


def test_filter_is_about_a_gaussian():
    """One point of value 1 among 41 x 41: the values of the others fall as exp(-r^2 / 2), as the paper claims."""
    rows, columns = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    grid = torch.stack([rows.flatten(), columns.flatten()]) / 4  # standard deviations of 4 pixels
    values = torch.zeros(41, 41)
    values[20, 20] = 1
    filtered = Lattice(grid[None], [10, 10])(values.view(-1, 1)).view(41, 41)
    distance = (rows - 20).square() + (columns - 20).square()
    expected = torch.exp(-distance / 2 / 16)
    np.testing.assert_allclose(filtered / filtered.sum(), expected / expected.sum(), atol=0.2 * float(expected.sum()) ** -1)


def test_normalised_kernel_has_its_weight():
    """k_ij w / sqrt(n_i n_j), from the matrix of the unnormalised filter."""
    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.random((1, 3, 15)).astype(np.float32) * 3)
    kernel = Lattice(features, [3] * 3)(torch.eye(15)).double()
    n = kernel.sum(1)
    expected = 2.5 * kernel / torch.sqrt(n[:, None] * n[None])
    np.testing.assert_allclose(Lattice(features, [3] * 3).normalise(2.5)(torch.eye(15)), expected, atol=1e-5)


def test_results_do_not_depend_on_the_block_size(monkeypatch):
    rng = np.random.default_rng(4)
    features = torch.from_numpy(rng.random((1, 5, 300)).astype(np.float32) * 5)
    values = torch.from_numpy(rng.random((300, 7)).astype(np.float32))
    whole = Lattice(features, [5] * 5)(values).clone()
    monkeypatch.setattr(permutohedral, "CPU_VALUES", 50)
    assert torch.equal(Lattice(features, [5] * 5)(values), whole)


def test_lattice_with_too_many_points_is_refused():
    with pytest.raises(ValueError, match=r"does not fit in 64 bits"):
        Lattice(torch.zeros(1, 5, 4), [1e4] * 5)
