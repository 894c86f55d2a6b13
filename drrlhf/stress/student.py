"""Student's t: whether a mean over prompts is above 0 by more than chance."""

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
