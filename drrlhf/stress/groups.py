"""Accuracy of every group of every attribute, and of pairs of attributes, with honest intervals.

The interval of a group is Wilson's, at a level divided by the number of groups that were looked at
(Bonferroni), so that all of them hold together with 95 %; its sample size is divided by how much
pairs of one prompt agree (the design effect, each block of prompts left out in turn), and what is
known of that from few prompts, or from few that hold most pairs, widens it (Student's t).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.curves import ERRORS, Array, error_codes
from drrlhf.stress.resample import CONFIDENCE, counts
from drrlhf.stress.scores import Attribute, Scores
from drrlhf.stress.student import students_t

SHOWN = 20


class Column(NamedTuple):
    """One attribute or a pair of them, with its groups' numbers, each (G,): the mean of the values
    and its variance, and how many prompts with as many pairs each tell as much (``effective``)."""

    attributes: tuple[str, ...]
    names: list[tuple[str, ...]]
    pairs: Array
    support: Array
    means: Array
    variance: Array
    effective: Array


def groups_of(scores: Scores, blocks: NDArray[np.int64], min_support: int) -> dict[str, Any]:
    """The groups, worst first by the upper end of their interval, and those too small to rank.

    ``min_support`` is the number of prompts that a group must have (of blocks of prompts, where
    there are more than 1024). "single" holds the groups of single attributes, "paired" those of
    pairs of attributes, of which a report has the `SHOWN` worst; "below" says whether a group's
    interval lies wholly below the accuracy of all pairs.
    """
    errors = ERRORS[error_codes(scores.margin)]
    measured = "accuracy", 1 - float(errors.mean())
    return ranked(scores.attributes, errors, blocks, min_support, _interval, measured)


def in_words(group: Mapping[str, Any], sign: str = " = ") -> str:
    """A group of a report in words, as "COLUMN = VALUE"."""
    return ", ".join(f"{key}{sign}{value}" for key, value in group["group"].items())


def by_subject(
    found: Mapping[str, Any], number: str
) -> Iterator[tuple[str, Mapping[str, float] | None]]:
    """The ``number`` of each group of `groups_of` by what a gate calls it, "COLUMN=VALUE"; None
    where several groups are called so, be they too small to rank."""
    every = [*found["single"], *found["paired"]]
    times = Counter(in_words(group, "=") for group in [*every, *found["too_small"]])
    for group in every:
        name = in_words(group, "=")
        yield name, group[number] if times[name] == 1 else None


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a report has of `groups_of`: of pairs of attributes the worst."""
    return {**found, "paired": found["paired"][:SHOWN]}


def ranked(
    attributes: Mapping[str, Attribute],
    values: Array,
    blocks: NDArray[np.int64],
    min_support: int,
    interval: Callable[[Column, int, float], dict[str, float]],
    measured: tuple[str, float],
    of: str = "pairs",
) -> dict[str, Any]:
    """`groups_of` for values (n,) of any kind. ``interval(column, index, level)`` is that of one
    group, which misses with the probability ``level``; ``measured`` is the name of the number and
    what it is over all, and ``of`` what is counted."""
    columns = list(_columns(attributes, values, blocks))
    large = [column.support >= min_support for column in columns]
    looked_at = sum(int(one.sum()) for one in large)
    level = (1 - CONFIDENCE) / max(looked_at, 1)
    name, overall = measured
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    small, small_pairs = [], 0
    for column, enough in zip(columns, large, strict=True):
        for index in np.flatnonzero(column.pairs).tolist():
            group = {
                "group": dict(zip(column.attributes, column.names[index], strict=True)),
                of: int(column.pairs[index]),
                "support": int(column.support[index]),
            }
            if enough[index]:
                number = interval(column, index, level)
                group |= {name: number, "below": number["high"] < overall}
                found[len(column.attributes)].append(group)
            elif len(column.attributes) == 1:
                small.append(group)
            else:
                small_pairs += 1
    for some in found.values():
        some.sort(key=lambda group: (group[name]["high"], -group[of]))
    return {
        "looked_at": looked_at,
        "min_support": min_support,
        "single": found[1],
        "paired": found[2],
        "too_small": sorted(small, key=lambda group: -group[of]),
        "too_small_pairs_of_attributes": small_pairs,
    }


def _columns(
    attributes: Mapping[str, Attribute], values: Array, blocks: NDArray[np.int64]
) -> Iterator[Column]:
    for name, attribute in attributes.items():
        names: list[tuple[str, ...]] = [(value,) for value in attribute.names]
        yield _column((name,), names, attribute.codes, values, blocks)
    for (first, a), (second, b) in itertools.combinations(attributes.items(), 2):
        codes = np.where((a.codes < 0) | (b.codes < 0), -1, a.codes * len(b.names) + b.codes)
        names = [*itertools.product(a.names, b.names)]
        yield _column((first, second), names, codes, values, blocks)


def _column(
    attributes: tuple[str, ...],
    names: list[tuple[str, ...]],
    codes: NDArray[np.int64],
    values: Array,
    blocks: NDArray[np.int64],
) -> Column:
    known = codes >= 0
    # Only groups that are there: a pair of attributes may have ten thousand that are not.
    there, compact = np.unique(codes[known], return_inverse=True)
    size = len(there)
    if not size:
        nothing = np.zeros(0)
        return Column(attributes, [], *[nothing] * 5)
    known_values = values[known]
    in_block = counts(blocks[known], compact, size)
    sum_in_block = counts(blocks[known], compact, size, known_values)
    pairs, sums = in_block.sum(0), sum_in_block.sum(0)
    mean = sums / pairs
    # A ratio of sums over blocks: how far it moves as each is left out. That is never taken to be
    # less than with independent pairs. What lies in one block alone moves nowhere.
    others = np.maximum(pairs - in_block, 1)
    spread = np.square((sum_in_block - mean * in_block) / others).sum(0)
    support = (in_block > 0).sum(0).astype(np.float64)
    between = spread * (support - 1) / support
    squares = np.bincount(compact, weights=known_values**2, minlength=size) / pairs
    variance = np.maximum(between, (squares - mean**2) / pairs)
    effective = pairs**2 / np.square(in_block).sum(0)
    names = [names[i] for i in there]
    return Column(attributes, names, pairs, support, mean, variance, effective)


def _interval(column: Column, index: int, level: float) -> dict[str, float]:
    accuracy = 1 - float(column.means[index])
    size, variance = float(column.pairs[index]), float(column.variance[index])
    effective = float(column.effective[index])
    if variance > 0:
        size *= min(accuracy * (1 - accuracy) / size / variance, 1.0)
    else:  # all pairs alike: they tell no more than their prompts
        size = effective
    # Where each pair is a prompt nothing was estimated of how pairs agree.
    alone = column.pairs[index] == column.support[index]
    low, high = wilson(accuracy, size, _quantile(level, None if alone else int(effective) - 1))
    return {"value": accuracy, "low": low, "high": high}


@cache
def _quantile(level: float, freedom: int | None) -> float:
    """That of Student's t, or, without degrees of freedom, of the normal distribution, at which
    both tails together have ``level``."""
    if freedom is None:
        return NormalDist().inv_cdf(1 - level / 2)
    return students_t(1 - level / 2, max(freedom, 1))


def wilson(share: float, size: float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share among ``size`` trials."""
    middle = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * (share * (1 - share) / size + z * z / (4 * size**2)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)
