"""Accuracy of every group of every attribute, and of pairs of attributes, with honest intervals.

The interval of a group is Wilson's, at a level divided by the number of groups that were looked at
(Bonferroni), so that all of them hold together with 95 %; its sample size is divided by how much
pairs of one prompt agree (the design effect, from sums over blocks of prompts).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.curves import CONFIDENCE, ERRORS, Array, error_codes
from drrlhf.stress.resample import counts
from drrlhf.stress.scores import Attribute, Scores

SHOWN = 20


class _Column(NamedTuple):
    """One attribute or a pair of them, with its groups' numbers, each (G,)."""

    attributes: tuple[str, ...]
    names: list[tuple[str, ...]]
    pairs: Array
    support: Array
    errors: Array
    variance: Array


def groups_of(scores: Scores, blocks: NDArray[np.int64], min_support: int) -> dict[str, Any]:
    """The groups, worst first by the upper end of their interval, and those too small to rank.

    ``min_support`` is the number of prompts that a group must have (of blocks of prompts, where
    there are more than 1024). "single" holds the groups of single attributes, "paired" the `SHOWN`
    worst of pairs of attributes; "below" says whether a group's interval lies wholly below the
    accuracy of all pairs.
    """
    attributes = scores.attributes
    columns = list(_columns(attributes, error_codes(scores.margin), blocks))
    large = [column.support >= min_support for column in columns]
    looked_at = sum(int(one.sum()) for one in large)
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(looked_at, 1)))
    overall = 1 - float(ERRORS[error_codes(scores.margin)].mean())
    ranked: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    small = []
    for column, enough in zip(columns, large, strict=True):
        for index in np.flatnonzero(column.pairs).tolist():
            group = {
                "group": dict(zip(column.attributes, column.names[index], strict=True)),
                "pairs": int(column.pairs[index]),
                "support": int(column.support[index]),
            }
            if enough[index]:
                ranked[len(column.attributes)].append(group | _interval(column, index, z, overall))
            elif len(column.attributes) == 1:
                small.append(group)
    for found in ranked.values():
        found.sort(key=lambda group: (group["accuracy"]["high"], -group["pairs"]))
    return {
        "looked_at": looked_at,
        "min_support": min_support,
        "single": ranked[1],
        "paired": ranked[2][:SHOWN],
        "too_small": sorted(small, key=lambda group: -group["pairs"]),
        "too_small_pairs_of_attributes": sum(
            int(((column.pairs > 0) & ~enough).sum())
            for column, enough in zip(columns, large, strict=True)
            if len(column.attributes) == 2
        ),
    }


def _columns(
    attributes: Mapping[str, Attribute], errors: NDArray[np.int64], blocks: NDArray[np.int64]
) -> Iterator[_Column]:
    for name, attribute in attributes.items():
        names: list[tuple[str, ...]] = [(value,) for value in attribute.names]
        yield _column((name,), names, attribute.codes, errors, blocks)
    for (first, a), (second, b) in itertools.combinations(attributes.items(), 2):
        codes = np.where((a.codes < 0) | (b.codes < 0), -1, a.codes * len(b.names) + b.codes)
        names = [*itertools.product(a.names, b.names)]
        yield _column((first, second), names, codes, errors, blocks)


def _column(
    attributes: tuple[str, ...],
    names: list[tuple[str, ...]],
    codes: NDArray[np.int64],
    errors: NDArray[np.int64],
    blocks: NDArray[np.int64],
) -> _Column:
    known = codes >= 0
    # Only groups that are there: a pair of attributes may have ten thousand that are not.
    there, compact = np.unique(codes[known], return_inverse=True)
    size = len(there)
    if not size:
        nothing = np.zeros(0)
        return _Column(attributes, [], nothing, nothing, nothing, nothing)
    wrong = ERRORS[errors[known]]
    in_block = counts(blocks[known], compact, size)
    wrong_in_block = counts(blocks[known], compact, size, wrong)
    pairs, wrongs = in_block.sum(0), wrong_in_block.sum(0)
    mean = wrongs / pairs
    # A ratio of sums over blocks, linearised; never below that of independent pairs.
    spread = np.square(wrong_in_block - mean * in_block).sum(0)
    support = (in_block > 0).sum(0).astype(np.float64)
    between = spread / pairs**2 * support / np.maximum(support - 1, 1)
    squares = np.bincount(compact, weights=wrong**2, minlength=size) / pairs
    variance = np.maximum(between, (squares - mean**2) / pairs)
    return _Column(attributes, [names[i] for i in there], pairs, support, mean, variance)


def _interval(column: _Column, index: int, z: float, overall: float) -> dict[str, Any]:
    accuracy = 1 - float(column.errors[index])
    size, variance = float(column.pairs[index]), float(column.variance[index])
    if variance > 0:
        size *= min(accuracy * (1 - accuracy) / size / variance, 1.0)
    else:  # all pairs alike: they tell no more than their prompts
        size = float(column.support[index])
    low, high = wilson(accuracy, size, z)
    return {"accuracy": {"value": accuracy, "low": low, "high": high}, "below": high < overall}


def wilson(share: float, size: float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share among ``size`` trials."""
    middle = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * (share * (1 - share) / size + z * z / (4 * size**2)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)
