"""Student's t: whether a mean over prompts is above 0, or above another, by more than chance."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.resample import CONFIDENCE, Array

_EQUAL = 1e-9  # a deviation of the mean no larger than this, relative to it, is rounding


def above_zero(values: Array, blocks: NDArray[np.int64], tests: int) -> bool:
    """Whether Student's interval of the mean of what is known of (n,) lies above 0, at a level
    divided by the number of ``tests``: the largest of several losses is large by chance too.

    Where all blocks have one value there is no spread to go by: chance alone makes J of them have
    one sign with probability 2^-J, which must be below the level.
    """
    known = np.isfinite(values)
    counted = np.bincount(blocks[known])
    sums = np.bincount(blocks[known], weights=values[known])
    there = int((counted > 0).sum())
    if there < 2:
        return False
    level = (1 - CONFIDENCE) / (2 * tests)
    mean = sums.sum() / counted.sum()
    spread = np.square(sums - mean * counted).sum() / counted.sum() ** 2 * there / (there - 1)
    if math.sqrt(spread) <= _EQUAL * abs(mean):
        return bool(mean > 0 and 0.5**there <= level)
    return bool(mean - students_t(1 - level, there - 1) * math.sqrt(spread) > 0)


def above(
    shares: Array,
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    blocks: NDArray[np.int64],
    min_support: int,
) -> bool:
    """Whether the mean of ``shares`` (n,) in [0, 1] is larger in the ``first`` part (n,) than in
    the ``second`` by more than chance: Student's interval of the difference, by blocks. A
    part with fewer than ``min_support`` blocks proves nothing.

    The variance is never below that of independent pairs that do not differ: a part in which all
    are right has no spread of its own.
    """
    support = min(len(np.unique(blocks[part])) for part in (first, second))
    if support < max(min_support, 2):
        return False
    means = [float(shares[part].mean()) for part in (first, second)]
    sizes = [int(part.sum()) for part in (first, second)]
    pulls = np.where(first, (shares - means[0]) / sizes[0], 0.0)
    pulls = pulls - np.where(second, (shares - means[1]) / sizes[1], 0.0)
    there = len(np.unique(blocks[first | second]))
    spread = np.square(np.bincount(blocks, weights=pulls)).sum() * there / (there - 1)
    whole = float(shares[first | second].mean())
    least = whole * (1 - whole) * (1 / sizes[0] + 1 / sizes[1])
    t = students_t((1 + CONFIDENCE) / 2, support - 1)
    return bool(means[0] - means[1] > t * math.sqrt(max(spread, least)))


def students_t(share: float, freedom: float) -> float:
    """The quantile of Student's t with that many degrees of freedom, for a ``share`` from 1/2 on.

    With t = sqrt(f) tan a, P(|T| <= t) is the integral of cos^(f - 1) from 0 to a, over that to
    pi/2, which is sqrt(pi) Gamma(f/2) / (2 Gamma((f + 1)/2)).
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    logs = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    factor = 2 * math.exp(logs) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        angle = (low + high) / 2
        # The integrand is a narrow bell for many degrees of freedom: only its part counts.
        end = min(angle, 12 / math.sqrt(freedom))
        at = end * (1 + nodes) / 2
        inside = factor * end / 2 * float(weights @ np.cos(at) ** (freedom - 1))
        low, high = (angle, high) if inside < 2 * share - 1 else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
