"""Geometric-Median Matching: a robust centre of many points, and k of them whose mean follows it.

Source: Acharya, Sanghavi, Dimakis and Dhillon 2025, "Geometric Median (GM) Matching for Robust k-Subset Selection
from Noisy Data", openreview pxfpGbeVx2 (arXiv:2504.00564).
N points of D numbers; they may be a memory map, of which only CHUNK rows are ever copied.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

CHUNK = 4096  # rows turned into float64 at a time: 19 MB at D = 576
NEAREST = 1e-8  # a point at the centre itself would have infinite weight
TOLERANCE = 1e-7  # stop when a step is shorter than this share of the mean distance to the points
MAX_STEPS = 1000
SAY_EVERY = 64  # picks


class Center(NamedTuple):
    """The geometric median, in float64, and how many steps it took; MAX_STEPS: it had not settled."""

    point: Array
    steps: int


def geometric_median(points: Array) -> Center:
    """Return the point with the least sum of distances to `points`; robust while fewer than half of them are bad.

    Weiszfeld's iteration from the mean: z <- sum(x_i / d_i) / sum(1 / d_i), d_i = max(|z - x_i|, 1e-8).
    """
    center: Array = sum((chunk.sum(0) for chunk in _chunks(points)), np.zeros(points.shape[1])) / len(points)
    for step in range(1, MAX_STEPS + 1):
        moved, distance = _weiszfeld(points, center)
        settled = np.linalg.norm(moved - center) <= TOLERANCE * distance
        center = moved
        if settled:
            return Center(center, step)
    return Center(center, MAX_STEPS)


def match(points: Array, center: Array, k: int, on_pick: Callable[[int], None] = lambda picked: None) -> list[int]:
    """Return the positions of k points, in the order picked, such that the mean of the first t is near `center`.

    Pick t + 1 is the point, of those left, that brings the sum of the picked nearest to (t + 1) x center;
    of equal ones the first. Costs k passes over the N x D numbers. The error falls as 1/k where `center` lies
    inside the points; that of a random choice falls as 1/sqrt(k).

    Differs: the paper picks by <w, x> alone, w = (t + 1) x center - sum of the picked. That is this rule for points
    of equal length, which the authors' code makes them (cosine); otherwise it prefers long ones, and of 40 % noise
    with five times the spread of the clean points it picked nothing else. Here -|x - center|^2 / 2 completes the
    square, so that length counts and the origin does not.
    """
    cost = np.concatenate([np.square(chunk - center).sum(1) / 2 for chunk in _chunks(points)])
    residual = np.zeros_like(center)  # t x center - sum of the picked; an array of its own: `center` must not move
    picked: list[int] = []
    for number in range(1, k + 1):
        # einsum gives equal rows equal products, at any position and with any number of threads; BLAS does not
        gain = np.einsum("nd,d->n", points, residual.astype(points.dtype))
        best = int(np.argmax(gain - cost))
        picked.append(best)
        cost[best] = np.inf
        residual += center - points[best]
        if number % SAY_EVERY == 0 or number == k:
            on_pick(number)
    return picked


def _chunks(points: Array) -> Iterator[Array]:
    for first in range(0, len(points), CHUNK):
        yield np.asarray(points[first : first + CHUNK], dtype=np.float64)


def _weiszfeld(points: Array, center: Array) -> tuple[Array, float]:
    """Return the next center and the mean distance of the points from this one."""
    top, bottom, distances = np.zeros_like(center), 0.0, 0.0
    for chunk in _chunks(points):
        distance = np.linalg.norm(chunk - center, axis=1)
        weight = 1 / np.maximum(distance, NEAREST)
        top += weight @ chunk
        bottom += float(weight.sum())
        distances += float(distance.sum())
    return top / bottom, distances / len(points)
